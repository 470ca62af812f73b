"""Operations of `z_image_l2p` networks for forecasts: linear layers, convolutions and attention."""

from __future__ import annotations

from l2p_engines.forecast.calls import Operations, Rows
from l2p_export.families.z_image_l2p.dimensions import Dimensions, network_blocks, network_shapes

_ROWS: dict[str, Rows] = {
    "t_embedder.": "call",
    "all_x_embedder.": "image",
    "noise_refiner.": "padded_image",
    "cap_embedder.": "caption",
    "context_refiner.": "caption",
    "layers.": "sequence",
}
"""Name prefix of linear layers to the rows that they multiply; modulation has one row per call."""


def network_operations(name: str, d: Dimensions) -> Operations:
    """The operations of one network."""
    shapes = network_shapes(name, d)
    halvings = _halvings(d)
    matrices = [tensor for tensor, shape in shapes.items() if len(shape) == 2 and tensor.endswith(".weight")]
    return Operations(
        linear_layers={tensor: _rows(tensor) for tensor in matrices},
        convolutions={tensor: halvings[tensor] for tensor, shape in shapes.items() if len(shape) == 4},
        attentions=tuple((_rows(f"{block}."), d.width) for block in network_blocks(name, d)),
    )


def _rows(tensor: str) -> Rows:
    if ".adaLN_modulation." in tensor:
        return "call"
    return next(rows for begin, rows in _ROWS.items() if tensor.startswith(begin))


def _halvings(d: Dimensions) -> dict[str, int]:
    """Convolution of the U-Net to the number of times that its image was halved; full resolution is first."""
    found = {"local_decoder.bottleneck.0.weight": len(d.levels), "local_decoder.out_conv.weight": 0}
    for halvings, level in enumerate(d.levels):
        parts = (f"enc{level.name}.0", f"up{level.name}.1", f"dec{level.name}.0")
        found |= {f"local_decoder.{part}.weight": halvings for part in parts}
    return found
