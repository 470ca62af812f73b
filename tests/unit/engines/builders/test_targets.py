from __future__ import annotations

import ctypes
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2p_engines.builders.gpus import Gpu, gpus
from l2p_engines.builders.targets import (
    multiplies_float32,
    parse_targets,
    require_dtypes,
    require_float32_products,
    runs,
)
from l2p_engines.builders.trt import library_version, load_library
from l2p_runtime.contract import CAPABILITIES, PORTABLE, EngineBackend, Target, target_from_spelling
from l2p_runtime.errors import HostError, UsageError

INSTALLED = {"rtx": "1.7", "tensorrt": "11.4"}
PIECES = (
    "rtx",
    "tensorrt",
    "RTX",
    "1.7",
    "11.4",
    "1",
    ".",
    "-",
    "sm",
    "sm89",
    "SM120",
    "sm90",
    "portable",
    ",",
    " ",
    "٣",
)
WRONG = ["sm89", "rtx", "rtx-", "rtx_sm89", "rtx-sm8", "rtx-sm1200", "rtx-89", "rtx-sm٨٩", "cuda-sm89", "rtx1-sm89"]
WRONG += ["rtx1.7.1-sm89", "rtxsm89", "rtx-sm89;rtx-sm120", "rtx-sm89 rtx-sm120", "rtx1.7", "rtx-this", "portable1.7"]


def version(backend: EngineBackend) -> str:
    return INSTALLED[backend]


def parse(text: str, this: EngineBackend = "rtx") -> tuple[Target, ...]:
    return parse_targets(text, this, version)


def spellings(text: str) -> list[str]:
    return [target.spelling for target in parse(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rtx-sm89", ["rtx1.7-sm89"]),
        ("rtx1.7-sm89", ["rtx1.7-sm89"]),
        ("RTX-SM120", ["rtx1.7-sm120"]),
        ("portable", ["rtx1.7-portable"]),
        ("rtx-Portable", ["rtx1.7-portable"]),
        ("tensorrt-sm90", ["tensorrt11.4-sm90"]),
        ("TensorRT11.4-sm100", ["tensorrt11.4-sm100"]),
        ("rtx-sm89,rtx-sm120", ["rtx1.7-sm89", "rtx1.7-sm120"]),
        (" rtx-sm120 ,\trtx-sm89\n", ["rtx1.7-sm120", "rtx1.7-sm89"]),
        ("tensorrt-sm89,portable,rtx-sm89", ["tensorrt11.4-sm89", "rtx1.7-portable", "rtx1.7-sm89"]),
    ],
)
def test_spellings_are_understood(text: str, expected: list[str]) -> None:
    assert spellings(text) == expected


def test_a_target_named_twice_is_one() -> None:
    assert spellings("rtx-sm89,portable,RTX1.7-SM89,rtx-portable") == ["rtx1.7-sm89", "rtx1.7-portable"]


@pytest.mark.parametrize("backend", CAPABILITIES)
def test_every_capability_is_a_target_that_reads_back(backend: EngineBackend) -> None:
    for capability in CAPABILITIES[backend]:
        (target,) = parse(f"{backend}-{capability}")
        assert target == Target(backend, INSTALLED[backend], capability)
        assert target_from_spelling(target.spelling) == target


@pytest.mark.parametrize("text", ["", " ", ",", "rtx-sm89,", ",rtx-sm89", "rtx-sm89,,rtx-sm120"])
def test_a_blank_names_no_target(text: str) -> None:
    with pytest.raises(UsageError, match="names no target") as caught:
        parse(text)
    assert "portable; this" in caught.value.hint


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_target_is_refused_with_all_that_are(text: str) -> None:
    with pytest.raises(UsageError, match="there is no target") as caught:
        parse(text)
    for capability in CAPABILITIES["rtx"]:
        assert capability in caught.value.hint


@pytest.mark.parametrize(
    ("text", "needles"),
    [
        ("rtx-sm90", ("TensorRT for RTX", "'sm90'", "sm75, sm80, sm86, sm89, sm120, sm121, and portable")),
        ("rtx-sm70", ("TensorRT for RTX", "'sm70'")),
        ("tensorrt-sm70", ("TensorRT does not build", "sm90")),
        ("tensorrt-portable", ("no portable engine", "--target portable")),
    ],
)
def test_what_a_library_does_not_build_for_is_refused(text: str, needles: tuple[str, ...]) -> None:
    def absent(backend: EngineBackend) -> str:
        raise HostError(f"{backend} is not installed")

    # It is the call that is wrong, whatever is installed.
    for installed in (version, absent):
        with pytest.raises(UsageError) as caught:
            parse_targets(text, "rtx", installed)
        for needle in needles:
            assert needle in f"{caught.value} {caught.value.hint}"


