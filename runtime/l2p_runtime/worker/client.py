"""The client's side of a worker: needs only the standard library, whatever Python and NumPy a host application has."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from l2p_runtime import __version__
from l2p_runtime.errors import CancelledError, HostError
from l2p_runtime.worker.messages import Message, Messages, raise_error
from l2p_runtime.worker.sockets import connect, peer_process

_POLL_SECONDS = 0.1
_STATUS_SECONDS = 10.0
_STOP_SECONDS = 30.0


def worker_status(socket: Path) -> Message:
    """What a worker tells of itself: bundle, process, options.

    Raises:
        HostError: no worker listens there.
    """
    with _request(socket, {"do": "status"}, seconds=_STATUS_SECONDS) as (messages, process):
        try:
            return {"process": process, **_answer(messages, socket)}
        except TimeoutError as error:
            raise HostError(
                f"the worker at `{socket}` has not answered within {_STATUS_SECONDS:g} s",
                hint=f"end process {process}; its log is `{log_path(socket)}`",
            ) from error


def stop_worker(socket: Path, seconds: float = _STOP_SECONDS) -> None:
    """Stop a worker, and wait until it has ended. What it draws is cancelled.

    Args:
        socket: of the worker.
        seconds: how long to wait; then it is killed. Its files are whole, or not there, even so.

    Raises:
        HostError: no worker listens there, or it is a process that cannot be seen and has not ended.
    """
    with _request(socket, {"do": "stop"}, seconds=seconds) as (messages, process), _handle(process) as handle:
        try:
            _answer(messages, socket)
            with suppress(ConnectionError):
                messages.receive()
            if _has_ended(handle, seconds):
                return
        except TimeoutError as error:
            if handle is None:
                raise HostError(f"the worker at `{socket}` has not ended within {seconds:g} s") from error
        if handle is not None:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            _has_ended(handle, seconds)


def draw(
    socket: str | Path,
    bundle: str | Path,
    out: str | Path,
    *,
    progress: Callable[[float], None] = lambda share: None,
    cancelled: Callable[[], bool] = lambda: False,
    **options: str | float | bool | os.PathLike[str],
) -> Message:
    """Draw an image, or the frames of a shot, in a worker on this machine, which writes the files.

    Args:
        socket: of the worker.
        bundle: the bundle that it was started with.
        out: the file, as `--out` of `generate`.
        progress: receives the share that is done, 0 to 1.
        cancelled: called several times a second; true stops the drawing.
        options: of `l2p-export generate`, as `prompt="a red circle", size="1024x512", skip_existing=True`.

    Returns:
        What `generate --json` prints. Of a shot, `failed` lists the frames that were not written.

    Raises:
        L2PError: what went wrong in the worker, as if it had been drawn here.
        HostError: no worker listens there, or it ended.
        CancelledError: `cancelled` said so.
    """
    words = [
        f"--out={Path(out).absolute()}",
        *(word for name, value in options.items() for word in _words(name, value)),
    ]
    request = {"version": __version__, "bundle": str(Path(bundle).resolve()), "arguments": words}

    def event(message: Message) -> None:
        if "share" in message:
            progress(message["share"])

    return request_drawing(Path(socket).absolute(), request, event, cancelled)


def request_drawing(
    socket: Path,
    request: Mapping[str, Any],
    event: Callable[[Message], None],
    cancelled: Callable[[], bool] | None = None,
) -> Message:
    """Let a worker draw.

    Args:
        socket: of the worker.
        request: what to draw, as the worker takes it.
        event: receives what the worker tells meanwhile; whatever it raises cancels the drawing.
        cancelled: called several times a second; true cancels too.

    Returns:
        The worker's answer.

    Raises:
        L2PError: what went wrong in the worker, as if it had been drawn here.
        HostError: no worker listens there, or it ended.
        CancelledError: `cancelled` said so.
    """
    seconds = None if cancelled is None else _POLL_SECONDS
    with _request(socket, {**request, "do": "draw"}, seconds=seconds) as (messages, _):
        return _answer(messages, socket, event, cancelled)


def _words(name: str, value: str | float | bool | os.PathLike[str]) -> list[str]:
    """An option as `generate` takes it; one that is false or None is left out."""
    option = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return []
    if value is True:
        return [option]
    return [f"{option}={os.path.abspath(value) if isinstance(value, os.PathLike) else value}"]  # noqa: PTH100


@contextmanager
def _request(socket: Path, request: Message, seconds: float | None) -> Iterator[tuple[Messages, int]]:
    connection = connect(socket)
    messages = Messages(connection)
    try:
        try:
            messages.send(request)
        except OSError as error:
            raise _gone(socket) from error
        connection.settimeout(seconds)
        yield messages, peer_process(connection)
    finally:
        # Whatever ended the block, the worker sees that nobody waits.
        messages.close()


@contextmanager
def _handle(process: int) -> Iterator[int | None]:
    """A handle of a process; None for this one, and for one that cannot be seen."""
    try:
        handle = None if process in (0, os.getpid()) else os.pidfd_open(process)
    except OSError:
        handle = None
    try:
        yield handle
    finally:
        if handle is not None:
            os.close(handle)


def _has_ended(handle: int | None, seconds: float) -> bool:
    """Wait for the end of a process. One without a handle counts as ended."""
    return handle is None or bool(select.select([handle], [], [], seconds)[0])


def _answer(
    messages: Messages,
    socket: Path,
    event: Callable[[Message], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Message:
    while True:
        message = None
        try:
            message = messages.receive()
        except TimeoutError:
            if cancelled is None:
                raise
            _go_on(cancelled)
            continue
        except ConnectionError:
            pass
        if message is None:
            raise _gone(socket)
        if "error" in message:
            raise_error(message["error"])
        if "done" in message:
            done: Message = message["done"]
            return done
        if event is not None:
            event(message["event"])
        if cancelled is not None:
            _go_on(cancelled)


def _go_on(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise CancelledError("drawing was cancelled")


def _gone(socket: Path) -> HostError:
    return HostError(
        f"the worker at `{socket}` ended before it answered",
        hint=f"its log is `{log_path(socket)}`; a kill for memory leaves no line there",
    )


def log_path(socket: Path) -> Path:
    """Where a worker that runs in the background writes its messages."""
    return socket.with_name(f"{socket.name}.log")
