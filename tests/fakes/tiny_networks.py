"""The networks of the tiny family in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2p_export.families.linear import Linear

if TYPE_CHECKING:
    from fakes.tiny_family import TinyModel

DTypeOf = Callable[[str], torch.dtype]


class Norm(nn.Module):
    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return F.rms_norm(wide, self.weight.shape, self.weight.to(torch.float32), 1e-5).to(x.dtype)


class Turn(nn.Module):
    """Channels k and k + R of a head are a pair, as in HiDream."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        wide, half = x.to(torch.float32), x.shape[-1] // 2
        first, second = wide[..., :half], wide[..., half:]
        cos, sin = cos[:, None], sin[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Look(nn.Module):
    def __init__(self, head_width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_width, self.dtype = head_width, dtype
        self.query, self.key, self.value = Turn(), Turn(), nn.Identity()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (torch.unflatten(part, -1, (-1, self.head_width)) for part in (q, k, v))
        parts = (self.query(q, cos, sin), self.key(k, cos, sin), self.value(v))
        q, k, v = (part.to(self.dtype).transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, name: str, d: TinyModel, dtype_of: DTypeOf) -> None:
        super().__init__()

        def linear(layer: str, inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, bias=False, dtype=dtype_of(f"{name}.{layer}"))

        self.calm, self.rest = (Norm(d.width, dtype_of(f"{name}.{layer}")) for layer in ("calm", "rest"))
        self.ask, self.find, self.give, self.mix = (
            linear(layer, d.width, d.width) for layer in ("ask", "find", "give", "mix")
        )
        self.up, self.down = linear("up", d.width, d.ffn_width), linear("down", d.ffn_width, d.width)
        if name.startswith("enc."):
            self.tick = linear("tick", d.time_width, d.width)
        self.look = Look(d.settings["head_width"], dtype_of(f"{name}.look"))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, modulation: Tensor | None = None) -> Tensor:
        calm = self.calm(x)
        if modulation is not None:
            calm = calm + self.tick(modulation)[:, None].to(calm.dtype)
        seen = self.look(self.ask(calm), self.find(calm), self.give(calm), cos, sin)
        x = x + self.mix(seen).to(x.dtype)
        fed: Tensor = self.down(F.gelu(self.up(self.rest(x))))
        return x + fed.to(x.dtype)


def _blocks(prefix: str, names: Sequence[str], d: TinyModel, dtype_of: DTypeOf) -> nn.ModuleDict:
    own = [name for name in names if name.startswith(f"{prefix}.")]
    return nn.ModuleDict({name.rpartition(".")[2]: Block(name, d, dtype_of) for name in own})


class Caption(nn.Module):
    def __init__(self, d: TinyModel, dtype_of: DTypeOf, blocks: Sequence[str]) -> None:
        super().__init__()
        self.residual = dtype_of("residual.caption")
        self.words_in = Linear(d.caption_width, d.width, dtype=dtype_of("words_in"))
        self.hush = nn.Parameter(torch.empty(1, d.width, dtype=dtype_of("hush")))
        self.words = _blocks("words", blocks, d, dtype_of)

    def forward(self, prompt_embeds: Tensor, caption_mask: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        x = self.words_in(prompt_embeds).to(self.residual)
        x = torch.where(caption_mask.unsqueeze(-1), x, self.hush.to(x.dtype))
        for block in self.words.values():
            x = block(x, rope_cos, rope_sin)
        return x.to(torch.float32)


class Stem(nn.Module):
    def __init__(self, d: TinyModel, dtype_of: DTypeOf, blocks: Sequence[str]) -> None:
        super().__init__()
        self.residual, self.patch_px = dtype_of("residual.stem"), d.patch_px
        self.pixels = Linear(3 * d.patch_px**2, d.width, dtype=dtype_of("pixels"))
        self.clock = Linear(2, d.time_width, dtype=dtype_of("clock"))
        self.blank = nn.Parameter(torch.empty(1, d.width, dtype=dtype_of("blank")))
        self.enc = _blocks("enc", blocks, d, dtype_of)

    def forward(
        self, image: Tensor, time: Tensor, caption: Tensor, rope_cos: Tensor, rope_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        modulation = self.clock(torch.stack([time.cos(), time.sin()], dim=-1)).to(torch.float32)
        x = torch.unflatten(torch.unflatten(image, 3, (-1, self.patch_px)), 2, (-1, self.patch_px))
        x = self.pixels(x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)).to(self.residual)
        blank = self.blank.to(x.dtype).unsqueeze(0).expand(x.shape[0], 1, -1)
        rows = torch.arange(rope_cos.shape[0] - caption.shape[1], device=x.device).clamp(max=x.shape[1])
        x = torch.cat([x, blank], dim=1).index_select(1, rows)
        x = torch.cat([x, caption.to(x.dtype)], dim=1)
        for block in self.enc.values():
            x = block(x, rope_cos, rope_sin, modulation)
        return x.to(torch.float32), modulation


class Trunk(nn.Module):
    def __init__(self, d: TinyModel, dtype_of: DTypeOf, blocks: Sequence[str]) -> None:
        super().__init__()
        self.residual = dtype_of("residual.trunk")
        self.enc = _blocks("enc", blocks, d, dtype_of)

    def forward(self, tokens: Tensor, modulation: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        x = tokens.to(self.residual)
        for block in self.enc.values():
            x = block(x, rope_cos, rope_sin, modulation)
        return x.to(torch.float32)


class Tail(nn.Module):
    def __init__(self, d: TinyModel, dtype_of: DTypeOf) -> None:
        super().__init__()
        self.last = Linear(d.width, d.width, bias=False, dtype=dtype_of("last"))

    def forward(self, tokens: Tensor, modulation: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        made: Tensor = self.last(tokens).to(torch.float32)
        return made


class Head(nn.Module):
    """Tokens to x0, from which the noise that the image is taken for is subtracted."""

    def __init__(self, d: TinyModel, dtype_of: DTypeOf) -> None:
        super().__init__()
        self.patch_px = d.patch_px
        self.draw = Linear(d.width, 3 * d.patch_px**2, dtype=dtype_of("draw"))

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        drawn = torch.unflatten(self.draw(tokens).to(torch.float32), 3, (3, self.patch_px, self.patch_px))
        return drawn.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3) - image


def tiny_network(network: str, d: TinyModel, dtype_of: DTypeOf, blocks: Sequence[str]) -> nn.Module:
    made: nn.Module
    if network == "caption":
        made = Caption(d, dtype_of, blocks)
    elif network == "stem":
        made = Stem(d, dtype_of, blocks)
    elif network == "head":
        made = Head(d, dtype_of)
    else:
        made = Trunk(d, dtype_of, blocks) if network == "trunk" else Tail(d, dtype_of)
    return made.eval().requires_grad_(requires_grad=False)
