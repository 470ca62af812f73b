"""Draws on a server that serves a repository of `l2p-export triton`, over gRPC or HTTP.

    from l2p_runtime.client import Client

    with Client.open("grpc://127.0.0.1:8001") as client:
        image = client.generate("a red circle", height=1024, width=1024, seed=7).pixels

Needs the extra `[triton]`; `l2p_runtime.client.health` needs nothing.
"""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from l2p_runtime.arguments import flag, text
from l2p_runtime.client.inputs import finite, request_inputs
from l2p_runtime.client.regions import Regions
from l2p_runtime.client.transport import Address, HttpTransport, connect, parse_address, stream_infer, to_l2p_error
from l2p_runtime.errors import CancelledError, HostError, L2PError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from l2p_runtime.coarse import Coarse
    from l2p_runtime.contract import Grid

PreviewCallback: TypeAlias = "Callable[[int, int, NDArray[np.uint8]], None]"
"""Receives (step, total steps, preview [h,w,3])."""

_OTHER_VERSION = "its models are of another version"
_LOCAL = ("127.0.0.1", "localhost", "::1")
_POLL_SECONDS = 0.05
_PIXEL_BYTES_MAX = 3 * 2
"""Of float16, the largest that a repository may be written with."""
_REGION_BYTES_MAX = 4 << 30
"""The largest image that memory is set aside for; what is larger is for the server to refuse."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An image [H,W,3], and what the server says of it: bundle, plan, sampling as used, seconds.

    The first few images that a caller holds at a time are views of the shared memory that they came through. Only the
    caller uses it until the array and all views of it are gone, also after the client was closed.
    """

    pixels: NDArray[Any]
    report: Mapping[str, Any]


