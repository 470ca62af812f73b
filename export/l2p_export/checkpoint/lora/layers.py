"""What a file holds for one layer, and the change that it makes; checks that shapes fit the layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Protocol

from l2p_export.checkpoint.lora.changes import Change, Full, Hadamard, Kronecker, Product
from l2p_export.checkpoint.lora.model import Decomposition
from l2p_export.tensors.sources import FileTensor
from l2p_runtime.errors import ArtifactError
from l2p_runtime.tensorfile import TensorFile, TensorInfo

_HADA = frozenset(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
_METHODS: Mapping[str, frozenset[str]] = {
    "LoRA": frozenset(("down", "up", "mid")),
    "LoHa": _HADA | {"hada_t1", "hada_t2"},
    "LoKr": frozenset(f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    "difference": frozenset(("diff",)),
}
_MAGNITUDES = ("magnitude", "dora_scale")


@dataclass(slots=True)
class Group:
    """What a file holds for one layer.

    Attributes:
        layer: the layer as the file spells it.
        weights: published weights that it stands for, whose rows the layer has in this order.
        parts: part to tensor, as `Key.part` names them.
    """

    file: TensorFile
    layer: str
    weights: tuple[str, ...]
    parts: dict[str, TensorInfo] = field(default_factory=dict)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that its parts belong to; one in a sound file, none where only a bias changes."""
        return tuple(method for method in methods_of(self.parts) if method != "DoRA")

    @property
    def is_whole(self) -> bool:
        """Whether no part lacks the others that it needs."""
        parts = self.parts.keys()
        weight = {
            "LoRA": {"down", "up"} <= parts,
            "LoHa": parts >= _HADA and ("hada_t1" in parts) == ("hada_t2" in parts),
            "LoKr": _has_one(parts, "lokr_w1") and _has_one(parts, "lokr_w2") and _core_has_factors(parts),
            "difference": True,
        }
        needs_factors = {"alpha", "bias", *_MAGNITUDES} & parts
        has_factors = bool({"LoRA", "LoHa", "LoKr"} & set(self.methods))
        return all(weight[method] for method in self.methods) and (has_factors or not needs_factors)

    @property
    def rank(self) -> int | None:
        """The rank that alpha is divided by; None where both factors of a LoKr are whole, and for a difference."""
        return rank_of(self.parts)

    def tensor(self, part: str) -> FileTensor:
        """One part as it is stored."""
        info = self.parts[part]
        return FileTensor(self.file, info, info.shape)


class Shaped(Protocol):
    """Whatever has a shape."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""


def methods_of(parts: Mapping[str, object]) -> tuple[str, ...]:
    """The methods that the parts of a layer belong to, and DoRA where magnitudes are among them."""
    found = [method for method, names in _METHODS.items() if names & parts.keys()]
    return (*found, "DoRA") if any(part in parts for part in _MAGNITUDES) else tuple(found)


def rank_of(parts: Mapping[str, Shaped]) -> int | None:
    """The rank that the factors of a layer show; 0 for a factor without axes, None where there are none."""
    for part in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if part in parts:
            return (*parts[part].shape, 0)[0]
    return None


def change_of(group: Group, shape: tuple[int, ...]) -> Change | None:
    """The change of a layer's weight [out, in...] or vector [out]; None where only its bias changes.

    Raises:
        ArtifactError: parts of two methods, or shapes that do not fit.
    """
    if len(group.methods) > 1:
        raise ArtifactError(f"`{group.file.path}`: `{group.layer}` is changed by {' and '.join(group.methods)}")
    if not group.methods:
        return None
    read = {"LoRA": _lora, "LoHa": _loha, "LoKr": _lokr, "difference": _difference}
    return read[group.methods[0]](group, shape)


def decomposition_of(group: Group, shape: tuple[int, ...]) -> Decomposition | None:
    """The magnitudes of a DoRA, as PEFT or LyCORIS writes them; None for other methods.

    Raises:
        ArtifactError: magnitudes that fit neither the rows nor the inputs.
    """
    part = next((part for part in _MAGNITUDES if part in group.parts), None)
    if part is None:
        return None
    info, is_peft = group.parts[part], part == "magnitude"
    rows, inputs = shape[0], shape[1]
    size = math.prod(info.shape)
    # LyCORIS norms [out, 1] or [1, in]; PEFT writes [out], or [1, out, 1, 1] for a convolution.
    by_row = size == rows and (is_peft or info.shape[:1] == (rows,))
    by_input = not is_peft and not by_row and size == inputs and info.shape[1:2] == (inputs,)
    if not (by_row or by_input):
        wanted = f"[{rows}]" if is_peft else f"[{rows}, 1] or [1, {inputs}]"
        raise _misfit(group, part, wanted)
    return Decomposition(group.tensor(part), by_input, is_peft)


def bias_of(group: Group, part: str, rows: int) -> Full:
    """The change of a layer's bias.

    Raises:
        ArtifactError: another number of values than the layer has rows.
    """
    if math.prod(group.parts[part].shape) != rows:
        raise _misfit(group, part, f"[{rows}]")
    return Full(group.tensor(part), (rows, 1))


def _has_one(parts: AbstractSet[str], name: str) -> bool:
    """Whether a factor of a LoKr is there either whole or as two."""
    halves = [f"{name}_{half}" in parts for half in "ab"]
    return (name in parts) != all(halves) and any(halves) == all(halves)


def _core_has_factors(parts: AbstractSet[str]) -> bool:
    return "lokr_t2" not in parts or "lokr_w2_a" in parts


def _lora(group: Group, shape: tuple[int, ...]) -> Change:
    """Require down [r, in...] and up [out, r]; with a core down [r, in] and [r, r, kernel...]."""
    down, up = group.parts["down"], group.parts["up"]
    rank = down.shape[0] if down.shape else 0
    core = "mid" if "mid" in group.parts else None
    inputs = shape[1:2] if core else shape[1:]
    if rank and len(up.shape) > 1 and up.shape[1] != rank and _bare(down.shape) == _bare((rank, *inputs)):
        raise ArtifactError(
            f"`{group.file.path}`: `{down.name}` {list(down.shape)} has rank {rank}, but `{up.name}` {list(up.shape)} "
            f"has rank {up.shape[1]}"
        )
    _require(group, "down", (rank, *inputs), ("r", *inputs))
    _require(group, "up", (shape[0], rank), (shape[0], "r"))
    _require_core(group, core, rank, shape)
    return _product(group, "up", "down", core)


def _loha(group: Group, shape: tuple[int, ...]) -> Change:
    """Require w_a [out, r] and w_b [r, in...] twice; with cores w_a [r, out], w_b [r, in] and t [r, r, kernel...]."""
    first = group.parts["hada_w1_b"]
    rank = first.shape[0] if first.shape else 0
    halves = []
    for half in ("1", "2"):
        core = f"hada_t{half}" if f"hada_t{half}" in group.parts else None
        up, down = f"hada_w{half}_a", f"hada_w{half}_b"
        columns = shape[1] if core else math.prod(shape[1:])
        _require(group, down, (rank, columns), ("r", columns), flat=True)
        if core:
            _require(group, up, (rank, shape[0]), ("r", shape[0]))
        else:
            _require(group, up, (shape[0], rank), (shape[0], "r"))
        _require_core(group, core, rank, shape)
        halves.append(_product(group, up, down, core))
    return Hadamard(*halves)


def _lokr(group: Group, shape: tuple[int, ...]) -> Change:
    """Require two factors whose Kronecker product has the layer's shape."""
    for part in _METHODS["LoKr"] & group.parts.keys():
        if len(group.parts[part].shape) < 2 or 0 in group.parts[part].shape:
            raise _misfit(group, part, "a matrix with a rank r of 1 or more")
    left, right = _kronecker_factor(group, "lokr_w1", None), _kronecker_factor(group, "lokr_w2", shape)
    product = Kronecker(left, right)
    columns = math.prod(shape[1:])
    if product.shape != (shape[0], columns) or right.shape[1] % math.prod(shape[2:]):
        raise ArtifactError(
            f"`{group.file.path}`: the LoKr of `{group.layer}` is {list(left.shape)} x {list(right.shape)}, which "
            f"makes {list(product.shape)}, expected [{shape[0]}, {columns}]",
            hint="it was made for a model of another width",
        )
    return product


