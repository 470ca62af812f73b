"""Fuses an ONNX graph for ONNX Runtime on the CPU: attention, rotation and norms, by its contrib operators, and skips.

    Softmax(q kᵀ) v   or   Attention(q, k, v)   becomes   MultiHeadAttention(q, k, v)      of com.microsoft
    a cos - b sin, a sin + b cos on pairs       becomes   RotaryEmbedding(x, cos, sin)     of com.microsoft
    x * Reciprocal(Sqrt(mean(x²) + ε)) * w      becomes   x / Sqrt(mean(x²) + ε) * w       which it fuses itself
    Conv(Concat(a, b), w)                       becomes   Conv(a, w₁) + Conv(b, w₂)        the sum fuses into the second

On the CPU, `Attention` holds scores [B,N,S,S] whole, as does attention that is written out; `MultiHeadAttention` does
not: 16,416 tokens in 3 heads of 48 take 170 MB in place of 3,263, in half the time. A skip of the pixel head that is
not copied beside the upsampled image saves a fifth of the head's time at 2048 px. The fused graph refers to the weights
file of the graph. Only ONNX Runtime reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnxscript.rewriter import RewriteRule

_DOMAIN, _VERSION = "com.microsoft", 1
_HEADS_INSIDE = [0, 2, 1, 3]
"""Between [B,N,S,D] and [B,S,N,D]."""


def fuse(model: ir.Model) -> bool:
    """Fuse a graph, in place; weights keep their names and places.

    Args:
        model: a graph whose weights are external.

    Returns:
        Whether it has attention or skips that were fused. If it has none, the graph may be changed, and has no use.
    """
    from onnx_ir.passes import Sequential, common
    from onnxscript.rewriter import RewriteRuleSet
    from onnxscript.rewriter.rules.common import no_op_transpose_rule, transpose_transpose_rule

    if not RewriteRuleSet([_written_out(), _attention(), _skip()]).apply_to_model(model):
        return False
    RewriteRuleSet([_rotation(), _norm()]).apply_to_model(model)
    # Else the shape of the transposed keys is still read, and their transpose stays.
    common.RemoveUnusedNodesPass()(model)
    # Heads that the graph moved outside are moved back inside: two transposes that undo each other.
    RewriteRuleSet([transpose_transpose_rule, no_op_transpose_rule]).apply_to_model(model)
    Sequential(
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedOpsetsPass(),
        common.NameFixPass(),
    )(model)
    model.opset_imports[_DOMAIN] = _VERSION
    return True


def _written_out() -> RewriteRule:
    """Attention as the exporter decomposes it: query and key are both multiplied by the root of the scale."""
    from onnxscript.rewriter import RewriteRule

    def written(op: Any, q: Any, k: Any, v: Any, root: Any, flat: Any, turned: Any) -> Any:
        keys = op.Reshape(op.Transpose(op.Reshape(k, flat), perm=[0, 2, 1]), turned)
        scores = op.MatMul(op.Mul(q, root), op.Mul(keys, root))
        return op.MatMul(op.Softmax(scores, axis=-1), v)

    def fused(op: Any, q: Any, k: Any, v: Any, root: Any, **_: Any) -> Any:
        return _multi_head(op, q, k, v, float(root.const_value.numpy().item()) ** 2)

    def fits(_context: Any, q: Any, root: Any, **_others: Any) -> bool:
        return _has_sizes(q, 1, 3) and root.const_value is not None and root.const_value.size == 1

    return RewriteRule(written, fused, fits)


def _attention() -> RewriteRule:
    """The operator `Attention` of opset 23, without mask or past, with the default scale."""
    from onnxscript.rewriter import RewriteRule

    def standard(op: Any, q: Any, k: Any, v: Any) -> Any:
        return op.Attention(q, k, v, is_causal=0, softcap=0.0, qk_matmul_output_mode=0, _allow_other_attributes=False)

    def fused(op: Any, q: Any, k: Any, v: Any) -> Any:
        return _multi_head(op, q, k, v, float(q.shape[3]) ** -0.5)

    def fits(_context: Any, q: Any, **_others: Any) -> bool:
        return _has_sizes(q, 1, 3)

    return RewriteRule(standard, fused, fits)


def _multi_head(op: Any, q: Any, k: Any, v: Any, scale: float) -> Any:
    """Attention of [B,N,S,D] by the operator, which takes and returns float32 [B,S,N D]."""
    import onnx_ir as ir

    heads, width = int(q.shape[1]), int(q.shape[3])
    flat = op.Constant(value_ints=[0, 0, heads * width])
    parts = [op.Reshape(op.Transpose(part, perm=_HEADS_INSIDE), flat) for part in (q, k, v)]
    is_float32 = q.dtype == ir.DataType.FLOAT
    if not is_float32:
        # Its kernel on the CPU takes only float32.
        parts = [op.Cast(part, to=ir.DataType.FLOAT) for part in parts]
    out = op.MultiHeadAttention(*parts, num_heads=heads, scale=scale, _domain=_DOMAIN)
    if not is_float32:
        out = op.Cast(out, to=q.dtype)
    return op.Transpose(op.Reshape(out, op.Constant(value_ints=[0, 0, heads, width])), perm=_HEADS_INSIDE)


def _rotation() -> RewriteRule:
    """Rotation of neighbouring channels of [B,S,N,D] by tables [S,D/2]."""
    from onnxscript.rewriter import RewriteRule

    def written(
        op: Any, x: Any, pairs: Any, zero: Any, one: Any, axis: Any, end: Any, cos: Any, sin: Any, joined: Any
    ) -> Any:
        halves = op.Reshape(x, pairs)
        a, b = op.Slice(halves, zero, one, axis, one), op.Slice(halves, one, end, axis, one)
        real = op.Sub(op.Mul(a, cos), op.Mul(b, sin))
        imaginary = op.Add(op.Mul(a, sin), op.Mul(b, cos))
        return op.Reshape(op.Concat(real, imaginary, axis=-1), joined)

    def fused(op: Any, x: Any, cos: Any, sin: Any, **_: Any) -> Any:
        heads, width = int(x.shape[2]), int(x.shape[3])
        flat = op.Reshape(x, op.Constant(value_ints=[0, 0, heads * width]))
        tables = [table.producer().inputs[0] for table in (cos, sin)]
        first = op.Constant(value_ints=[0])
        turned = op.RotaryEmbedding(flat, first, *tables, interleaved=1, _domain=_DOMAIN)
        return op.Reshape(turned, op.Constant(value_ints=[0, 0, heads, width]))

    def fits(
        _context: Any, x: Any, zero: Any, one: Any, axis: Any, end: Any, cos: Any, sin: Any, **_others: Any
    ) -> bool:
        # Tables [S,D/2] with axes of size 1 put in, by a node that all blocks share.
        moved = all(table.producer() is not None and table.producer().op_type == "Unsqueeze" for table in (cos, sin))
        is_split = [_value(part) for part in (zero, one, axis)] == [0, 1, 4] and (_value(end) or 0) > 1
        return moved and is_split and _has_sizes(x, 2, 3) and len(cos.producer().inputs[0].shape or ()) == 2

    return RewriteRule(written, fused, fits)


def _norm() -> RewriteRule:
    """A root-mean-square norm in the form that ONNX Runtime recognises: with a division."""
    from onnxscript.rewriter import RewriteRule

    def written(op: Any, x: Any, two: Any, axis: Any, epsilon: Any, weight: Any) -> Any:
        mean = op.ReduceMean(op.Pow(x, two), axis, keepdims=1, noop_with_empty_axes=0)
        return op.Mul(op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(mean, epsilon)))), weight)

    def divided(op: Any, x: Any, two: Any, axis: Any, epsilon: Any, weight: Any) -> Any:
        mean = op.ReduceMean(op.Pow(x, two), axis, keepdims=1, noop_with_empty_axes=0)
        return op.Mul(op.Div(x, op.Sqrt(op.Add(mean, epsilon))), weight)

    def fits(_context: Any, weight: Any, **_others: Any) -> bool:
        return bool(weight.is_initializer())

    return RewriteRule(written, divided, fits)


def _skip() -> RewriteRule:
    """A convolution of two tensors that are joined along their channels, in float32."""
    import onnx_ir as ir
    from onnxscript.rewriter import RewriteRule

    def joined(op: Any, a: Any, b: Any, weight: Any, bias: Any) -> Any:
        both = op.Concat(a, b, axis=1)
        return op.Conv(both, weight, bias, _allow_other_attributes=True, _outputs=["out"])

    def apart(op: Any, a: Any, b: Any, weight: Any, bias: Any, out: Any) -> Any:
        attributes = out.producer().attributes
        sizes = op.Constant(value_ints=[int(a.shape[1]), int(b.shape[1])])
        first, second = op.Split(weight, sizes, axis=1, _outputs=2)
        return op.Add(op.Conv(a, first, bias, **attributes), op.Conv(b, second, **attributes))

    def fits(_context: Any, a: Any, b: Any, weight: Any, out: Any, **_others: Any) -> bool:
        group = out.producer().attributes.get("group")
        is_float32 = weight.is_initializer() and weight.dtype == ir.DataType.FLOAT
        return is_float32 and (group is None or group.as_int() == 1) and _has_sizes(a, 1) and _has_sizes(b, 1)

    return RewriteRule(joined, apart, fits)


def _has_sizes(value: Any, *axes: int) -> bool:
    """Whether a value has four axes, and these of known size."""
    shape: Sequence[Any] | None = value.shape
    return shape is not None and len(shape) == 4 and all(isinstance(shape[axis], int) for axis in axes)


def _value(value: Any) -> int | None:
    """The single number of a constant; None for anything else."""
    constant = value.const_value
    return int(constant.numpy().item()) if constant is not None and constant.size == 1 else None
