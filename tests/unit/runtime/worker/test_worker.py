"""A worker's socket, messages and turns, with a stand-in for what draws."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from l2p_runtime.errors import CancelledError, HostError, InternalError, L2PError, UsageError
from l2p_runtime.worker import bind, request_drawing, serve, sockets, stop_worker, worker_status
from l2p_runtime.worker.messages import MESSAGE_BYTES_MAX, Messages, error_message, raise_error

DEADLINE = 20.0


def _silent(event: dict[str, Any]) -> None:
    pass


@contextmanager
def running(path: Path, handle: Callable[..., Any], *, idle: float = 30.0) -> Iterator[list[str]]:
    """A worker in a thread; the list holds why it ended."""
    reasons: list[str] = []
    listener = bind(path)
    thread = threading.Thread(
        target=lambda: reasons.append(serve(listener, handle, {"bundle": "b"}, idle)), daemon=True
    )
    thread.start()
    _wait(lambda: _answers(path) or bool(reasons))
    yield reasons
    if not reasons:
        with suppress(HostError):
            stop_worker(path, DEADLINE)
    thread.join(DEADLINE)
    assert not thread.is_alive()


def _answers(path: Path) -> bool:
    try:
        return worker_status(path)["bundle"] == "b"
    except HostError:
        return False


def _wait(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "own" / "socket"


def test_requests_are_served_in_turn_and_events_arrive(path: Path) -> None:
    def handle(request: dict[str, Any], emit: Callable[[dict[str, Any]], None], _: Any) -> dict[str, Any]:
        for index in range(request["count"]):
            emit({"step": index})
        return {"drawn": request["count"]}

    with running(path, handle):
        for count in (3, 0):
            events: list[dict[str, Any]] = []
            assert request_drawing(path, {"count": count}, events.append) == {"drawn": count}
            assert events == [{"step": index} for index in range(count)]
        assert worker_status(path) == {"process": os.getpid(), "bundle": "b", "waiting": 0}
    assert not path.exists()


def test_the_socket_and_its_folder_are_private(path: Path) -> None:
    with running(path, lambda *_: {}):
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    for call in (lambda: bind(folder / "socket"), lambda: worker_status(folder / "socket")):
        with pytest.raises(HostError, match=f"with mode {mode:o}, expected user"):
            call()


def test_a_link_to_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("own")
    with pytest.raises(HostError, match="cannot open the folder"):
        bind(tmp_path / "link" / "socket")


def test_a_peer_of_another_user_is_turned_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(path, lambda *_: {}):
        credentials = sockets._credentials
        monkeypatch.setattr(sockets, "_credentials", lambda peer: (1, os.geteuid() + 1, 1))
        with pytest.raises(HostError, match="belongs to user"):
            worker_status(path)
        # The worker's own check, behind the client's.
        listener = socket.socket(socket.AF_UNIX)
        monkeypatch.setattr(sockets, "_require_same_user", _only_in_server(credentials))
        listener.close()
        with pytest.raises(HostError, match="ended before it answered"):
            worker_status(path)
        monkeypatch.undo()
        assert _answers(path)


def _only_in_server(credentials: Any) -> Callable[[socket.socket], None]:
    def check(connection: socket.socket) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise HostError("another user")

    return check


def test_a_long_path_is_no_problem(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 120) / "own" / "socket"
    with running(path, lambda *_: {"drawn": 1}):
        assert request_drawing(path, {}, _silent) == {"drawn": 1}


def test_a_second_worker_is_refused_and_a_stale_socket_replaced(path: Path) -> None:
    with running(path, lambda *_: {}), pytest.raises(HostError, match="another worker is in"):
        bind(path)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert path.exists()
    with pytest.raises(HostError, match="no worker listens"):
        worker_status(path)
    with running(path, lambda *_: {}):
        assert _answers(path)


def test_a_file_at_the_path_stays(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.write_text("mine")
    with pytest.raises(UsageError, match="is a file and no socket"):
        bind(path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (UsageError("size 3", hint="do"), UsageError, "size 3"),
        (ValueError("x"), InternalError, "ValueError: x"),
        (MemoryError(), HostError, "out of memory"),
    ],
)
def test_an_error_of_one_request_leaves_the_next(
    path: Path, raised: Exception, kind: type[L2PError], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def handle(request: dict[str, Any], *_: Any) -> dict[str, Any]:
        if request.get("bad"):
            raise raised
        return {"drawn": 1}

    with running(path, handle):
        with pytest.raises(kind, match=text) as caught:
            request_drawing(path, {"bad": True}, _silent)
        if isinstance(raised, L2PError):
            assert caught.value.hint == raised.hint
        assert request_drawing(path, {}, _silent) == {"drawn": 1}


def test_a_client_that_goes_cancels_its_drawing(path: Path) -> None:
    seen: list[str] = []

    def handle(request: dict[str, Any], emit: Callable[..., None], cancelled: Callable[[], bool]) -> dict[str, Any]:
        if request.get("long"):
            emit({"started": True})
            _wait(cancelled)
            seen.append("cancelled")
            raise CancelledError("drawing was cancelled")
        return {"drawn": 1}

    def interrupt(event: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with running(path, handle):
        with pytest.raises(KeyboardInterrupt):
            request_drawing(path, {"long": True}, interrupt)
        assert request_drawing(path, {}, _silent) == {"drawn": 1}
        assert seen == ["cancelled"]


def test_stopping_cancels_and_turns_away_who_waits(path: Path) -> None:
    started, errors = threading.Event(), []

    def handle(_: Any, __: Any, cancelled: Callable[[], bool]) -> dict[str, Any]:
        started.set()
        _wait(cancelled)
        raise CancelledError("drawing was cancelled")

    def draw() -> None:
        try:
            request_drawing(path, {}, _silent)
        except L2PError as error:
            errors.append(type(error))

    with running(path, handle) as reasons:
        threads = [threading.Thread(target=draw) for _ in range(2)]
        threads[0].start()
        assert started.wait(DEADLINE)
        threads[1].start()
        _wait(lambda: worker_status(path)["waiting"] == 1)
        stop_worker(path, DEADLINE)
        for thread in threads:
            thread.join(DEADLINE)
    assert reasons == ["asked to stop"]
    assert sorted(errors, key=str) == [CancelledError, HostError]


def test_it_ends_when_nobody_asks_and_when_its_socket_is_gone(path: Path) -> None:
    with running(path, lambda *_: {}, idle=0.01) as reasons:
        _wait(lambda: bool(reasons))
    assert reasons[0].startswith("no request for")
    with running(path, lambda *_: {}) as reasons:
        path.unlink()
        _wait(lambda: bool(reasons))
    assert reasons == ["the socket was removed"]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"no json\n", "is no JSON"),
        (b"[" * 100_000 + b"\n", "is no JSON"),
        (b"[]\n", "is a list, expected an object"),
        (b'{"do": "dance"}\n', "expected status, stop or draw"),
        (b"{}\n", "expected status, stop or draw"),
        (b"x" * (MESSAGE_BYTES_MAX + 2), "over 8,388,608 bytes"),
    ],
    ids=["text", "deep", "list", "unknown", "empty", "long"],
)
def test_what_is_no_request_is_refused(path: Path, data: bytes, text: str) -> None:
    with running(path, lambda *_: {}):
        connection = sockets.connect(path)
        # The worker stops reading a message that is too long.
        with suppress(OSError):
            connection.sendall(data)
        answer = Messages(connection).receive()
        assert answer is not None
        assert text in answer["error"]["text"]
        connection.close()
        assert _answers(path)


def test_a_request_that_is_too_long_is_not_sent(path: Path) -> None:
    with running(path, lambda *_: {}), pytest.raises(UsageError, match="a worker takes"):
        request_drawing(path, {"prompt": "x" * MESSAGE_BYTES_MAX}, _silent)


def test_errors_keep_their_kind_and_a_foreign_one_is_a_bug() -> None:
    for kind in (UsageError, HostError, CancelledError):
        with pytest.raises(kind) as caught:
            raise_error(json.loads(json.dumps(error_message(kind("\ud800 found", hint="do"))))["error"])
        assert (str(caught.value), caught.value.hint) == ("\ud800 found", "do")
    for facts in ({"kind": "SystemExit", "text": "x"}, {"kind": "annotations", "text": "x"}, "x", None):
        with pytest.raises(InternalError):
            raise_error(facts)


def test_a_worker_that_does_not_end_is_killed(path: Path) -> None:
    process, drawing, errors = _process(path), threading.Event(), []

    def draw() -> None:
        try:
            request_drawing(path, {}, lambda event: drawing.set())
        except HostError as error:
            errors.append(str(error))

    thread = threading.Thread(target=draw)
    thread.start()
    assert drawing.wait(DEADLINE)
    stop_worker(path, 0.3)
    assert process.wait(DEADLINE) == -signal.SIGKILL
    thread.join(DEADLINE)
    assert errors == [f"the worker at `{path}` ended before it answered"]


def _process(path: Path) -> subprocess.Popen[bytes]:
    """A worker in a process of its own, whose drawings take a minute and cannot be cancelled."""
    code = (
        "import sys, time; from pathlib import Path; from l2p_runtime.worker import bind, serve\n"
        "serve(bind(Path(sys.argv[1])), lambda r, emit, c: emit({'at': 1}) or time.sleep(60), {'bundle': 'b'})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    _wait(lambda: _answers(path))
    return process


def test_a_killed_worker_is_told_and_replaced(path: Path) -> None:
    process = _process(path)
    with pytest.raises(HostError, match="ended before it answered") as caught:
        request_drawing(path, {}, lambda event: os.kill(process.pid, signal.SIGKILL))
    assert "socket.log" in caught.value.hint
    process.wait(DEADLINE)
    assert path.exists()
    with running(path, lambda *_: {}):
        assert _answers(path)
