"""The worker's side: one process that draws for its clients, one request at a time.

The main thread draws, since a GPU's context belongs to one thread; a thread per connection reads. An error in one
request is told to its client and leaves the next one as it was.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

from l2p_runtime.errors import CancelledError, HostError, L2PError, UsageError
from l2p_runtime.worker.messages import Message, Messages, error_message
from l2p_runtime.worker.sockets import Listener, accept

IDLE_SECONDS = 600.0
"""A worker that nobody asks for so long ends."""

_CONNECTIONS_MAX = 64
_POLL_SECONDS = 0.5
_FIRST_SECONDS = 10.0

Emit: TypeAlias = Callable[[Message], None]
"""Sends an event to the client."""

Handle: TypeAlias = Callable[[Message, Emit, Callable[[], bool]], Message]
"""Serves one request: (request, emit, cancelled) to the answer."""


@dataclass(frozen=True, slots=True)
class _Job:
    """A request that waits for its turn, or is being served."""

    request: Message
    messages: Messages
    cancelled: threading.Event


@dataclass(frozen=True, slots=True)
class _Shared:
    """What the threads of a worker share; None among the jobs wakes the one that draws."""

    jobs: queue.Queue[_Job | None]
    connections: threading.BoundedSemaphore
    stopping: threading.Event
    waiting_for_end: queue.SimpleQueue[Messages]
    facts: Mapping[str, Any]


def serve(listener: Listener, handle: Handle, facts: Mapping[str, Any], idle_seconds: float = IDLE_SECONDS) -> str:
    """Serve requests until asked to stop, until nobody asks for long, or until the socket is gone.

    Args:
        listener: where clients connect, from here on; closed at the end.
        handle: serves a request to draw, in the calling thread.
        facts: what `status` tells.
        idle_seconds: how long to wait for a request.

    Returns:
        Why it ended.
    """
    limit = threading.BoundedSemaphore(_CONNECTIONS_MAX)
    shared = _Shared(queue.Queue(), limit, threading.Event(), queue.SimpleQueue(), facts)
    try:
        listener.start()
        threading.Thread(target=_accept, args=(listener, shared), daemon=True).start()
        return _serve(listener, handle, shared, idle_seconds)
    finally:
        shared.stopping.set()
        listener.close()
        _turn_away(shared.jobs)
        while not shared.waiting_for_end.empty():
            shared.waiting_for_end.get().close()


def _serve(listener: Listener, handle: Handle, shared: _Shared, idle_seconds: float) -> str:
    since = time.monotonic()
    while True:
        if shared.stopping.is_set():
            return "asked to stop"
        if not listener.is_there():
            return "the socket was removed"
        if time.monotonic() - since > idle_seconds:
            return f"no request for {idle_seconds:g} s"
        with suppress(queue.Empty):
            job = shared.jobs.get(timeout=_POLL_SECONDS)
            if job is None:
                continue
            _serve_job(job, handle, lambda: shared.stopping.is_set() or not listener.is_there())
            since = time.monotonic()


def _serve_job(job: _Job, handle: Handle, ending: Callable[[], bool]) -> None:
    def emit(event: Message) -> None:
        try:
            job.messages.send({"event": event})
        except OSError as error:
            job.cancelled.set()
            raise CancelledError("the client has gone") from error

    answer: Message
    try:
        answer = {"done": handle(job.request, emit, lambda: job.cancelled.is_set() or ending())}
    except Exception as error:  # noqa: BLE001 - an error of one request leaves the others
        if not isinstance(error, L2PError):
            traceback.print_exception(error)
        answer = error_message(error)
    except BaseException:
        _answer(job.messages, error_message(HostError("the worker was stopped while it drew")))
        raise
    _answer(job.messages, answer)


def _answer(messages: Messages, answer: Message) -> None:
    with suppress(OSError):
        messages.send(answer)
    messages.close()


def _turn_away(jobs: queue.Queue[_Job | None]) -> None:
    with suppress(queue.Empty):
        while True:
            if (job := jobs.get_nowait()) is not None:
                _answer(job.messages, error_message(HostError("the worker is stopping")))


def _accept(listener: Listener, shared: _Shared) -> None:
    while not shared.stopping.is_set():
        try:
            connection = accept(listener)
        except OSError:
            # Closed at the end; otherwise without descriptors for a while.
            time.sleep(_POLL_SECONDS)
            continue
        if connection is None:
            continue
        messages = Messages(connection)
        if not shared.connections.acquire(blocking=False):
            _answer(messages, error_message(HostError(f"the worker has {_CONNECTIONS_MAX} clients already")))
            continue
        threading.Thread(target=_read, args=(connection, messages, shared), daemon=True).start()


def _read(connection: socket.socket, messages: Messages, shared: _Shared) -> None:
    """Read a connection's request, and then whether its client cancels or goes."""
    try:
        connection.settimeout(_FIRST_SECONDS)
        request = messages.receive()
        connection.settimeout(None)
        _take(request, messages, shared)
    except TimeoutError:
        _answer(messages, error_message(HostError(f"no request came within {_FIRST_SECONDS:g} s")))
    except (L2PError, OSError) as error:
        _answer(messages, error_message(error))
    finally:
        shared.connections.release()


def _take(request: Message | None, messages: Messages, shared: _Shared) -> None:
    if request is None:
        messages.close()
        return
    match request.get("do"):
        case "status":
            _answer(messages, {"done": {**shared.facts, "waiting": shared.jobs.qsize()}})
        case "stop":
            messages.send({"done": {}})
            # Its connection closes at the end, which tells the client.
            shared.waiting_for_end.put(messages)
            shared.stopping.set()
            shared.jobs.put(None)
        case "draw":
            job = _Job(request, messages, threading.Event())
            shared.jobs.put(job)
            # A message or the end of the connection, whichever comes: both cancel.
            with suppress(OSError, L2PError):
                messages.receive()
            job.cancelled.set()
        case other:
            raise UsageError(f"a request is to do {str(other)[:40]!r}, expected status, stop or draw")
