"""Memory that this process and a server on the same host both map, kept for the next image."""

from __future__ import annotations

import mmap
import os
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray

LENT_MAX = 4
"""Images that callers hold and that are still shared memory; a caller who keeps more gets copies."""

_SHARED = Path("/dev/shm")  # noqa: S108 - where the kernel keeps what `shm_open` names
_PROBE_BYTES = 4096
_IN_USE_SECONDS = 2.0


class Registrar(Protocol):
    """Tells a server of regions."""

    def register(self, name: str, key: str, size_bytes: int) -> None:
        """Make a region known."""

    def unregister(self, name: str) -> None:
        """Have it forgotten."""


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """One region: the name that the server knows it by, its size and this process's view of it."""

    name: str
    size_bytes: int
    memory: mmap.mmap


class Regions:
    """Regions that are free, the smallest that fits first. Mapping fresh pages costs more than the copy itself."""

    def __init__(self, server: Registrar) -> None:
        self._server = server
        self._lock = threading.Lock()
        # Every region that the server knows: 1 for a call that uses it, and 1 for an array of it that was lent.
        self._holders: dict[Region, int] = {}
        self._lent = 0
        # An array may be collected at any moment, in a thread that holds the lock: releases come without it.
        self._released: deque[tuple[Region, bool]] = deque()

    def works(self) -> bool:
        """Whether the server can map what this process makes."""
        try:
            with self.take(_PROBE_BYTES):
                return True
        except Exception:  # noqa: BLE001 - a server in another container says so in many ways
            return False

    @contextmanager
    def take(self, size_bytes: int) -> Iterator[Region]:
        """A region of at least that size, for as long as the context or an array of it that was lent lasts."""
        with self._lock:
            self._settle()
            fitting = [r for r, holders in self._holders.items() if not holders and r.size_bytes >= size_bytes]
            region = min(fitting, key=lambda region: region.size_bytes, default=None)
            if region is not None:
                self._holders[region] = 1
        if region is None:
            region = self._make(size_bytes)
        try:
            yield region
        except BaseException:
            # The server may still write to it: no other image gets this one.
            self._drop(region)
            raise
        self._released.append((region, False))

    def read(self, region: Region, datatype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """What the server wrote: the region itself until the array and all views of it are gone, or a copy.

        Args:
            region: that was taken and still is.
            datatype: as Triton spells it.
            shape: of the array.
        """
        import numpy as np
        from tritonclient.utils import triton_to_np_dtype

        dtype = np.dtype(triton_to_np_dtype(datatype))
        count = int(np.prod(shape, dtype=np.int64))
        owner: NDArray[Any] = np.frombuffer(region.memory, dtype, count)
        with self._lock:
            self._settle()
            lends = self._lent < LENT_MAX
            if lends:
                self._lent += 1
                self._holders[region] += 1
        if not lends:
            return owner.reshape(shape).copy()
        weakref.finalize(owner, self._released.append, (region, True)).atexit = False
        return owner.reshape(shape)

    def close(self) -> None:
        """Unregister all; what is still lent is unmapped when its array goes."""
        for region in list(self._holders):
            self._drop(region)

    def _settle(self) -> None:
        """Count what was released; under the lock."""
        while self._released:
            region, lent = self._released.popleft()
            self._lent -= lent
            if region in self._holders:
                self._holders[region] -= 1

    def _make(self, size_bytes: int) -> Region:
        name = f"l2p_client_{secrets.token_hex(8)}"
        path = _SHARED / name
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.ftruncate(descriptor, size_bytes)
            region = Region(name, size_bytes, mmap.mmap(descriptor, size_bytes))
            self._server.register(name, f"/{name}", size_bytes)
        finally:
            # Both sides have mapped it: without a name, it goes when they do, however they end.
            os.close(descriptor)
            path.unlink()
        with self._lock:
            self._holders[region] = 1
        return region

    def _drop(self, region: Region) -> None:
        with self._lock:
            self._holders.pop(region, None)
        # Right after a reply the server may hold it for a moment longer.
        end = time.monotonic() + _IN_USE_SECONDS
        while True:
            try:
                self._server.unregister(region.name)
                break
            except Exception:  # noqa: BLE001 - a server that is gone forgets it anyway
                if time.monotonic() > end:
                    break
                time.sleep(0.02)
        with suppress(BufferError):
            region.memory.close()
