from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fakes.tensorrt import (
    CHUNKS,
    BuilderFlag,
    Config,
    FakeBuilds,
    HardwareCompatibilityLevel,
    MemoryPoolType,
    ParserError,
    ProfilingVerbosity,
    Tensor,
)
from fakes.tensorrt_types import DataType, Severity
from l2p_engines.builders.compiling import Compiled, compile_engine
from l2p_engines.builders.gpus import Gpu
from l2p_engines.builders.listeners import Journal, Phases
from l2p_engines.builders.request import BuildProgress, EngineSpec, require_timings
from l2p_engines.builders.trt import EngineSettings, RtxLibrary, TensorRtLibrary, require_settings
from l2p_runtime.contract import EngineProfile, InputShapes, NetworkSpec, Target, TensorSpec
from l2p_runtime.errors import ArtifactError, HostError, L2PError, UnsupportedError, UsageError

NETWORK = NetworkSpec(
    "stem",
    (TensorSpec("image", "float32", ("B", 3, "16*h", "16*w")), TensorSpec("table", "float32", (8, 4))),
    (TensorSpec("tokens", "float32", ("B", "s", 64)),),
)
TABLE = InputShapes("table", *((8, 4),) * 3)
SMALL, LARGE = (
    EngineProfile((InputShapes("image", (1, 3, low, 16), (1, 3, mid, 32), (2, 3, high, 64)), TABLE))
    for low, mid, high in ((16, 32, 64), (64, 128, 256))
)
H200 = Gpu("NVIDIA H200", "sm90")
ENGINE = b"".join(CHUNKS)


@dataclass
class Bench:
    """A fake library, and what a build with it told."""

    folder: Path
    fake: FakeBuilds = field(default_factory=lambda: FakeBuilds(NETWORK))
    journal: Journal = field(default_factory=Journal)
    told: list[BuildProgress] = field(default_factory=list)

    def build(
        self,
        settings: EngineSettings | None = None,
        target: str = "tensorrt-sm90",
        out: Path | None = None,
        timings: Path | None = None,
    ) -> Compiled:
        backend, _, capability = target.partition("-")
        library: Any = {"tensorrt": TensorRtLibrary, "rtx": RtxLibrary}[backend](self.fake, self.fake.__version__)
        version = {"tensorrt": "11.4", "rtx": "1.7"}[backend]
        spec = EngineSpec(
            NETWORK,
            "fp16",
            Target(library.backend, version, capability),
            (SMALL, LARGE),
            (),
            settings or EngineSettings(),
        )
        phases = Phases(self.told.append)
        out = out or self.folder / "engine"
        return compile_engine(library, spec, "stem.onnx", out, self.journal, phases, timings)

    @property
    def config(self) -> Config:
        assert self.fake.config is not None
        return self.fake.config


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr("l2p_engines.builders.trt.gpus", lambda: (H200,))
    return Bench(tmp_path)


def test_an_engine_is_what_the_library_wrote(bench: Bench) -> None:
    bench.fake.fail("parse_from_file", True, "weights are cast", "weights are cast", severity=Severity.WARNING)
    built = bench.build()
    assert (bench.folder / "engine").read_bytes() == ENGINE
    assert bench.fake.written == [len(chunk) for chunk in CHUNKS]
    assert bench.fake.graphs == ["stem.onnx"]
    assert built == Compiled(hashlib.sha256(ENGINE).hexdigest(), len(ENGINE), (SMALL, LARGE), ("weights are cast",))
    asked = [profile.shapes for profile in bench.config.profiles]
    assert asked[1] == {"image": [(1, 3, 64, 16), (1, 3, 128, 32), (2, 3, 256, 64)], "table": [(8, 4)] * 3}
    assert asked[0]["image"][2] == (2, 3, 64, 64)


