from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from fakes.cuda import FakeDriver, fake_device, fake_driver
from fakes.tensorrt_runtime import RTX_VERSION, WEIGHT_BYTES, FakeLibrary, profile_of, write_engine
from l2p_runtime.backends.cuda import CudaDevice
from l2p_runtime.backends.trt_engine import TrtEngine
from l2p_runtime.backends.trt_layers import LayerPrecision, parse_layers, read_layers
from l2p_runtime.backends.trt_runtime import EngineRuntime, Journal
from l2p_runtime.contract import EngineProfile, EngineRecord, NetworkSpec, TensorSpec
from l2p_runtime.errors import ArtifactError, HostError, InternalError, L2PError, UsageError

SPEC = NetworkSpec(
    "toy",
    (
        TensorSpec("image", "float32", ("B", "4*n")),
        TensorSpec("mask", "bool", ("B", "4*n")),
        TensorSpec("ids", "int64", ("B", "4*n")),
    ),
    (TensorSpec("result", "float32", ("B", "4*n")),),
)
SMALL, LARGE = ({"B": (1, 1, 2), "n": span} for span in ((1, 2, 4), (4, 8, 16)))


@dataclass
class Kit:
    """An engine file of a toy network, the library and the device that run it."""

    device: CudaDevice
    driver: FakeDriver
    library: FakeLibrary
    shared: EngineRuntime
    path: Path
    record: EngineRecord

    def open(self, record: EngineRecord | None = None, spec: NetworkSpec = SPEC) -> TrtEngine:
        return TrtEngine(self.shared, self.path, record or self.record, spec)

    def arrays(self, batch: int, n: int, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any], NDArray[np.float32]]:
        """Inputs and outputs on the device, and the expected result."""
        rng = np.random.default_rng(seed)
        image = rng.standard_normal((batch, 4 * n), dtype=np.float32)
        mask = rng.random((batch, 4 * n)) < 0.5
        ids = rng.integers(0, 100, (batch, 4 * n))
        inputs = {"image": image, "mask": mask, "ids": ids}
        expected = np.where(mask, image, np.float32(0)) + ids.astype(np.float32)
        return (
            {name: self.device.upload(values) for name, values in inputs.items()},
            {"result": self.device.alloc((batch, 4 * n), "float32")},
            expected,
        )

    def require_right(self, engine: TrtEngine, batch: int, n: int) -> None:
        inputs, outputs, expected = self.arrays(batch, n)
        engine.run(inputs, outputs)
        self.device.synchronize()
        np.testing.assert_array_equal(self.device.download(outputs["result"]), expected)

    def prepared(self) -> tuple[Callable[[], None], TrtEngine]:
        """An engine, and a run of it."""
        engine = self.open()
        inputs, outputs, _ = self.arrays(1, 2)
        return lambda: engine.run(inputs, outputs), engine


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """result = where(mask, image, 0) + ids."""
    shape = ["B", "4*n"]
    inputs = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind in (("image", TensorProto.FLOAT), ("mask", TensorProto.BOOL), ("ids", TensorProto.INT64))
    ]
    nodes = [
        helper.make_node("Where", ["mask", "image", "zero"], ["kept"]),
        helper.make_node("Cast", ["ids"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["kept", "numbers"], ["result"]),
    ]
    output = helper.make_tensor_value_info("result", TensorProto.FLOAT, shape)
    zero = helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0])
    made = helper.make_graph(nodes, "toy", inputs, [output], [zero])
    path = tmp_path / "toy.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture
def kit(tmp_path: Path, graph: Path) -> Iterator[Kit]:
    made = make_kit(tmp_path, graph, [profile_of(SPEC, **SMALL), profile_of(SPEC, **LARGE)])
    yield made
    made.device.close()
    assert not made.driver.held_bytes


def make_kit(
    folder: Path, graph: Path, profiles: list[EngineProfile], *, driver: Mapping[str, Any] | None = None, **facts: Any
) -> Kit:
    device = fake_device(**(driver or {}))
    library = FakeLibrary(fake_driver(device))
    path = folder / "toy.engine"
    record = write_engine(path, graph, profiles, network="trunk", **facts)
    return Kit(device, fake_driver(device), library, EngineRuntime("rtx", library, device), path, record)