def test_a_version_that_is_not_installed_is_refused() -> None:
    with pytest.raises(UsageError, match=r"for version 1\.6, the installed TensorRT for RTX is 1\.7") as caught:
        parse("rtx1.6-sm89")
    assert "rtx-sm89, or install version 1.6" in caught.value.hint


def test_a_long_text_is_cut_in_messages() -> None:
    for text in ("x" * 100_000, "," * 100_000):
        with pytest.raises(UsageError) as caught:
            parse(text)
        assert len(str(caught.value)) < 200


@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=12).map("".join)))
def test_any_text_is_targets_or_a_wrong_call(text: str) -> None:
    try:
        found = parse(text)
    except UsageError:
        return
    assert found
    assert len(set(found)) == len(found)
    assert [target_from_spelling(target.spelling) for target in found] == list(found)


@pytest.mark.parametrize("backend", CAPABILITIES)
def test_this_needs_a_gpu(backend: EngineBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l2p_engines.builders.trt.gpus", tuple)
    with pytest.raises(HostError, match="no NVIDIA driver or no GPU") as caught:
        parse("rtx-sm89,this", backend)
    assert caught.value.exit_code == 3
    assert "rtx-sm89" in caught.value.hint


def test_this_is_the_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = (Gpu("NVIDIA GeForce RTX 4090", "sm89"), Gpu("NVIDIA GeForce RTX 5090", "sm120"))
    monkeypatch.setattr("l2p_engines.builders.trt.gpus", lambda: found)
    assert spellings("This,rtx-sm89") == ["rtx1.7-sm89"]
    assert parse("this", "tensorrt") == (Target("tensorrt", "11.4", "sm89"),)


def test_this_may_be_a_gpu_that_only_one_library_builds_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l2p_engines.builders.trt.gpus", lambda: (Gpu("NVIDIA H200", "sm90"),))
    assert parse("this", "tensorrt") == (Target("tensorrt", "11.4", "sm90"),)
    with pytest.raises(UsageError, match="NVIDIA H200 is sm90: TensorRT for RTX does not build"):
        parse("this", "rtx")


def install(monkeypatch: pytest.MonkeyPatch, module: str, version: str, **packages: str) -> None:
    """Have a library of a version, and packages of versions of their own."""

    def found(name: str) -> str:
        if name not in packages:
            raise metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setitem(sys.modules, module, SimpleNamespace(__version__=version))
    monkeypatch.setattr(metadata, "version", found)


def test_a_target_is_of_the_version_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorrt", "11.4.0.106", tensorrt_cu13="11.4.0.106", tensorrt_cu13_libs="11.4.0.106")
    assert parse_targets("tensorrt-sm90") == (Target("tensorrt", "11.4", "sm90"),)
    assert load_library("tensorrt").version == "11.4.0.106"
    install(monkeypatch, "tensorrt_rtx", "1.7.1.116")
    assert parse_targets("portable") == (Target("rtx", "1.7", PORTABLE),)


@pytest.mark.parametrize(
    ("module", "backend", "version"),
    [("tensorrt", "tensorrt", version) for version in ("10.16.1.11", "12.0.0", "1.7.1.116", "110.0.0", "", "11")]
    + [("tensorrt_rtx", "rtx", version) for version in ("1.6.0.1", "1.70.0", "11.4.0.106", "2.1.7.0")],
)
def test_another_version_of_a_library_is_refused(
    monkeypatch: pytest.MonkeyPatch, module: str, backend: EngineBackend, version: str
) -> None:
    install(monkeypatch, module, version)
    with pytest.raises(HostError, match=f"is version {version}, this version of l2p-export builds with") as caught:
        library_version(backend)
    assert "pip install" in caught.value.hint


@pytest.mark.parametrize("part", ["tensorrt_cu13", "tensorrt_cu13_bindings", "tensorrt_cu12_libs"])
def test_packages_of_two_versions_are_refused(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    packages = {"tensorrt_cu13": "11.4.0.106", "tensorrt_cu13_bindings": "11.4.0.106", part: "11.3.1.2"}
    install(monkeypatch, "tensorrt", "11.4.0.106", **packages)
    with pytest.raises(HostError, match=f"is version 11.4.0.106, but its package {part} is 11.3.1.2") as caught:
        parse_targets("tensorrt-sm90")
    assert "--force-reinstall" in caught.value.hint


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import tensorrt_that_is_not_there", "does not load: No module named"),
        ("raise ImportError('libnvinfer.so.11: cannot open shared object file')", "does not load: libnvinfer.so.11"),
        (None, "TensorRT is not installed"),
    ],
)
def test_a_library_that_does_not_load_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str | None, says: str
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    if source is not None:
        monkeypatch.delitem(sys.modules, "tensorrt")
        (tmp_path / "tensorrt.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(HostError, match=says) as caught:
        parse_targets("tensorrt-sm90")
    assert caught.value.exit_code == 3
    assert "l2p-export[tensorrt]" in caught.value.hint


@pytest.mark.parametrize(
    ("target", "dtype", "allowed"),
    [
        ("rtx-sm86", "float8_e4m3fn", False),
        ("rtx-sm89", "float8_e4m3fn", True),
        ("rtx-sm120", "float8_e4m3fn", True),
        ("tensorrt-sm90", "float8_e4m3fn", True),
        ("tensorrt-sm80", "float8_e4m3fn", False),
        ("rtx-sm75", "bfloat16", False),
        ("rtx-sm80", "bfloat16", True),
        ("rtx-sm75", "float16", True),
        (PORTABLE, "float8_e4m3fn", True),
        (PORTABLE, "bfloat16", True),
    ],
)
def test_dtypes_that_a_gpu_has_no_arithmetic_for_are_refused(target: str, dtype: str, allowed: bool) -> None:
    (parsed,) = parse(target)
    assert runs(parsed, dtype) == allowed
    if allowed:
        require_dtypes(parsed, ["float32", dtype, "float16"])
        return
    with pytest.raises(UsageError) as caught:
        require_dtypes(parsed, ["float32", dtype, "float16"])
    assert parsed.spelling in str(caught.value)
    assert {"bfloat16": "BF16", "float8_e4m3fn": "FP8"}[dtype] in str(caught.value)
    offered = str(caught.value).rpartition("targets, ")[2].removesuffix(" do").split(", ")
    assert (PORTABLE in offered) == (parsed.backend == "rtx")
    assert all(runs(Target(parsed.backend, "1.7", name), dtype) for name in offered)


@pytest.mark.parametrize("backend", CAPABILITIES)
def test_turing_has_no_float32_products_in_one_library(backend: EngineBackend) -> None:
    layers = ("layers.0.attention.to_q", "layers.1.feed_forward.w2", "layers.1.feed_forward.w3")
    for capability in (*CAPABILITIES[backend], *((PORTABLE,) if backend == "rtx" else ())):
        (target,) = parse(f"{backend}-{capability}")
        require_float32_products(target, "fp16", ())
        assert multiplies_float32(target) == ((backend, capability) != ("rtx", "sm75"))
        if multiplies_float32(target):
            require_float32_products(target, "fp32", layers)
            continue
        with pytest.raises(UsageError) as caught:
            require_float32_products(target, "fp32", layers)
        assert "rtx1.7-sm75 has no matrix products in FP32, in which plan `fp32` computes" in str(caught.value)
        assert "`layers.0.attention.to_q` and 2 more layers" in str(caught.value)
        assert "--precision fp16" in caught.value.hint
        assert "--backend onnx-cuda" in caught.value.hint
        with pytest.raises(UsageError, match=r"computes `layers.0.attention.to_q`$"):
            require_float32_products(target, "fp16", layers[:1])


class Driver:
    """`libcuda.so.1` with some GPUs; `broken` names a call that fails."""

    def __init__(self, *capabilities: tuple[int, int], broken: str = "") -> None:
        self.capabilities, self.broken = capabilities, broken

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: int(name == self.broken) or getattr(self, f"_{name}")(*arguments)

    def _cuInit(self, flags: int) -> int:  # noqa: N802 - NVIDIA's names
        return flags

    def _cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.capabilities)
        return 0

    def _cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        device._obj.value = ordinal
        return 0

    def _cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = f"GPU {device.value}".encode()[: size - 1]
        return 0

    def _cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = self.capabilities[device.value][{75: 0, 76: 1}[attribute]]
        return 0


def test_gpus_are_named_by_their_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver((8, 9), (12, 0)))
    assert gpus() == (Gpu("GPU 0", "sm89"), Gpu("GPU 1", "sm120"))
    for call in ("cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute"):
        monkeypatch.setattr(ctypes, "CDLL", lambda name, call=call: Driver((8, 9), broken=call))
        assert gpus() == ()


def test_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert gpus() == ()
