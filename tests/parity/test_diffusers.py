"""Our networks against diffusers' Z-Image transformer, given 3 channels and 16 px patches.

The two differ on purpose in one place. diffusers computes the frequencies of the time sinusoid, and the angles of the
rotation, in float32; we compute both in float64 and round once. At 1000 rad one float32 step of a frequency moves the
sinusoid by 6e-5. So every comparison runs twice: with diffusers as it is, and with its tables replaced by correctly
rounded ones, where only the order of additions is left to differ.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_z_image import (
    RopeEmbedder,
    TimestepEmbedder,
    ZImageTransformer2DModel,
    ZImageTransformerBlock,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from l2p_export.families.z_image_l2p import ZImageModel
from l2p_export.families.z_image_l2p.blocks import Block, TimeEmbedding
from l2p_export.families.z_image_l2p.dimensions import Dimensions
from l2p_runtime.positions import caption_tables, rope_tables
from parity.models import (
    State,
    call,
    condition,
    load_network,
    model_spec,
    published_like,
    random_state,
    relative_error,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Tolerances are three times what was measured: over 600 random cases for tokens and time, over the cases below for the
# rest. "Plain" is diffusers as it is, "exact" with correctly rounded tables.
EXACT_TOKENS = 3.3e-6  # 1.1e-6
PLAIN_TOKENS = 1e-4  # 3.2e-5
PLAIN_TIME = 3.7e-5  # 1.2e-5
EXACT_TIME = 1e-6  # equal to the last bit
BLOCK = 1e-6  # equal to the last bit
TIME_TRUTH = 1.7e-5  # 5.6e-6, where diffusers has 6.3e-6
ROPE_EXACT = 1.2e-7  # equal to the last bit; two steps of float32 for another machine's cosine
ROPE_PLAIN = 4.5e-5  # 1.5e-5

AXIS_LENGTHS = (1024, 512, 512)
PATCH_PX = 16

WIDTHS = [
    (width, head)
    for width, head in itertools.product(range(64, 129, 16), (16, 32, 48))
    if width % head == 0
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Case:
    """One small model and what it is given."""

    width: int
    head_width: int
    caption_width: int
    layers: int
    refiners: int
    grid: tuple[int, int]
    captions: tuple[int, ...]
    time: float
    seed: int

    @property
    def dimensions(self) -> Dimensions:
        return published_like(
            width=self.width,
            head_width=self.head_width,
            caption_width=self.caption_width,
            layers=self.layers,
            refiners=self.refiners,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    width, head_width = draw(st.sampled_from(WIDTHS))
    # A batch holds captions of equal padded length; 33 and 64 tokens share one.
    captions = draw(st.sampled_from([(1,), (31,), (32,), (33,), (70,), (1, 32), (64, 33), (31, 1, 32)]))
    return Case(
        width=width,
        head_width=head_width,
        caption_width=draw(st.integers(3, 90)),
        layers=draw(st.integers(3, 7)),
        refiners=draw(st.integers(1, 3)),
        grid=(draw(st.integers(1, 9)), draw(st.integers(1, 9))),
        captions=captions,
        time=draw(st.floats(0, 1, width=32)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


# One token; a whole multiple of 32 tokens; more than one row of 32 pads; a batch whose captions pad unequally.
ONE_TOKEN = Case(64, 16, 40, 3, 1, (1, 1), (1,), 0.3, 0)
NO_PADS = Case(96, 48, 24, 5, 2, (4, 8), (64, 33), 0.75, 1)
TALL = Case(128, 32, 56, 7, 3, (33, 1), (70,), 1.0, 2)
WIDE = Case(80, 16, 7, 4, 2, (1, 35), (31,), 0.0, 3)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(cases())
@example(ONE_TOKEN)
@example(NO_PADS)
@example(TALL)
@example(WIDE)
def test_last_layer_equals_diffusers(case: Case) -> None:
    state = _state(case.dimensions, case.seed)
    image, captions = _inputs(case)
    ours, modulation = _ours(case, state, image, captions)
    with _exact_tables():
        theirs, their_modulation = _theirs(case, state, image, captions)
    assert relative_error(modulation, their_modulation) <= EXACT_TIME
    assert relative_error(ours, theirs) <= EXACT_TOKENS
    theirs, their_modulation = _theirs(case, state, image, captions)
    assert relative_error(modulation, their_modulation) <= PLAIN_TIME
    assert relative_error(ours, theirs) <= PLAIN_TOKENS


@pytest.mark.parametrize("modulated", [True, False], ids=["modulated", "plain"])
@pytest.mark.parametrize(("width", "head_width"), WIDTHS)
def test_block_equals_diffusers(width: int, head_width: int, modulated: bool) -> None:
    d = published_like(width=width, head_width=head_width, caption_width=8, layers=3, refiners=1)
    name = "layers.0." if modulated else "context_refiner.0."
    shapes = {key.removeprefix(name): s for key, s in ZImageModel(d).shapes.items() if key.startswith(name)}
    state = random_state(shapes, seed=width + head_width)
    theirs = ZImageTransformerBlock(0, width, d.heads, d.heads, 1e-5, qk_norm=True, modulation=modulated).eval()
    theirs.load_state_dict(state)
    ours = Block(d, torch.float32, modulated=modulated).eval()
    ours.load_state_dict(state)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 45, width, generator=generator)
    modulation = torch.randn(2, d.time_width, generator=generator) if modulated else None
    angles = torch.rand(45, head_width // 2, generator=generator) * 100
    rotation = torch.polar(torch.ones_like(angles), angles)
    with torch.no_grad():
        expected = theirs(x, None, rotation.expand(2, -1, -1), modulation)
        found = ours(x, modulation, rotation.real.contiguous(), rotation.imag.contiguous())
    assert relative_error(found, expected) <= BLOCK


def test_time_embedding_is_as_close_to_float64_as_diffusers() -> None:
    d = published_like(width=128, head_width=32, caption_width=8, layers=3, refiners=1)
    shapes = {k.removeprefix("t_embedder."): s for k, s in ZImageModel(d).shapes.items() if k.startswith("t_embedder.")}
    state = random_state(shapes, seed=5)
    ours = TimeEmbedding(d, torch.float32)
    ours.load_state_dict(state)
    theirs = TimestepEmbedder(d.time_width, mid_size=d.time_hidden)
    theirs.load_state_dict(state)
    times = torch.linspace(0, 1, 1001)
    with torch.no_grad():
        found, plain = ours(times), theirs(times * 1000.0)
        with _exact_tables():
            exact = theirs(times * 1000.0)
    truth = _time_embedding_in_float64(times, state)
    assert relative_error(found, exact) <= EXACT_TIME
    assert relative_error(found, truth) <= TIME_TRUTH
    assert relative_error(found, truth) < relative_error(plain, truth)


@pytest.mark.parametrize("head_width", [16, 32, 48, 128])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (4, 8), (33, 2), (64, 64)])
@pytest.mark.parametrize("caption_tokens", [32, 96, 512])
def test_rope_tables_equal_diffusers(head_width: int, grid: tuple[int, int], caption_tokens: int) -> None:
    d = published_like(width=2 * head_width, head_width=head_width, caption_width=8, layers=3, refiners=1)
    tables = rope_tables(model_spec(d), *grid, caption_tokens)
    positions = torch.tensor(list(_positions(grid, caption_tokens)))
    embedder = RopeEmbedder(256.0, _axis_channels(head_width), list(AXIS_LENGTHS))
    plain = embedder(positions)
    with _exact_tables():
        embedder.freqs_cis = None
        exact = embedder(positions)
    for found, ours, theirs in zip(tables, (exact.real, exact.imag), (plain.real, plain.imag), strict=True):
        assert np.abs(found - ours.numpy()).max() <= ROPE_EXACT
        assert np.abs(found - theirs.numpy()).max() <= ROPE_PLAIN
    for whole, part in zip(tables, caption_tables(tables, caption_tokens), strict=True):
        assert np.array_equal(part, whole[len(positions) - caption_tokens :])


def _positions(grid: tuple[int, int], caption_tokens: int) -> Iterator[tuple[int, int, int]]:
    """Time, row and column of every token, as docs/model.md, "Rotary positions", lists them."""
    rows, columns = grid
    for row in range(rows):
        for column in range(columns):
            yield caption_tokens + 1, row, column
    for _ in range(-(rows * columns) % 32):
        yield 0, 0, 0
    for index in range(caption_tokens):
        yield 1 + index, 0, 0


def _axis_channels(head_width: int) -> list[int]:
    return [head_width // 4, head_width * 3 // 8, head_width * 3 // 8]


def _state(d: Dimensions, seed: int) -> State:
    shapes = {name: shape for name, shape in ZImageModel(d).shapes.items() if not name.startswith("local_decoder.")}
    return random_state(shapes, seed)


def _inputs(case: Case) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
    random = np.random.default_rng(case.seed)
    rows, columns = case.grid
    size = (len(case.captions), 3, rows * PATCH_PX, columns * PATCH_PX)
    image = random.standard_normal(size, np.float32)
    return image, [random.standard_normal((tokens, case.caption_width), np.float32) for tokens in case.captions]


def _times(case: Case) -> Tensor:
    """A time of its own for each image of the batch."""
    return torch.tensor([abs(case.time - 0.125 * index) for index in range(len(case.captions))])


def _ours(
    case: Case, state: State, image: NDArray[np.float32], captions: list[NDArray[np.float32]]
) -> tuple[Tensor, Tensor]:
    d = case.dimensions
    prompt = condition(d, state, captions, *case.grid)
    rope = {"rope_cos": prompt.rope_cos, "rope_sin": prompt.rope_sin}
    stem = load_network("stem", d, state)
    tokens, modulation = call(stem, image=image, time=_times(case), caption=prompt.caption, **rope)
    for name in ("trunk", "tail"):
        (tokens,) = call(load_network(name, d, state), tokens=tokens, modulation=modulation, **rope)
    return tokens, modulation


def _theirs(
    case: Case, state: State, image: NDArray[np.float32], captions: list[NDArray[np.float32]]
) -> tuple[Tensor, Tensor]:
    """Output of the last main layer and of the time embedding."""
    model = ZImageTransformer2DModel(
        all_patch_size=(PATCH_PX,),
        all_f_patch_size=(1,),
        in_channels=3,
        dim=case.width,
        n_layers=case.layers,
        n_refiner_layers=case.refiners,
        n_heads=case.width // case.head_width,
        n_kv_heads=case.width // case.head_width,
        cap_feat_dim=case.caption_width,
        axes_dims=_axis_channels(case.head_width),
        axes_lens=list(AXIS_LENGTHS),
    ).eval()
    incompatible = model.load_state_dict(state, strict=False)
    assert not incompatible.unexpected_keys
    assert all(name.startswith("all_final_layer.") for name in incompatible.missing_keys)
    made: dict[str, Tensor] = {}
    model.layers[-1].register_forward_hook(lambda module, inputs, output: made.update(tokens=output))
    model.t_embedder.register_forward_hook(lambda module, inputs, output: made.update(modulation=output))
    with torch.no_grad():
        model(
            [torch.from_numpy(pixels).unsqueeze(1) for pixels in image],
            _times(case),
            [torch.from_numpy(embeds) for embeds in captions],
            patch_size=PATCH_PX,
            f_patch_size=1,
        )
    return made["tokens"], made["modulation"]


@contextmanager
def _exact_tables() -> Iterator[None]:
    """Let diffusers use frequencies and rotations that are rounded to float32 once."""
    with (
        patch.object(TimestepEmbedder, "timestep_embedding", staticmethod(_sinusoid)),
        patch.object(RopeEmbedder, "precompute_freqs_cis", staticmethod(_rotations)),
    ):
        yield


def _sinusoid(scaled_time: Tensor, width: int) -> Tensor:
    half = width // 2
    frequencies = torch.tensor([10000.0 ** (-index / half) for index in range(half)], dtype=torch.float32)
    angles = scaled_time[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _rotations(channels: list[int], lengths: list[int], theta: float) -> list[Tensor]:
    tables = []
    for width, length in zip(channels, lengths, strict=True):
        frequencies = torch.tensor([theta ** (-pair / width) for pair in range(0, width, 2)], dtype=torch.float64)
        angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
        tables.append(torch.complex(angles.cos(), angles.sin()).to(torch.complex64))
    return tables


def _time_embedding_in_float64(times: Tensor, state: State) -> Tensor:
    """docs/model.md, "Timestep", in float64 throughout: sinusoid of 1000 t, linear, SiLU, linear."""
    weights = {name: value.double() for name, value in state.items()}
    frequencies = torch.exp(torch.arange(128, dtype=torch.float64) * (-math.log(10000.0) / 128))
    angles = times.double()[:, None] * 1000.0 * frequencies
    x = torch.cat([angles.cos(), angles.sin()], dim=1)
    x = torch.nn.functional.silu(x @ weights["mlp.0.weight"].T + weights["mlp.0.bias"])
    return x @ weights["mlp.2.weight"].T + weights["mlp.2.bias"]
