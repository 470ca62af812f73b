"""Precision plans as files: every layer with its dtype, exponent, reason and evidence. Builds write them, people edit.

{"schema": 1, "name": "fp16", "base": "fp16", "default": "float16", "headroom": 4.0,
 "networks": [{"network": "trunk", "sha256": "..."}, ...],
 "layers": [{"layer": "layers.3.feed_forward.w3", "dtype": "float16", "exponent": -6, "reason": "...",
             "evidence": [{"point": "layers.3.feed_forward.w3:out", "peak": 12.5, "p999": 4.5, "calls": 9}],
             "float8": null}, ...]}
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from l2p_calib.fp8 import ScaleChoice
from l2p_calib.layout import Attention, QuantizationLayout
from l2p_calib.plans.plan import (
    FLOAT8,
    PLANS,
    ComputeDType,
    InputScale,
    LayerRule,
    LayerScale,
    NamedPlan,
    PrecisionPlan,
)
from l2p_runtime.contract import BASE_PRECISIONS, BasePrecision, base_of_name
from l2p_runtime.contract.codec import from_json, to_json
from l2p_runtime.errors import ArtifactError, L2PError, UsageError

SCHEMA = 1
EXPONENTS = range(-24, 25)
"""Powers of two that weights may be scaled by: float16 spans about forty."""

INPUT_SCALES = (2.0**-24, 65504.0)
"""Minimum and maximum scale of an FP8 layer's inputs: ONNX graphs hold it in float16."""

_FILE_BYTES_MAX = 64 << 20
_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,31}(-[a-z0-9][a-z0-9_]{0,31}){0,3}")


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was measured at one point of a layer, before any scaling.

    Attributes:
        peak: largest magnitude.
        p999: magnitude that 99.9 % of the values do not exceed.
        calls: denoising calls.
    """

    point: str
    peak: float
    p999: float
    calls: int


@dataclass(frozen=True, slots=True)
class Float8:
    """How the input of an FP8 layer, or an input of attention, is rounded. Scales of weights follow from these.

    Attributes:
        input_scale: what inputs are divided by, before any scaling by powers of two.
        method: how it was chosen: one of the choices, or whatever a person calls it.
        choices: the scales to choose from, each with its error.
    """

    input_scale: float
    method: str
    choices: tuple[ScaleChoice, ...] = ()

    def __post_init__(self) -> None:
        minimum, maximum = INPUT_SCALES
        if not minimum <= self.input_scale <= maximum:
            raise ArtifactError(
                f"input_scale is {self.input_scale:g}, expected {minimum:.3g} to {maximum:g}",
                hint="it is the largest input over 448; take it from a plan that was measured",
            )


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer.

    Attributes:
        layer: published name; a pad token; `residual.NETWORK`; or an input of attention, which is listed only where
            the plan rounds it.
        dtype: dtype that its weights are stored in and that it computes in.
        exponent: its weights are stored times two to this power; only where a norm undoes it.
        reason: why it has this dtype; empty where it is the plan's default.
        evidence: what was measured of it.
        float8: how its inputs are rounded; only of layers in FP8.
    """

    layer: str
    dtype: ComputeDType
    exponent: int = 0
    reason: str = ""
    evidence: tuple[Evidence, ...] = ()
    float8: Float8 | None = None


@dataclass(frozen=True, slots=True)
class NetworkDigest:
    """A network that a plan was made for, by the digest of its weights."""

    network: str
    sha256: str