def test_results_are_the_graphs(kit: Kit) -> None:
    engine = kit.open()
    for batch, n in ((1, 1), (2, 4), (1, 3), (1, 3)):
        kit.require_right(engine, batch, n)
    engine.close()


def test_the_first_profile_that_covers_is_used_and_changed_only_when_it_must(kit: Kit) -> None:
    engine = kit.open()
    for n in (2, 4, 3):
        kit.require_right(engine, 1, n)
    assert kit.library.profiles == []  # 0 is active from the start, and covers 4 too
    for n in (5, 16, 5, 1, 2):
        kit.require_right(engine, 2, n)
    assert kit.library.profiles == [1, 0]
    engine.close()


def test_the_same_sizes_are_prepared_once(kit: Kit) -> None:
    engine = kit.open()
    for _ in range(3):
        kit.require_right(engine, 1, 2)
    assert kit.library.calls["set_input_shape"] == 3
    assert kit.library.calls["update_device_memory_size_for_shapes"] == 1
    assert kit.library.calls["set_device_memory"] == 3
    engine.close()


def test_no_profile_covers(kit: Kit) -> None:
    engine = kit.open()
    inputs, outputs, _ = kit.arrays(1, 17)
    with pytest.raises(UsageError) as caught:
        engine.run(inputs, outputs)
    assert "`toy` was not built for image [1, 68]" in str(caught.value)
    assert "image [1, 4] to [2, 16]" in str(caught.value)
    assert "or image [1, 16] to [2, 64]" in str(caught.value)
    assert "--profile" in caught.value.hint
    kit.require_right(engine, 1, 2)
    engine.close()


def test_arrays_that_would_corrupt_memory_are_refused(kit: Kit) -> None:
    engine, device = kit.open(), kit.device
    inputs, outputs, _ = kit.arrays(1, 2)
    wide = device.alloc((1, 16), "float32")
    wrong: list[tuple[dict[str, Any], dict[str, Any], type[L2PError], str]] = [
        ({**inputs, "image": device.alloc((1, 8), "float16")}, outputs, InternalError, "float16, expected float32"),
        ({**inputs, "mask": device.alloc((1, 8), "uint8")}, outputs, InternalError, "uint8, expected bool"),
        ({**inputs, "image": wide[:, ::2]}, outputs, InternalError, "not contiguous"),
        ({**inputs, "image": wide}, outputs, UsageError, "`mask` has shape"),
        ({**inputs, "image": device.alloc((8,), "float32")}, outputs, UsageError, "`image` has shape"),
        ({"image": inputs["image"]}, outputs, InternalError, "takes"),
        (inputs, {"result": wide}, InternalError, "writes result"),
        (inputs, {"result": wide[:, 1:9]}, InternalError, "multiple of 256"),
        (inputs, {}, InternalError, "writes result"),
    ]
    for given, written, kind, text in wrong:
        with pytest.raises(kind, match=text):
            engine.run(given, written)
    assert not kit.library.ran
    engine.close()


def test_a_view_that_begins_anywhere_is_copied_to_where_it_may(kit: Kit) -> None:
    engine, device = kit.open(), kit.device
    inputs, outputs, expected = kit.arrays(1, 2)
    rows = device.alloc((2, 8), "float32")
    view = rows[1:2]
    assert view.address % 256
    device.copy(view, inputs["image"])
    engine.run({**inputs, "image": view}, outputs)
    np.testing.assert_array_equal(device.download(outputs["result"]), expected)
    engine.close()


def test_scratch_memory_grows_with_the_sizes_and_is_shared(kit: Kit, tmp_path: Path, graph: Path) -> None:
    first, second = kit.open(), kit.open()
    need = kit.open()._engine.scratch_bytes
    shapes = dict.fromkeys(("image", "mask", "ids"), (2, 64))
    kit.require_right(first, 1, 1)
    small = kit.driver.held_bytes
    kit.require_right(second, 2, 16)
    assert kit.driver.held_bytes - small == need(shapes) - need(dict.fromkeys(shapes, (1, 4)))
    # The buffer has moved, and the first engine uses the new one.
    kit.require_right(first, 1, 1)
    kit.require_right(first, 2, 16)
    assert kit.driver.held_bytes - small == need(shapes) - need(dict.fromkeys(shapes, (1, 4)))
    first.close()
    second.close()


