"""Transformer blocks of Z-Image, written for export: real arithmetic, static heads, no data-dependent branch.

A layer computes in the dtype of its own weight, so a precision plan is applied by the dtypes of the parameters. Norms
keep the dtype of their input; the rotation runs in float32 (docs/model.md, "Transformer"). If a plan scales a branch by
a power of two, the norm after it undoes the scale: its epsilon is scaled with its input, and it runs in float32.
Parameters have their published names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2p_export.families.linear import Linear
from l2p_export.families.z_image_l2p.dimensions import SINUSOID_WIDTH, Dimensions

NORM_EPSILON = 1e-5
TIME_SCALE = 1000.0


@dataclass(frozen=True, slots=True)
class BlockPrecision:
    """How one block computes.

    Attributes:
        dtype_of: name of a layer inside the block, as `attention.to_q`, to the dtype of its weights; `attention` is
            attention itself, on query, key and value.
        attention_exponent: the input of `attention_norm2` is scaled by two to this power.
        ffn_exponent: the same for `ffn_norm2`.
        has_wide_residual: the stream between blocks is float32, while the last layers of branches are narrower.
    """

    dtype_of: Callable[[str], torch.dtype]
    attention_exponent: int = 0
    ffn_exponent: int = 0
    has_wide_residual: bool = False


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in the dtype of its input.

    An input that is scaled by two to the power of `exponent` gives the same result as the unscaled one. It is computed
    in float32, since the scaled epsilon is too small for float16.
    """

    def __init__(self, width: int, dtype: torch.dtype, exponent: int = 0, *, is_wide: bool = False) -> None:
        super().__init__()
        self.exponent, self.is_wide = exponent, is_wide or exponent != 0
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same shape and dtype; to float32 if the norm is wide."""
        if self.is_wide:
            x = widened(x)
        epsilon = NORM_EPSILON * 4.0**self.exponent
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), epsilon)


class Rotation(nn.Module):
    """The rotary embedding of queries or keys, in float32."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate channel pairs (2k, 2k+1) of x [B,S,heads,2R] by the tables [S,R], to the shape and dtype of x."""
        pairs = torch.unflatten(widened(x), -1, (-1, 2))
        even, odd = pairs[..., :1], pairs[..., 1:]
        cos, sin = cos[:, None, :, None], sin[:, None, :, None]
        return torch.cat([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Self-attention over the whole sequence: norm over each head of q and k, rotation, no mask."""

    def __init__(self, d: Dimensions, dtype_of: Callable[[str], torch.dtype]) -> None:
        super().__init__()
        self.heads = d.heads
        self.to_q = Linear(d.width, d.width, bias=False, dtype=dtype_of("attention.to_q"))
        self.to_k = Linear(d.width, d.width, bias=False, dtype=dtype_of("attention.to_k"))
        self.to_v = Linear(d.width, d.width, bias=False, dtype=dtype_of("attention.to_v"))
        self.to_out = nn.ModuleList([Linear(d.width, d.width, bias=False, dtype=dtype_of("attention.to_out.0"))])
        self.norm_q = RMSNorm(d.head_width, dtype_of("attention.norm_q"))
        self.norm_k = RMSNorm(d.head_width, dtype_of("attention.norm_k"))
        # Query, key and value each come from a module, so that they can be measured and quantized there.
        self.query, self.key, self.value = Rotation(), Rotation(), nn.Identity()
        # If a plan raises the layers around it, attention keeps its own dtype; otherwise it takes that of its inputs.
        dtype = dtype_of("attention")
        layers = (self.to_q, self.to_k, self.to_v)
        self.dtype = None if all(layer.weight.dtype == dtype for layer in layers) else dtype

    def forward(self, x: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        """x [B,S,D], tables [S,R] float32, to [B,S,D]."""
        q, k, v = (torch.unflatten(layer(x), -1, (self.heads, -1)) for layer in (self.to_q, self.to_k, self.to_v))
        q = self.query(self.norm_q(q), rope_cos, rope_sin).transpose(1, 2)
        k = self.key(self.norm_k(k), rope_cos, rope_sin).transpose(1, 2)
        v = self.value(v).transpose(1, 2)
        q, k, v = (part.to(self.dtype or part.dtype) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.to_out[0](attended.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, d: Dimensions, dtype_of: Callable[[str], torch.dtype]) -> None:
        super().__init__()
        self.w1 = Linear(d.width, d.ffn_width, bias=False, dtype=dtype_of("feed_forward.w1"))
        self.w2 = Linear(d.ffn_width, d.width, bias=False, dtype=dtype_of("feed_forward.w2"))
        self.w3 = Linear(d.width, d.ffn_width, bias=False, dtype=dtype_of("feed_forward.w3"))

    def forward(self, x: Tensor) -> Tensor:
        """[B,S,D] to the same."""
        gate, up = self.w1(x), self.w3(x)
        dtype = torch.promote_types(gate.dtype, up.dtype)
        out: Tensor = self.w2(F.silu(gate.to(dtype)) * up.to(dtype))
        return out


class Block(nn.Module):
    """Attention and feed-forward, each with a norm before and after; modulated by time unless a caption block.

    The adaLN chunks are scale_msa, gate_msa, scale_mlp, gate_mlp: scales enter as 1 + s, gates as tanh(g), no shift.
    """

    def __init__(self, d: Dimensions, precision: torch.dtype | BlockPrecision, *, modulated: bool) -> None:
        super().__init__()
        if isinstance(precision, torch.dtype):
            precision = _uniform(precision)
        dtype_of, is_wide = precision.dtype_of, precision.has_wide_residual
        self.attention = Attention(d, dtype_of)
        self.feed_forward = FeedForward(d, dtype_of)
        self.attention_norm1 = RMSNorm(d.width, dtype_of("attention_norm1"))
        self.attention_norm2 = RMSNorm(
            d.width, dtype_of("attention_norm2"), precision.attention_exponent, is_wide=is_wide
        )
        self.ffn_norm1 = RMSNorm(d.width, dtype_of("ffn_norm1"))
        self.ffn_norm2 = RMSNorm(d.width, dtype_of("ffn_norm2"), precision.ffn_exponent, is_wide=is_wide)
        modulation = [Linear(d.time_width, 4 * d.width, dtype=dtype_of("adaLN_modulation.0"))] if modulated else []
        self.adaLN_modulation = nn.ModuleList(modulation)

    def forward(self, x: Tensor, modulation: Tensor | None, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        """x [B,S,D], modulation [B,A], tables [S,R], to [B,S,D] in the dtype of x."""
        if modulation is None:
            attended = self.attention(self.attention_norm1(x), rope_cos, rope_sin)
            x = x + self.attention_norm2(attended).to(x.dtype)
            fed: Tensor = self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
            return x + fed.to(x.dtype)
        chunks = torch.unflatten(self.adaLN_modulation[0](modulation), -1, (4, -1)).to(x.dtype)
        # Slices, each [B,1,D]: `chunk` would export as a sequence, which TensorRT does not take.
        scale_msa, gate_msa, scale_mlp, gate_mlp = (chunks[:, i : i + 1] for i in range(4))
        attended = self.attention(self.attention_norm1(x) * (1 + scale_msa), rope_cos, rope_sin)
        x = x + torch.tanh(gate_msa) * self.attention_norm2(attended).to(x.dtype)
        fed = self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * (1 + scale_mlp)))
        return x + torch.tanh(gate_mlp) * fed.to(x.dtype)


class TimeEmbedding(nn.Module):
    """t in [0,1] to the vector that modulates every block: sinusoid of 1000 t, two linear layers."""

    def __init__(self, d: Dimensions, dtype: torch.dtype) -> None:
        super().__init__()
        first = Linear(SINUSOID_WIDTH, d.time_hidden, dtype=dtype)
        second = Linear(d.time_hidden, d.time_width, dtype=dtype)
        self.mlp = nn.ModuleList([first, nn.SiLU(), second])

    def forward(self, time: Tensor) -> Tensor:
        """time [B] float32 to [B,A] float32."""
        half = SINUSOID_WIDTH // 2
        # In float64 from numbers that float32 holds too, so torch and the folded ONNX graph round to the same float32:
        # at 1000 rad one ulp of a frequency moves the sinusoid by 6e-5.
        steps = torch.arange(half, dtype=torch.float64, device=time.device)
        frequencies = torch.pow(10000.0, steps / -half).to(torch.float32)
        angles = (time * TIME_SCALE).unsqueeze(-1) * frequencies
        x = torch.cat([angles.cos(), angles.sin()], dim=-1)
        for layer in self.mlp:
            x = layer(x)
        return x.to(torch.float32)


def widened(x: Tensor) -> Tensor:
    """The tensor in float32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _uniform(dtype: torch.dtype) -> BlockPrecision:
    return BlockPrecision(lambda layer: dtype)
