"""The host as a device: NumPy arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from l2p_runtime.backends.host_kernels import KERNELS
from l2p_runtime.errors import HostError, InternalError
from l2p_runtime.memory import available_host_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray


class HostDevice:
    """Host memory; implements `Device`."""

    name = "cpu"

    def alloc(self, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """Uninitialised memory.

        Raises:
            HostError: the host has not that much.
        """
        import numpy as np

        try:
            return np.empty(shape, dtype)
        except MemoryError as error:
            raise HostError(f"no memory for {list(shape)} {dtype}: {error}", hint="draw a smaller image") from error

    def upload(self, values: NDArray[Any]) -> NDArray[Any]:
        """The values themselves when contiguous, else a contiguous copy."""
        import numpy as np

        return np.ascontiguousarray(values)

    def download(self, array: Any) -> NDArray[Any]:
        """The array itself."""
        values: NDArray[Any] = array
        return values

    def contiguous(self, view: Any) -> NDArray[Any]:
        """The view itself if its values are contiguous, else a copy."""
        import numpy as np

        return np.ascontiguousarray(view)

    def copy(self, target: Any, source: Any) -> None:
        """Copy values between equally shaped views."""
        if target.shape != source.shape:
            raise InternalError(f"copy from {source.shape} to {target.shape}")
        target[...] = source

    def launch(self, kernel: str, *arguments: Any) -> None:
        """Run one of `host_kernels.KERNELS`."""
        KERNELS[kernel](*arguments)

    def synchronize(self) -> None:
        """Nothing runs behind the caller's back on the host."""

    def available_bytes(self) -> int:
        """Memory the system could give now, within the limits of this process's container."""
        return available_host_bytes()

    def close(self) -> None:
        """Arrays of the host go when nobody refers to them."""
