"""Names the files that users give in place of a safetensors file: pickles, GGUF, Git LFS pointers, error pages.

Only the first bytes are read and nothing is decoded, so a hostile file costs nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from l2p_runtime.errors import ArtifactError

HEAD_BYTES = 512
"""Bytes from the start of a file that are enough to name its format."""

FROM_PICKLE = (
    "convert it where you trust it: "
    'python -c "import sys, torch; from safetensors.torch import save_file; '
    "state = torch.load(sys.argv[1], map_location='cpu', weights_only=True); state = state.get('state_dict', state); "
    'save_file({k: v.clone() for k, v in state.items() if torch.is_tensor(v)}, sys.argv[2])" IN.pt OUT.safetensors'
)
FROM_GGUF = (
    "dequantize it (pip install gguf safetensors): "
    'python -c "import sys, gguf, numpy as np; from safetensors.numpy import save_file; '
    "save_file({t.name: np.float32(gguf.dequantize(t.data, t.tensor_type)).reshape(t.shape[::-1]) "
    'for t in gguf.GGUFReader(sys.argv[1]).tensors}, sys.argv[2])" IN.gguf OUT.safetensors; '
    "or fetch the .safetensors file that it was made from"
)

_AGAIN = "download it again"
_FETCH = "fetch the .safetensors file of the model"
_UNPACK = "unpack it, and give the .safetensors file or the folder that it holds"


class Format(NamedTuple):
    """A file format that is not safetensors: its name with an article, and what to do about such a file."""

    name: str
    hint: str


class ForeignFileError(ArtifactError):
    """A file is of another format than safetensors.

    Attributes:
        format: the format's name, as `GGUF file`.
    """

    def __init__(self, path: Path, found: Format) -> None:
        super().__init__(f"`{path}` is {found.name}, expected a .safetensors file", hint=found.hint)
        self.format = found.name.partition(" ")[2]


PICKLE = Format(
    "a pickle (a PyTorch .pt, .bin or .ckpt file), which can run code when opened and is refused", FROM_PICKLE
)

_MAGIC: tuple[tuple[bytes, Format], ...] = (
    (b"GGUF", Format("a GGUF file", FROM_GGUF)),
    (
        b"version https://git-lfs",
        Format(
            "a Git LFS pointer, which stands for the file in a repository that was cloned without its large files",
            "run `git lfs install` and `git lfs pull` in the repository's folder, or download the file itself",
        ),
    ),
    (b"\x1f\x8b", Format("a gzip archive", _UNPACK)),
    (b"\x28\xb5\x2f\xfd", Format("a Zstandard archive", _UNPACK)),
    (b"\xfd7zXZ\x00", Format("an xz archive", _UNPACK)),
    (b"BZh", Format("a bzip2 archive", _UNPACK)),
    (b"7z\xbc\xaf\x27\x1c", Format("a 7-Zip archive", _UNPACK)),
    (b"Rar!\x1a\x07", Format("a RAR archive", _UNPACK)),
    (b"\x93NUMPY", Format("a NumPy array file", _FETCH)),
    (b"\x89HDF\r\n\x1a\n", Format("an HDF5 file", _FETCH)),
    (
        b"\x00\x05\x16\x07",
        Format("a macOS metadata file (AppleDouble)", "give the file of the same name without `._` at the start"),
    ),
    (b"ftrt", Format("a TensorRT engine", "give the checkpoint that it was built from")),
    (b"\x89PNG\r\n", Format("a PNG picture", _FETCH)),
    (b"\xff\xd8\xff", Format("a JPEG picture", _FETCH)),
    (b"RIFF", Format("a RIFF media file", _FETCH)),
)

_SUFFIXES: dict[str, Format] = {
    **dict.fromkeys((".pt", ".pth", ".ckpt", ".bin", ".pkl"), PICKLE),
    ".gguf": Format("a GGUF file", FROM_GGUF),
    ".onnx": Format("an ONNX graph", "give the checkpoint that it was exported from"),
    ".engine": Format("a TensorRT engine", "give the checkpoint that it was built from"),
}

_HTML = re.compile(rb"(?:<!doctype html|<html|<head|<!--)", re.IGNORECASE)


def format_of(head: bytes) -> Format | None:
    """The format of a file that is no safetensors file; None if its first bytes tell none.

    Args:
        head: the first `HEAD_BYTES` of the file, or the whole of a shorter one.
    """
    for magic, found in _MAGIC:
        if head.startswith(magic):
            return found
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip_format(head)
    # Protocol 2 and later; 0 and 1 have no mark of their own.
    if head[:1] == b"\x80" and head[1:2] <= b"\x08":
        return PICKLE
    if head[257:262] == b"ustar":
        return Format("a tar archive", _UNPACK)
    if len(head) >= 8 and not any(head):
        return Format("a file that begins with zeros, as an unfinished download does", _AGAIN)
    return _text_format(head)


def format_of_name(name: str) -> Format | None:
    """The format that a file's suffix states; None for any other suffix than that of a known format of weights."""
    return _SUFFIXES.get(Path(name).suffix.lower())


def _zip_format(head: bytes) -> Format:
    """PyTorch's archives begin with the entry `NAME/data.pkl`; the name's length is at byte 26, the name at byte 30."""
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    # Without a first entry it cannot be told; most archives under such a name are PyTorch's.
    if not name or name.endswith((b".pkl", b"/version", b"/.data/serialization_id", b"/byteorder")):
        return PICKLE
    return Format("a zip archive", _UNPACK)


def _text_format(head: bytes) -> Format | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _HTML.match(text):
        return Format(
            "an HTML page, such as a sign-in or error page",
            "download it again with a tool that signs in: hf download ORGANIZATION/NAME",
        )
    if text.startswith(b"<?xml"):
        return Format("an XML file, such as the error of a storage server", _AGAIN)
    if len(head) < 8 or not text or any((byte < 32 and byte not in b"\t\n\r") or byte > 126 for byte in text):
        return None
    if text.startswith((b"{", b"[")):
        return Format("a JSON file", "give the .safetensors file beside it, or the folder that holds both")
    line = text.splitlines()[0][:60].decode("ascii")
    return Format(f"a text file that begins with {line!r}", "the download may have saved a message; " + _AGAIN)
