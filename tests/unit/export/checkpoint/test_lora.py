"""LoRA files: every spelling means the same sum, and what cannot be merged is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from l2p_export.checkpoint.loading import load_model
from l2p_export.checkpoint.lora import (
    Lora,
    LoraRequest,
    MergedTensor,
    merge,
    merge_loras,
    open_lora,
    parse_lora,
    trunk_layers_touched,
)
from l2p_export.checkpoint.lora.names import LayerNames
from l2p_export.families.z_image_l2p import Z_IMAGE_L2P
from l2p_export.families.z_image_l2p.dimensions import VARIANTS, expected_shapes, published_dimensions
from l2p_export.tensors.digests import weights_digest
from l2p_export.tensors.sources import TensorSource, read_tensor
from l2p_runtime.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array = np.ndarray[Any, np.dtype[Any]]
State = dict[str, Array]

D, FFN, TIME, CAPTION = 6, 8, 4, 5


def _shapes() -> dict[str, tuple[int, ...]]:
    """A model of 3 layers that is small enough to write a thousand times."""
    shapes: dict[str, tuple[int, ...]] = {
        "all_x_embedder.16-1.weight": (D, 12),
        "all_x_embedder.16-1.bias": (D,),
        "t_embedder.mlp.0.weight": (7, 9),
        "t_embedder.mlp.2.weight": (TIME, 7),
        "cap_embedder.0.weight": (CAPTION,),
        "cap_embedder.1.weight": (D, CAPTION),
        "x_pad_token": (1, D),
        "local_decoder.enc1.0.weight": (4, 3, 3, 3),
        "local_decoder.bottleneck.0.weight": (5, 4 + D, 1, 1),
    }
    for block in ("layers.0", "layers.1", "layers.2", "noise_refiner.0", "context_refiner.0"):
        for projection in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes[f"{block}.attention.{projection}.weight"] = (D, D)
        shapes[f"{block}.attention_norm1.weight"] = (D,)
        shapes[f"{block}.feed_forward.w1.weight"] = (FFN, D)
        shapes[f"{block}.feed_forward.w2.weight"] = (D, FFN)
        shapes[f"{block}.feed_forward.w3.weight"] = (FFN, D)
        if not block.startswith("context"):
            shapes[f"{block}.adaLN_modulation.0.weight"] = (4 * D, TIME)
    return shapes


SHAPES = _shapes()
ALIASES = Z_IMAGE_L2P.aliases(SHAPES)
TARGETS = tuple(name.removesuffix(".weight") for name, shape in SHAPES.items() if len(shape) > 1 and "pad" not in name)
Q = "layers.1.attention.to_q"
QKV = tuple(f"layers.1.attention.{name}" for name in ("to_q", "to_k", "to_v"))


@dataclass(frozen=True)
class ArraySource:
    """A tensor in memory that hands out pieces of any size it likes."""

    values: NDArray[np.float32]
    dtype: str = "BF16"
    piece: int = 5

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def chunks(self, chunk_bytes: int = 0) -> Iterator[NDArray[np.float32]]:
        flat = self.values.reshape(-1)
        step = self.piece if chunk_bytes == 0 else max(1, chunk_bytes // 4)
        for start in range(0, flat.size, step):
            yield flat[start : start + step]


@dataclass(frozen=True)
class Pair:
    """What a tool trained for one layer; alpha None where it stored none."""

    down: NDArray[np.float32]
    up: NDArray[np.float32]
    alpha: float | None = None

    @property
    def rank(self) -> int:
        return len(self.down)


def base() -> dict[str, TensorSource]:
    rng = np.random.default_rng(0)
    return {name: ArraySource(rng.standard_normal(shape, np.float32)) for name, shape in SHAPES.items()}


def random_pair(layer: str, rank: int, seed: int, alpha: float | None = None) -> Pair:
    rng = np.random.default_rng(seed)
    shape = SHAPES[f"{layer}.weight"]
    ones = (1,) * (len(shape) - 2)
    down = rng.standard_normal((rank, *shape[1:]), np.float32)
    return Pair(down, rng.standard_normal((shape[0], rank, *ones), np.float32), alpha)


def pairs_of(*layers: str, rank: int = 2, alpha: float | None = None) -> dict[str, Pair]:
    return {layer: random_pair(layer, rank, seed, alpha) for seed, layer in enumerate(layers)}


def spelled(
    pairs: Mapping[str, Pair], name: Callable[[str], str] = str, down: str = "lora_A.weight", up: str = "lora_B.weight"
) -> State:
    """Keys as one tool writes them, alpha as a tensor."""
    state: State = {}
    for layer, pair in pairs.items():
        state |= {f"{name(layer)}.{down}": pair.down, f"{name(layer)}.{up}": pair.up}
        if pair.alpha is not None:
            state[f"{name(layer)}.alpha"] = np.asarray(pair.alpha, np.float32)
    return state


def with_fused(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """The three projections of layer 1 as one, when they share what comes before."""
    first = pairs[Q]
    rows = np.concatenate([pairs[layer].up for layer in QKV])
    rest = {layer: pair for layer, pair in pairs.items() if layer not in QKV}
    return rest | {"layers.1.attention.qkv": Pair(first.down, rows, first.alpha)}


def renamed(layer: str) -> str:
    """Names of the node-based user interfaces."""
    return layer.replace(".attention.to_out.0", ".attention.out").replace("all_x_embedder.16-1", "x_embedder")


def flat(layer: str) -> str:
    return layer.replace(".", "_")


def opened(folder: Path, state: State, strength: float = 1.0, metadata: dict[str, str] | None = None) -> Lora:
    path = folder / "x.safetensors"
    save_file({name: np.array(value, order="C") for name, value in state.items()}, path, metadata)
    return open_lora(LoraRequest(path, strength), SHAPES, ALIASES)


def values_of(tensors: Mapping[str, TensorSource]) -> State:
    return {name: read_tensor(source) for name, source in tensors.items()}


def merged(loras: Sequence[Lora]) -> State:
    return values_of(merge_loras(base(), loras))


def assert_same(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def by_hand(pairs: Mapping[str, Pair], strength: float = 1.0) -> State:
    """The definition, in float64 and without a matrix product."""
    wanted = values_of(base())
    for layer, pair in pairs.items():
        scale = strength * (1.0 if pair.alpha is None else pair.alpha / pair.rank)
        up, down = pair.up.reshape(-1, pair.rank).astype(np.float64), pair.down.reshape(pair.rank, -1)
        delta = sum(np.outer(up[:, r], down[r].astype(np.float64)) for r in range(pair.rank))
        name = f"{layer}.weight"
        wanted[name] = wanted[name] + np.asarray(scale * delta).reshape(SHAPES[name])
    return wanted


# The command line's form


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("a.safetensors:-2", "a.safetensors", -2.0),
        ("a.safetensors:0", "a.safetensors", 0.0),
        ("dir/a:b.safetensors:1e-1", "dir/a:b.safetensors", 0.1),
        ("dir:1/a.safetensors", "dir:1/a.safetensors", 1.0),
        ("2:3:4", "2:3", 4.0),
    ],
)
def test_the_form_on_the_command_line(text: str, path: str, strength: float) -> None:
    assert parse_lora(text) == LoraRequest(Path(path), strength)


@pytest.mark.parametrize("text", ["a:nan", "a:inf", "a:-Infinity", "a:1e999", "", ":", ":0.5", "a:", "a::1"])
def test_bad_forms(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_lora(text)
    assert "FILE:STRENGTH" in caught.value.hint


# Spellings


@st.composite
def random_loras(draw: st.DrawFn) -> dict[str, Pair]:
    """Some layers, each with its own rank and maybe alpha; sometimes q, k and v of layer 1 that share their input."""
    layers = draw(st.lists(st.sampled_from(TARGETS), min_size=1, max_size=6, unique=True))
    alphas = st.none() | st.sampled_from([0.5, 1.0, 3.0, 16.0])
    pairs = {layer: random_pair(layer, draw(st.integers(1, 4)), i, draw(alphas)) for i, layer in enumerate(layers)}
    if draw(st.booleans()):
        first = random_pair(Q, draw(st.integers(1, 4)), 99, draw(alphas))
        pairs |= {layer: replace(random_pair(layer, first.rank, i), alpha=first.alpha) for i, layer in enumerate(QKV)}
        pairs |= {layer: replace(pairs[layer], down=first.down) for layer in QKV}
    return pairs


def peft_config(pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """What PEFT writes beside: one alpha, and a pattern for layers of another."""
    pattern = {layer: pair.rank if pair.alpha is None else pair.alpha for layer, pair in pairs.items()}
    return {"lora_alpha": 8, "r": 8, "alpha_pattern": pattern, "init_lora_weights": True}


def every_spelling(pairs: Mapping[str, Pair]) -> dict[str, tuple[State, dict[str, str] | None]]:
    """Tool to keys and metadata, all of them the same LoRA."""
    bare = {layer: replace(pair, alpha=None) for layer, pair in pairs.items()}
    config = peft_config(pairs)
    prefixed = {f"transformer.{key}": value for key, value in config.items()}
    peft = "base_model.model.{}".format
    spellings: dict[str, tuple[State, dict[str, str] | None]] = {
        "peft": (spelled(bare, peft), {"adapter_config": json.dumps(config)}),
        "peft, adapter named": (
            spelled(bare, peft, "lora_A.default.weight", "lora_B.default.weight"),
            {"peft_config": json.dumps(config)},
        ),
        "diffusers model": (spelled(bare), {"lora_adapter_metadata": json.dumps(config)}),
        "diffusers pipeline": (
            spelled(bare, "transformer.{}".format),
            {"lora_adapter_metadata": json.dumps(prefixed)},
        ),
        "ai-toolkit": (spelled(pairs, "diffusion_model.{}".format), None),
        "peft around a prefix": (spelled(pairs, "base_model.model.model.diffusion_model.{}".format), None),
        "bare": (spelled(pairs), None),
        "node UI": (spelled(pairs, lambda layer: f"diffusion_model.{renamed(layer)}"), None),
        "down and up": (spelled(pairs, "diffusion_model.{}".format, "lora_down.weight", "lora_up.weight"), None),
    }
    for prefix in ("lora_unet_", "lora_unet__", "lora_transformer_"):
        for alias in (str, renamed):
            name = lambda layer, prefix=prefix, alias=alias: prefix + flat(alias(layer))  # noqa: E731
            spellings[f"{prefix} {alias.__name__}"] = (spelled(pairs, name, "lora_down.weight", "lora_up.weight"), None)
    if all(layer in pairs and pairs[layer].down is pairs[Q].down for layer in QKV):
        fused = with_fused(pairs)
        spellings["fused"] = (spelled(fused, "diffusion_model.{}".format), None)
        kohya = spelled(fused, lambda layer: "lora_unet_" + flat(renamed(layer)), "lora_down.weight", "lora_up.weight")
        spellings["fused kohya"] = (kohya, None)
    return spellings


@settings(max_examples=40, deadline=None)
@given(random_loras(), st.sampled_from([1.0, 0.75, -0.3]))
def test_every_spelling_merges_to_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, pairs: dict[str, Pair], strength: float
) -> None:
    folder = tmp_path_factory.mktemp("lora")
    wanted = merged([opened(folder, spelled(pairs), strength)])
    for name, values in by_hand(pairs, strength).items():
        np.testing.assert_allclose(wanted[name], values, rtol=1e-6, atol=1e-6)
    for tool, (state, metadata) in every_spelling(pairs).items():
        found = opened(folder, state, strength, metadata)
        assert found.deltas.keys() == {f"{layer}.weight" for layer in pairs}, tool
        assert_same(merged([found]), wanted)


@pytest.mark.parametrize("variant", VARIANTS.values())
def test_every_published_layer_is_found_under_its_underscores(variant: str) -> None:
    shapes = expected_shapes(published_dimensions(variant))
    names = LayerNames(shapes, Z_IMAGE_L2P.aliases(shapes))
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and len(shape) > 1:
            assert tuple(names.weights(layer)) == (name,)
            assert tuple(names.weights(flat(layer))) == (name,)
        else:
            assert not names.weights(layer)


def test_dtypes_of_the_file_do_not_matter_where_values_fit(tmp_path: Path) -> None:
    pairs = pairs_of(Q, "layers.0.feed_forward.w2")
    state = {name: value.astype(ml_dtypes.bfloat16) for name, value in spelled(pairs).items()}
    wanted = merged([opened(tmp_path, {name: value.astype(np.float32) for name, value in state.items()})])
    assert_same(merged([opened(tmp_path, state)]), wanted)
    assert_same(merged([opened(tmp_path, {name: value.astype(np.float64) for name, value in state.items()})]), wanted)


def test_convolutions_of_one_pixel_may_be_written_as_matrices(tmp_path: Path) -> None:
    pairs = pairs_of("local_decoder.bottleneck.0", Q)
    wanted = merged([opened(tmp_path, spelled(pairs))])
    conv, linear = pairs["local_decoder.bottleneck.0"], pairs[Q]
    pairs["local_decoder.bottleneck.0"] = Pair(conv.down[..., 0, 0], conv.up[..., 0, 0])
    pairs[Q] = Pair(linear.down[..., None, None], linear.up[..., None, None])
    assert_same(merged([opened(tmp_path, spelled(pairs))]), wanted)


# Alpha


def scale_of(lora: Lora, layer: str = Q) -> float:
    return lora.deltas[f"{layer}.weight"].scale


def test_alpha_absent_means_scale_one(tmp_path: Path) -> None:
    assert scale_of(opened(tmp_path, spelled(pairs_of(Q, rank=3)))) == 1.0


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, ml_dtypes.bfloat16])
def test_alpha_as_a_tensor_of_any_dtype(tmp_path: Path, shape: tuple[int, ...], dtype: Any) -> None:
    alpha = np.full(shape, 6, dtype)
    assert scale_of(opened(tmp_path, spelled(pairs_of(Q, rank=4)) | {f"{Q}.alpha": alpha})) == 1.5


def test_alpha_in_the_metadata(tmp_path: Path) -> None:
    state = spelled(pairs_of(Q, rank=4))
    assert scale_of(opened(tmp_path, state, metadata={"lora_alpha": "8"})) == 2.0
    assert scale_of(opened(tmp_path, state, metadata={"adapter_config": '{"lora_alpha": 8}'})) == 2.0
    root = {"adapter_config": '{"lora_alpha": 8, "use_rslora": true}'}
    assert scale_of(opened(tmp_path, state, metadata=root)) == 4.0
    tensor = state | {f"{Q}.alpha": np.float32(2)}
    assert scale_of(opened(tmp_path, tensor, metadata={"lora_alpha": "8"})) == 0.5


@pytest.mark.parametrize(
    "pattern", ["to_q", "attention.to_q", Q, f"^{Q}$", r"layers\.1\.attention\.to_q", f"transformer.{Q}"]
)
def test_alpha_patterns_name_layers_or_their_ends(tmp_path: Path, pattern: str) -> None:
    config = {"lora_alpha": 8, "alpha_pattern": {pattern: 2}}
    state = spelled(pairs_of(Q, "layers.1.attention.to_k", rank=4), "transformer.{}".format)
    lora = opened(tmp_path, state, metadata={"lora_adapter_metadata": json.dumps(config)})
    assert (scale_of(lora), scale_of(lora, "layers.1.attention.to_k")) == (0.5, 2.0)


def test_peft_keeps_alpha_in_the_file_beside(tmp_path: Path) -> None:
    save_file(spelled(pairs_of(Q, rank=4), "base_model.model.{}".format), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert scale_of(open_lora(LoraRequest(path), SHAPES, ALIASES)) == 2.0
    # Beside a file of another name it is no more than a neighbour.
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "style.safetensors")
    assert scale_of(open_lora(LoraRequest(tmp_path / "style.safetensors"), SHAPES, ALIASES)) == 1.0


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "a list, expected an object"),
        ('{"lora_alpha": "x"}', "lora_alpha = 'x', expected a finite number"),
        ('{"lora_alpha": NaN}', "expected a finite number"),
        ('{"lora_alpha": true}', "expected a finite number"),
        ('{"alpha_pattern": [1]}', "alpha_pattern that is no object"),
        ('{"alpha_pattern": {"(a+)+b": 1}}', "a regular expression"),
        ('{"alpha_pattern": {"to_q": []}}', "expected a finite number"),
        ('{"init_lora_weights": "pissa_niter_4"}', "changes the base weights"),
    ],
)
def test_bad_configurations(tmp_path: Path, config: str, wanted: str) -> None:
    state = spelled(pairs_of(Q))
    with pytest.raises(ArtifactError, match=wanted.replace("(", r"\(")):
        opened(tmp_path, state, metadata={"adapter_config": config})
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(ArtifactError, match=wanted):
        open_lora(LoraRequest(tmp_path / "adapter_model.safetensors"), SHAPES, ALIASES)


# Merging


def test_untouched_tensors_stay_the_same_objects(tmp_path: Path) -> None:
    tensors = base()
    found = merge_loras(tensors, [opened(tmp_path, spelled(pairs_of(Q)))])
    changed = [name for name, source in found.items() if source is not tensors[name]]
    assert changed == [f"{Q}.weight"]
    assert (found[changed[0]].dtype, found[changed[0]].shape) == ("F32", (D, D))
    assert list(found) == list(tensors)


def test_strength_zero_and_alpha_zero_touch_nothing(tmp_path: Path) -> None:
    tensors = base()
    for lora in (
        opened(tmp_path, spelled(pairs_of(Q)), strength=0.0),
        opened(tmp_path, spelled(pairs_of(Q, alpha=0.0))),
    ):
        assert all(source is tensors[name] for name, source in merge_loras(tensors, [lora]).items())
        assert trunk_layers_touched([lora], SHAPES) == ()


def test_several_loras_add_up(tmp_path: Path) -> None:
    shared, alone = pairs_of(Q, "layers.0.adaLN_modulation.0", rank=3, alpha=1.5), pairs_of("t_embedder.mlp.2", Q)
    loras = []
    for index, (pairs, strength) in enumerate(((shared, 0.5), (alone, -2.0), (alone, 0.0))):
        (tmp_path / str(index)).mkdir()
        loras.append(opened(tmp_path / str(index), spelled(pairs), strength))
    wanted = by_hand(shared, 0.5)
    added = by_hand(alone, -2.0)
    start = values_of(base())
    for name, values in merged(loras).items():
        np.testing.assert_allclose(values, wanted[name] + added[name] - start[name], rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 9),
    rank=st.integers(1, 3),
    block=st.integers(1, 64),
    sizes=st.lists(st.integers(1, 400), min_size=2, max_size=4),
)
def test_bits_do_not_hang_on_the_chunk_size(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, rank: int, block: int, sizes: list[int]
) -> None:
    rng = np.random.default_rng(rows)
    shapes = {"a.weight": (rows, columns)}
    state = {"a.lora_A.weight": rng.standard_normal((rank, columns), np.float32)}
    state["a.lora_B.weight"] = rng.standard_normal((rows, rank), np.float32)
    path = tmp_path_factory.mktemp("lora") / "x.safetensors"
    save_file(state, path)
    start = rng.standard_normal((rows, columns), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "BLOCK_VALUES", block)
        source = merge_loras({"a.weight": ArraySource(start)}, [open_lora(LoraRequest(path), shapes, {})])["a.weight"]
        made = [list(source.chunks(size)) for size in sizes]
    whole = np.concatenate(made[0])
    np.testing.assert_allclose(
        whole, (start + state["a.lora_B.weight"] @ state["a.lora_A.weight"]).reshape(-1), atol=1e-5
    )
    for size, chunks in zip(sizes, made, strict=True):
        assert max(chunk.nbytes for chunk in chunks) <= max(size, 4)
        np.testing.assert_array_equal(np.concatenate(chunks), whole)


def test_a_chunk_stays_as_it_was_handed_out(tmp_path: Path) -> None:
    source = merge_loras(base(), [opened(tmp_path, spelled(pairs_of(Q)))])[f"{Q}.weight"]
    assert isinstance(source, MergedTensor)
    copies = [(chunk, chunk.copy()) for chunk in source.chunks(16)]
    for chunk, copy in copies:
        np.testing.assert_array_equal(chunk, copy)


def test_a_sum_beyond_float32_is_left_for_the_writer_to_refuse(tmp_path: Path) -> None:
    huge = Pair(np.full((1, D), 1e30, np.float32), np.full((D, 1), 1e30, np.float32))
    assert np.isinf(merged([opened(tmp_path, spelled({Q: huge}))])[f"{Q}.weight"]).all()


def test_the_trunk_layers_that_change(tmp_path: Path) -> None:
    layers = ("layers.2.feed_forward.w1", Q, "layers.0.attention.to_q", "noise_refiner.0.attention.to_q")
    lora = opened(tmp_path, spelled(pairs_of(*layers, "layers.1.adaLN_modulation.0", "t_embedder.mlp.0")))
    assert trunk_layers_touched([lora, lora], layers_of(1, 2)) == (
        "layers.1.attention.to_q",
        "layers.1.adaLN_modulation.0",
        "layers.2.feed_forward.w1",
    )
    assert trunk_layers_touched([lora], layers_of(3)) == ()
    assert trunk_layers_touched([], SHAPES) == ()
    fused = opened(tmp_path, spelled(with_fused(shared_qkv())))
    assert trunk_layers_touched([fused], layers_of(1)) == QKV


@pytest.mark.parametrize(("layer", "same"), [("layers.0.attention.to_q", True), (Q, False)])
def test_a_lora_on_the_trunk_makes_another_trunk(tmp_path: Path, tiny_path: Path, layer: str, *, same: bool) -> None:
    loaded = load_model(tiny_path)
    shapes, trunk = loaded.checkpoint.shapes, loaded.model.network_shapes("trunk")
    rng = np.random.default_rng(0)
    rows, columns = shapes[f"{layer}.weight"]
    pair = Pair(rng.standard_normal((2, columns), np.float32), rng.standard_normal((rows, 2), np.float32))
    save_file(spelled({layer: pair}), tmp_path / "x.safetensors")
    lora = open_lora(LoraRequest(tmp_path / "x.safetensors"), shapes, {})
    tensors = merge_loras(loaded.checkpoint.tensors, [lora])
    assert (weights_digest(tensors, trunk) == weights_digest(loaded.checkpoint.tensors, trunk)) is same
    assert trunk_layers_touched([lora], trunk) == (() if same else (layer,))


def layers_of(*numbers: int) -> list[str]:
    return [name for name in SHAPES if name.startswith(tuple(f"layers.{number}." for number in numbers))]


def shared_qkv() -> dict[str, Pair]:
    pairs = pairs_of(*QKV)
    return {layer: replace(pair, down=pairs[Q].down) for layer, pair in pairs.items()}


# What is refused

A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
GOOD = spelled(pairs_of(Q))


def refused(folder: Path, state: State) -> str:
    with pytest.raises(ArtifactError) as caught:
        opened(folder, state)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "method"),
    [
        (f"diffusion_model.{Q}.dora_scale", "DoRA"),
        (f"base_model.model.{Q}.lora_magnitude_vector", "DoRA"),
        (f"base_model.model.{Q}.lora_magnitude_vector.default.weight", "DoRA"),
        ("lora_unet_layers_1_attention_to_q.hada_w1_a", "LoHa"),
        ("lycoris_layers_1_attention_to_q.lokr_w1", "LoKr"),
        ("lora_unet_local_decoder_enc1_0.lora_mid.weight", "LoCon"),
        (f"{Q}.oft_blocks", "OFT"),
    ],
)
def test_other_methods_are_refused_by_name(tmp_path: Path, key: str, method: str) -> None:
    message = refused(tmp_path, GOOD | {key: np.ones((D, D), np.float32)})
    assert f"a {method}" in message
    assert key in message


def test_unmatched_keys_are_listed_in_one_error(tmp_path: Path) -> None:
    few = {
        "layers.9.attention.to_q.lora_A.weight": np.ones((1, D), np.float32),
        "layers.1.attention_norm1.lora_A.weight": np.ones((1, D), np.float32),
        "lora_te_encoder.alpha": np.ones((), np.float32),
        f"{Q}.diff": np.ones((D, D), np.float32),
        f"base_model.model.{Q}.lora_A.other.weight": np.ones((1, D), np.float32),
        "layers.1.attention.to_out.0.bias": np.ones(D, np.float32),
    }
    message = refused(tmp_path, GOOD | few)
    assert "6 keys" in message
    assert all(f"`{name}`" in message for name in few)
    assert A not in message
    many = {f"layers.{index}.attention.to_q.lora_A.weight": np.ones((1, D), np.float32) for index in range(100, 145)}
    message = refused(tmp_path, GOOD | many)
    assert "45 keys" in message
    assert message.count("`layers.") == 20
    assert "and 25 more" in message


@pytest.mark.parametrize("kept", [A, B, f"{Q}.alpha"])
def test_half_pairs(tmp_path: Path, kept: str) -> None:
    state = GOOD | {f"{Q}.alpha": np.float32(1)}
    other = spelled(pairs_of("layers.0.feed_forward.w1"))
    message = refused(tmp_path, other | {kept: state[kept]})
    assert "1 keys without their other half" in message
    assert f"`{kept}`" in message


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({A: np.ones((2, D + 1), np.float32)}, f"`{A}` has shape [2, 7], expected [r, 6]"),
        ({B: np.ones((D + 2, 2), np.float32)}, f"`{B}` has shape [8, 2], expected [6, r]"),
        ({A: np.ones((D, 2), np.float32)}, f"`{A}` has shape [6, 2], expected [r, 6]"),
        ({A: np.ones((0, D), np.float32)}, f"`{A}` has shape [0, 6], expected [r, 6] with a rank r of 1 or more"),
        ({A: np.ones((), np.float32)}, f"`{A}` has shape [], expected [r, 6]"),
        ({B: np.ones((), np.float32)}, f"`{B}` has shape [], expected [6, r]"),
        ({B: np.ones((D, 3), np.float32)}, f"`{A}` [2, 6] has rank 2, but `{B}` [6, 3] has rank 3"),
        ({A: np.full((2, D), np.nan, np.float32)}, f"`{A}` holds NaN or Inf"),
        ({B: np.full((D, 2), np.inf, np.float32)}, f"`{B}` holds NaN or Inf"),
        ({B: np.full((D, 2), 1e300, np.float64)}, f"`{B}` holds NaN or Inf"),
        ({A: np.ones((2, D), np.int8)}, f"`{A}` is I8, expected one of F64, F32, F16, BF16"),
        ({B: np.ones((D, 2), np.int64)}, f"`{B}` is I64, expected"),
        ({f"{Q}.alpha": np.float32(np.nan)}, f"`{Q}.alpha` is nan, expected a finite number"),
        ({f"{Q}.alpha": np.ones(2, np.float32)}, f"`{Q}.alpha` is F32 [2], expected one number"),
        ({f"{Q}.alpha": np.ones(1, bool)}, f"`{Q}.alpha` is BOOL [1], expected one number"),
        ({f"transformer.{A}": GOOD[A]}, "are both the down of one layer"),
        ({f"lora_unet_{flat(Q)}.{p}.weight": GOOD[k] for p, k in (("lora_down", A), ("lora_up", B))}, "both change"),
        (spelled(with_fused(shared_qkv())), f"both change `{Q}.weight`"),
    ],
)
def test_bad_pairs(tmp_path: Path, changes: State, wanted: str) -> None:
    assert wanted in refused(tmp_path, GOOD | changes)


def test_fused_rows_must_be_those_of_all_three(tmp_path: Path) -> None:
    fused = spelled(with_fused(shared_qkv()))
    key = "layers.1.attention.qkv.lora_B.weight"
    assert f"`{key}` has shape [17, 2], expected [18, r]" in refused(tmp_path, fused | {key: fused[key][:17]})


def test_convolutions_need_their_kernel(tmp_path: Path) -> None:
    state = spelled(pairs_of("local_decoder.enc1.0"))
    key = "local_decoder.enc1.0.lora_A.weight"
    assert "expected [r, 3, 3, 3]" in refused(tmp_path, state | {key: np.ones((2, 3, 1, 1), np.float32)})


def test_absent_damaged_and_doubtful_files(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(ArtifactError) as caught:
            open_lora(LoraRequest(path), SHAPES, ALIASES)
        return str(caught.value)

    assert "there is no LoRA" in message(tmp_path / "none.safetensors")
    assert "there is no LoRA" in message(tmp_path / ("n" * 5000))
    assert "there is no LoRA" in message(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"PK\x03\x04 and so on")
    assert "pickle" in message(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"")
    assert "is empty" in message(tmp_path / "b.safetensors")
    assert "holds 2 .safetensors files" in message(tmp_path)


def test_a_lora_of_rank_above_the_width_still_merges(tmp_path: Path) -> None:
    pairs = pairs_of(Q, rank=4 * D, alpha=math.pi)
    found = merged([opened(tmp_path, spelled(pairs))])[f"{Q}.weight"]
    alpha = float(np.float32(math.pi))
    wanted = by_hand({Q: replace(pairs[Q], alpha=alpha)})[f"{Q}.weight"]
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