def test_an_engine_that_needs_no_scratch_gets_none(tmp_path: Path, graph: Path) -> None:
    kit = make_kit(tmp_path, graph, [profile_of(SPEC, **SMALL)], needs_no_scratch=True)
    engine = kit.open()
    kit.require_right(engine, 1, 2)
    assert not kit.library.calls["set_device_memory"]
    engine.close()


def test_where_the_sizes_need_is_not_told_the_profiles_is_taken(kit: Kit) -> None:
    kit.library.fail("update_device_memory_size_for_shapes", 0)
    engine = kit.open()
    inputs, outputs, expected = kit.arrays(1, 1)
    engine.run(inputs, outputs)
    np.testing.assert_array_equal(kit.device.download(outputs["result"]), expected)
    assert engine._scratch_bytes == engine._engine.get_device_memory_size_for_profile_v2(0)
    engine.close()


def test_a_library_without_the_question(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("fakes.tensorrt_runtime.Context.update_device_memory_size_for_shapes")
    engine = kit.open()
    kit.require_right(engine, 1, 1)
    assert engine._scratch_bytes == engine._engine.get_device_memory_size_for_profile_v2(0)
    engine.close()


@pytest.mark.parametrize(
    ("call", "answer", "kind", "text"),
    [
        ("deserialize_cuda_engine", None, ArtifactError, "cannot be opened with rtx 1.7.1.116"),
        ("create_execution_context", None, HostError, "create_execution_context.. failed in the engine of `toy`"),
    ],
)
def test_opening_fails(kit: Kit, call: str, answer: Any, kind: type[L2PError], text: str) -> None:
    held = kit.driver.held_bytes
    kit.library.fail(call, answer, "Error Code 4: the reason")
    with pytest.raises(kind, match=text) as caught:
        kit.open()
    assert "the library said: Error Code 4: the reason" in str(caught.value)
    assert caught.value.hint
    # Though the error, and so the frames that it passed, is still there.
    assert kit.driver.held_bytes == held
    assert +kit.library.alive == {}
    kit.library.heal()
    engine = kit.open()
    kit.require_right(engine, 1, 2)
    engine.close()


@pytest.mark.parametrize(
    ("call", "answer", "kind"),
    [
        ("set_input_shape", False, ArtifactError),
        ("get_tensor_shape", (1, 9), ArtifactError),
        ("get_device_memory_size_for_profile_v2", -1, HostError),
        ("set_device_memory", None, HostError),
        ("set_tensor_address", False, InternalError),
        ("execute_async_v3", False, HostError),
    ],
)
def test_running_fails_and_goes_on_once_the_cause_is_gone(
    kit: Kit, call: str, answer: Any, kind: type[L2PError]
) -> None:
    run, engine = kit.prepared()
    if call == "get_device_memory_size_for_profile_v2":
        kit.library.fail("update_device_memory_size_for_shapes", 0)
    kit.library.fail(call, answer, "Error Code 9: the reason")
    with pytest.raises(kind, match=r"Error Code 9: the reason") as caught:
        run()
    assert "`toy`" in str(caught.value)
    assert caught.value.hint
    kit.library.heal()
    kit.require_right(engine, 1, 2)
    engine.close()
    # Though the error, and so the frames that it passed, is still there.
    assert +kit.library.alive == {}


def test_memory_that_is_refused_is_not_run_on_what_was_there_before(kit: Kit) -> None:
    run, engine = kit.prepared()
    run()
    kit.library.fail("set_device_memory", None, "memory != nullptr")
    with pytest.raises(HostError, match=r"set_device_memory\(\) failed .* memory != nullptr"):
        run()
    assert len(kit.library.ran) == 1
    engine.close()


def test_a_profile_that_cannot_be_chosen(kit: Kit) -> None:
    engine = kit.open()
    kit.library.fail("set_optimization_profile_async", False, "Error Code 9: the reason")
    inputs, outputs, _ = kit.arrays(1, 9)
    with pytest.raises(HostError, match=r"set_optimization_profile_async\(1\) failed in the engine of `toy`.*Code 9"):
        engine.run(inputs, outputs)
    kit.library.heal()
    kit.require_right(engine, 1, 9)
    engine.close()


def test_a_library_that_says_nothing_is_quoted_as_such(kit: Kit) -> None:
    run, engine = kit.prepared()
    kit.library.fail("execute_async_v3", False, "")
    with pytest.raises(HostError, match="the library said nothing"):
        run()
    engine.close()


def test_an_older_message_is_not_blamed(kit: Kit) -> None:
    run, engine = kit.prepared()
    kit.library.say("from another engine")
    run()
    kit.library.fail("execute_async_v3", False, "this one")
    with pytest.raises(HostError) as caught:
        run()
    assert "from another engine" not in str(caught.value)
    engine.close()


@pytest.mark.parametrize(
    ("says", "kind", "text"),
    [
        ("Error Code 1: Cuda Runtime (out of memory)", HostError, "out of GPU memory"),
        ("Requested amount of GPU memory: OutOfMemory (no further information)", HostError, "out of GPU memory"),
        ("CUDA initialization failure with error: 35", HostError, "CUDA initialization failure"),
        ("Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed", ArtifactError, "magicTag"),
    ],
)
def test_what_the_log_says_decides_whose_fault_it_is(kit: Kit, says: str, kind: type[L2PError], text: str) -> None:
    kit.library.fail("deserialize_cuda_engine", None, says)
    with pytest.raises(kind, match=text):
        kit.open()


def test_weights_that_do_not_fit(tmp_path: Path, graph: Path) -> None:
    kit = make_kit(tmp_path, graph, [profile_of(SPEC, **SMALL)], driver={"total_bytes": 4096}, weight_bytes=5000)
    with pytest.raises(HostError, match="out of GPU memory") as caught:
        kit.open()
    assert "memory budget" in caught.value.hint
    kit.device.close()


def test_activations_that_do_not_fit_are_named(tmp_path: Path, graph: Path) -> None:
    kit = make_kit(tmp_path, graph, [profile_of(SPEC, B=(1, 1, 1), n=(1, 2, 256))], driver={"total_bytes": 40_000})
    engine = kit.open()
    inputs, outputs, _ = kit.arrays(1, 256)
    with pytest.raises(HostError, match=r"the activations of `toy` take 49,152 bytes at these sizes: .* has no memory"):
        engine.run(inputs, outputs)
    kit.require_right(engine, 1, 2)
    engine.close()
    kit.device.close()


@pytest.mark.parametrize("content", [b"", b"not an engine", b"\x00" * 4096])
def test_a_file_that_is_no_engine(kit: Kit, content: bytes) -> None:
    kit.path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"`toy\.engine`") as caught:
        kit.open()
    assert "build the bundle again" in caught.value.hint