def test_where_a_build_stands_is_told_and_never_falls(bench: Bench) -> None:
    bench.build()
    fractions = [progress.fraction for progress in bench.told]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0, 1)
    phases = list(dict.fromkeys(progress.phase for progress in bench.told))
    assert phases == ["parsing graph", "Building engine", "Computing profile costs", "writing engine"]
    assert bench.told[-1].step == len(ENGINE)


def test_settings_that_are_left_out_stay_the_librarys_own_but_tf32(bench: Bench) -> None:
    bench.build()
    assert bench.config.flags == set()
    assert bench.config.pools == {}
    assert bench.config.builder_optimization_level == 3
    assert bench.config.hardware_compatibility_level is HardwareCompatibilityLevel.NONE
    assert bench.config.num_compute_capabilities == 0


def test_layers_can_be_inspected_in_every_engine(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.build()
    assert bench.config.profiling_verbosity is ProfilingVerbosity.DETAILED
    ignored = property(lambda config: ProfilingVerbosity.LAYER_NAMES_ONLY, lambda config, value: None)
    monkeypatch.setattr(Config, "profiling_verbosity", ignored)
    with pytest.raises(UsageError, match=r"the profiling verbosity is ProfilingVerbosity\.LAYER_NAMES_ONLY"):
        bench.build()


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        (EngineSettings(tf32=True), {BuilderFlag.TF32}),
        (EngineSettings(weight_streaming=True), {BuilderFlag.WEIGHT_STREAMING}),
        (EngineSettings(version_compatible=True), {BuilderFlag.VERSION_COMPATIBLE}),
        (EngineSettings(tf32=True, version_compatible=True), {BuilderFlag.TF32, BuilderFlag.VERSION_COMPATIBLE}),
    ],
)
def test_flags_are_set(bench: Bench, settings: EngineSettings, flags: set[BuilderFlag]) -> None:
    bench.build(settings)
    assert bench.config.flags == flags


def test_numbers_are_set(bench: Bench) -> None:
    bench.build(EngineSettings(workspace_bytes=1 << 33, optimization_level=0, hardware_compatible=True))
    assert bench.config.pools == {MemoryPoolType.WORKSPACE: 1 << 33}
    assert bench.config.builder_optimization_level == 0
    assert bench.config.hardware_compatibility_level is HardwareCompatibilityLevel.AMPERE_PLUS
    assert bench.config.flags == set()


