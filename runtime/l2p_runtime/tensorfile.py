"""Reads safetensors files. The header is checked in full before anything is allocated.

Layout (safetensors README, "Format"): 8 bytes little-endian header length, JSON header, tensor data.
The `safetensors` library checks too, but answers with its own wording and cannot map BF16 for NumPy.
"""

from __future__ import annotations

import json
import math
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_runtime.errors import ArtifactError, counted
from l2p_runtime.files import atomic_file
from l2p_runtime.foreign import HEAD_BYTES, ForeignFileError, format_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

HEADER_BYTES_MAX = 100_000_000
"""The format's own limit; the published 4K header takes 61 KB."""

NAME_CHARACTERS_MAX = 512
"""Published names take up to 60 characters."""

ITEM_BITS: Mapping[str, int] = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
"""Every dtype of the format, and the bits of one value."""

ITEM_BYTES: Mapping[str, int] = {dtype: bits // 8 for dtype, bits in ITEM_BITS.items() if bits % 8 == 0}

_NUMPY_NAMES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "C64": "<c8",
    "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E4M3FNUZ": "u1", "F8_E5M2FNUZ": "u1", "F8_E8M0": "u1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
    "BOOL": "?",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: dtype as the format spells it, shape, and where its bytes lie in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file whose header was checked."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    def read(self, name: str) -> NDArray[Any]:
        """Map one tensor, without copying it.

        Returns:
            A read-only array of the stored shape; BF16 and FP8 come as their bits (uint16, uint8).

        Raises:
            ArtifactError: values of 4 or 6 bits, for which NumPy has no dtype.
        """
        import numpy as np

        info = self.tensors[name]
        if info.dtype not in _NUMPY_NAMES:
            raise ArtifactError(f"`{self.path}`: `{name}` is {info.dtype}, whose values are no whole bytes")
        dtype = np.dtype(_NUMPY_NAMES[info.dtype])
        if info.size_bytes == 0:
            return np.zeros(info.shape, dtype)
        return np.memmap(self.path, dtype, mode="r", offset=info.offset, shape=info.shape)


def open_tensorfile(path: Path) -> TensorFile:
    """Read and check the header of a safetensors file.

    Raises:
        ForeignFileError: another format, which the message names.
        ArtifactError: the file is absent, not a safetensors file, truncated, or its header contradicts itself.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            # Opening a pipe would wait for a writer for ever; a device has no end.
            raise _bad(path, "is not a regular file")
        size_bytes = status.st_size
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            _refuse_foreign(head, size_bytes, path)
            file.seek(min(len(head), 8))
            header, data_start = _read_header(head[:8], file.read, size_bytes, path)
    except OSError as error:
        raise ArtifactError(f"cannot read `{path}`: {error.strerror or error}") from error
    metadata = _metadata(header.pop("__metadata__", {}), path)
    tensors = [_tensor_info(name, entry, data_start, size_bytes, path) for name, entry in header.items()]
    _check_layout(tensors, data_start, size_bytes, path)
    return TensorFile(path, {info.name: info for info in tensors}, metadata)


def header_bytes(
    tensors: Iterator[tuple[str, str, tuple[int, ...]]] | list[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
    *,
    align_bytes: int = 4096,
) -> tuple[bytes, dict[str, TensorInfo]]:
    """Lay out a new file: tensors one after the other, in the order given.

    Args:
        tensors: name, dtype and shape of each.
        metadata: text to store beside them.
        align_bytes: the data starts at a multiple of this; a page, so that mapping is cheap.

    Returns:
        The bytes up to the first tensor, and where each tensor lies in the file.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    places = []
    begin = 0
    for name, dtype, shape in tensors:
        count = 1
        for size in shape:
            count *= size
        end = begin + count * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        places.append((name, dtype, shape, begin, end))
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align_bytes)
    start = 8 + len(text)
    infos = {name: TensorInfo(name, dtype, shape, start + b, e - b) for name, dtype, shape, b, e in places}
    return struct.pack("<Q", len(text)) + text, infos


