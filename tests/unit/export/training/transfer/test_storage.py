"""Frozen linear layers in BF16 and FP8."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from l2p_export.training.transfer.storage import StoredLinear


@pytest.mark.parametrize("storage", ["bfloat16", "float8"])
def test_no_widened_weight_is_kept_for_the_backward_pass(storage: str) -> None:
    linear = nn.Linear(64, 32)
    stored, saved = StoredLinear(linear, storage), list[Tensor]()

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = stored(x)
    assert sum(tensor.numel() * tensor.element_size() for tensor in saved if tensor.dtype == torch.float32) <= 4 * 32
    (found,) = torch.autograd.grad(made.square().sum(), x)
    (expected,) = torch.autograd.grad(linear(x).square().sum(), x)
    assert float((found - expected).norm() / expected.norm()) < (0.01 if storage == "bfloat16" else 0.06)


def test_rows_of_zeros_and_of_extremes_are_stored() -> None:
    linear = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.0] * 4, [448.0] * 4, [449.0, 1, 0, 0], [1e-30] * 4]))
    made = StoredLinear(linear, "float8")(torch.eye(4)).T
    assert made.isfinite().all()
    assert made[:2].equal(linear.weight[:2].detach())
    torch.testing.assert_close(made, linear.weight.detach(), rtol=0.07, atol=0)


def test_autocast_reaches_stored_layers() -> None:
    layer = StoredLinear(nn.Linear(8, 8), "float8")
    with torch.autocast("cpu", torch.bfloat16):
        made = layer(torch.randn(2, 8, requires_grad=True))
    assert made.dtype == torch.bfloat16
    made.sum().backward()