CALLS: dict[str, Any] = {
    "Builder": None,
    "create_network": None,
    "OnnxParser": None,
    "parse_from_file": False,
    "create_builder_config": None,
    "create_optimization_profile": None,
    "add_optimization_profile": -1,
    "build_serialized_network_to_stream": False,
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_tells_what_the_library_said(bench: Bench, call: str) -> None:
    bench.fake.fail(call, CALLS[call], *(f"line {number}" for number in range(20)))
    with pytest.raises(L2PError) as caught:
        bench.build()
    assert type(caught.value) is HostError
    assert bench.fake.calls[-1] == call
    text = str(caught.value)
    assert "cannot build `stem.fp16.tensorrt11.4-sm90` with TensorRT 11.4.0.106: " in text
    assert text.splitlines()[1:] == [f"  line {number}" for number in range(12, 20)]
    assert call in text or call == "parse_from_file"


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_for_a_known_reason_is_explained(bench: Bench, call: str) -> None:
    bench.fake.fail(call, CALLS[call], "Error Code 10: Could not find any implementation for node {ForeignNode[a]}")
    with pytest.raises(UnsupportedError, match=r"no kernel runs {ForeignNode"):
        bench.build()


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_and_says_nothing_is_an_error_all_the_same(bench: Bench, call: str) -> None:
    bench.fake.fail(call, CALLS[call])
    kinds: dict[str, type[L2PError]] = {"parse_from_file": ArtifactError, "add_optimization_profile": UsageError}
    with pytest.raises(L2PError, match="cannot build `stem") as caught:
        bench.build()
    assert type(caught.value) is kinds.get(call, HostError)


def test_no_engine_at_all_is_an_error(bench: Bench) -> None:
    bench.fake.fail("build_serialized_network_to_stream", None)
    with pytest.raises(HostError, match="returned None, and the library said nothing"):
        bench.build()
    bench.fake.fail("build_serialized_network_to_stream", True)
    bench.fake.chunks = ()
    with pytest.raises(HostError, match="has 0 bytes on disk"):
        bench.build()


def test_every_call_that_answers_is_checked(bench: Bench) -> None:
    bench.build()
    assert set(bench.fake.calls) == {*CALLS, "get_shape"}


def test_what_is_set_is_read_back(bench: Bench) -> None:
    bench.fake.fail("get_memory_pool_limit", 4096)
    with pytest.raises(UsageError, match="workspace limit is 4096, not 8192"):
        bench.build(EngineSettings(workspace_bytes=8192))
    bench.fake.fail("get_shape", [(1, 3, 16, 16)] * 3)
    with pytest.raises(HostError, match="came back as"):
        bench.build()


def test_contradictions_that_are_only_warned_of_are_errors(bench: Bench) -> None:
    text = "Profile kMAX values are not self-consistent. IElementWiseLayer: broadcast dimensions"
    bench.fake.fail("build_serialized_network_to_stream", True, text, severity=Severity.WARNING)
    with pytest.raises(UsageError, match="cannot take the MAX shapes"):
        bench.build()


def test_errors_of_the_parser_name_the_node(bench: Bench) -> None:
    bench.fake.parser_errors = [ParserError("must have same input types", "blocks.0/add"), ParserError("and more")]
    with pytest.raises(ArtifactError, match=r"mixes dtypes(.|\n)*in node `blocks.0/add` \(Add\)\n  and more"):
        bench.build()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda fake: fake.inputs.pop(), "has inputs image, expected image, table"),
        (lambda fake: fake.inputs.append(Tensor("mask", DataType.BOOL, (-1,))), "has inputs image, mask, table"),
        (lambda fake: fake.outputs.clear(), "has outputs none, expected tokens"),
        (lambda fake: (fake.inputs.clear(), fake.outputs.clear()), "is no ONNX graph, or an empty one"),
        (lambda fake: setattr(fake.inputs[0], "dtype", DataType.HALF), r"input `image` .* is half .*expected float32"),
        (lambda fake: setattr(fake.inputs[0], "shape", (-1, 4, -1, -1)), r"\[-1, 4, -1, -1\], expected .*16\*h"),
        (lambda fake: setattr(fake.inputs[0], "shape", (-1, 3, 64, -1)), r"\[-1, 3, 64, -1\]"),
        (lambda fake: setattr(fake.outputs[0], "shape", (-1, -1)), "output `tokens`"),
        (lambda fake: setattr(fake.outputs[0], "shape", (-1, -1, 32)), "output `tokens`"),
    ],
)
def test_a_graph_of_another_network_is_refused(bench: Bench, change: Callable[[FakeBuilds], object], says: str) -> None:
    change(bench.fake)
    with pytest.raises(ArtifactError, match=says):
        bench.build()
    assert "build_serialized_network_to_stream" not in bench.fake.calls


def test_an_output_size_that_the_library_worked_out_is_taken(bench: Bench) -> None:
    bench.fake.outputs[0].shape = (-1, 96, 64)
    bench.build()


@pytest.mark.parametrize("size", [10, 10 << 20])
def test_a_full_disk_is_told_though_the_library_saw_no_failure(bench: Bench, size: int) -> None:
    # A small engine fails when its buffer is flushed, a large one while it is written.
    bench.fake.chunks = (b"x" * size, b"y")
    with pytest.raises(HostError, match=r"to `/dev` after .* bytes: No space left on device") as caught:
        bench.build(out=Path("/dev/full"))
    assert "free some space" in caught.value.hint
    assert bench.fake.written == ([10, 1] if size == 10 else [0, 0])