@pytest.mark.parametrize(
    ("target", "version"),
    [
        ("rtx1.6-sm89", "1.6.2.50"),
        ("rtx1.7-sm120", RTX_VERSION),
        ("tensorrt1.7-sm89", RTX_VERSION),
    ],
)
def test_an_engine_for_another_library_or_gpu(kit: Kit, target: str, version: str) -> None:
    record = replace(kit.record, target=target, library_version=version)
    with pytest.raises(ArtifactError, match=f"built for {target}, this machine runs rtx1.7-sm89") as caught:
        kit.open(record)
    assert "--target rtx-sm89" in caught.value.hint
    assert not kit.library.calls["deserialize_cuda_engine"]


def test_a_portable_engine_runs_here(tmp_path: Path, graph: Path) -> None:
    kit = make_kit(tmp_path, graph, [profile_of(SPEC, **SMALL)], target="rtx1.7-portable")
    engine = kit.open()
    kit.require_right(engine, 1, 2)
    engine.close()


def test_an_engine_whose_record_lies_about_its_gpu(kit: Kit, graph: Path) -> None:
    write_engine(kit.path, graph, kit.record.profiles, network="trunk", target="rtx1.7-sm120")
    with pytest.raises(ArtifactError, match="not compatible with this version or device"):
        kit.open()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: replace(s, inputs=s.inputs[:2]), "has inputs ids, image, mask, the manifest says image, mask"),
        (lambda s: replace(s, outputs=()), "has outputs result, the manifest says none"),
        (
            lambda s: replace(s, inputs=(replace(s.inputs[0], dtype="float16"), *s.inputs[1:])),
            "`image` of `toy.engine` is float on the device, the manifest says float16",
        ),
    ],
)
def test_an_engine_of_another_network(kit: Kit, change: Callable[[NetworkSpec], NetworkSpec], text: str) -> None:
    held = kit.driver.held_bytes
    with pytest.raises(ArtifactError, match=text) as caught:
        kit.open(spec=change(SPEC))
    assert kit.driver.held_bytes == held, caught


