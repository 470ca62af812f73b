"""Kernel timings of earlier builds, which TensorRT reads instead of timing the same kernels again.

TensorRT for RTX times no kernels while it builds, so it has no timing cache. A cache belongs to one GPU and one version
of the library. The library refuses any other cache, and a new one is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from l2p_runtime.errors import HostError
from l2p_runtime.files import write_bytes

TIMINGS_BYTES_MAX = 1 << 30


def load_timings(config: Any, path: Path) -> None:
    """Give a builder's configuration the timings of a file, or none when there is no file or it belongs to another GPU.

    Raises:
        HostError: the file cannot be read.
    """
    try:
        size_bytes = path.stat().st_size if path.exists() else 0
        data = path.read_bytes() if size_bytes <= TIMINGS_BYTES_MAX and path.exists() else b""
    except OSError as error:
        raise HostError(f"cannot read the timing cache `{path}`: {error.strerror or error}") from error
    for content in (data, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def store_timings(config: Any, path: Path) -> None:
    """Write the timings of a build. The file appears complete, or not at all.

    Raises:
        HostError: the file cannot be written.
    """
    cache = config.get_timing_cache()
    serialized = cache.serialize() if cache is not None else None
    if serialized is None:
        return
    try:
        write_bytes(path, bytes(serialized))
    except OSError as error:
        raise HostError(
            f"cannot write the timing cache `{path}`: {error.strerror or error}", hint="choose another --timing-cache"
        ) from error