def test_an_engine_that_cannot_be_opened_is_told(bench: Bench) -> None:
    with pytest.raises(HostError, match="after 0 bytes: No such file or directory") as caught:
        bench.build(out=bench.folder / "no" / "engine")
    assert caught.value.hint == "choose another --out"


@pytest.mark.parametrize(("found", "says"), [((), "no NVIDIA driver"), ((Gpu("A10", "sm86"),), "A10 .sm86.; sm90 was")])
def test_the_gpu_is_asked_for_before_anything_of_the_library_is_made(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, found: tuple[Gpu, ...], says: str
) -> None:
    monkeypatch.setattr("l2p_engines.builders.trt.gpus", lambda: found)
    with pytest.raises(HostError, match=says) as caught:
        bench.build()
    assert caught.value.exit_code == 3
    assert bench.fake.calls == []
    assert not (bench.folder / "engine").exists()


def test_rtx_builds_for_a_gpu_that_is_not_there(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l2p_engines.builders.trt.gpus", tuple)
    bench.fake.__version__ = "1.7.1.116"
    bench.build(target="rtx-sm120")
    assert [capability.name for capability in bench.config.capabilities.values()] == ["SM120"]
    bench.build(target="rtx-portable")
    assert (bench.config.num_compute_capabilities, bench.config.capabilities) == (0, {})
    bench.fake.fail("set_compute_capability", False)
    with pytest.raises(UsageError, match=r"set_compute_capability\(sm89\) is False"):
        bench.build(target="rtx-sm89")


@pytest.mark.parametrize("setting", ["version_compatible", "hardware_compatible"])
def test_rtx_refuses_compatibility_that_it_cannot_build(bench: Bench, setting: str) -> None:
    settings = EngineSettings(**{setting: True})
    require_settings("tensorrt", settings)
    with pytest.raises(UsageError, match="TensorRT for RTX") as caught:
        bench.build(settings, "rtx-sm89")
    assert caught.value.hint
    assert bench.fake.calls == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("workspace_bytes", 0), ("workspace_bytes", 2**63), ("optimization_level", 6), ("optimization_level", -1)],
)
def test_numbers_that_the_libraries_take_without_a_word_are_refused(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"is {value}"):
        EngineSettings(**{name: value})  # type: ignore[arg-type]


def test_phases_that_the_library_mixes_up_are_borne() -> None:
    told: list[BuildProgress] = []
    phases = Phases(told.append)
    phases.step("never begun", 3)
    phases.finish("never begun")
    phases.start("outer", "never begun", 2)
    phases.start("inner", "outer", -1)
    phases.step("inner", 7)
    phases.step("outer", 9)
    phases.finish("outer")
    phases.step("inner", 8)
    phases.start("outer", None, 1)
    phases.finish("outer")
    assert [progress.fraction for progress in told] == sorted(progress.fraction for progress in told)
    assert told[-1] == BuildProgress("outer", 0, 1, 1, 1.0)


@pytest.mark.parametrize(
    ("found", "written"), [(None, b"+timed"), (b"kernels", b"kernels+timed"), (b"another GPU's", b"+timed")]
)
def test_kernel_timings_are_read_and_written(bench: Bench, found: bytes | None, written: bytes) -> None:
    path = bench.folder / "timings"
    if found is not None:
        path.write_bytes(found)
    bench.build(timings=path)
    assert path.read_bytes() == written
    assert sorted(entry.name for entry in bench.folder.iterdir()) == ["engine", "timings"]


def test_timings_that_cannot_be_written_are_an_error(bench: Bench) -> None:
    with pytest.raises(HostError, match="cannot write the timing cache"):
        bench.build(timings=bench.folder / "nowhere" / "timings")


def test_rtx_has_no_timings() -> None:
    require_timings("tensorrt", Path("x"))
    with pytest.raises(UsageError, match="has no timing cache"):
        require_timings("rtx", Path("x"))
