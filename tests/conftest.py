"""Checkpoints and bundles that many tests share.

A bundle takes about half a minute to build, most of it tracing, so the whole session builds each kind once, through
the command line, two at a time. With pytest-xdist the processes share the work and what came of it. docs/testing.md
has more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
from filelock import FileLock, Timeout
from safetensors.numpy import save_file

from golden import tiny_checkpoint
from l2p_engines.store.stages import Stage, stages
from l2p_export.checkpoint.demo import write_demo_checkpoint
from l2p_runtime.onnx_library import disable_telemetry

# Tests load ONNX Runtime by themselves too.
disable_telemetry()

PROFILE = """\
patch_px = {patch}
height_px = {{ min = {min}, opt = {opt}, max = {max} }}
width_px = {{ min = {min}, opt = {opt}, max = {max} }}
sampling = {{ steps = 2, guidance = 1.0, shift = 3.0 }}
"""

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
INTERRUPTED = (130, 143)
OUTCOME = ("returncode", "stdout", "stderr")

KINDS = {
    "tiny-16": (16, False, ("fp32", "fp16")),
    "tiny-16-fused": (16, True, ("fp32",)),
    "tiny-64": (64, False, ("fp32",)),
    "demo-160": (160, None, ("fp32",)),
    "demo-16": (16, None, ("fp32", "fp16", "fp8")),
    "tiny-128": (128, False, ("fp32",)),
}
"""Kind of bundle to patch, fused spelling (None: the demo checkpoint) and precisions.

The fused one and the trained demo, `demo-16`, have a text encoder too. FP8 scales are those of pictures that it drew.
"""

DEMO_PX = 128
"""The size that the 1k adapters of the demo learnt at; the judge's score means something there."""


BUILDER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from l2p_engines.children import end_with
end_with(int(sys.argv[3]))
from conftest import Bundles
Bundles(Path(sys.argv[2])).build_all()
"""

RIGHTS = ("root reads every file", "no right to mount a file system here", "onnxruntime-gpu is installed")
"""Reasons of skips that say what a machine is, rather than what it lacks."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a bundle, which takes a trace of each network."""
    for item in items:
        if "bundles" in getattr(item, "fixturenames", ()):
            item.add_marker("bundle")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI, a test that is skipped for something missing fails."""
    report = yield
    _fail_for_what_is_missing(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a file that skips itself."""
    report = yield
    _fail_for_what_is_missing(report)
    return report