class Client:
    """A server's models; one client serves any number of threads. Made by `Client.open`; use it in a `with` block."""

    def __init__(self, address: Address, transport: Any, regions: Regions | None, timeout_s: float) -> None:
        self._address, self._transport = address, transport
        self._regions, self._timeout_s = regions, timeout_s

    @classmethod
    def open(cls, url: str, *, shared_memory: bool | None = None, timeout_s: float = 600.0) -> Self:
        """Connect to a server.

        Args:
            url: `grpc://host:8001` or `http://host:8000`.
            shared_memory: whether images come through memory that both sides map, which spares two copies; None for
                where client and server are on one host and see the same `/dev/shm`, which is tried.
            timeout_s: of one image, the wait in the server's queue included.

        Raises:
            UsageError: no such URL, or shared memory with another host.
            HostError: tritonclient is not installed, or no server answers.
        """
        address = parse_address(text("url", url))
        if shared_memory is not None:
            shared_memory = flag("shared_memory", shared_memory)
        timeout_s = finite("timeout_s", timeout_s)
        if timeout_s <= 0:
            raise UsageError(f"timeout_s is {timeout_s}, expected more than 0")
        local = address.host in _LOCAL
        if shared_memory and not local:
            raise UsageError(f"shared memory needs a server on this host, the URL names `{address.host}`")
        transport = connect(address, timeout_s)
        regions = None
        if local and shared_memory is not False and not isinstance(transport, HttpTransport):
            regions = Regions(transport)
            if not regions.works():
                regions = None
                if shared_memory:
                    transport.close()
                    raise HostError(
                        "the server does not see this process's shared memory", hint="share /dev/shm with it"
                    )
        return cls(address, transport, regions, timeout_s)

    @property
    def shares_memory(self) -> bool:
        """Whether images come through shared memory."""
        return self._regions is not None

    def generate(
        self,
        prompt: str | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str | None = None,
        prompt_embeds: NDArray[np.float32] | None = None,
        negative_embeds: NDArray[np.float32] | None = None,
        positions: str | None = None,
        base_grid: Grid | None = None,
        coarse: Coarse | None = None,
    ) -> Reply:
        """Draw one image; the arguments are those of `Pipeline.generate`, what is None has the server's default.

        `positions` is a name; a function cannot be sent.

        Raises:
            UsageError: an argument of another type, or the server refuses the request or lacks an input; says why.
            HostError: no answer in time, a full queue, or a server that cannot draw.
        """
        inputs = request_inputs(
            {"prompt": prompt, "negative_prompt": negative_prompt},
            {"prompt_embeds": prompt_embeds, "negative_embeds": negative_embeds},
            {"seed": seed, "height": height, "width": width, "steps": steps},
            guidance,
            positions,
            base_grid,
            coarse,
        )
        model = "l2p" if prompt_embeds is None else "l2p_embeddings"
        try:
            size_bytes = 0 if height is None or width is None else height * width * _PIXEL_BYTES_MAX
            if self._regions is not None and 0 < size_bytes <= _REGION_BYTES_MAX:
                return self._through_memory(self._regions, model, inputs, size_bytes)
            result = self._transport.infer(model, inputs, {"image": None, "report": None}, self._timeout_s)
            return Reply(result.as_numpy("image"), _report(result))
        except Exception as error:
            raise self._told(error, model, inputs) from error

    def stream(
        self,
        prompt: str | None = None,
        *,
        shown: PreviewCallback,
        cancelled: Callable[[], bool] = lambda: False,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str | None = None,
        prompt_embeds: NDArray[np.float32] | None = None,
        negative_embeds: NDArray[np.float32] | None = None,
        positions: str | None = None,
        base_grid: Grid | None = None,
        coarse: Coarse | None = None,
    ) -> Reply:
        """Draw one image and show a preview of every step; only over gRPC.

        The arguments are those of `generate`, and `shown`, told each step with its preview in the caller's thread, and
        `cancelled`, asked about twenty times a second: the server then stops drawing.

        Raises:
            UsageError: as `generate`; or the URL is not `grpc://`.
            HostError: as `generate`.
            CancelledError: `cancelled` said so.
        """
        if self._address.scheme != "grpc":
            raise UsageError("previews need gRPC, the URL is http://", hint="use grpc://host:8001")
        inputs = request_inputs(
            {"prompt": prompt, "negative_prompt": negative_prompt},
            {"prompt_embeds": prompt_embeds, "negative_embeds": negative_embeds},
            {"seed": seed, "height": height, "width": width, "steps": steps},
            guidance,
            positions,
            base_grid,
            coarse,
        )
        answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        end = time.monotonic() + self._timeout_s
        with stream_infer(self._address, "l2p_stream", inputs, answers) as stop:
            while True:
                if cancelled():
                    stop()
                    raise CancelledError("drawing was cancelled")
                if time.monotonic() > end:
                    stop()
                    raise HostError(f"no image after {self._timeout_s:g} s")
                try:
                    result, error = answers.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    continue
                if error is not None:
                    raise self._told(error, "l2p_stream", inputs) from error
                image = result.as_numpy("image")
                if image is not None:
                    return Reply(image, _report(result))
                numbers, preview = result.as_numpy("step"), result.as_numpy("preview")
                if numbers is None or preview is None:
                    raise HostError("the server sent neither an image nor a preview of a step", hint=_OTHER_VERSION)
                step, steps_in_all = (int(value) for value in numbers)
                shown(step, steps_in_all, preview)

    def close(self) -> None:
        """Close connections and give shared memory back."""
        if self._regions is not None:
            self._regions.close()
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _told(self, error: Exception, model: str, inputs: Mapping[str, Any]) -> L2PError:
        """What a failed call means; a model written by an older version is said to lack inputs."""
        told = to_l2p_error(error)
        # A stream's errors have no status, so its refusals are told by their words.
        if told is error or not (
            isinstance(told, UsageError) or "number of inputs" in str(told) or "inference input" in str(told)
        ):
            return told
        with suppress(Exception):
            known = self._transport.input_names(model)
            lacking = [name for name in inputs if name not in known]
            if known and lacking:
                return UsageError(
                    f"the server's model `{model}` has no input {', '.join(f'`{name}`' for name in lacking)}",
                    hint="write its repository again with this version of `l2p-export triton`, or do without",
                )
        return told

    def _through_memory(self, regions: Regions, model: str, inputs: Mapping[str, Any], size_bytes: int) -> Reply:
        with regions.take(size_bytes) as region:
            result = self._transport.infer(model, inputs, {"image": region, "report": None}, self._timeout_s)
            return Reply(regions.read(region, *self._transport.described(result, "image")), _report(result))


def _report(result: Any) -> dict[str, Any]:
    values = result.as_numpy("report")
    if values is None or not len(values):
        raise HostError("the server sent an image without a report", hint=_OTHER_VERSION)
    report: dict[str, Any] = json.loads(values.tobytes())
    return report


__all__ = ["Client", "L2PError", "Reply"]
