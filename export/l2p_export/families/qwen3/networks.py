"""Text encoder network: Qwen3 up to the output of its last layer but one, written for export.

    input_ids [B,L] attention_mask [B,L]  ->  prompt_embeds [B,L,C]

Real arithmetic, static heads, embedding rows gathered by index. A linear layer computes in the dtype of its weight. The
residual, norms, rotation and softmax stay in float32 in every plan: the range of Qwen3's residual is unknown, and the
network runs only once per prompt. Parameters have their published names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2p_export.families.linear import Linear
from l2p_export.families.qwen3.dimensions import PRODUCT_SCALE, TextEncoderConfig


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in float32."""

    def __init__(self, width: int, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same in float32."""
        return F.rms_norm(x.to(torch.float32), self.weight.shape, self.weight.to(torch.float32), self.epsilon)


class Attention(nn.Module):
    """Causal self-attention with grouped heads; each head of q and k has a norm before the rotation."""

    def __init__(self, config: TextEncoderConfig, dtype: torch.dtype) -> None:
        super().__init__()
        sizes = config.sizes
        self.kv_heads, self.groups, self.head_width = sizes.kv_heads, sizes.heads // sizes.kv_heads, sizes.head_width
        wide, narrow = sizes.heads * sizes.head_width, sizes.kv_heads * sizes.head_width
        self.q_proj = Linear(sizes.width, wide, bias=False, dtype=dtype)
        self.k_proj = Linear(sizes.width, narrow, bias=False, dtype=dtype)
        self.v_proj = Linear(sizes.width, narrow, bias=False, dtype=dtype)
        self.o_proj = Linear(wide, sizes.width, bias=False, dtype=dtype)
        self.q_norm = RMSNorm(sizes.head_width, config.norm_epsilon, dtype)
        self.k_norm = RMSNorm(sizes.head_width, config.norm_epsilon, dtype)

    def forward(self, x: Tensor, allowed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B,L,D], allowed [B,1,1,L,L] true where a row may attend, tables [L,R] float32, to [B,L,D]."""
        heads = (self.kv_heads, -1, self.head_width)
        q, k, v = (torch.unflatten(layer(x), -1, heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        # Decomposed: the Attention operator does not take this mask in float32 on TensorRT for RTX, nor groups at
        # opset 20. From [B,L,kv,g,d] to [B,kv,g,L,d]; k and v have one head per group, which MatMul broadcasts.
        q = (rotate(self.q_norm(q), cos, sin) * self.head_width**-0.5).to(v.dtype).permute(0, 2, 3, 1, 4)
        k = rotate(self.k_norm(k), cos, sin).to(v.dtype).permute(0, 2, 3, 4, 1)
        scores = torch.matmul(q, k).to(torch.float32)
        # A finite minimum: with minus infinity, a row of only padding would become NaN.
        scores = torch.where(allowed, scores, torch.finfo(torch.float32).min)
        attended = torch.matmul(scores.softmax(dim=-1).to(v.dtype), v.permute(0, 2, 3, 1, 4))
        out: Tensor = self.o_proj(attended.permute(0, 3, 1, 2, 4).flatten(2))
        return out


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: TextEncoderConfig, dtype: torch.dtype) -> None:
        super().__init__()
        width, inner = config.sizes.width, config.sizes.ffn_width
        self.gate_proj = Linear(width, inner, bias=False, dtype=dtype)
        self.up_proj = Linear(width, inner, bias=False, dtype=dtype)
        self.down_proj = Linear(inner, width, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B,L,D] to the same in float32."""
        product = F.silu(self.gate_proj(x).to(torch.float32)) * self.up_proj(x).to(torch.float32)
        # Language models of this kind have a few products of thousands; their sum must not reach float16's 65504.
        if self.down_proj.weight.dtype == torch.float16:
            half: Tensor = self.down_proj(product * PRODUCT_SCALE)
            return half.to(torch.float32) / PRODUCT_SCALE
        out: Tensor = self.down_proj(product)
        return out.to(torch.float32)


class Layer(nn.Module):
    """Attention and feed-forward, each with a norm before it."""

    def __init__(self, config: TextEncoderConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.self_attn = Attention(config, dtype)
        self.mlp = FeedForward(config, dtype)
        self.input_layernorm = RMSNorm(config.sizes.width, config.norm_epsilon, dtype)
        self.post_attention_layernorm = RMSNorm(config.sizes.width, config.norm_epsilon, dtype)

    def forward(self, x: Tensor, allowed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See `Attention.forward`."""
        x = x + self.self_attn(self.input_layernorm(x), allowed, cos, sin).to(torch.float32)
        fed: Tensor = self.mlp(self.post_attention_layernorm(x))
        return x + fed


class Decoder(nn.Module):
    """Holds the parameters under the published prefix `model.`; it is never called."""

    def __init__(
        self, config: TextEncoderConfig, dtype_of: Callable[[str], torch.dtype], layers: Iterable[int]
    ) -> None:
        super().__init__()
        dtype = dtype_of("model.embed_tokens")
        self.embed_tokens = nn.Embedding(config.sizes.vocabulary, config.sizes.width, dtype=dtype)
        # Keyed by number, since a trace holds one layer of several that are equal.
        self.layers = nn.ModuleDict({str(index): Layer(config, dtype_of(f"model.layers.{index}")) for index in layers})


class TextEncoderNetwork(nn.Module):
    """Token numbers to hidden states."""

    def __init__(
        self, config: TextEncoderConfig, dtype_of: Callable[[str], torch.dtype], layers: Iterable[int]
    ) -> None:
        super().__init__()
        self.head_width, self.rope_theta = config.sizes.head_width, config.rope_theta
        self.model = Decoder(config, dtype_of, layers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See the module docstring; the mask is 1 for a real token and 0 for padding at the right."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        causal = positions.unsqueeze(0) <= positions.unsqueeze(1)
        allowed = causal & (attention_mask != 0)[:, None, None, None, :]
        half = self.head_width // 2
        # In float64 from numbers that float32 holds too, so torch and the folded ONNX graph round to the same float32.
        steps = torch.arange(half, dtype=torch.float64, device=input_ids.device)
        frequencies = torch.pow(self.rope_theta, steps / -half).to(torch.float32)
        angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
        cos, sin = angles.cos(), angles.sin()
        x: Tensor = self.model.embed_tokens(input_ids).to(torch.float32)
        for layer in self.model.layers.values():
            x = layer(x, allowed, cos, sin)
        return x


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channels (k, k + R) of x [B,L,heads,groups,2R] by the tables [L,R], in float32."""
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    cos, sin = cos[:, None, None], sin[:, None, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def text_encoder_module(
    config: TextEncoderConfig, dtype_of: Callable[[str], torch.dtype], blocks: Iterable[str]
) -> nn.Module:
    """Build the network on the current device; its weights are uninitialised.

    Args:
        config: sizes and constants.
        dtype_of: weight dtype of each layer, by published layer name.
        blocks: the layers to build, as `model.layers.5`.
    """
    layers = [int(block.rpartition(".")[2]) for block in blocks]
    return TextEncoderNetwork(config, dtype_of, layers).eval().requires_grad_(requires_grad=False)
