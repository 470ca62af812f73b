"""Builds each engine in a process of its own.

So an interrupt ends a build at once, a crash of the library becomes an error, and all its memory is freed.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from l2p_engines.builders.explanations import build_error, clean_line, explain, quote
from l2p_engines.builders.listeners import WRITING
from l2p_engines.builders.request import BuildProgress, EngineBuilt, EngineRequest
from l2p_engines.builders.watching import STALLED_SECONDS, MemoryWatch, StallWatch
from l2p_engines.forecast.calls import ENGINE_BUILD_BYTES, ENGINE_BUILD_FACTOR, ENGINE_KERNEL_BYTES
from l2p_runtime import errors
from l2p_runtime.contract.codec import from_json, to_json
from l2p_runtime.errors import ArtifactError, HostError, InternalError, L2PError
from l2p_runtime.files import commit_file, partial_path
from l2p_runtime.memory import available_host_bytes

PATIENCE_SECONDS = 1.0
"""How long a worker may take to end when asked to; then it is killed."""

_LINES_KEPT = 40
_LINE_BYTES = 4096
"""A longer line is split."""
_PIPE_BYTES = 1 << 16


def build_engine(
    request: EngineRequest,
    out: Path,
    progress: Callable[[BuildProgress], None] = lambda progress: None,
    stalled_seconds: float = STALLED_SECONDS,
) -> EngineBuilt:
    """Build one engine and put it at `out`. A build that fails leaves no files.

    Args:
        request: what to build.
        out: the finished file; its folder must exist.
        progress: receives the progress, in this thread; an exception that it raises ends the build.
        stalled_seconds: how long the process may say nothing and use no processor time before it is ended.

    Raises:
        ArtifactError: the graph is damaged, or another network's.
        UsageError: a profile, setting or dtype that the target cannot have.
        HostError: no library, no GPU where one is needed, too little disk or memory, or the library crashed or stalled.
    """
    if not request.graph.is_file():
        raise ArtifactError(f"there is no graph `{request.graph}`")
    _require_disk(request, out)
    # The worker makes the file: what it cannot write, it explains.
    partial = partial_path(out)
    try:
        built = _Build(request, partial, progress, stalled_seconds).run()
        commit_file(partial, out)
    finally:
        # A file system that cannot be written refuses this too; the error of the build matters more.
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return built


def build_memory_bytes(weight_bytes: int) -> int:
    """Forecast of the memory that the process of a build takes, in bytes, without the weights' file that it maps."""
    return ENGINE_BUILD_BYTES + round(ENGINE_BUILD_FACTOR * weight_bytes)


