"""A finished bundle run again on this machine: what its build stored against what its graphs make of it here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from l2p_export.text_encoder.build import verify_text
from l2p_export.verification import END_TO_END, Case, case_inputs, compare_graphs, not_run
from l2p_runtime.backends import Engine, open_backend
from l2p_runtime.contract import LedgerEntry, ReferenceCase
from l2p_runtime.errors import ArtifactError, UnsupportedError
from l2p_runtime.tensorfile import open_tensorfile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l2p_export.progress import Reporter
    from l2p_runtime.bundle import Bundle


def verify_bundle(bundle: Bundle, backend: str, plan: str | None, reporter: Reporter) -> list[LedgerEntry]:
    """Run a bundle's stored cases on this machine; what only the build could run is listed as not run.

    Raises:
        ArtifactError: no such plan, or a damaged reference file.
        HostError: the backend cannot run here.
    """
    manifest = bundle.manifest
    opened = open_backend(backend)
    networks = {spec.name: spec for spec in manifest.networks}
    references = {case.name: _read_case(bundle, case) for case in manifest.references}
    plans = [manifest.plan(plan)] if plan else manifest.plans
    ledger: list[LedgerEntry] = []
    for ref in plans:

        def load(network: str, name: str = ref.name) -> Engine:
            record = manifest.graph(network, name)
            return opened.load(bundle.path(record.graph), bundle.path(record.weights), networks[network])

        with reporter.stage(f"ledger {ref.name}", len(references) * len(networks), "calls") as advance:
            try:
                ledger += compare_graphs(ref.name, networks, references, load, advance)
                ledger += verify_text(bundle, opened, ref.name)
            except UnsupportedError as error:
                ledger += not_run(ref.name, list(references), str(error))
    cases = {case.name for case in manifest.references} | {entry.case for entry in ledger}
    chosen = {f"torch float32 -> {ref.name} graph" for ref in plans}
    left = dict.fromkeys(
        (e.stage, e.case, e.status) for e in manifest.ledger if e.case not in cases and e.stage in chosen
    )
    return ledger + [
        LedgerEntry(stage, END_TO_END, case, "not run", f"no stored reference; `{status}` when the bundle was built")
        for stage, case, status in left
    ]


def _read_case(bundle: Bundle, case: ReferenceCase) -> dict[str, NDArray[Any]]:
    """Read one stored case; its tensors must be the ones that the case and the networks call for."""
    file = open_tensorfile(bundle.path(case.file))
    model = bundle.manifest.model
    rows, columns = case.height_px // model.patch_px, case.width_px // model.patch_px
    inputs = case_inputs(model, Case(case.name, rows, columns, case.caption_tokens, stored=True), seed=0)
    wanted = {name: value.shape for name, value in inputs.items()}
    sizes = {"B": 1, "s": len(inputs["rope_cos"]), "t": model.padded(case.caption_tokens) // model.sequence_multiple}
    sizes |= {"h": rows // model.head.row_multiple, "w": columns // model.head.row_multiple}
    sizes["r"] = sizes["h"]
    wanted |= {f"{net.name}.{out.name}": out.resolve(sizes) for net in bundle.manifest.networks for out in net.outputs}
    found = {name: info.shape for name, info in file.tensors.items()}
    if found != wanted:
        wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise ArtifactError(f"reference `{case.file}` does not hold case `{case.name}`: {', '.join(wrong[:6])}")
    return {name: file.read(name) for name in file.tensors}
