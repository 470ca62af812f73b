"""Builds of engines that crash, are killed, or lack disk, memory or a whole graph: the right error, and nothing left.

A build imports `tensorrt_rtx` from wherever this process would, so that a test can put a module before it that does
something first.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from conftest import Bundles
from l2p_engines.builders.builder import build_engine, build_memory_bytes
from l2p_engines.builders.request import BuildProgress, EngineRequest, EngineSpec
from l2p_engines.builders.shapes import engine_profiles
from l2p_engines.builders.trt import library_version
from l2p_engines.builders.watching import STALLED_SECONDS
from l2p_engines.profiles import load_profile
from l2p_runtime.bundle import Bundle, open_bundle
from l2p_runtime.contract import Target
from l2p_runtime.errors import ArtifactError, HostError, InternalError, L2PError
from tools.mounts import mounted

pytest.importorskip("tensorrt_rtx")

STOPPED_SECONDS = 2
LIBRARY = """
import importlib, os, resource, signal, sys, time
from pathlib import Path

# A crash would leave its core beside the graph.
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
folder = Path(__file__).resolve().parent
(folder / "worker.part").write_text(str(os.getpid()))
(folder / "worker.part").rename(folder / "worker.pid")
{before}
sys.path.remove(str(folder))
del sys.modules["tensorrt_rtx"]
trt = importlib.import_module("tensorrt_rtx")
{after}
"""
HANG = "trt.OnnxParser = lambda *arguments: time.sleep(60)"
BUSY = "stop = time.monotonic() + 1.5\nwhile time.monotonic() < stop: pass"
SLOW_DISK = "os.fsync = lambda file: time.sleep(60)"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
PARENT = """
import pickle, sys
from l2p_engines.builders.builder import build_engine

request, out = pickle.load(sys.stdin.buffer)
build_engine(request, out, lambda progress: print(progress.phase, flush=True))
"""


@dataclass
class Site:
    """A folder for an engine, and what the worker's library does beside its work."""

    bundle: Bundle
    root: Path
    monkeypatch: pytest.MonkeyPatch

    @property
    def out(self) -> Path:
        return self.root / "out" / "engine"

    def request(self, network: str = "tail", plan: str = "fp16") -> EngineRequest:
        manifest = self.bundle.manifest
        spec = next(spec for spec in manifest.networks if spec.name == network)
        record = next(graph for graph in manifest.graphs if (graph.network, graph.plan) == (network, plan))
        shapes = engine_profiles(spec, manifest.model, [load_profile("1k")])
        weight_bytes = self.bundle.path(record.weights).stat().st_size
        target = Target("rtx", library_version("rtx"), "sm89")
        return EngineRequest(EngineSpec(spec, plan, target, shapes), self.bundle.path(record.graph), weight_bytes)

    def library(self, before: str = "", after: str = "") -> None:
        """Have the worker run this before and after it loads the library."""
        (self.root / "library").mkdir(exist_ok=True)
        (self.root / "library" / "tensorrt_rtx.py").write_text(LIBRARY.format(before=before, after=after))
        self.monkeypatch.syspath_prepend(self.root / "library")

    @property
    def worker(self) -> int:
        return int((self.root / "library" / "worker.pid").read_text())

    def fail(
        self,
        request: EngineRequest,
        progress: Callable[[BuildProgress], None] = lambda progress: None,
        stalled_seconds: float = STALLED_SECONDS,
    ) -> L2PError:
        """The error of a build that leaves nothing."""
        with pytest.raises(L2PError) as caught:
            build_engine(request, self.out, progress, stalled_seconds)
        assert list(self.out.parent.iterdir()) == []
        return caught.value

    def strike(self, number: int, phase: str) -> Callable[[BuildProgress], None]:
        """Send a signal to the worker when it comes to a phase."""
        return lambda progress: os.kill(self.worker, number) if progress.phase == phase else None


@pytest.fixture(scope="module")
def bundle(bundles: Bundles) -> Bundle:
    return open_bundle(bundles.path("tiny-16"))