@dataclass(slots=True)
class _Build:
    """One build while its process runs.

    Attributes:
        free_bytes: memory that was free before it.
        phase: what the library was last doing.
        lines: the last errors of its log, then the lines that it printed. Warnings are left out: builds that succeed
            have them too, and they would be taken for the cause.
        result: the result that the process reported; None until then.
    """

    request: EngineRequest
    partial: Path
    progress: Callable[[BuildProgress], None]
    stalled_seconds: float
    free_bytes: int = field(default_factory=available_host_bytes)
    phase: str = "starting"
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LINES_KEPT))
    result: EngineBuilt | L2PError | None = None

    def run(self) -> EngineBuilt:
        started = time.monotonic()
        worker = _start(self.request, self.partial)
        printed: deque[str] = deque(maxlen=_LINES_KEPT)
        reader = threading.Thread(target=_keep_lines, args=(worker.stderr, printed), daemon=True)
        memory = MemoryWatch(worker.pid)
        try:
            reader.start()
            memory.start()
            _send(worker.stdin, to_json(self.request.spec))
            self._listen(_opened(worker.stdout), StallWatch(worker.pid, self.stalled_seconds))
            code = worker.wait()
        finally:
            _stop(worker)
            peak_bytes = memory.stop()
            reader.join(PATIENCE_SECONDS)
            for pipe in (worker.stdout, worker.stderr):
                _opened(pipe).close()
        self.lines.extend(printed)
        if isinstance(self.result, L2PError):
            raise self.result
        if code or self.result is None:
            raise self._death(code)
        return replace(self.result, seconds=time.monotonic() - started, peak_memory_bytes=peak_bytes)

    def _listen(self, pipe: IO[bytes], watch: StallWatch) -> None:
        """Read the worker's messages until it has sent all; a worker that stalls is an error."""
        ready = select.poll()
        ready.register(pipe, select.POLLIN)
        rest = b""
        while True:
            if not ready.poll(1000 * watch.look_seconds):
                if self.phase == WRITING:
                    # A file system that another process serves lets a writer sleep as long as it likes.
                    watch.heard()
                elif watch.look():
                    raise self._stall(watch.idle_seconds)
                continue
            if not (data := os.read(pipe.fileno(), _PIPE_BYTES)):
                return
            watch.heard()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._hear(json.loads(line))

    def _hear(self, message: dict[str, Any]) -> None:
        ((kind, what),) = message.items()
        if kind == "progress":
            progress = from_json(BuildProgress, what)
            self.phase = progress.phase
            self.progress(progress)
        elif kind == "log":
            severity, text = what
            if "ERROR" in severity:
                self.lines.append(text)
        elif kind == "error":
            name, text, hint = what
            self.result = getattr(errors, name, HostError)(text, hint=hint)
        else:
            self.result = from_json(EngineBuilt, what)

    def _death(self, code: int) -> L2PError:
        """The error for a process that ended without saying why."""
        label = self.request.spec.label
        at = f"while it was at `{self.phase}`"
        if code == -signal.SIGKILL:
            return HostError(
                f"out of memory, most likely: the kernel killed the builder of `{label}` {at}; {self._memory()}",
                hint="free some memory, or build where there is more; a lower --precision takes less",
            )
        known = explain(self.lines) is not None
        if code >= 0 and not known:
            last = " ".join(map(clean_line, list(self.lines)[-3:]))
            return InternalError(
                f"the builder of `{label}` ended with code {code} {at}: {last}",
                hint="this is a bug in l2p-export; report it with these lines",
            )
        happened = f"the library crashed ({_signal_name(-code)}) {at}"
        error = build_error(f"`{label}`", self.lines, happened)
        return type(error)(f"{error}\n{happened}", hint=error.hint) if known else error

    def _stall(self, seconds: float) -> L2PError:
        """The error for a process that has stalled."""
        return HostError(
            f"out of memory, most likely: the builder of `{self.request.spec.label}` did nothing for {seconds:.0f} "
            f"seconds while it was at `{self.phase}`, as the library does after memory was refused to it; "
            f"{self._memory()}{quote(self.lines)}",
            hint="free some memory, raise limits on it (`ulimit -d`, `ulimit -v`), or build where there is more; "
            "a lower --precision takes less",
        )

    def _memory(self) -> str:
        forecast = build_memory_bytes(self.request.weight_bytes)
        return f"the forecast is {forecast:,} bytes, {self.free_bytes:,} bytes were free"


def _require_disk(request: EngineRequest, out: Path) -> None:
    needed = request.weight_bytes + ENGINE_KERNEL_BYTES
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise HostError(
            f"`{out.parent}` has {free:,} bytes free, the engine `{request.spec.label}` needs about {needed:,}",
            hint="free some space, or choose another --out",
        )


def _start(request: EngineRequest, partial: Path) -> subprocess.Popen[bytes]:
    # The graph goes by its plain name from inside its folder: the libraries take only paths in UTF-8.
    timings = str(request.timings.resolve()) if request.timings is not None else ""
    arguments = [request.graph.name, str(partial.resolve()), str(os.getpid()), timings]
    command = [sys.executable, "-P", "-m", "l2p_engines.builders.worker", *arguments]
    pipe = subprocess.PIPE
    folder = request.graph.parent
    # The worker imports modules from the same paths as this process.
    paths = os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path)
    return subprocess.Popen(  # noqa: S603 - this Python and our own module
        command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=folder, env={**os.environ, "PYTHONPATH": paths}
    )


def _send(pipe: IO[bytes] | None, data: object) -> None:
    """Send a worker its task. Why a worker has already died is found out elsewhere."""
    try:
        with _opened(pipe) as stdin:
            stdin.write(json.dumps(data).encode())
    except BrokenPipeError:
        return


def _stop(worker: subprocess.Popen[bytes]) -> None:
    """End a worker that may still run, and wait for its end."""
    try:
        if worker.poll() is None:
            worker.terminate()
            worker.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        worker.kill()
        worker.wait()


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in signal.valid_signals() else f"code {-number}"


def _keep_lines(pipe: IO[bytes], lines: deque[str]) -> None:
    while line := pipe.readline(_LINE_BYTES):
        if text := line.decode(errors="replace").strip():
            lines.append(text)


def _opened(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise InternalError("a worker has no pipe")
    return pipe