def _kronecker_factor(group: Group, name: str, shape: tuple[int, ...] | None) -> Full | Product:
    """One factor; only the second may have a core, for the kernel of `shape`."""
    if name in group.parts:
        whole = group.tensor(name)
        return Full(whole, (whole.shape[0], math.prod(whole.shape[1:])))
    up, down = f"{name}_a", f"{name}_b"
    core = "lokr_t2" if shape is not None and "lokr_t2" in group.parts else None
    rank = group.parts[down].shape[0]
    if shape is not None:
        _require_core(group, core, rank, shape)
    found = group.parts[up].shape
    if found[0 if core else 1] != rank or math.prod(found) != found[0] * found[1]:
        raise _misfit(group, up, f"[{'r, out' if core else 'out, r'}] with r = {rank}, as `{group.parts[down].name}`")
    return _product(group, up, down, core)


def _difference(group: Group, shape: tuple[int, ...]) -> Change:
    if _bare(group.parts["diff"].shape) != _bare(shape):
        raise _misfit(group, "diff", str(list(shape)))
    return Full(group.tensor("diff"), (shape[0], math.prod(shape[1:])))


def _product(group: Group, up: str, down: str, core: str | None) -> Product:
    turned = core is not None and core != "mid"
    return Product(group.tensor(up), group.tensor(down), group.tensor(core) if core else None, turned)


def _require_core(group: Group, core: str | None, rank: int, shape: tuple[int, ...]) -> None:
    if core:
        _require(group, core, (rank, rank, *shape[2:]), ("r", "r", *shape[2:]))


def _require(
    group: Group, part: str, shape: tuple[int, ...], shown: tuple[int | str, ...], *, flat: bool = False
) -> None:
    """Require a shape; trailing axes of size 1 do not count, and with `flat` only the first axis and the size do."""
    found = group.parts[part].shape
    fits = _bare(found) == _bare(shape)
    if flat and found:
        fits = found[0] == shape[0] and math.prod(found) == math.prod(shape)
    if not fits or 0 in shape:
        raise _misfit(group, part, f"[{', '.join(map(str, shown))}] with a rank r of 1 or more")


def _misfit(group: Group, part: str, wanted: str) -> ArtifactError:
    info = group.parts[part]
    return ArtifactError(
        f"`{group.file.path}`: `{info.name}` has shape {list(info.shape)}, expected {wanted}",
        hint="the LoRA was made for a model of another width",
    )


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the trailing axes of 1x1 convolutions: tools write [out, r] or [out, r, 1, 1] for the same."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
