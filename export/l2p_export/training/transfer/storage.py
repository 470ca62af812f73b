"""Frozen linear layers in BF16 or FP8: an eighth to a half of their bytes, widened each time they are used.

BF16 storage of weights that are BF16 already changes no value. FP8 (E4M3, one power of two for each row) keeps three
bits behind the point: training then sees a trunk that is a few hundredths off the one that adapters will run on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STORAGES = {"float32": 4, "bfloat16": 2, "float8": 1}
"""Name to bytes a value."""

FLOAT8_MAX = 448.0


class StoredLinear(nn.Module):
    """A frozen linear layer that keeps its weight narrow.

    Attributes:
        weight: [out,in], BF16 or E4M3.
        scale: [out] float32, powers of two that rows of an E4M3 weight are multiplied by.
        bias: [out] float32, or None.
        relative_error: of the stored weight, root of the mean square over that of the weight.
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
        """[..., in] to [..., out], in autocast's dtype, or in float32 without it."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        out: Tensor = _Product.apply(x, self.weight, self.scale, dtype)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _Product(torch.autograd.Function):
    """x W^T, of which the backward pass keeps the stored weight alone, not the widened one."""

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
    """The largest relative error of the stored weights; 0 where all are exact."""
    return max((part.relative_error for part in module.modules() if isinstance(part, StoredLinear)), default=0.0)


def _as_float8(values: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values [out,in] and the power of two for each row [out] that keeps the row's largest value in range."""
    largest = values.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny * FLOAT8_MAX)
    scale = torch.exp2(torch.ceil(torch.log2(largest / FLOAT8_MAX)))
    return (values / scale[:, None]).to(torch.float8_e4m3fn), scale
