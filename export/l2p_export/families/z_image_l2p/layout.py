"""Quantization layouts of `z_image_l2p` networks: points to measure, the layers that hold them, and branches."""

from __future__ import annotations

from collections.abc import Iterator

from l2p_calib.layout import (
    ATTENTION_INPUTS,
    Attention,
    Branch,
    Float32Layer,
    Point,
    QuantizableLayer,
    QuantizationLayout,
    layer_of,
)
from l2p_export.families.z_image_l2p.dimensions import Dimensions, network_blocks, network_shapes

ATTENTION_BRANCH = ("attention.to_v", "attention.to_out.0")
"""Attention is linear in its values, so both layers scale the input of `attention_norm2`."""
FFN_BRANCH = ("feed_forward.w3", "feed_forward.w2")
"""SwiGLU is linear in w3, so both layers scale the input of `ffn_norm2`."""

FLOAT32 = (Float32Layer("t_embedder", "angles reach 1000 rad; float16 spaces numbers there by 0.5, bfloat16 by 4"),)


def network_layout(name: str, d: Dimensions) -> QuantizationLayout:
    """The layout of one network."""
    shapes = network_shapes(name, d)
    blocks = network_blocks(name, d)
    layers = tuple(dict.fromkeys(layer_of(tensor) for tensor in shapes))
    residual = f"residual.{name}"
    points: list[Point] = []
    inside = tuple(f"{block}." for block in blocks)
    for tensor, shape in shapes.items():
        if len(shape) < 2 or not tensor.endswith(".weight") or tensor.startswith(inside):
            continue
        layer = layer_of(tensor)
        joins_residual = layer.startswith(("all_x_embedder.", "cap_embedder."))
        points.append(Point(f"{layer}:in", (layer,)))
        points.append(Point(f"{layer}:out", (layer, residual) if joins_residual else (layer,)))
    for block in blocks:
        points += _block_points(block, residual, modulated=f"{block}.adaLN_modulation.0" in layers)
    if name == "head":
        return QuantizationLayout(name, layers, tuple(points))
    points.append(Point(f"{residual}:out", (residual,)))
    branches = tuple(branch for block in blocks for branch in _branches(block))
    products = tuple(product for block in blocks for product in _products(block))
    attentions = tuple(_attention(block) for block in blocks)
    float32 = tuple(item for item in FLOAT32 if any(layer.startswith(f"{item.layer}.") for layer in layers))
    return QuantizationLayout(name, (*layers, residual), tuple(points), branches, products, attentions, float32)


def _block_points(block: str, residual: str, *, modulated: bool) -> Iterator[Point]:
    q, k, v, out, w1, w2, w3 = (
        f"{block}.{layer}"
        for layer in (
            "attention.to_q",
            "attention.to_k",
            "attention.to_v",
            "attention.to_out.0",
            "feed_forward.w1",
            "feed_forward.w2",
            "feed_forward.w3",
        )
    )
    if modulated:
        adaln = f"{block}.adaLN_modulation.0"
        yield Point(f"{adaln}:in", (adaln,))
        yield Point(f"{adaln}:out", (adaln, residual))
    yield Point(f"{block}.attention_norm1:in", (residual,))
    yield Point(f"{block}.attention_norm1:out", (residual,))
    # Norm and modulation run in the dtype of the residual. All three layers read their output, cast to their own dtype.
    yield Point(f"{q}:in", (q, k, v, residual))
    yield Point(f"{q}:out", (q,))
    yield Point(f"{k}:out", (k,))
    # Attention itself is never widened: TensorRT for RTX has no float32 kernel for it.
    yield Point(f"{block}.attention.norm_q:out")
    yield Point(f"{block}.attention.norm_k:out")
    yield Point(f"{block}.attention.query:out")
    yield Point(f"{block}.attention.key:out")
    yield Point(f"{v}:out", (), (v,))
    yield Point(f"{out}:in", (), (v,))
    yield Point(f"{out}:out", (out,), (v, out))
    yield Point(f"{block}.attention_norm2:out", (residual,))
    yield Point(f"{block}.ffn_norm1:in", (residual,))
    yield Point(f"{block}.ffn_norm1:out", (residual,))
    yield Point(f"{w1}:in", (w1, w3, residual))
    yield Point(f"{w1}:out", (w1,))
    yield Point(f"{w3}:out", (w3,), (w3,))
    yield Point(f"{w2}:in", (w1, w3, w2), (w3,))
    yield Point(f"{w2}:out", (w2,), (w3, w2))
    yield Point(f"{block}.ffn_norm2:out", (residual,))


def _branches(block: str) -> Iterator[Branch]:
    v, out, w3, w2 = (f"{block}.{layer}" for layer in (*ATTENTION_BRANCH, *FFN_BRANCH))
    yield Branch(v, out, usual=out)
    yield Branch(w3, w2, usual=w3)


def _products(block: str) -> Iterator[QuantizableLayer]:
    """Linear layers of attention and feed-forward; not the embedders, the modulation or the head.

    Source: docs/design.md, "Precision".
    """
    for part in "qkv":
        yield QuantizableLayer(f"{block}.attention.to_{part}", f"{block}.attention.to_q:in", f"{block} qkv")
    yield QuantizableLayer(f"{block}.attention.to_out.0", f"{block}.attention.to_out.0:in", f"{block} out")
    yield QuantizableLayer(f"{block}.feed_forward.w1", f"{block}.feed_forward.w1:in", f"{block} w1w3")
    yield QuantizableLayer(f"{block}.feed_forward.w3", f"{block}.feed_forward.w1:in", f"{block} w1w3")
    yield QuantizableLayer(f"{block}.feed_forward.w2", f"{block}.feed_forward.w2:in", f"{block} w2")


def _attention(block: str) -> Attention:
    """Query and key after the rotation, and value as `to_v` makes it."""
    query, key, value = (f"{block}.attention.{name}" for name in ATTENTION_INPUTS)
    group = f"{block} attention"
    inputs = (
        QuantizableLayer(query, f"{query}:out", group),
        QuantizableLayer(key, f"{key}:out", group),
        QuantizableLayer(value, f"{block}.attention.to_v:out", group),
    )
    return Attention(f"{block}.attention", inputs, (f"{block}.attention.norm_q", f"{block}.attention.norm_k"))
