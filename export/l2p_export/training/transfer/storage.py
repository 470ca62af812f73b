"""Frozen linear layers stored in BF16 or FP8, a half or a quarter of float32, and dequantized at each use.

BF16 storage of weights that are already BF16 changes no value. FP8 (E4M3, with a power-of-two scale per row) keeps
three mantissa bits: the relative error of the trunk in training is a few hundredths, and adapters later run on the
exact trunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STORAGES = {"float32": 4, "bfloat16": 2, "float8": 1}
"""Storage dtype to bytes per value."""

FLOAT8_MAX = 448.0


class StoredLinear(nn.Module):
    """A frozen linear layer with its weight in BF16 or FP8.

    Attributes:
        weight: [out,in], BF16 or E4M3.
        scale: [out] float32, power-of-two scales of the rows of an E4M3 weight; None for BF16.
        bias: [out] float32, or None.
        relative_error: relative L2 error of the stored weight.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, storage: str) -> None:
        super().__init__()
        values = linear.weight.detach().to(torch.float32)
        if storage == "float8":
            weight, scale = _as_float8(values)
            widened = weight.to(torch.float32) * scale[:, None]
        else:
            weight, scale = values.to(torch.bfloat16), None
            widened = weight.to(torch.float32)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(torch.float32))
        self.relative_error = (
            0.0 if values.is_meta else float((widened - values).norm() / values.norm().clamp(min=1e-30))
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in autocast's dtype, or in float32 without autocast."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        out: Tensor = _Product.apply(x, self.weight, self.scale, dtype)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _Product(torch.autograd.Function):
    """x W^T whose backward pass keeps only the stored weight, not the dequantized one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.dtypes = dtype, x.dtype
        made = F.linear(x.to(dtype), weight.to(dtype))
        return made if scale is None else made * scale.to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        dtype, dtype_in = ctx.dtypes
        gradient = gradient.to(dtype)
        if scale is not None:
            gradient = gradient * scale.to(dtype)
        return (gradient @ weight.to(dtype)).to(dtype_in), None, None, None


def largest_error(module: nn.Module) -> float:
    """Maximum relative error of the stored weights; 0 if all are exact."""
    return max((part.relative_error for part in module.modules() if isinstance(part, StoredLinear)), default=0.0)


def _as_float8(values: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values [out,in] and power-of-two scales per row [out] that keep each row's maximum in range."""
    largest = values.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny * FLOAT8_MAX)
    scale = torch.exp2(torch.ceil(torch.log2(largest / FLOAT8_MAX)))
    return (values / scale[:, None]).to(torch.float8_e4m3fn), scale
