"""Linear layer that computes in the dtype of its weight; all families use it."""

from __future__ import annotations

from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return super().forward(x.to(self.weight.dtype))
