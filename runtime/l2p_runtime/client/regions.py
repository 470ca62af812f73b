"""Memory that this process and a server on the same host both map, kept for the next image."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PROBE_BYTES = 4096
_IN_USE_SECONDS = 2.0


class Registrar(Protocol):
    """Tells a server of regions."""

    def register(self, name: str, key: str, size_bytes: int) -> None:
        """Make a region known."""

    def unregister(self, name: str) -> None:
        """Have it forgotten."""


@dataclass(frozen=True, slots=True)
class Region:
    """One region: the name that the server knows it by, its size and the library's handle."""

    name: str
    size_bytes: int
    handle: Any

    def read(self, datatype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """A copy of what the server wrote."""
        import numpy as np
        import tritonclient.utils.shared_memory as library
        from tritonclient.utils import triton_to_np_dtype

        return np.array(library.get_contents_as_numpy(self.handle, triton_to_np_dtype(datatype), list(shape)))


class Regions:
    """Regions that are free, the smallest that fits first. Mapping fresh pages costs more than the copy itself."""

    def __init__(self, server: Registrar) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._free: list[Region] = []
        self._all: list[Region] = []

    def works(self) -> bool:
        """Whether the server can map what this process makes."""
        try:
            with self.take(_PROBE_BYTES):
                return True
        except Exception:  # noqa: BLE001 - a server in another container says so in many ways
            return False

    @contextmanager
    def take(self, size_bytes: int) -> Iterator[Region]:
        """A region of at least that size, for as long as the context lasts."""
        with self._lock:
            fitting = [region for region in self._free if region.size_bytes >= size_bytes]
            region = min(fitting, key=lambda region: region.size_bytes, default=None)
            if region is not None:
                self._free.remove(region)
        if region is None:
            region = self._make(size_bytes)
        try:
            yield region
        except BaseException:
            # The server may still write to it: no other image gets this one.
            self._drop(region)
            raise
        with self._lock:
            self._free.append(region)

    def close(self) -> None:
        """Unregister and unmap all."""
        for region in list(self._all):
            self._drop(region)

    def _make(self, size_bytes: int) -> Region:
        import tritonclient.utils.shared_memory as library

        name = f"l2p_client_{secrets.token_hex(8)}"
        region = Region(name, size_bytes, library.create_shared_memory_region(name, f"/{name}", size_bytes))
        try:
            self._server.register(name, f"/{name}", size_bytes)
        except BaseException:
            library.destroy_shared_memory_region(region.handle)
            raise
        with self._lock:
            self._all.append(region)
        return region

    def _drop(self, region: Region) -> None:
        import tritonclient.utils.shared_memory as library

        with self._lock:
            self._all.remove(region)
            self._free = [free for free in self._free if free is not region]
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
        with suppress(Exception):
            library.destroy_shared_memory_region(region.handle)