def _fail_for_what_is_missing(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get("CI") == "true" and report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith(RIGHTS):
            report.outcome, report.longrepr = "failed", f"skipped, and in CI nothing may be missing: {reason}"


@dataclass
class Bundles:
    """Builds each kind of bundle once, on first use; later kinds build while earlier ones are tested.

    Equal networks are traced once, in a store, and the bundles are packed without it. Builders
    are processes beside the tests, which import torch once for all kinds; those of pytest-xdist's processes share the
    work, by a lock a kind, and what came of it.
    """

    root: Path
    logs: dict[str, subprocess.CompletedProcess[str]] = field(default_factory=dict)
    _builders: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def store(self) -> Path:
        """What all kinds but `demo-16` were built in; a test's own build finds its traces there and takes seconds."""
        return self.root / "store"

    @property
    def demo_store(self) -> Path:
        """What `demo-16` was built in: the 4k demo shares most of its networks."""
        return self.root / "demo-store"

    def shared(self, kind: str) -> Path:
        """The bundle of a kind whose files lie in the store; `path` waits for it."""
        return self.root / "shared" / kind

    def path(self, kind: str) -> Path:
        """The finished bundle of a kind."""
        if kind not in self.logs:
            deadline = time.monotonic() + 550
            while not (log := self._log(kind)).exists():
                ended = all(builder.poll() is not None for builder in self._builders)
                assert not ended or log.exists(), [path.read_text() for path in self.root.glob("builder-*.txt")]
                assert time.monotonic() < deadline
                time.sleep(0.1)
            self.logs[kind] = subprocess.CompletedProcess(**json.loads(log.read_text()))
        result = self.logs[kind]
        assert result.returncode == 0, result.stderr
        return self.root / kind

    def checkpoint(self, kind: str) -> Path:
        """The checkpoint that a kind was built from; the demo one is written anew."""
        path = self.root / f"{kind}.safetensors"
        if KINDS[kind][1] is None and not path.exists():
            write_demo_checkpoint(path, KINDS[kind][0])
        self.path(kind)
        return path

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """While this lasts, builders work; what one leaves half done, another's goes on with."""
        command = [sys.executable, "-c", BUILDER, str(Path(__file__).parent), str(self.root), str(os.getpid())]
        for index in range(2 // WORKERS or 1):
            with (self.root / f"builder-{os.getpid()}-{index}.txt").open("wb") as file:
                self._builders.append(subprocess.Popen(command, stdout=file, stderr=file))
        yield
        for builder in self._builders:
            builder.kill()
            builder.wait()

    def build_all(self) -> None:
        """Build or find each kind; one that another process builds is come back to."""
        while left := [kind for kind in KINDS if not self._log(kind).exists()]:
            for kind in left:
                log = self._log(kind)
                try:
                    with FileLock(log.with_suffix(".lock"), timeout=0):
                        if not log.exists():
                            result = self._build(kind)
                            if result.returncode in INTERRUPTED:
                                return
                            facts = {"args": [], **{name: getattr(result, name) for name in OUTCOME}}
                            partial = log.with_suffix(".partial")
                            partial.write_text(json.dumps(facts))
                            partial.replace(log)
                except Timeout:
                    continue
            time.sleep(0.2)

    def _log(self, kind: str) -> Path:
        return self.root / f"{kind}.json"

    def _build(self, kind: str) -> subprocess.CompletedProcess[str]:
        patch, fused, precisions = KINDS[kind]
        profile = write_profile(self.root / f"{kind}.toml", patch)
        command: list[str | Path] = ["build", "--profile", profile, "--backend", "onnx"]
        if fused is not None:
            command.append(write_tiny_checkpoint(self.root / f"{kind}.safetensors", patch, fused=fused))
        if kind == "tiny-16-fused":
            command += ["--text-encoder", write_text_encoder(self.root / "qwen3")]
        shared = self.shared(kind)
        command += ["--store", self.demo_store if kind == "demo-16" else self.store, "--out", shared]
        if "fp8" in precisions:
            # Its scales are measured in a bundle, this one as it is at first.
            statistics = self.root / f"{kind}.statistics.json"
            size = f"{DEMO_PX}x{DEMO_PX}"
            measuring = ("calibrate", shared, "--samples", 4, "--size", size, "--out", statistics, "--quiet")
            for arguments in (command, measuring):
                first = run_cli(*arguments)
                if first.returncode:
                    return first
            command += ["--statistics", statistics]
        for precision in precisions:
            command += ["--precision", precision]
        result = run_cli(*command)
        if result.returncode:
            return result
        packed = run_cli("pack", shared, "--out", self.root / kind)
        return result if packed.returncode == 0 else packed


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch with one thread: matrices this small wait for each other's, on a busy machine for 28 s instead of 4."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundles]:
    """Bundles of every kind, built once a session."""
    if kept := os.environ.get("L2P_TEST_BUNDLES"):
        # Beside others: what older code has built is not what this code builds.
        root = Path(kept).resolve() / _digest_of_packages()[:16]
    else:
        base = tmp_path_factory.getbasetemp()
        # Each process of pytest-xdist has a folder of its own in that of the session.
        root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "bundles"
    root.mkdir(exist_ok=True, parents=True)
    built = Bundles(root)
    with built.building():
        yield built


def _digest_of_packages() -> str:
    digest = hashlib.sha256()
    for folder in ("export", "runtime", "calib", "engines", "tests/golden"):
        for path in sorted((Path(__file__).parents[1] / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny 16 px checkpoint in the published spelling."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny.safetensors", 16)


def write_tiny_checkpoint(path: Path, patch: int, *, fused: bool = False) -> Path:
    """Write the golden generator's checkpoint."""
    state = tiny_checkpoint.checkpoint(patch)
    save_file(tiny_checkpoint.fused(state) if fused else state, path)
    return path


def write_text_encoder(folder: Path) -> Path:
    """Write a small random Qwen3 folder of the golden checkpoint's caption width."""
    from parity.text_models import write_qwen3

    write_qwen3(folder)
    return folder


def write_profile(path: Path, patch: int) -> Path:
    """Write a small profile for a patch size."""
    multiple = 2 * patch if patch == 160 else patch
    path.write_text(PROFILE.format(patch=patch, min=multiple, opt=2 * multiple, max=8 * multiple))
    return path


def link_traces(source: Path, target: Path) -> None:
    """Put the traces of a store into another, or into a bundle that has none: its build goes on from there."""
    _link(source, target, [stage for stage in stages(source) if stage.kind == "trace"])


def _link(source: Path, target: Path, found: list[Stage]) -> None:
    for stage in found:
        for name in (*(record.path for record in stage.files), f"stages/{stage.key}.json"):
            (target / name).parent.mkdir(exist_ok=True, parents=True)
            if not (target / name).exists():
                os.link(source / name, target / name)


def seed_store(source: Path, target: Path) -> None:
    """Another store with every finished stage of the store `source`.

    Its files are links: replace them, never write into them.
    """
    _link(source, target, stages(source))
    os.link(source / "l2p-store.json", target / "l2p-store.json")


def run_process(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `l2p-export` as a user does, in a process of its own: 3 to 5 s where the command imports torch."""
    command = [sys.executable, "-m", "l2p_export", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", check=False, cwd=cwd)


def run_cli(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `l2p-export` in the test process, from the same entry point to the same exit code.

    What it and its children write to stdout and stderr is caught where they write it, at the file descriptors. The
    environment, the handlers of signals and the working directory are afterwards what they were. A warning is an
    error here, as in any test. Only the main thread may call it: signals have handlers only there.
    """
    from l2p_export.cli.main import run

    words = ["l2p-export", *map(str, arguments)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with contextlib.ExitStack() as stack:
        if cwd is not None:
            stack.enter_context(contextlib.chdir(cwd))
        stack.enter_context(mock.patch.dict(os.environ))
        stack.enter_context(mock.patch.object(sys, "argv", words))
        out, err = (stack.enter_context(_caught(name)) for name in ("stdout", "stderr"))
        try:
            run()
        except SystemExit as end:
            assert isinstance(end.code, int)  # noqa: PT017
            code = end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess(words, code, out(), err())


@contextlib.contextmanager
def _caught(name: str) -> Iterator[Callable[[], str]]:
    """Catch a standard stream and its file descriptor; what is given tells afterwards what was written."""
    number = {"stdout": 1, "stderr": 2}[name]
    real = getattr(sys, f"__{name}__")
    before = getattr(sys, name)
    before.flush()
    text = ""
    saved = os.dup(number)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), number)
        stream = open(number, "w", encoding="utf-8", errors=real.errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        try:
            yield lambda: text
        finally:
            setattr(sys, name, before)
            stream.close()
            os.dup2(saved, number)
            os.close(saved)
            file.seek(0)
            text = file.read().decode("utf-8", "surrogateescape")