@dataclass(frozen=True, slots=True)
class PlanFile:
    """A whole plan, as a file holds it.

    Attributes:
        name: small letters, digits and dashes.
        base: the plan of `PLANS` that it was made from. A file without it has a name that starts with its base.
        default: dtype of layers that are not listed.
        headroom: factor between the largest magnitude that was measured and the maximum of the dtype.
        networks: the weights it was made for; others are refused. A network that is left out takes any weights.
    """

    name: str
    base: BasePrecision
    default: ComputeDType
    headroom: float
    networks: tuple[NetworkDigest, ...]
    layers: tuple[LayerPlan, ...]
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ArtifactError(f"schema version {self.schema}, this version reads {SCHEMA}")
        base = PLANS[self.base]
        if not _NAME.fullmatch(self.name):
            raise ArtifactError(
                f"a plan cannot be called {self.name[:80]!r}",
                hint="use small letters, digits and underscores, in parts of at most 32 joined by dashes",
            )
        if self.name in BASE_PRECISIONS and self.name != self.base:
            raise ArtifactError(f"plan `{self.name}` states the base `{self.base}`", hint="call it otherwise")
        if self.default != base.default:
            raise ArtifactError(f"plan `{self.name}` has the default {self.default}, expected {base.default}")
        if self.headroom < 1:
            raise ArtifactError(f"the headroom is {self.headroom:g}, expected 1 or more")
        names = [entry.layer for entry in self.layers]
        twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
        if twice is not None:
            raise ArtifactError(f"`{twice}` stands twice")
        for entry in self.layers:
            if entry.exponent not in EXPONENTS:
                raise ArtifactError(
                    f"`{entry.layer}` has the exponent {entry.exponent}: a scale of 0 or infinity in float16; "
                    f"expected {EXPONENTS.start} to {EXPONENTS.stop - 1}"
                )
            _check_float8(entry, base)

    @property
    def plan(self) -> PrecisionPlan:
        """The precision plan that ONNX graphs are exported under."""
        return PrecisionPlan(
            self.name,
            self.base,
            self.default,
            tuple(LayerRule(e.layer, e.dtype, e.reason) for e in self.layers if e.dtype != self.default),
            tuple(LayerScale(e.layer, e.exponent) for e in self.layers if e.exponent),
            tuple(InputScale(e.layer, e.float8.input_scale) for e in self.layers if e.float8 is not None),
        )

    @property
    def sha256(self) -> str:
        """Digest of the file."""
        return hashlib.sha256(plan_to_bytes(self)).hexdigest()


