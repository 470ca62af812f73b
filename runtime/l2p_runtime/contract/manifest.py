"""The manifest `bundle.json`, which describes a bundle (docs/design.md, "Bundle")."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from l2p_runtime.contract.codec import from_json, to_json
from l2p_runtime.contract.engine import PORTABLE, EngineProfile, Target, short_version, target_from_spelling
from l2p_runtime.contract.ledger import LedgerEntry, comparison_of_text
from l2p_runtime.contract.model import Grid, ModelSpec, check_base_grid
from l2p_runtime.contract.precision import BasePrecision, base_of_name
from l2p_runtime.contract.profile import Profile, Sampling
from l2p_runtime.contract.tensors import NetworkSpec
from l2p_runtime.errors import ArtifactError, UsageError

SCHEMA = 4
"""Version of `bundle.json`. Older ones still open: 3 had no fused graphs; 2 also gave the trained grid one side; 1 also
named comparisons by texts, and plans' bases by their names."""
MANIFEST_NAME = "bundle.json"
NETWORKS = ("caption", "stem", "trunk", "tail", "head")
"""The networks of one denoising call, in the order of the data flow."""
TEXT_ENCODER = "text_encoder"
"""The network that makes embeddings of prompts; a bundle may have none."""

# One folder of the bundle and one plain name: nothing that climbs, hides or names a drive.
_BUNDLE_PATH = re.compile(r"(?:engines|graphs|plans|reference|text|traces)/[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of the bundle: plain path inside it, size, digest and the short digest checked on open.

    Attributes:
        stamp: SHA-256 over the first and the last 64 KiB.
        in_store: whether it lies in the shared store, under the same path there.
    """

    path: str
    size_bytes: int
    sha256: str
    stamp: str
    in_store: bool = False

    def __post_init__(self) -> None:
        if not _BUNDLE_PATH.fullmatch(self.path) or ".." in self.path:
            raise ArtifactError(
                f"path {self.path!r} is refused: files of a bundle lie in `graphs/`, `engines/`, `plans/`, "
                "`reference/` or `text/` under a plain name",
                hint="the manifest was edited or comes from somebody careless; build the bundle again",
            )
        if self.size_bytes < 0:
            raise ArtifactError(f"`{self.path}`: size_bytes is {self.size_bytes}")
        for digest in (self.sha256, self.stamp):
            if not _SHA256.fullmatch(digest):
                raise ArtifactError(f"`{self.path}`: {digest[:80]!r} is no SHA-256 digest")


@dataclass(frozen=True, slots=True)
class PlanRef:
    """A precision plan by name, with the digest of its content.

    Attributes:
        base: base precision that it was made from; decides thresholds and what a GPU must have.
        file: path of the plan file, layer by layer; None for a plan that its name defines.
    """

    name: str
    digest: str
    base: BasePrecision
    file: str | None = None


@dataclass(frozen=True, slots=True)
class GraphRecord:
    """One network as ONNX under one precision plan: paths of the ONNX graph and of its weights.

    Attributes:
        fused: path of the same graph with contrib operators, for ONNX Runtime on the CPU; it refers to the same
            weights. None where there is none.
    """

    network: str
    plan: str
    opset: int
    graph: str
    weights: str
    fused: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """Its two or three files."""
        return (self.graph, self.weights, *((self.fused,) if self.fused is not None else ()))


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """One ONNX graph compiled for one target.

    Attributes:
        target: as `rtx1.7-sm89`.
        library_version: of the library that built it, in full.
        graph_sha256: of the ONNX graph that it was built from.
        weights_sha256: of that ONNX graph's weights.
        profiles: its optimization profiles, in its own order.
        engine: path of the file.
    """

    network: str
    plan: str
    target: str
    library_version: str
    graph_sha256: str
    weights_sha256: str
    profiles: tuple[EngineProfile, ...]
    engine: str

    def __post_init__(self) -> None:
        target = target_from_spelling(self.target)
        if short_version(self.library_version) != target.library_version:
            raise ArtifactError(f"`{self.engine}` is for {self.target} and built by version {self.library_version}")
        if not self.profiles:
            raise ArtifactError(f"`{self.engine}` has no optimization profile")


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """The checkpoint that the weights come from.

    Attributes:
        fingerprint: MD5 over tensor names and shapes, published spelling (docs/model.md, "Fingerprints").
        known_as: the published model with that fingerprint; empty when unknown.
        trained: False for the seeded demo weights, which draw noise.
        licence: as stated in the checkpoint; empty when it states none.
        source: name of the latent checkpoint it was overlaid on and compared with; empty when none was given.
        loras: LoRAs that were merged into it, as `NAME:STRENGTH`.
    """

    name: str
    fingerprint: str
    known_as: str
    tensors: int
    parameters: int
    trunk_sha256: str
    trained: bool
    licence: str
    source: str = ""
    loras: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReferenceCase:
    """Inputs and expected outputs of one small denoising call, computed in torch float32."""

    name: str
    file: str
    height_px: int
    width_px: int
    caption_tokens: int


@dataclass(frozen=True, slots=True)
class TextRecord:
    """The text encoder, which turns prompts into embeddings, and its tokenizer.

    Attributes:
        network: inputs and output of the text encoder.
        graphs: ONNX graphs of the text encoder, one for each of the bundle's plans.
        tokenizer: path of its tokenizer.json.
        chat_template: path of a text with `{prompt}` in one place.
        max_tokens: longest prompt with its template.
        vocabulary: token numbers that the encoder has rows for.
        reference: path of token numbers and their embeddings in torch float32; None when the build could not run it.
    """

    network: NetworkSpec
    graphs: tuple[GraphRecord, ...]
    tokenizer: str
    chat_template: str
    max_tokens: int
    vocabulary: int
    reference: str | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.vocabulary < 1:
            raise ArtifactError(
                f"max_tokens is {self.max_tokens} and vocabulary {self.vocabulary}, expected 1 or more of each"
            )
        wrong = [name for name in (self.network.name, *(g.network for g in self.graphs)) if name != TEXT_ENCODER]
        if wrong:
            raise ArtifactError(f"the text encoder is described as network {wrong[0][:80]!r}")
        inputs = {(spec.name, spec.dtype, spec.shape) for spec in self.network.inputs}
        outputs = [(spec.name, spec.dtype, spec.shape[:2], len(spec.shape)) for spec in self.network.outputs]
        if inputs != {(name, "int64", ("B", "L")) for name in ("input_ids", "attention_mask")} or outputs != [
            ("prompt_embeds", "float32", ("B", "L"), 3)
        ]:
            raise ArtifactError("the text encoder has other inputs and outputs than token numbers and embeddings")

    @property
    def documents(self) -> set[str]:
        """Every file of the bundle that it uses besides its ONNX graphs."""
        return {self.tokenizer, self.chat_template} | ({self.reference} if self.reference else set())

    def graph(self, plan: str) -> GraphRecord:
        """The ONNX graph under one plan."""
        return next(record for record in self.graphs if record.plan == plan)

    def check_model(self, model: ModelSpec, plans: tuple[PlanRef, ...]) -> None:
        """Check that its embeddings fit the model, and that it has an ONNX graph for every plan.

        Raises:
            ArtifactError: they do not fit, or an ONNX graph is missing.
        """
        width = self.network.outputs[0].shape[2]
        if width != model.caption_width:
            raise ArtifactError(f"the text encoder's width is {width}, the model takes {model.caption_width}")
        if self.max_tokens > model.caption_tokens_max:
            raise ArtifactError(
                f"prompts of {self.max_tokens} tokens, the model takes up to {model.caption_tokens_max}"
            )
        if sorted(record.plan for record in self.graphs) != sorted(plan.name for plan in plans):
            raise ArtifactError("the text encoder has graphs for other plans than the bundle")


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole of `bundle.json`.

    Attributes:
        base_grid: the trained grid as the build's flag, its profile or the checkpoint states it; None when none of them
            does, and the published one of the family in `model.rotary` counts.
    """

    schema: int
    producer: str
    model: ModelSpec
    checkpoint: CheckpointRecord
    sampling: Sampling
    networks: tuple[NetworkSpec, ...]
    profiles: tuple[Profile, ...]
    plans: tuple[PlanRef, ...]
    graphs: tuple[GraphRecord, ...]
    references: tuple[ReferenceCase, ...]
    files: tuple[FileRecord, ...]
    ledger: tuple[LedgerEntry, ...]
    text: TextRecord | None = None
    engines: tuple[EngineRecord, ...] = ()
    base_grid: Grid | None = None

    def __post_init__(self) -> None:
        if self.base_grid is not None:
            check_base_grid(self.base_grid, self.model.rotary.axis_lengths)
        if not self.profiles or not self.plans:
            raise ArtifactError("the bundle has no profile or no precision plan")
        wanted = {(network, plan.name) for network in NETWORKS for plan in self.plans}
        missing = sorted(wanted - {(record.network, record.plan) for record in self.graphs})
        if missing:
            raise ArtifactError(f"the bundle has no graph for {', '.join(f'{n} in {p}' for n, p in missing)}")
        if sorted(spec.name for spec in self.networks) != sorted(NETWORKS):
            raise ArtifactError(f"the bundle describes other networks than {', '.join(NETWORKS)}")
        paths = {record.path for record in self.files}
        # A copy that was packed for a target has engines in place of their graphs.
        built = {(record.network, record.plan) for record in self.engines}
        used = {
            path
            for record in (*self.graphs, *(self.text.graphs if self.text is not None else ()))
            if (record.network, record.plan) not in built or not paths.isdisjoint(record.paths)
            for path in record.paths
        }
        used |= {case.file for case in self.references} | {record.engine for record in self.engines}
        used |= {plan.file for plan in self.plans if plan.file is not None}
        if self.text is not None:
            self.text.check_model(self.model, self.plans)
            used |= self.text.documents
        if used != paths or len(paths) != len(self.files):
            wrong = sorted(used ^ paths) or ["a path that stands twice"]
            raise ArtifactError(f"the file list does not match what the bundle uses: {', '.join(wrong)}")
        self._check_engines()
        for profile in self.profiles:
            profile.check_model(self.model)
        failed = [f"{entry.network} on {entry.case}" for entry in self.ledger if entry.status == "failed"]
        if failed:
            raise ArtifactError(
                f"the ledger holds comparisons that failed: {', '.join(failed[:4])}",
                hint="no build commits such a bundle; build it again",
            )

    def model_on(self, base_grid: Grid | None = None) -> ModelSpec:
        """The model with the trained grid that counts: the one given, the bundle's, or that of the family.

        Raises:
            UsageError: the grid given is not positive, or larger than the model's positions reach.
        """
        grid = self.base_grid if base_grid is None else base_grid
        if grid is None:
            return self.model
        sides = tuple(grid) if isinstance(grid, Sequence) and not isinstance(grid, str) else ()
        if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
            raise UsageError(f"base_grid is {str(grid)[:40]!r}, expected two whole numbers: token rows and columns")
        try:
            return replace(self.model, rotary=replace(self.model.rotary, base_grid=(sides[0], sides[1])))
        except ArtifactError as error:
            raise UsageError(str(error)) from error

    def plan(self, name: str | None) -> PlanRef:
        """The plan called `name`; the first one when None.

        Raises:
            UsageError: no such plan.
        """
        if name is None:
            return self.plans[0]
        found = next((plan for plan in self.plans if plan.name == name), None)
        if found is None:
            have = ", ".join(plan.name for plan in self.plans)
            raise UsageError(f"the bundle has no plan `{name}`; it has {have}")
        return found

    def graph(self, network: str, plan: str) -> GraphRecord:
        """The ONNX graph of one network, or of the text encoder, under one plan."""
        if network == TEXT_ENCODER and self.text is not None:
            return self.text.graph(plan)
        return next(record for record in self.graphs if record.network == network and record.plan == plan)

    def has_graph(self, network: str, plan: str) -> bool:
        """Whether the ONNX graph's files are there; a copy that was packed for an engine target has none."""
        graph = self.graph(network, plan).graph
        return any(record.path == graph for record in self.files)

    def network(self, name: str) -> NetworkSpec:
        """Inputs and outputs of one network, or of the text encoder."""
        if name == TEXT_ENCODER and self.text is not None:
            return self.text.network
        return next(spec for spec in self.networks if spec.name == name)

    def engine(self, network: str, plan: str, target: Target) -> EngineRecord:
        """The engine of one network under one plan that runs on a target: its own, or a portable one.

        Raises:
            ArtifactError: there is none; lists the targets that have one, and says how to build it.
        """
        portable = Target(target.backend, target.library_version, PORTABLE).spelling if target.backend == "rtx" else ""
        found = [record for record in self.engines if (record.network, record.plan) == (network, plan)]
        for spelling in (target.spelling, portable):
            for record in found:
                if record.target == spelling:
                    return record
        have = ", ".join(dict.fromkeys(record.target for record in found)) or "none at all"
        wanted = f"{target.backend}-{target.compute_capability}"
        raise ArtifactError(
            f"the bundle has no engine of `{network}` in plan `{plan}` for {target.spelling}; it has {have}",
            hint=f"build it again with --backend {target.backend} --precision {plan} --target {wanted}",
        )

    def _check_engines(self) -> None:
        """Check that engines match this bundle's ONNX graphs, inputs and plans.

        Raises:
            ArtifactError: one is not.
        """
        digests = {record.path: record.sha256 for record in self.files}
        plans = {plan.name for plan in self.plans}
        networks = (*NETWORKS, *((TEXT_ENCODER,) if self.text is not None else ()))
        seen = set()
        for record in self.engines:
            identity = (record.network, record.plan, record.target)
            if record.network not in networks or record.plan not in plans or identity in seen:
                raise ArtifactError(f"`{record.engine}` is an engine of a network or plan that the bundle has not")
            seen.add(identity)
            graph = self.graph(record.network, record.plan)
            found = (digests.get(graph.graph), digests.get(graph.weights))
            if found not in ((record.graph_sha256, record.weights_sha256), (None, None)):
                raise ArtifactError(
                    f"`{record.engine}` was built from another graph than `{graph.graph}`",
                    hint="build the bundle again",
                )
            for profile in record.profiles:
                shapes = {part.name: part.max for part in profile.inputs}
                if shapes.keys() != {spec.name for spec in self.network(record.network).inputs}:
                    raise ArtifactError(f"`{record.engine}` has other inputs than `{record.network}`")


def manifest_to_bytes(manifest: Manifest) -> bytes:
    """The manifest as UTF-8 JSON: the same manifest gives the same bytes."""
    return (json.dumps(to_json(manifest), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def manifest_from_bytes(data: bytes) -> Manifest:
    """Parse and check `bundle.json`.

    Raises:
        ArtifactError: not JSON, another schema version, or content that does not hold together.
    """
    try:
        parsed = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"`{MANIFEST_NAME}` is not JSON: {error}", hint="build the bundle again") from error
    schema = parsed.get("schema") if isinstance(parsed, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool) or not 1 <= schema <= SCHEMA:
        raise ArtifactError(
            f"`{MANIFEST_NAME}` has schema version {schema!r}, this version reads 1 to {SCHEMA}",
            hint="open it with the version of l2p-export that built it, or build it again",
        )
    try:
        return from_json(Manifest, _upgraded(parsed, schema))
    except UsageError as error:
        # Specs that are a caller's fault elsewhere are the file's fault here.
        raise ArtifactError(f"`{MANIFEST_NAME}`: {error}", hint="build the bundle again") from error


def _upgraded(parsed: dict[str, object], schema: int) -> dict[str, object]:
    """A manifest of an older schema converted to this version; parts of an unexpected form are left as they are."""

    def plan(item: dict[str, object]) -> dict[str, object]:
        base = base_of_name(str(item.get("name")))
        return item if base is None else {**item, "base": base}

    def entry(item: dict[str, object]) -> dict[str, object]:
        others = {key: value for key, value in item.items() if key != "stage"}
        return {"comparison": to_json(comparison_of_text(str(item["stage"]))), **others} if "stage" in item else item

    def model(item: object) -> object:
        if not isinstance(item, dict) or not isinstance(item.get("rotary"), dict):
            return item
        side = item["rotary"].get("base_grid")
        return {**item, "rotary": {**item["rotary"], "base_grid": [side, side]}}

    upgraded = {**parsed, "schema": SCHEMA}
    if schema < 3 and "model" in parsed:
        upgraded["model"] = model(parsed["model"])
    if schema > 1:
        return upgraded
    for key, change in (("plans", plan), ("ledger", entry)):
        found = parsed.get(key)
        if isinstance(found, list):
            upgraded[key] = [change(item) if isinstance(item, dict) else item for item in found]
    return upgraded


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("an object names a key twice")
    return entries


def bundle_digest(manifest_bytes: bytes) -> str:
    """Digest of a bundle's exact content: SHA-256 of its manifest, which holds the digest of every file."""
    return hashlib.sha256(manifest_bytes).hexdigest()