def test_an_input_that_the_engine_reads_on_the_host(kit: Kit) -> None:
    kit.path.write_text(json.dumps({**json.loads(kit.path.read_text()), "locations": {"ids": "HOST"}}))
    with pytest.raises(ArtifactError, match=r"`ids` of `toy\.engine` is int64 on the host"):
        kit.open()


def test_another_number_of_profiles_than_recorded(kit: Kit) -> None:
    with pytest.raises(ArtifactError, match="has 2 optimization profiles, the manifest says 1"):
        kit.open(replace(kit.record, profiles=kit.record.profiles[:1]))


def test_a_record_with_wider_profiles_than_the_engine(kit: Kit) -> None:
    wide = profile_of(SPEC, B=(1, 1, 2), n=(1, 2, 64))
    engine = kit.open(replace(kit.record, profiles=(wide, wide)))
    inputs, outputs, _ = kit.arrays(1, 40)
    with pytest.raises(ArtifactError, match=r"set_input_shape\(image, \[1, 160\]\) failed.*not within profile 0"):
        engine.run(inputs, outputs)
    engine.close()


@pytest.mark.parametrize(("budget", "held"), [(0, 1000), (2000, 3000), (9000, 4000)])
def test_weights_that_do_not_fit_are_streamed(tmp_path: Path, graph: Path, budget: int, held: int) -> None:
    facts = {"weight_bytes": 4000, "streamable_bytes": 3000, "streaming_budget_bytes": budget}
    kit = make_kit(tmp_path, graph, [profile_of(SPEC, **SMALL)], **facts)
    engine = kit.open()
    assert engine.memory_bytes() == held
    kit.require_right(engine, 1, 2)
    engine.close()
    kit.device.close()


def test_memory_is_told_and_given_back(kit: Kit) -> None:
    before = kit.driver.held_bytes
    engine = kit.open()
    assert engine.memory_bytes() == WEIGHT_BYTES
    assert kit.driver.held_bytes - before == WEIGHT_BYTES
    kit.require_right(engine, 1, 2)
    engine.close()
    engine.close()
    kit.device.available_bytes()  # gives the scratch buffer back
    assert kit.driver.held_bytes == before
    assert +kit.library.alive == {}
    assert engine.memory_bytes() == 0