def plan_to_bytes(plan: PlanFile) -> bytes:
    """The file as UTF-8 JSON: equal plans give equal bytes."""
    return (json.dumps(to_json(plan), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_plan(path: Path) -> PlanFile:
    """Read a plan and check what it says without knowing a model.

    Raises:
        UsageError: no such file.
        ArtifactError: not JSON, another schema, an unknown key, dtype or name, an exponent out of range.
    """
    if not path.is_file():
        raise UsageError(f"there is no plan `{path}`", hint="a bundle holds the plans it was built by in `plans/`")
    if path.stat().st_size > _FILE_BYTES_MAX:
        raise ArtifactError(f"`{path}` has {path.stat().st_size:,} bytes, expected at most {_FILE_BYTES_MAX:,}")
    try:
        return from_json(PlanFile, _with_base(json.loads(path.read_bytes())))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"plan `{path}` is not JSON: {error}", hint="correct it, or take the bundle's") from error
    except L2PError as error:
        raise ArtifactError(f"plan `{path}`: {error}", hint=error.hint or "correct it") from error


def _with_base(parsed: object) -> object:
    """The content of a file with its base; files of earlier versions state the base by their plan's name."""
    if not isinstance(parsed, dict) or "base" in parsed:
        return parsed
    name = parsed.get("name")
    base = base_of_name(name) if isinstance(name, str) else None
    if base is None:
        raise ArtifactError(
            "the plan does not state its base", hint=f'add one, as "base": "fp16"; bases: {", ".join(BASE_PRECISIONS)}'
        )
    return {**parsed, "base": base}


def check_layers(plan: PlanFile, layouts: Sequence[QuantizationLayout]) -> None:
    """Check that a plan names only layers of a model, and scales only those that may be scaled.

    Raises:
        ArtifactError: a layer is unknown; a layer that no norm follows is scaled; a layer is in FP8 that cannot be;
            two layers read the same input with different scales; only some inputs of an attention are in FP8; or one
            of them is in float32.
    """
    products = [product for layout in layouts for product in layout.quantizable]
    known = {layer for layout in layouts for layer in layout.layers} | {product.layer for product in products}
    scalable = {layer for layout in layouts for layer in layout.scalable}
    for entry in plan.layers:
        if entry.layer not in known:
            near = difflib.get_close_matches(entry.layer, known, 1)
            raise ArtifactError(
                f"plan `{plan.name}` speaks of `{entry.layer[:80]}`, which the model has not",
                hint=f"did you mean `{near[0]}`?" if near else "layers go by their published names",
            )
        if entry.exponent and entry.layer not in scalable:
            raise ArtifactError(
                f"plan `{plan.name}` scales `{entry.layer}`, and nothing behind it would undo that",
                hint=f"layers that a norm follows may be scaled, as `{min(scalable)}`" if scalable else "set it to 0",
            )
    _check_products(plan, {product.layer: product.reads for product in products})
    for attention in (attention for layout in layouts for attention in layout.attentions):
        _check_attention(plan, attention)


def _check_products(plan: PlanFile, reads: Mapping[str, str]) -> None:
    scales: dict[str, tuple[str, float]] = {}
    for entry in plan.layers:
        if entry.float8 is None:
            continue
        if entry.layer not in reads:
            raise ArtifactError(
                f"plan `{plan.name}` has `{entry.layer}` in {FLOAT8}, which only linear layers of attention and "
                "feed-forward, and inputs of attention, can be",
                hint=f"as `{min(reads)}`; set this one to {plan.default}" if reads else f"set it to {plan.default}",
            )
        other, scale = scales.setdefault(reads[entry.layer], (entry.layer, entry.float8.input_scale))
        if scale != entry.float8.input_scale:
            raise ArtifactError(
                f"plan `{plan.name}`: `{other}` and `{entry.layer}` read the same values, and their input_scale is "
                f"{scale:g} and {entry.float8.input_scale:g}",
                hint="give both the same",
            )


def _check_attention(plan: PlanFile, attention: Attention) -> None:
    names = [item.layer for item in attention.inputs]
    dtypes = {entry.layer: entry.dtype for entry in plan.layers if entry.layer in names}
    dtypes = {name: dtypes.get(name, plan.default) for name in names}
    told = ", ".join(f"`{name}` in {dtype}" for name, dtype in dtypes.items())
    if not {plan.default, FLOAT8}.issuperset(dtypes.values()):
        raise ArtifactError(
            f"plan `{plan.name}` has {told}: attention computes in {plan.default}, and reads that or {FLOAT8}",
            hint=f"set all three to {plan.default}, or to {FLOAT8} with an input_scale each",
        )
    if len(set(dtypes.values())) > 1:
        raise ArtifactError(
            f"plan `{plan.name}` has {told}: query, key and value must be all {FLOAT8}, or none",
            hint=f"give all three {FLOAT8} with an input_scale, or set them to {plan.default}",
        )


def _check_float8(entry: LayerPlan, base: NamedPlan) -> None:
    if (entry.dtype == FLOAT8) != (entry.float8 is not None):
        what = "has no `float8` with an input_scale" if entry.dtype == FLOAT8 else "has `float8`"
        raise ArtifactError(
            f"`{entry.layer}` is in {entry.dtype} and {what}", hint=f"both belong to layers in {FLOAT8}"
        )
    if entry.float8 is not None and FLOAT8 not in base.dtypes:
        raise ArtifactError(
            f"`{entry.layer}` is in {FLOAT8}, and the plan's base is `{base.name}`",
            hint="state the base fp8 or fp8-attention: its thresholds judge what FP8 rounds",
        )


def check_digests(plan: PlanFile, digests: Mapping[str, str]) -> None:
    """Check that a plan was made for these weights.

    Args:
        plan: as read.
        digests: network to the digest of its weights.

    Raises:
        ArtifactError: it was made for another trunk, or other adapters.
    """
    for item in plan.networks:
        found = digests.get(item.network)
        if found != item.sha256:
            what = f"has {item.network} {found[:16]}" if found else f"has no network `{item.network[:40]}`"
            raise ArtifactError(
                f"plan `{plan.name}` was made for {item.network[:40]} {item.sha256[:16]}, the checkpoint {what}",
                hint=f"build without --plan; or remove `{item.network[:40]}` from its `networks` and take it anyway",
            )
