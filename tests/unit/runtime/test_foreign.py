"""Files of other formats are named by their first bytes, and never decoded."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from l2p_runtime.errors import ArtifactError
from l2p_runtime.foreign import FROM_PICKLE, ForeignFileError, format_of
from l2p_runtime.tensorfile import open_tensorfile


def _zip(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"x" * 600)
    return file.getvalue()


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"))
    return file.getvalue()


def _torch(*, legacy: bool) -> bytes:
    file = io.BytesIO()
    torch.save({"w": torch.ones(2)}, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 19570000000\n"

FILES: dict[str, tuple[bytes, str, str]] = {
    "GGUF": (b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + bytes(64), "GGUF file", "gguf.dequantize"),
    "LFS": (LFS, "Git LFS pointer", "git lfs pull"),
    "HTML": (b"\n <!DOCTYPE html><html><body>Sign in</body></html>", "HTML page", "hf download"),
    "HTML with a mark": (b"\xef\xbb\xbf<HTML lang='en'><title>404</title>", "HTML page", "hf download"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML file", "download it again"),
    "JSON": (b'{"error": "Repository not found"}', "JSON file", "folder"),
    "text": (b"Entry not found", "text file that begins with 'Entry not found'", "download it again"),
    "pickle": (pickle.dumps({"a": [1.0] * 9}, protocol=2), "pickle", "weights_only=True"),
    "torch": (_torch(legacy=False), "pickle", "weights_only=True"),
    "old torch": (_torch(legacy=True), "pickle", "weights_only=True"),
    "zip": (_zip("model.safetensors"), "zip archive", "unpack it"),
    "tar": (_tar(), "tar archive", "unpack it"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(60), "gzip archive", "unpack it"),
    "Zstandard": (b"\x28\xb5\x2f\xfd" + bytes(60), "Zstandard archive", "unpack it"),
    "NumPy": (b"\x93NUMPY\x01\x00v\x00{'descr'", "NumPy array file", ".safetensors file"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(60), "HDF5 file", ".safetensors file"),
    "AppleDouble": (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X" + bytes(60), "AppleDouble", "without `._`"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(60), "PNG picture", ".safetensors file"),
    "zeros": (bytes(4096), "begins with zeros", "download it again"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_foreign_file_is_named(case: str, tmp_path: Path) -> None:
    content, name, hint = FILES[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ForeignFileError) as caught:
        open_tensorfile(path)
    assert name in str(caught.value)
    assert name.partition(" ")[0] in caught.value.format
    assert hint in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"abc", b"\x01\x02\x03\x04\x05\x06\x07\x08\xff\xfe", bytes(7)])
def test_what_no_format_claims_stays_a_damaged_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        open_tensorfile(path)
    assert not isinstance(caught.value, ForeignFileError)


@given(st.binary(max_size=600))
def test_any_bytes_have_an_answer(head: bytes) -> None:
    found = format_of(head)
    assert found is None or (found.name and found.hint)


@pytest.mark.parametrize("nested", [False, True])
def test_the_hint_for_a_pickle_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, nested: bool) -> None:
    shared = torch.arange(3.0)
    state = {"a": shared, "b": shared, "step": 7}
    torch.save({"state_dict": state} if nested else state, tmp_path / "in.pt")
    code = FROM_PICKLE.partition('python -c "')[2].partition('" IN.pt')[0]
    monkeypatch.setattr("sys.argv", ["-c", str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors")])
    exec(code, {})  # noqa: S102 - what the hint says to run
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == {"a", "b"}
    np.testing.assert_array_equal(found["b"], [0, 1, 2])