def write_tensorfile(
    path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write float32, float16, bfloat16, int64, int16 or bool arrays; the file appears whole or not at all.

    Weights that memory does not hold are streamed by the export instead.
    """
    import numpy as np

    names = {
        "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int16": "I16", "bool": "BOOL",
    }  # fmt: skip
    header, _ = header_bytes([(name, names[str(a.dtype)], a.shape) for name, a in tensors.items()], metadata)
    with atomic_file(path) as file:
        file.write(header)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _refuse_foreign(head: bytes, size_bytes: int, path: Path) -> None:
    # The length of a header may be any bytes, those of a pickle or of "BZh" too; a header begins with a brace.
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and 8 + length <= min(size_bytes, HEADER_BYTES_MAX):
        return
    found = format_of(head)
    if found is not None:
        raise ForeignFileError(path, found)


def _read_header(
    prefix: bytes,
    read: Any,
    size_bytes: int,
    path: Path,
) -> tuple[dict[str, Any], int]:
    if len(prefix) < 8:
        what = "is empty" if not prefix else f"has {counted(size_bytes, 'byte')}"
        raise _bad(path, f"{what}, too short for a safetensors header")
    length = struct.unpack("<Q", prefix)[0]
    if length > HEADER_BYTES_MAX:
        raise _bad(path, f"claims a header of {length} bytes, more than the limit of {HEADER_BYTES_MAX}")
    if 8 + length > size_bytes:
        raise _bad(path, f"claims a header of {length} bytes, but the file has {size_bytes} bytes")
    try:
        header = json.loads(read(length).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"has a header that is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _bad(path, f"has a header that is a {type(header).__name__}, expected an object of tensors")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise ValueError(f"names {_short(name)} twice")
        entries[name] = value
    return entries


def _metadata(entry: object, path: Path) -> dict[str, str]:
    if not isinstance(entry, dict):
        raise _bad(path, f"has `__metadata__` that is {_short(entry)}, expected an object of strings")
    for key, value in entry.items():
        if not isinstance(value, str):
            raise _bad(
                path,
                f"has {_short(value)} as `__metadata__` {_short(key)}, expected only strings",
                hint="the tool that wrote it broke the format; write it again with the text of that value",
            )
    # A lone surrogate is legal JSON and cannot be written again.
    wrong = [key for key, value in entry.items() if not (_is_text(key) and _is_text(value))]
    if wrong:
        raise _bad(path, f"has `__metadata__` that is not text: {_short(wrong[0])}")
    return dict(entry)


def _tensor_info(name: str, entry: object, data_start: int, size_bytes: int, path: Path) -> TensorInfo:
    if not name.isprintable() or len(name) > NAME_CHARACTERS_MAX:
        raise _bad(
            path, f"names a tensor {_short(name)}, expected up to {NAME_CHARACTERS_MAX} characters that can be printed"
        )
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _bad(path, f"tensor `{name}` lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise _bad(
            path,
            f"tensor `{name}` has unknown dtype {_short(dtype)}",
            hint="a newer tool may have written it: fetch the model as BF16, F16, F32 or FP8",
        )
    if not _is_sizes(shape) or len(shape) > 8:
        raise _bad(path, f"tensor `{name}` has shape {_short(shape)}, expected up to 8 sizes of 0 or more")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        found = _short(offsets)
        raise _bad(path, f"tensor `{name}` has data_offsets {found}, expected [begin, end] with 0 <= begin <= end")
    begin, end = offsets
    if data_start + end > size_bytes:
        raise _bad(
            path,
            f"tensor `{name}` ends at byte {data_start + end}, but the file has {size_bytes} bytes",
            hint="the file is truncated; download it again",
        )
    wanted, odd_bits = divmod(math.prod(shape) * ITEM_BITS[dtype], 8)
    if odd_bits:
        raise _bad(path, f"tensor `{name}` {dtype} {shape} does not fill whole bytes")
    if wanted != end - begin:
        raise _bad(path, f"tensor `{name}` {dtype} {shape} needs {wanted} bytes, its data_offsets hold {end - begin}")
    # An axis of 0 must not hide one that no array can have.
    if math.prod(size or 1 for size in shape) * ITEM_BITS[dtype] >= 2**66:
        raise _bad(path, f"tensor `{name}` has shape {shape}, which no machine can hold")
    return TensorInfo(name, dtype, tuple(shape), data_start + begin, end - begin)


def _is_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_layout(tensors: list[TensorInfo], data_start: int, size_bytes: int, path: Path) -> None:
    """Tensors lie one behind the other, with no byte shared and none left over."""
    if not tensors:
        raise _bad(path, "holds no tensors")
    end, previous = data_start, ""
    for info in sorted(tensors, key=lambda item: (item.offset, item.offset + item.size_bytes)):
        if info.offset < end:
            raise _bad(path, f"tensors `{previous}` and `{info.name}` overlap")
        if info.offset > end:
            raise _bad(path, f"has {info.offset - end} bytes before tensor `{info.name}` that belong to no tensor")
        end, previous = info.offset + info.size_bytes, info.name
    if end != size_bytes:
        raise _bad(path, f"has {size_bytes - end} bytes after the last tensor", hint="download the file again")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: object) -> str:
    """A value from a hostile header, fit for a message: escaped, and cut."""
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _bad(path: Path, what: str, hint: str = "") -> ArtifactError:
    return ArtifactError(f"`{path}` {what}", hint=hint or "expected a complete .safetensors file")
