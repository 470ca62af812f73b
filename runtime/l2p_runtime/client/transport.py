"""Connections to a server: one call over gRPC or HTTP, a stream over gRPC, and what their errors mean."""

from __future__ import annotations

import queue
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from l2p_runtime.errors import CancelledError, HostError, L2PError, UsageError

if TYPE_CHECKING:
    from l2p_runtime.client.regions import Region

_URL = re.compile(r"(grpc|http)://(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})/?")
_REFUSED = {"400", "StatusCode.INVALID_ARGUMENT"}
_CANCELLED = {"499", "StatusCode.CANCELLED"}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    scheme: Literal["grpc", "http"]
    host: str
    port: int

    @property
    def place(self) -> str:
        """`host:port`."""
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def parse_address(url: str) -> Address:
    """Read `grpc://host:port` or `http://host:port`.

    Raises:
        UsageError: no such URL.
    """
    match = _URL.fullmatch(url)
    if match is None or not 1 <= int(match[3]) <= 65535:
        raise UsageError(f"{url[:80]!r} is no address of a server", hint="use grpc://host:8001 or http://host:8000")
    return Address("grpc" if match[1] == "grpc" else "http", match[2].strip("[]"), int(match[3]))


def connect(address: Address, timeout_s: float) -> GrpcTransport | HttpTransport:
    """A connection that any number of threads may use.

    Raises:
        HostError: tritonclient is not installed, or no server answers.
    """
    transport: GrpcTransport | HttpTransport
    transport = (
        GrpcTransport(_library("grpc"), address)
        if address.scheme == "grpc"
        else HttpTransport(_library("http"), address, timeout_s)
    )
    try:
        if transport.is_live():
            return transport
        reason = "it is not live"
    except Exception as error:  # noqa: BLE001 - the library's own, gevent's and the socket's
        reason = str(error)
    transport.close()
    raise HostError(f"no server answers at {address.scheme}://{address.place}: {reason}"[:300])


class GrpcTransport:
    """gRPC; its channel is safe to share."""

    def __init__(self, library: Any, address: Address) -> None:
        self._library = library
        self._client = library.InferenceServerClient(address.place)

    def is_live(self) -> bool:
        """Whether the server answers."""
        return bool(self._client.is_server_live(client_timeout=10))

    def infer(
        self, model: str, inputs: Mapping[str, Any], outputs: Mapping[str, Region | None], timeout_s: float
    ) -> Any:
        """One call; an output with a region is written there."""
        sent, wanted = tensors(self._library, inputs, outputs)
        return self._client.infer(model, sent, outputs=wanted, client_timeout=timeout_s)

    def input_names(self, model: str) -> set[str]:
        """Inputs that a model takes."""
        return {str(tensor.name) for tensor in self._client.get_model_metadata(model, client_timeout=10).inputs}

    def described(self, result: Any, output: str) -> tuple[str, tuple[int, ...]]:
        """Triton's data type and the shape of an output that was written to a region."""
        found = result.get_output(output)
        return str(found.datatype), tuple(int(size) for size in found.shape)

    def register(self, name: str, key: str, size_bytes: int) -> None:
        """Tell the server of a region."""
        self._client.register_system_shared_memory(name, key, size_bytes, client_timeout=30)

    def unregister(self, name: str) -> None:
        """Have the server forget a region."""
        self._client.unregister_system_shared_memory(name, client_timeout=30)

    def close(self) -> None:
        """Close the channel."""
        self._client.close()


class HttpTransport:
    """HTTP; the library's client breaks when threads share it, so each call has its own."""

    def __init__(self, library: Any, address: Address, timeout_s: float) -> None:
        self._library, self._place, self._timeout_s = library, address.place, timeout_s

    def is_live(self) -> bool:
        """Whether the server answers."""
        with self._client() as client:
            return bool(client.is_server_live())

    def infer(
        self, model: str, inputs: Mapping[str, Any], outputs: Mapping[str, Region | None], timeout_s: float
    ) -> Any:
        """One call; regions are gRPC's."""
        del timeout_s
        sent, wanted = tensors(self._library, inputs, outputs)
        with self._client() as client:
            return client.infer(model, sent, outputs=wanted)

    def input_names(self, model: str) -> set[str]:
        """Inputs that a model takes."""
        with self._client() as client:
            return {str(tensor["name"]) for tensor in client.get_model_metadata(model)["inputs"]}

    def close(self) -> None:
        """Nothing stays open between calls."""

    def _client(self) -> Any:
        return self._library.InferenceServerClient(
            self._place, connection_timeout=self._timeout_s, network_timeout=self._timeout_s
        )


@contextmanager
def stream_infer(
    address: Address, model: str, inputs: Mapping[str, Any], answers: queue.SimpleQueue[tuple[Any, Any]]
) -> Iterator[Callable[[], None]]:
    """Ask a streaming model; its responses, or an error, arrive in `answers`. Gives a function that cancels."""
    library = _library("grpc")
    # A client has one stream at a time, so each has a client.
    client = library.InferenceServerClient(address.place)
    sent, _ = tensors(library, inputs, {})
    try:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer(model, sent)
        yield lambda: client.stop_stream(cancel_requests=True)
    finally:
        with suppress(Exception):
            client.stop_stream(cancel_requests=True)
        client.close()


def tensors(
    library: Any, inputs: Mapping[str, Any], outputs: Mapping[str, Region | None]
) -> tuple[list[Any], list[Any]]:
    """The library's own inputs and outputs."""
    from tritonclient.utils import np_to_triton_dtype

    sent, wanted = [], []
    for name, array in inputs.items():
        sent.append(library.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        sent[-1].set_data_from_numpy(array)
    for name, region in outputs.items():
        wanted.append(library.InferRequestedOutput(name))
        if region is not None:
            wanted[-1].set_shared_memory(region.name, region.size_bytes)
    return sent, wanted


def to_l2p_error(error: BaseException) -> L2PError:
    """What a failed call means to the caller."""
    if isinstance(error, L2PError):
        return error
    status = getattr(error, "status", lambda: None)()
    text = getattr(error, "message", lambda: str(error))() or str(error)
    if status in _REFUSED:
        return UsageError(text)
    if status in _CANCELLED:
        return CancelledError("drawing was cancelled")
    if status == "StatusCode.DEADLINE_EXCEEDED" or isinstance(error, TimeoutError):
        return HostError("the server gave no image in time", hint="raise the time-out, or add servers")
    return HostError(f"the server gave no image: {text}"[:500])


def _library(name: str) -> Any:
    try:
        if name == "grpc":
            import tritonclient.grpc as library
        else:
            import tritonclient.http as library
    except ImportError as error:
        raise HostError(
            f"a client needs `tritonclient`, which cannot be imported: {error}", hint="pip install 'l2p-export[triton]'"
        ) from error
    return library
