"""The pixel head against the table of docs/model.md, "Pixel head", stage by stage, and stripes against the whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from l2p_export.checkpoint.demo import demo_dimensions
from l2p_export.families.z_image_l2p import ZImageModel
from l2p_export.families.z_image_l2p.dimensions import Dimensions, UNetLevel
from l2p_export.families.z_image_l2p.head import PixelHead
from l2p_runtime.contract import HeadSpec
from l2p_runtime.stripes import Stripe, plan_stripes
from parity.models import State, model_spec, random_state, relative_error

HEAD = "local_decoder."


class Tables:
    """The operations that the tables name, on the tensors of one head."""

    def __init__(self, state: State) -> None:
        self._state = state

    def encode(self, name: str, x: Tensor) -> Tensor:
        """3x3 convolution and SiLU."""
        return F.silu(self._conv(f"enc{name}.0", x))

    def up(self, name: str, x: Tensor) -> Tensor:
        """Nearest x2 and 3x3 convolution, no activation."""
        twice = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return self._conv(f"up{name}.1", twice)

    def decode(self, name: str, up: Tensor, skip: Tensor) -> Tensor:
        """Decoder path first, skip second; 3x3 convolution and SiLU."""
        return F.silu(self._conv(f"dec{name}.0", torch.cat([up, skip], dim=1)))

    def join(self, x: Tensor, features: Tensor) -> Tensor:
        """Bottleneck: image path first, tokens second; 1x1 convolution and SiLU."""
        return F.silu(self._conv("bottleneck.0", torch.cat([x, features], dim=1)))

    def out(self, x: Tensor) -> Tensor:
        """1x1 convolution, no activation."""
        return self._conv("out_conv", x)

    def _conv(self, name: str, x: Tensor) -> Tensor:
        weight = self._state[name + ".weight"]
        return F.conv2d(x, weight, self._state[name + ".bias"], padding=weight.shape[-1] // 2)


def pool(x: Tensor) -> Tensor:
    """The largest of each 2x2 square."""
    return torch.stack([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).amax(dim=0)


def head_16(net: Tables, image: Tensor, features: Tensor) -> Tensor:
    enc1 = net.encode("1", image)
    enc2 = net.encode("2", pool(enc1))
    enc3 = net.encode("3", pool(enc2))
    enc4 = net.encode("4", pool(enc3))
    x = net.join(pool(enc4), features)
    dec4 = net.decode("4", net.up("4", x), enc4)
    dec3 = net.decode("3", net.up("3", dec4), enc3)
    dec2 = net.decode("2", net.up("2", dec3), enc2)
    dec1 = net.decode("1", net.up("1", dec2), enc1)
    return net.out(dec1)


def head_64(net: Tables, image: Tensor, features: Tensor) -> Tensor:
    return net.out(inner_64(net, image, features))


def inner_64(net: Tables, image: Tensor, features: Tensor) -> Tensor:
    """The 64 px head without its last convolution: the 128 px head wraps it."""
    enc0 = net.encode("0", image)
    enc0b = net.encode("0b", pool(enc0))
    enc1 = net.encode("1", pool(enc0b))
    enc2 = net.encode("2", pool(enc1))
    enc3 = net.encode("3", pool(enc2))
    enc4 = net.encode("4", pool(enc3))
    x = net.join(pool(enc4), features)
    dec4 = net.decode("4", net.up("4", x), enc4)
    dec3 = net.decode("3", net.up("3", dec4), enc3)
    dec2 = net.decode("2", net.up("2", dec3), enc2)
    dec1 = net.decode("1", net.up("1", dec2), enc1)
    dec0b = net.decode("0b", net.up("0b", dec1), enc0b)
    return net.decode("0", net.up("0", dec0b), enc0)


def head_128(net: Tables, image: Tensor, features: Tensor) -> Tensor:
    enc_8k = net.encode("_8k", image)
    inner = inner_64(net, pool(enc_8k), features)
    return net.out(net.decode("_8k", net.up("_8k", inner), enc_8k))


def head_160(net: Tables, image: Tensor, features: Tensor) -> Tensor:
    enc_10k_a = net.encode("_10k_a", image)
    enc0 = net.encode("0", pool(enc_10k_a))
    enc0b = net.encode("0b", pool(enc0))
    enc1 = net.encode("1", pool(enc0b))
    enc2 = net.encode("2", pool(enc1))
    enc3 = net.encode("3", pool(enc2))
    x = net.join(pool(enc3), enlarge(features))
    dec3 = net.decode("3", net.up("3", x), enc3)
    dec2 = net.decode("2", net.up("2", dec3), enc2)
    dec1 = net.decode("1", net.up("1", dec2), enc1)
    dec0b = net.decode("0b", net.up("0b", dec1), enc0b)
    dec0 = net.decode("0", net.up("0", dec0b), enc0)
    dec_10k_a = net.decode("_10k_a", net.up("_10k_a", dec0), enc_10k_a)
    return net.out(dec_10k_a)


def enlarge(features: Tensor) -> Tensor:
    """2.5 times as many rows and columns; each takes the one at floor(0.4 i)."""
    rows, columns = ([2 * i // 5 for i in range(size * 5 // 2)] for size in features.shape[2:])
    return features[:, :, rows][:, :, :, columns]


WRITTEN_OUT: dict[int, Callable[[Tables, Tensor, Tensor], Tensor]] = {
    16: head_16,
    64: head_64,
    128: head_128,
    160: head_160,
}


@pytest.mark.parametrize("patch_px", [16, 64, 128, 160])
@pytest.mark.parametrize("grid", [(2, 4), (4, 2), (6, 2)])
def test_head_equals_the_tables(patch_px: int, grid: tuple[int, int]) -> None:
    d = small_head(patch_px)
    state = head_state(d, seed=patch_px)
    image, tokens = head_inputs(d, *grid, batch=2)
    expected = WRITTEN_OUT[patch_px](Tables(state), image, tokens.permute(0, 3, 1, 2))
    # Measured: equal to the last bit.
    assert relative_error(run_head(d, state, image, tokens), expected) <= HEAD_TOLERANCE


HEAD_TOLERANCE = 1e-6


def test_enlarging_equals_nearest_interpolation_of_the_published_grid() -> None:
    features = torch.arange(64 * 64, dtype=torch.float32).reshape(1, 1, 64, 64)
    assert torch.equal(enlarge(features), F.interpolate(features, size=(160, 160), mode="nearest"))


@pytest.mark.parametrize("patch_px", [16, 64, 128])
@pytest.mark.parametrize(
    ("rows", "columns", "kept"), [(9, 2, 2), (11, 1, 4), (8, 1, 1)], ids=["ragged-9-by-2", "ragged-11-by-4", "single"]
)
def test_stripes_equal_the_whole(patch_px: int, rows: int, columns: int, kept: int) -> None:
    d = small_head(patch_px)
    spec = model_spec(d).head
    assert spec.halo_rows is not None
    stripes = plan_stripes(spec, rows, bytes_per_row=1, budget_bytes=kept + 2 * spec.halo_rows)
    assert {stripe.stop - stripe.first for stripe in stripes[:-1]} == {kept}
    assert [row for stripe in stripes for row in range(stripe.first, stripe.stop)] == list(range(rows))
    state = head_state(d, seed=patch_px, gain=LOUD)
    image, tokens = head_inputs(d, rows, columns, batch=1)
    in_double = {name: value.double() for name, value in state.items()}, image.double(), tokens.double()
    assert relative_error(run_striped(d, *in_double, stripes), run_head(d, *in_double)) <= STRIPE_DOUBLE
    state = head_state(d, seed=patch_px)
    assert relative_error(run_striped(d, state, image, tokens, stripes), run_head(d, state, image, tokens)) <= STRIPE


# Measured 5.3e-7: convolutions of another height may add in another order.
STRIPE = 1.6e-6
# Nothing but too small a halo could show in float64: measured 1.2e-16.
STRIPE_DOUBLE = 1e-14
# Weights that multiply the variance at every convolution, so that the far end of the reach shows in the result.
LOUD = 4.0


def test_two_rows_of_halo_are_not_enough() -> None:
    """The head reaches 45 px at patch 16; 32 px of context show."""
    d = small_head(16)
    state = {name: value.double() for name, value in head_state(d, seed=16, gain=LOUD).items()}
    image, tokens = (value.double() for value in head_inputs(d, 12, 3, batch=1))
    whole = run_head(d, state, image, tokens)
    errors = {}
    for halo in (2, 3):
        spec = HeadSpec(row_multiple=1, halo_rows=halo, peak_values_per_px=1.0)
        stripes = plan_stripes(spec, 12, bytes_per_row=1, budget_bytes=2 + 2 * halo)
        assert {stripe.stop - stripe.first for stripe in stripes} == {2}
        errors[halo] = relative_error(run_striped(d, state, image, tokens, stripes), whole)
    assert errors[3] <= STRIPE_DOUBLE
    # Measured 0.037.
    assert errors[2] > 1e-3


def small_head(patch_px: int) -> Dimensions:
    """Few channels, no two stages alike; the 3 channels of the outermost encoder at 128 and 160 px stay."""
    d = demo_dimensions(patch_px)
    levels = tuple(
        UNetLevel(level.name, 3 if level.encoder == 3 else 4 + index, 5 + 2 * index, 3 + index)
        for index, level in enumerate(d.levels)
    )
    return replace(d, width=32, levels=levels, bottleneck=11)


def head_state(d: Dimensions, seed: int, gain: float = 1.5) -> State:
    shapes = {k.removeprefix(HEAD): shape for k, shape in ZImageModel(d).shapes.items() if k.startswith(HEAD)}
    return random_state(shapes, seed, gain)


def head_inputs(d: Dimensions, rows: int, columns: int, batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    image = torch.randn(batch, 3, rows * d.patch_px, columns * d.patch_px, generator=generator)
    return image, torch.randn(batch, rows, columns, d.width, generator=generator)


def run_head(d: Dimensions, state: State, image: Tensor, tokens: Tensor) -> Tensor:
    with torch.device("meta"):
        head = PixelHead(d, torch.float32)
    head.load_state_dict(state, assign=True)
    with torch.no_grad():
        out: Tensor = head(image, tokens)
    return out


def run_striped(
    d: Dimensions, state: State, image: Tensor, tokens: Tensor, stripes: tuple[Stripe, ...]
) -> Tensor:  # fmt: skip
    """Run the head on the rows each stripe reads and keep the rows that it owns."""
    p = d.patch_px
    kept = []
    for stripe in stripes:
        window = image[:, :, stripe.read_first * p : stripe.read_stop * p]
        made = run_head(d, state, window, tokens[:, stripe.read_first : stripe.read_stop])
        own = slice((stripe.first - stripe.read_first) * p, (stripe.stop - stripe.read_first) * p)
        kept.append(made[:, :, own])
    return torch.cat(kept, dim=2)
