"""Networks that take turns: under a budget that does not hold them together, the same pixels from one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Bundles
from l2p_runtime import HostError, Pipeline
from l2p_runtime.backends import onnx
from l2p_runtime.networks import forecast_call, network_bytes

KIND = "tiny-16-fused"
CALL = {"height": 32, "width": 16, "seed": 3, "steps": 2}


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Counts networks loaded, and the weights of those that are open at once."""
    seen: dict[str, Any] = {"loads": [], "open": {}, "peak_bytes": 0}
    load, close = onnx.OnnxEngine.__init__, onnx.OnnxEngine.close

    def loading(engine: onnx.OnnxEngine, graph: Path, weights: Path, spec: Any) -> None:
        load(engine, graph, weights, spec)
        seen["loads"].append(spec.name)
        seen["open"][id(engine)] = weights.stat().st_size
        seen["peak_bytes"] = max(seen["peak_bytes"], sum(seen["open"].values()))

    def closing(engine: onnx.OnnxEngine) -> None:
        close(engine)
        seen["open"].pop(id(engine), None)

    monkeypatch.setattr(onnx.OnnxEngine, "__init__", loading)
    monkeypatch.setattr(onnx.OnnxEngine, "close", closing)
    yield seen


def held(path: Path) -> dict[str, int]:
    """What each network takes while it is loaded, and the library."""
    with Pipeline.open(path) as pipe:
        return {**pipe._networks.held_bytes, "library": pipe._networks.opened.backend.library_bytes}


def test_networks_that_do_not_fit_together_take_turns(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundles.path(KIND)
    budget = sum(held(path).values()) - 1
    embeds = np.random.default_rng(0).standard_normal((5, 40), dtype=np.float32)
    negative = embeds[:3] * 2
    call = {**CALL, "prompt_embeds": embeds, "negative_embeds": negative, "guidance": 3.0, "dtype": "uint16"}
    with Pipeline.open(path) as pipe:
        expected = pipe.generate(**call)
        prediction = pipe.denoise(np.ones((1, 3, 32, 16), np.float32), 0.5, embeds)
        largest = max(size for name, size in network_bytes(pipe._networks.opened).items() if name != "text_encoder")
    with watched(monkeypatch) as seen:
        with Pipeline.open(path, memory_budget=budget) as pipe:
            assert seen["loads"] == []
            np.testing.assert_array_equal(pipe.generate(**call), expected)
            # Two prompts and two steps: the caption once a prompt, every other network once a step.
            assert seen["loads"] == ["caption", "caption", *("stem", "trunk", "tail", "head") * 2]
            np.testing.assert_array_equal(pipe.denoise(np.ones((1, 3, 32, 16), np.float32), 0.5, embeds), prediction)
        assert seen["open"] == {}
    assert seen["peak_bytes"] == largest


def test_a_call_that_needs_the_room_makes_networks_take_turns(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundles.path(KIND)
    total = sum(held(path).values())
    embeds = np.zeros((4, 40), np.float32)
    with Pipeline.open(path) as pipe:
        expected = pipe.generate(**CALL, prompt_embeds=embeds, guidance=1.0)
        need = forecast_call(pipe._networks.opened, 1, (2, 1), 32, 1)
    with watched(monkeypatch) as seen, Pipeline.open(path, memory_budget=total + need.buffers_bytes) as pipe:
        assert len(seen["loads"]) == 5
        np.testing.assert_array_equal(pipe.generate(**CALL, prompt_embeds=embeds, guidance=1.0), expected)
        assert len(seen["loads"]) == 5 + 1 + 4 * 2


def test_prompts_are_read_where_only_one_network_fits(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundles.path(KIND)
    with Pipeline.open(path) as pipe:
        expected = pipe.generate("a red circle", **CALL, guidance=2.0)
    with watched(monkeypatch) as seen, Pipeline.open(path, memory_budget=sum(held(path).values()) - 1) as pipe:
        np.testing.assert_array_equal(pipe.generate("a red circle", **CALL, guidance=2.0), expected)
        assert seen["loads"].count("text_encoder") == 1
        assert len(seen["open"]) <= 5


def test_a_network_that_does_not_fit_alone_is_named(bundles: Bundles) -> None:
    sizes = held(bundles.path(KIND))
    library = sizes.pop("library")
    largest = max(sizes, key=lambda name: sizes[name])
    needed = sizes[largest] + library
    with pytest.raises(HostError, match=f"the weights of `{largest}` in plan `fp32` take {needed:,} bytes with the"):
        Pipeline.open(bundles.path(KIND), memory_budget=needed - 1)
    Pipeline.open(bundles.path(KIND), memory_budget=needed).close()


def test_the_least_budget_that_a_refusal_states_is_enough(bundles: Bundles) -> None:
    """In bytes: the call that was refused runs with it, and with one byte less it is refused again."""
    path, call = bundles.path(KIND), {**CALL, "prompt_embeds": np.ones((4, 40), np.float32), "guidance": 1.0}
    sizes = held(path)
    budget = sizes.pop("library") + max(sizes.values())
    for size in ({"height": 16, "width": 2048}, {"height": 1024, "width": 512}):
        with Pipeline.open(path, memory_budget=budget) as pipe, pytest.raises(HostError) as caught:
            pipe.generate(**{**call, **size})
        stated = re.fullmatch(
            r"raise the memory budget to ([0-9,]+) bytes or more, or draw a smaller image", caught.value.hint
        )
        assert stated is not None
        least = int(stated[1].replace(",", ""))
        with Pipeline.open(path, memory_budget=least) as pipe:
            assert pipe._networks.plan_call(1, (size["height"] // 16, size["width"] // 16), 32, 1)
        with Pipeline.open(path, memory_budget=least - 1) as pipe, pytest.raises(HostError, match="needs"):
            pipe.generate(**{**call, **size})


def test_large_weights_stay_in_their_file(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundles.path("tiny-16")
    image = np.random.default_rng(1).standard_normal((1, 3, 48, 64), dtype=np.float32)
    embeds = np.random.default_rng(2).standard_normal((9, 40), dtype=np.float32)
    for plan, tolerance in (("fp32", 2e-6), ("fp16", 2e-2)):
        monkeypatch.undo()
        with Pipeline.open(path, plan=plan) as pipe:
            packed = pipe.denoise(image, 0.5, embeds)
            assert all(engine.memory_bytes() > 0 for engine in pipe._networks.engines.values())
        monkeypatch.setattr(onnx, "PACKED_BYTES_MAX", 0)
        with Pipeline.open(path, plan=plan) as pipe:
            assert np.abs(pipe.denoise(image, 0.5, embeds) - packed).max() <= tolerance * np.abs(packed).max()
            assert all(engine.memory_bytes() == 0 for engine in pipe._networks.engines.values())