@pytest.fixture
def site(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    # Before a test puts its own in front: the version is asked for in this process.
    library_version("rtx")
    (tmp_path / "out").mkdir()
    return Site(bundle, tmp_path, monkeypatch)


def runs(process: int) -> bool:
    """Whether it is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(("phase", "after"), [("parsing graph", HANG), ("writing engine", SLOW_DISK)])
def test_a_killed_worker_is_out_of_memory_and_the_forecast_is_told(site: Site, phase: str, after: str) -> None:
    site.library(after=after)
    request = site.request()
    error = site.fail(request, site.strike(signal.SIGKILL, phase))
    assert type(error) is HostError
    assert error.exit_code == 3
    assert "out of memory, most likely" in str(error)
    assert f"while it was at `{phase}`" in str(error)
    assert f"the forecast is {build_memory_bytes(request.weight_bytes):,} bytes" in str(error)
    assert re.search(r" [\d,]{9,} bytes were free", str(error))
    assert "lower --precision" in error.hint


@pytest.mark.parametrize("deaf", [False, True])
def test_a_worker_that_does_nothing_is_out_of_memory_and_ended(site: Site, deaf: bool) -> None:
    hang = f"""
def parse(network, logger):
    logger.log(trt.ILogger.ERROR, "a thread was refused its stack")
    time.sleep(60)
trt.OnnxParser = parse
{DEAF if deaf else ""}
"""
    site.library(after=hang)
    request, started = site.request(), time.monotonic()
    error = site.fail(request, stalled_seconds=0.5)
    assert time.monotonic() - started < 30
    assert type(error) is HostError
    assert error.exit_code == 3
    assert re.search(
        r"out of memory, most likely: .* nothing for \d seconds while it was at `parsing graph`", str(error)
    )
    assert f"the forecast is {build_memory_bytes(request.weight_bytes):,} bytes" in str(error)
    assert "\n  a thread was refused its stack" in str(error)
    assert "ulimit -d" in error.hint
    assert not runs(site.worker)


@pytest.mark.parametrize(
    "after",
    [BUSY, "sync = os.fsync; os.fsync = lambda file: (time.sleep(1.5), sync(file))"],
    ids=["busy", "writing to a file system of another process"],
)
def test_a_worker_that_says_nothing_but_works_is_left_to_it(site: Site, after: str) -> None:
    site.library(after=after)
    built = build_engine(site.request(), site.out, stalled_seconds=0.5)
    assert built.seconds > 1.5
    assert built.peak_memory_bytes > 20_000_000
    assert site.out.stat().st_size == built.size_bytes


def test_a_crash_is_an_error_like_any_other(site: Site) -> None:
    site.library(after=HANG)
    error = site.fail(site.request(), site.strike(signal.SIGSEGV, "parsing graph"))
    assert type(error) is HostError
    assert "the library crashed (SIGSEGV) while it was at `parsing graph`, and the library said nothing" in str(error)
    assert "not in the table of known ones" in error.hint


def test_a_crash_whose_cause_is_known_is_explained(site: Site) -> None:
    site.library("print('No importer registered for op: Frobnicate', file=sys.stderr, flush=True); os.abort()")
    error = site.fail(site.request())
    assert type(error) is ArtifactError
    assert "operator Frobnicate" in str(error)
    assert "the library crashed (SIGABRT)" in str(error)


def test_a_crash_is_not_laid_to_warnings_of_a_good_graph(site: Site) -> None:
    warning = "IShuffleLayer with zeroIsPlaceHolder=true has reshape dimension at position 1"
    after = f"""
def parse(network, logger):
    logger.log(trt.ILogger.WARNING, {warning!r})
    os.kill(os.getpid(), signal.SIGSEGV)
trt.OnnxParser = parse
"""
    site.library(after=after)
    error = site.fail(site.request())
    assert type(error) is HostError
    assert "the library crashed (SIGSEGV)" in str(error)


@pytest.mark.parametrize("after", ["", HANG, f"{DEAF}; {HANG}"], ids=["busy", "hanging", "deaf"])
def test_an_interrupt_ends_the_worker_at_once(site: Site, after: str) -> None:
    site.library(after=after)
    raised: list[float] = []

    def interrupt(progress: BuildProgress) -> None:
        raised.append(time.monotonic())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(site.request("stem"), site.out, interrupt)
    assert len(raised) == 1
    assert time.monotonic() - raised[0] < STOPPED_SECONDS
    assert not runs(site.worker)
    assert list(site.out.parent.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_ends_with_the_one_it_serves(site: Site, number: int) -> None:
    site.library(after=HANG)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command, pipe = [sys.executable, "-c", PARENT], subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe) as parent:
        try:
            assert parent.stdin is not None
            assert parent.stdout is not None
            pickle.dump((site.request(), site.out), parent.stdin)
            parent.stdin.close()
            assert parent.stdout.readline() == b"parsing graph\n"
            worker = site.worker
            # Ctrl-C reaches the whole group; it is for the parent to say what becomes of the build.
            os.kill(worker, signal.SIGINT)
            time.sleep(0.2)
            assert runs(worker)
            parent.send_signal(number)
            parent.wait(STOPPED_SECONDS)
            stop = time.monotonic() + STOPPED_SECONDS
            while runs(worker):
                assert time.monotonic() < stop
                time.sleep(0.02)
        finally:
            parent.kill()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda graph, weights: os.truncate(graph, graph.stat().st_size // 2), "no ONNX graph"),
        (lambda graph, weights: graph.write_bytes(b""), "no ONNX graph"),
        (lambda graph, weights: graph.write_bytes(b"this is no graph, and was never one\n" * 50), "no ONNX graph"),
        (lambda graph, weights: graph.unlink(), "there is no graph"),
        (lambda graph, weights: weights.unlink(), "weights are not where it says"),
        (lambda graph, weights: os.truncate(weights, 1000), "weights are not where it says"),
    ],
    ids=["truncated", "empty", "text", "no graph", "no weights", "short weights"],
)
def test_a_damaged_graph_is_refused(site: Site, damage: Callable[[Path, Path], object], says: str) -> None:
    request = site.request()
    (weights,) = request.graph.parent.glob("tail.fp16.*.safetensors")
    graph, weights = (Path(shutil.copy(path, site.root)) for path in (request.graph, weights))
    damage(graph, weights)
    error = site.fail(replace(request, graph=graph))
    assert type(error) is ArtifactError
    assert error.exit_code == 4
    assert says in str(error)


def test_a_graph_of_another_network_is_refused_and_an_old_engine_kept(site: Site) -> None:
    site.out.write_bytes(b"an older one")
    wrong = replace(site.request(), graph=site.request("stem").graph)
    with pytest.raises(ArtifactError, match=r"has inputs caption, image, .*, expected tokens, modulation"):
        build_engine(wrong, site.out)
    assert [path.read_bytes() for path in site.out.parent.iterdir()] == [b"an older one"]


def test_no_room_is_told_before_any_work(site: Site) -> None:
    with mounted(site.root / "small", "size=4m") as disk:
        with pytest.raises(HostError, match=r"bytes free, the engine `head\.fp16") as caught:
            build_engine(site.request("head"), disk / "engine", lambda progress: pytest.fail("it began"))
        assert list(disk.iterdir()) == []
    assert "free some space" in caught.value.hint


def test_a_disk_that_fills_up_while_writing(site: Site) -> None:
    # What was checked before is a forecast, here of weights that are not there.
    request = replace(site.request("head"), weight_bytes=0)
    with mounted(site.root / "full", "size=11m") as disk:
        with pytest.raises(HostError, match="No space left on device") as caught:
            build_engine(request, disk / "engine")
        assert list(disk.iterdir()) == []
    assert f"to `{site.root / 'full'}` after" in str(caught.value)
    assert caught.value.exit_code == 3
    assert caught.value.hint == "free some space, or choose another --out"


def test_a_limit_on_the_size_of_files_is_told(site: Site) -> None:
    site.library("resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))")
    error = site.fail(site.request("head"))
    assert type(error) is HostError
    assert "File too large" in str(error)
    assert "free some space" in error.hint


def test_a_folder_that_cannot_be_written(site: Site) -> None:
    with mounted(site.root / "fixed", "size=64m,ro") as disk, pytest.raises(HostError) as caught:
        build_engine(site.request(), disk / "engine")
    assert "Read-only file system" in str(caught.value)
    assert caught.value.hint == "choose another --out"


@pytest.mark.parametrize(("kind", "field", "left_mib"), [("RLIMIT_AS", "VmSize", 40), ("RLIMIT_DATA", "VmData", 16)])
def test_a_limit_on_memory_is_told(site: Site, kind: str, field: str, left_mib: int) -> None:
    site.library(
        after=f"""
status = Path("/proc/self/status").read_text().split()
limit = int(status[status.index("{field}:") + 1]) * 1024 + ({left_mib} << 20)
resource.setrlimit(resource.{kind}, (limit, limit))
"""
    )
    error = site.fail(site.request("head", "fp32"))
    assert type(error) is HostError
    assert "out of memory" in str(error)
    assert "free some memory" in error.hint


NOISE = "sys.stderr.buffer.write((b'\\xff\\x00\\x1b[31m' * 2000 + b'\\n') * {lines} + b'\\xf0' * 999_999)"


def test_noise_of_a_worker_does_not_matter(site: Site) -> None:
    site.library(NOISE.format(lines=300), "os.write(1, b'the library says hello\\n')")
    built = build_engine(site.request(), site.out)
    assert site.out.stat().st_size == built.size_bytes


def test_a_worker_that_ends_without_a_word_is_a_bug_and_its_noise_is_cut(site: Site) -> None:
    site.library(NOISE.format(lines=1) + "; sys.stderr.flush(); os._exit(3)")
    error = site.fail(site.request())
    assert type(error) is InternalError
    assert error.exit_code == 70
    assert "ended with code 3 while it was at `starting`: " in str(error)
    assert len(str(error)) < 2000
    assert str(error).isprintable()


def test_what_a_library_raises_is_an_error_of_the_machine(site: Site) -> None:
    site.library(after="trt.OnnxParser = lambda *arguments: 1 / 0")
    error = site.fail(site.request())
    assert type(error) is HostError
    assert "ZeroDivisionError" in str(error)