def test_closing_waits_for_what_runs_and_drops_the_engine_even_when_that_failed(kit: Kit) -> None:
    engine = kit.open()
    kit.driver.fail("cuStreamSynchronize", "CUDA_ERROR_ILLEGAL_ADDRESS", times=1)
    with pytest.raises(HostError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        engine.close()
    assert +kit.library.alive == {}
    engine.close()


def test_a_closed_engine_does_not_run(kit: Kit) -> None:
    run, engine = kit.prepared()
    engine.close()
    for call in (run, engine.layers):
        with pytest.raises(InternalError, match="the engine of `toy` is closed"):
            call()


def test_the_size_of_the_file_stands_in_for_weights_that_are_not_told(kit: Kit) -> None:
    kit.library.fail("get_engine_stat", -1, "")
    engine = kit.open()
    assert engine.memory_bytes() == kit.path.stat().st_size
    engine.close()


def test_another_thread_may_run_it(kit: Kit) -> None:
    engine = kit.open()
    kit.require_right(engine, 1, 2)
    inputs, outputs, expected = kit.arrays(1, 2, seed=1)
    thread = threading.Thread(target=lambda: engine.run(inputs, outputs))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(kit.device.download(outputs["result"]), expected)
    engine.close()


def test_a_context_that_another_library_made_current(kit: Kit) -> None:
    run, engine = kit.prepared()
    for _ in range(2):
        kit.driver.cuCtxSetCurrent(None)
        run()
    kit.driver.cuCtxSetCurrent(None)
    second = kit.open()
    second.close()
    engine.close()


def test_a_library_that_does_not_start(kit: Kit) -> None:
    kit.library.fail("Runtime", TypeError("pybind11::init(): factory function returned nullptr"), "driver error")
    with pytest.raises(HostError, match=r"TensorRT for RTX 1\.7\.1\.116 does not start: .* driver error"):
        EngineRuntime("rtx", kit.library, kit.device)


def test_the_journal_keeps_the_last_lines_on_one_line_each() -> None:
    journal = Journal()
    for index in range(20):
        journal.log("ERROR", f"line {index}\n  goes   on")
    journal.log("INFO", "chatter")
    journal.log("VERBOSE", "chatter")
    journal.log("INTERNAL_ERROR", "x" * 5000)
    assert len(journal.errors) == 8
    assert journal.errors[0] == "line 13 goes on"
    assert len(journal.errors[-1]) == 400
    journal.log("WARNING", "careful")
    assert "careful" not in str(journal.failure("it failed", HostError, ""))
    journal.errors.clear()
    assert "the library said: careful" in str(journal.failure("it failed", HostError, ""))


def test_layers_of_an_engine(kit: Kit) -> None:
    engine = kit.open()
    assert engine.layers() == (LayerPrecision("all", "kgen", ("float32",)),)
    kit.path.write_text(json.dumps({**json.loads(kit.path.read_text()), "detailed": False}))
    names = kit.open()
    assert names.layers() == (LayerPrecision("all"),)
    kit.library.fail("create_engine_inspector", None)
    assert read_layers(kit.library, names._engine) == ()
    engine.close()
    names.close()


@pytest.mark.parametrize(
    ("told", "dtype"),
    [
        ({"Format/Datatype": "Row major linear FP16 format"}, "float16"),
        ({"Format/Datatype": "Half"}, "float16"),
        ({"Format/Datatype": "Row major linear BFloat16 format"}, "bfloat16"),
        ({"Format/Datatype": "Row major linear BF16 format"}, "bfloat16"),
        ({"Format/Datatype": "Row major linear FP8 format (kE4M3)"}, "float8_e4m3fn"),
        ({"Format/Datatype": "Two wide channel vectorized row major FP32 format"}, "float32"),
        ({"Datatype": "Float"}, "float32"),
        ({"Format": "Row major linear", "DataType": "Int64"}, "int64"),
        ({"Format/Datatype": "Row major linear INT8 format"}, "int8"),
        ({"Format/Datatype": "Bool"}, "bool"),
        ({"Format/Datatype": "something new"}, "something new"),
        ({"Name": "FP16"}, ""),
        ("FP16", ""),
    ],
)
def test_how_libraries_speak_of_dtypes(told: Any, dtype: str) -> None:
    text = json.dumps({"Layers": [{"Name": "l", "LayerType": "gemm", "Outputs": [told]}]})
    assert parse_layers(text) == (LayerPrecision("l", "gemm", (dtype,)),)


@pytest.mark.parametrize("text", ["", "null", "[[[", '{"Layers": 3}', "3", '{"Bindings": []}', "[" * 100_000])
def test_inspections_that_say_nothing(text: str) -> None:
    assert parse_layers(text) == ()


def test_inspections_with_surprises() -> None:
    text = json.dumps([{"Name": 3}, 4, None, "one", {"Name": "two", "LayerType": [], "Outputs": {}}])
    assert parse_layers(text) == (LayerPrecision("one"), LayerPrecision("two"))
    assert parse_layers(None) == ()  # type: ignore[arg-type]
