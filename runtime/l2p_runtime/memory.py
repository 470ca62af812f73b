"""Memory that is available, and the forecast of what one denoising call takes."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_runtime.arguments import real_number, shown
from l2p_runtime.errors import UsageError

if TYPE_CHECKING:
    from l2p_runtime.contract import ModelSpec

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_FLOAT_BYTES, _HALF_BYTES = 4, 2
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LARGE_BYTES = 1 << 20
_SIZES = "write it as 6GiB, 500MB or 1073741824"


@dataclass(frozen=True, slots=True)
class CallMemory:
    """Bytes of one denoising call, besides the weights.

    Attributes:
        buffers_bytes: pixels and tokens that live from the first network to the last.
        tokens_bytes: the largest activations inside the transformer: attention scores and the feed-forward.
        head_row_bytes: activations inside the pixel head, per token row.
    """

    buffers_bytes: int
    tokens_bytes: int
    head_row_bytes: int


def call_memory(
    model: ModelSpec, batch: int, rows: int, columns: int, caption_tokens: int, prompts: int = 2
) -> CallMemory:
    """Forecast one denoising call in float32, with attention scores held whole.

    Args:
        model: the model.
        batch: images.
        rows: token rows of an image.
        columns: token columns of an image.
        caption_tokens: padded.
        prompts: 2 with guidance, 1 without.
    """
    sequence = model.padded(rows * columns) + caption_tokens
    row_px = model.patch_px * columns * model.patch_px
    pixel_values = 3 * row_px * rows
    token_values = sequence * model.width
    # Noisy image, and for each prompt a prediction and two token buffers.
    buffers = (1 + prompts) * pixel_values + 2 * prompts * token_values
    scores = 2 * model.heads * sequence * sequence
    inner = sequence * (3 * model.ffn_width + 4 * model.width)
    return CallMemory(
        buffers_bytes=_FLOAT_BYTES * batch * buffers,
        tokens_bytes=_FLOAT_BYTES * batch * max(scores, inner),
        head_row_bytes=int(_FLOAT_BYTES * batch * model.head.peak_values_per_px * row_px),
    )


def cpu_call_memory(
    model: ModelSpec,
    batch: int,
    rows: int,
    columns: int,
    caption_tokens: int,
    prompts: int = 2,
    *,
    fused_head: bool = True,
) -> CallMemory:
    """Forecast one denoising call of fused graphs in ONNX Runtime on the CPU.

    Arguments are those of `call_memory`, and whether the head too has a fused graph.

    Scores are never held. Measured at 16,416 tokens of width 144: 106 MiB in float32, where this says 108, and 81 in
    float16 and FP8, whose activations are partly widened. Inside the demo's head at 2048 px: 768 MiB, as this says.
    """
    plain = call_memory(model, batch, rows, columns, caption_tokens, prompts)
    image = rows * columns
    inner = (model.padded(image) + caption_tokens) * (3 * model.ffn_width + 4 * model.width)
    # The stem holds the image as patches, beside the tokens that it makes of them.
    patches = 3 * image * model.patch_px**2 + image * model.width
    head_row_bytes = plain.head_row_bytes
    if fused_head and model.head.fused_peak_values_per_px is not None:
        inside = head_row_bytes * model.head.fused_peak_values_per_px / model.head.peak_values_per_px
        head_row_bytes = int(inside) + _row_border_bytes(model, batch, columns)
    return replace(plain, tokens_bytes=_FLOAT_BYTES * batch * max(inner, patches), head_row_bytes=head_row_bytes)


def fused_call_memory(
    model: ModelSpec, batch: int, rows: int, columns: int, caption_tokens: int, prompts: int = 2
) -> CallMemory:
    """Forecast one denoising call in an engine with fused attention, in float16 or smaller.

    Scores are never held and activations take 2 bytes, but tensors between networks stay float32. In float32,
    attention is decomposed, scores are held whole, and the figures are those of `call_memory`; arguments are the same.
    """
    plain = call_memory(model, batch, rows, columns, caption_tokens, prompts)
    image = rows * columns
    padded = model.padded(image)
    inner = (padded + caption_tokens) * (3 * model.ffn_width + 4 * model.width)
    # The stem casts the image and holds it as patches, beside the tokens that it makes of them.
    patches = 2 * 3 * image * model.patch_px**2 + image * model.width
    return CallMemory(
        buffers_bytes=plain.buffers_bytes,
        tokens_bytes=_HALF_BYTES * batch * max(inner, patches),
        head_row_bytes=plain.head_row_bytes * _HALF_BYTES // _FLOAT_BYTES + _row_border_bytes(model, batch, columns),
    )


def _row_border_bytes(model: ModelSpec, batch: int, columns: int) -> int:
    """A stripe's copy of its pixels and tokens, and its prediction, per token row: float32 on every backend."""
    row_px = model.patch_px * columns * model.patch_px
    return _FLOAT_BYTES * batch * (6 * row_px + columns * model.width)


def available_host_bytes() -> int:
    """Memory in bytes that can be allocated now: the minimum of the kernel's estimate and the process's limits.

    Limits are those of its control group and of `ulimit -v` and `-d`.
    """
    available = min(_meminfo_available(), _resource_limit_left())
    limit, used = _read_number("/sys/fs/cgroup/memory.max"), _read_number("/sys/fs/cgroup/memory.current")
    return min(available, limit - used) if limit and used else available


def return_large_buffers_at_once() -> None:
    """Let the C library give every freed buffer of 1 MiB or more back to the system; holds for the whole process.

    Without this, glibc keeps freed buffers of up to 32 MiB for its next allocations, which fit them only in part: an
    image of 512 px under a budget of 120 MiB took 232 MiB.
    """
    if hasattr(_c_library(), "mallopt"):
        _c_library().mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def return_freed_memory() -> None:
    """Give freed memory back to the system, where the C library keeps it for its next allocation, as glibc's does.

    After an image of 2048 px on two threads, 64 of 97 MB were such memory.
    """
    if hasattr(_c_library(), "malloc_trim"):
        _c_library().malloc_trim(0)


def budget_bytes(budget: object) -> int | None:
    """Bytes of a memory budget: a number, a text that `parse_bytes` takes, or None for none.

    Raises:
        UsageError: not a positive size.
    """
    if budget is None:
        return None
    if isinstance(budget, str):
        return parse_bytes(budget)
    number = real_number("memory_budget", budget)
    if not 1 <= number < 2**63:
        raise UsageError(f"memory_budget is {shown(budget)}, expected 1 byte or more", hint=_SIZES)
    return int(number)


def parse_bytes(text: str) -> int:
    """Bytes from `6GiB`, `500MB` or `1073741824`.

    Raises:
        UsageError: not a positive size.
    """
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size <= 0:
        raise UsageError(f"{text!r} is no size in bytes", hint=_SIZES)
    return size


def _c_library() -> Any:
    try:
        return ctypes.CDLL(None)
    except OSError:
        return None


def _meminfo_available() -> int:
    try:
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:
        match = None
    return int(match[1]) * 1024 if match else 2**62


def _resource_limit_left() -> int:
    import resource

    left = 2**62
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return left
    for kind, field in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit, used = resource.getrlimit(kind)[0], re.search(rf"{field}:\s+(\d+) kB", status)
        if limit != resource.RLIM_INFINITY and used is not None:
            left = min(left, max(limit - int(used[1]) * 1024, 0))
    return left


def _read_number(path: str) -> int | None:
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
