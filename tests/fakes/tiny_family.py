"""A second family, as small as one can be: nothing of Z-Image's names, norms, positions or pixel head.

    words_in, words.N    caption     pixels, clock, enc.0    stem     enc.1 and on    trunk
    last                 tail        draw                    head

Blocks have no norm behind their branches, so that nothing is scaled; queries and keys are rotated by halves and have no
norms; the head is one linear layer, so that stripes need no halo.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from l2p_calib.layout import Attention, Float32Layer, Point, QuantizableLayer, QuantizationLayout, layer_of
from l2p_engines.forecast.calls import Operations, Rows
from l2p_export.families.faults import shape_faults
from l2p_export.tensors.checkpoint import Checkpoint, Spelling
from l2p_runtime.contract import HeadSpec, ModelSpec, NetworkSpec, RotarySpec, TensorSpec
from l2p_runtime.errors import ArtifactError
from l2p_runtime.noise import normal_noise
from l2p_runtime.tensorfile import write_tensorfile

if TYPE_CHECKING:
    import torch
    from torch import nn

    from l2p_export.families import Model
    from l2p_export.families.base import Shapes
    from l2p_export.tensors.files import Weights
    from l2p_export.tensors.sources import TensorSource

HEAD_WIDTH = 16
OUTSIDE_BLOCKS = {
    "caption": ("words_in.", "hush"),
    "stem": ("pixels.", "clock.", "blank"),
    "tail": ("last.",),
    "head": ("draw.",),
}
MATRICES = ("ask", "find", "give", "mix", "up", "down")


@dataclass(frozen=True, slots=True)
class TinyModel:
    """One architecture; implements `families.base.Model`."""

    patch_px: int = 8
    width: int = 48
    ffn_width: int = 80
    caption_width: int = 20
    time_width: int = 12
    layers: int = 3
    words: int = 1
    trunk: tuple[int, int] = (1, 3)

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            family="tiny",
            variant="only",
            patch_px=self.patch_px,
            width=self.width,
            heads=self.width // HEAD_WIDTH,
            layers=self.layers,
            trunk_layers=self.trunk,
            ffn_width=self.ffn_width,
            caption_width=self.caption_width,
            time_width=self.time_width,
            sequence_multiple=32,
            caption_tokens_max=64,
            rotary=RotarySpec(theta=100.0, axis_channels=(4, 6, 6), axis_lengths=(256, 64, 64), base_grid=(8, 8)),
            head=HeadSpec(row_multiple=1, halo_rows=0, peak_values_per_px=6.0),
        )

    @property
    def networks(self) -> tuple[NetworkSpec, ...]:
        caption_rope, rope = _rope("32*t"), _rope("s")
        caption = TensorSpec("caption", "float32", ("B", "32*t", self.width))
        tokens = TensorSpec("tokens", "float32", ("B", "s", self.width))
        tokens_out = TensorSpec("tokens_out", "float32", ("B", "s", self.width))
        modulation = TensorSpec("modulation", "float32", ("B", self.time_width))
        embeds = TensorSpec("prompt_embeds", "float32", ("B", "32*t", self.caption_width))
        mask, time = TensorSpec("caption_mask", "bool", ("B", "32*t")), TensorSpec("time", "float32", ("B",))
        p = self.patch_px
        grid = TensorSpec("tokens", "float32", ("B", "r", "w", self.width))
        image, stripe, prediction = (
            TensorSpec(name, "float32", ("B", 3, f"{p}*{rows}", f"{p}*w"))
            for name, rows in (("image", "h"), ("image", "r"), ("prediction", "r"))
        )
        return (
            NetworkSpec("caption", (embeds, mask, *caption_rope), (caption,)),
            NetworkSpec("stem", (image, time, caption, *rope), (tokens, modulation)),
            NetworkSpec("trunk", (tokens, modulation, *rope), (tokens_out,)),
            NetworkSpec("tail", (tokens, modulation, *rope), (tokens_out,)),
            NetworkSpec("head", (stripe, grid), (prediction,)),
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        width, pixels = self.width, 3 * self.patch_px**2
        shapes: dict[str, tuple[int, ...]] = {
            "words_in.weight": (width, self.caption_width),
            "words_in.bias": (width,),
            "hush": (1, width),
            "pixels.weight": (width, pixels),
            "pixels.bias": (width,),
            "blank": (1, width),
            "clock.weight": (self.time_width, 2),
            "clock.bias": (self.time_width,),
            "last.weight": (width, width),
            "draw.weight": (pixels, width),
            "draw.bias": (pixels,),
        }
        for block in [*(f"words.{n}" for n in range(self.words)), *(f"enc.{n}" for n in range(self.layers))]:
            shapes |= {f"{block}.{name}.weight": (width, width) for name in ("ask", "find", "give", "mix")}
            shapes |= {f"{block}.up.weight": (self.ffn_width, width), f"{block}.down.weight": (width, self.ffn_width)}
            shapes |= {f"{block}.calm.weight": (width,), f"{block}.rest.weight": (width,)}
            if block.startswith("enc."):
                shapes[f"{block}.tick.weight"] = (width, self.time_width)
        return shapes

    @property
    def settings(self) -> dict[str, int]:
        return {"head_width": HEAD_WIDTH}

    def faults(self, shapes: Shapes) -> list[str]:
        return shape_faults(shapes, self.shapes)

    def module(
        self,
        network: str,
        dtype_of: Callable[[str], torch.dtype],
        blocks: Iterable[str] | None = None,
        exponent_of: Callable[[str], int] | None = None,
    ) -> nn.Module:
        from fakes.tiny_networks import tiny_network

        del exponent_of
        return tiny_network(network, self, dtype_of, tuple(self.blocks(network) if blocks is None else blocks))

    def blocks(self, network: str) -> tuple[str, ...]:
        first, stop = self.trunk
        runs = {"stem": range(first), "trunk": range(first, stop)}
        if network == "caption":
            return tuple(f"words.{n}" for n in range(self.words))
        return tuple(f"enc.{n}" for n in runs.get(network, ()))

    def network_shapes(self, network: str) -> dict[str, tuple[int, ...]]:
        begins = (*(f"{block}." for block in self.blocks(network)), *OUTSIDE_BLOCKS.get(network, ()))
        return {name: shape for name, shape in self.shapes.items() if name.startswith(begins)}

    def layout(self, network: str) -> QuantizationLayout:
        layers = tuple(dict.fromkeys(map(layer_of, self.network_shapes(network))))
        outside = [name for name in ("words_in", "pixels", "clock", "last", "draw") if name in layers]
        points = [Point(f"{name}:{side}", (name,)) for name in outside for side in ("in", "out")]
        products, attentions = [], []
        for block in self.blocks(network):
            ask, find, give, mix, up, down = (f"{block}.{name}" for name in MATRICES)
            residual, look = f"residual.{network}", f"{block}.look"
            points += [
                Point(f"{ask}:in", (ask, find, give, residual)),
                *(Point(f"{layer}:out", (layer,)) for layer in (ask, find)),
                *(Point(name) for name in (f"{look}.query:out", f"{look}.key:out", f"{give}:out", f"{mix}:in")),
                Point(f"{mix}:out", (mix, residual)),
                Point(f"{up}:in", (up, residual)),
                Point(f"{up}:out", (up,)),
                Point(f"{down}:in", (up, down)),
                Point(f"{down}:out", (down, residual)),
            ]
            products += [QuantizableLayer(layer, f"{ask}:in", f"{block} inputs") for layer in (ask, find, give)]
            products += [QuantizableLayer(layer, f"{layer}:in", layer) for layer in (mix, up, down)]
            read = ((f"{look}.query", f"{look}.query:out"), (f"{look}.key", f"{look}.key:out"))
            parts = tuple(
                QuantizableLayer(layer, point, look) for layer, point in (*read, (f"{look}.value", f"{give}:out"))
            )
            attentions.append(Attention(look, (parts[0], parts[1], parts[2]), (ask, find)))
        fixed = (Float32Layer("clock", "it is small"),) if "clock" in layers else ()
        if not attentions:
            return QuantizationLayout(network, layers, tuple(points), float32=fixed)
        points.append(Point(f"residual.{network}:out", (f"residual.{network}",)))
        every = (*layers, f"residual.{network}")
        return QuantizationLayout(network, every, tuple(points), (), tuple(products), tuple(attentions), fixed)

    def operations(self, network: str) -> Operations:
        own: dict[str, Rows] = {"pixels": "image", "clock": "call", "draw": "image"}
        inside: Rows = "caption" if network == "caption" else "sequence"
        products: dict[str, Rows] = {
            name: own.get(layer_of(name), "call" if name.endswith(".tick.weight") else inside)
            for name, shape in self.network_shapes(network).items()
            if len(shape) == 2 and name.endswith(".weight")
        }
        return Operations(products, {}, ((inside, self.width),) * len(self.blocks(network)))


@dataclass(frozen=True, slots=True)
class TinyFamily:
    """Implements `families.base.Family`."""

    name: str = "tiny"

    @property
    def published(self) -> Mapping[int, Model]:
        return {}

    def claims(self, names: Iterable[str]) -> bool:
        return any(re.fullmatch(r"enc\.\d+\.ask\.weight", name) for name in names)

    def read(self, weights: Weights) -> Checkpoint:
        return Checkpoint(weights.path, Spelling("", fused=False), dict(weights.tensors), weights.metadata)

    def model(self, shapes: Shapes, equal_layers: tuple[int, ...] | None = None) -> TinyModel:
        if "pixels.weight" not in shapes or "words_in.weight" not in shapes:
            raise ArtifactError("there are no `pixels` or no `words_in`")
        layers = 1 + max((index for index in map(self.main_layer, shapes) if index is not None), default=-1)
        words = len({name.split(".")[1] for name in shapes if name.startswith("words.")})
        frozen = [n for n in range(1, layers) if equal_layers is None or n in equal_layers]
        return TinyModel(
            patch_px=math.isqrt(shapes["pixels.weight"][1] // 3),
            width=shapes["pixels.weight"][0],
            ffn_width=shapes["enc.0.up.weight"][0],
            caption_width=shapes["words_in.weight"][1],
            time_width=shapes["clock.weight"][0],
            layers=layers,
            words=words,
            trunk=(frozen[0], frozen[-1] + 1),
        )

    def is_source(self, names: Iterable[str]) -> bool:
        return not any(name.startswith("pixels.") for name in names)

    def is_shared(self, name: str) -> bool:
        return not name.startswith(("pixels.", "draw."))

    def main_layer(self, name: str) -> int | None:
        match = re.match(r"enc\.(\d{1,3})\.", name)
        return int(match[1]) if match else None

    def aliases(self, shapes: Shapes) -> Mapping[str, tuple[str, ...]]:
        return {}

    def replaced_layers(self, shapes: Shapes) -> Shapes:
        return {}

    def node_ui(self, tensors: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
        return dict(tensors)

    def known_as(self, fingerprint: str) -> str:
        return ""


TINY = TinyFamily()


def write_tiny_checkpoint(path: Path, seed: int = 0, model: TinyModel | None = None) -> Path:
    """Seeded weights: gains near 1, small biases, matrices that keep the variance."""
    values = {}
    for index, (name, shape) in enumerate((model or TinyModel()).shapes.items()):
        noise = normal_noise(seed, image_index=index, channels=1, rows=(0, 1), cols=(0, math.prod(shape)))
        scale = 0.1 if len(shape) == 1 or not name.endswith(".weight") else shape[1] ** -0.5
        gain = 1.0 if name.endswith((".calm.weight", ".rest.weight")) else 0.0
        values[name] = (gain + scale * noise.reshape(shape)).astype("float32")
    write_tensorfile(path, values, {"l2p.steps": "2", "l2p.guidance": "1.0", "license": "Apache-2.0"})
    return path


def with_layers(layers: int) -> TinyModel:
    """A deeper model."""
    return replace(TinyModel(), layers=layers, trunk=(1, layers))


def _rope(length: str) -> tuple[TensorSpec, TensorSpec]:
    cosine, sine = (TensorSpec(name, "float32", (length, HEAD_WIDTH // 2)) for name in ("rope_cos", "rope_sin"))
    return cosine, sine
