"""Sizes, build times and memory of TensorRT for RTX engines: two profiles in one, a shared trunk, the published size.

    python benchmarks/engines.py profiles [FOLDER]    one engine with two profiles against two engines
    python benchmarks/engines.py trunk [FOLDER]       4k, 8k and 10k adapters of one source in one store
    python benchmarks/engines.py full [FOLDER]        6.21 billion random weights in FP16: needs 38 GB of disk
    python benchmarks/engines.py float8 [FOLDER]      the same with linear layers of blocks in FP8: needs 28 GB of disk

Everything is built for sm89, which needs no GPU. Memory is the anonymous memory of the command and its workers.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from float8 import write_float8
from full_width import write_random
from measure import run_measured

from l2p_engines.builders.builder import build_engine, build_memory_bytes
from l2p_engines.builders.readback import read_back
from l2p_engines.builders.request import EngineRequest, EngineSpec
from l2p_engines.builders.shapes import engine_profiles
from l2p_engines.builders.stage import EngineFacts
from l2p_engines.forecast.calls import ENGINE_KERNEL_BYTES
from l2p_engines.profiles import load_profile
from l2p_engines.store.stages import Stage, stages
from l2p_export.checkpoint.demo import write_demo_checkpoint
from l2p_export.checkpoint.loading import load_model
from l2p_export.graphs.export import export_graph
from l2p_export.precision.plans import plain_plan
from l2p_runtime.contract import Target
from l2p_runtime.contract.codec import from_json

TARGET = "rtx-sm89"
_HEADS = (
    "| engine | weights, bytes | engine, bytes | over forecast | s | peak anonymous GiB | forecast GiB |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def main() -> None:
    """Run one of the four benchmarks."""
    what, folder = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
    with tempfile.TemporaryDirectory(dir=folder) as name:
        {"profiles": profiles, "trunk": trunk, "full": full, "float8": float8}[what](Path(name))


def profiles(root: Path) -> None:
    """Build the 4k and 8k-zeroshot profiles of one model into one engine and into two."""
    print("| network | both in one: MB, s | 4k: MB, s | 8k-zeroshot: MB, s | two engines: MB, s |\n|" + " --- |" * 5)
    columns = []
    for names in (("4k", "8k-zeroshot"), ("4k",), ("8k-zeroshot",)):
        out = root / "-".join(names)
        _build(root, out, None, names, "fp16")
        columns.append(_engines(root / "store", out))
    for network in columns[0]:
        both, first, second = (column[network] for column in columns)
        apart = (first[0] + second[0], first[1] + second[1])
        cells = [f"{size / 1e6:.2f}, {seconds:.1f}" for size, seconds in (both, first, second, apart)]
        print(f"| {network} | {' | '.join(cells)} |")


def trunk(root: Path) -> None:
    """Build three adapters of one source: the trunk's ONNX graph and engine are built once."""
    total = shared = 0
    for name, patch in (("4k", 64), ("8k", 128), ("10k", 160)):
        checkpoint = root / f"{name}.safetensors"
        write_demo_checkpoint(checkpoint, patch)
        log = _build(root, root / name, checkpoint, (name,), "fp16")
        made = [line.split("`")[1] for line in log if line.startswith("engine ") and ": done in" in line]
        manifest = json.loads((root / name / "bundle.json").read_bytes())
        total += sum(record["size_bytes"] for record in manifest["files"] if record["path"].startswith("engines/"))
        print(f"{name}: engines made: {', '.join(made)}")
    shared = sum(path.stat().st_size for path in (root / "store" / "engines").iterdir())
    print(f"engines of three bundles: {total / 1e6:.1f} MB; in the store: {shared / 1e6:.1f} MB")


def full(root: Path) -> None:
    """Build engines of the published size in FP16."""
    checkpoint, out = write_random(root / "random_4k.safetensors"), root / "bundle"
    command = _command(root, out, checkpoint, ("4k",), "fp16")
    # ONNX graphs first, so that the second run measures only engines.
    graphs = run_measured([part for part in command if part not in {"--target", TARGET}])
    peak = graphs.whole.peak_bytes / 2**30
    print(f"graphs: exit code {graphs.code}, {graphs.whole.seconds:.0f} s, peak anonymous {peak:.2f} GiB", flush=True)
    checkpoint_bytes = checkpoint.stat().st_size
    built = run_measured(command)
    print(
        f"engines: exit code {built.code}, {built.whole.seconds:.0f} s, "
        f"peak anonymous {built.whole.peak_bytes / 2**30:.2f} GiB; checkpoint {checkpoint_bytes / 1e9:.2f} GB"
    )
    if built.code:
        print("\n".join(built.stderr[-8:]))
        return
    print(_HEADS)
    manifest = json.loads((out / "bundle.json").read_bytes())
    sizes = {record["path"]: record["size_bytes"] for record in manifest["files"]}
    weights = {record["network"]: sizes[record["weights"]] for record in manifest["graphs"]}
    for stage, facts in _stages(root / "store"):
        network, size = stage.label.split(".")[0], stage.files[0].size_bytes
        forecast = weights[network] + ENGINE_KERNEL_BYTES
        print(
            f"| {stage.label} | {weights[network]:,} | {size:,} | {size / forecast - 1:+.2%} | {facts.seconds:.1f} "
            f"| {facts.peak_memory_bytes / 2**30:.2f} | {facts.forecast_memory_bytes / 2**30:.2f} |"
        )
    again = run_measured(command)
    print(f"again: {again.whole.seconds:.2f} s, {again.stderr[-1:]}", flush=True)


def float8(root: Path) -> None:
    """Build the same weights with all linear layers of blocks in FP8, without the head, which stays in FP16."""
    loaded = load_model(write_random(root / "random_4k.safetensors"))
    model, profile, plan = loaded.model, load_profile("4k"), plain_plan(loaded.model, "fp16")
    print(_HEADS, flush=True)
    for network in ("caption", "stem", "trunk", "tail"):
        spec = next(spec for spec in model.networks if spec.name == network)
        made = export_graph(model, loaded.checkpoint.tensors, spec, plan, root, lambda done: None)
        graph, weights = write_float8(made.graph, made.weights, root)
        shapes = engine_profiles(spec, model.spec, [profile])
        wanted = EngineSpec(spec, "fp8", Target("rtx", "1.7", "sm89"), shapes, ("float16", "float8_e4m3fn"))
        size = weights.stat().st_size
        built = build_engine(EngineRequest(wanted, graph, size), root / "engine")
        forecast = size + ENGINE_KERNEL_BYTES
        print(
            f"| {wanted.label} | {size:,} | {built.size_bytes:,} | {built.size_bytes / forecast - 1:+.2%} "
            f"| {built.seconds:.1f} | {built.peak_memory_bytes / 2**30:.2f} | {build_memory_bytes(size) / 2**30:.2f} |",
            flush=True,
        )
        read_back(wanted, size, built.size_bytes)
        for path in (made.graph, made.weights, graph, weights, root / "engine"):
            path.unlink()


def _command(root: Path, out: Path, checkpoint: Path | None, names: tuple[str, ...], precision: str) -> list[str]:
    command = [sys.executable, "-m", "l2p_export", "build", *([str(checkpoint)] if checkpoint else [])]
    command += [option for name in names for option in ("--profile", name)]
    return [*command, "--precision", precision, "--target", TARGET, "--store", str(root / "store"), "--out", str(out)]


def _build(root: Path, out: Path, checkpoint: Path | None, names: tuple[str, ...], precision: str) -> list[str]:
    shutil.rmtree(out, ignore_errors=True)
    command = _command(root, out, checkpoint, names, precision)
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        sys.exit(built.stderr)
    return built.stderr.splitlines()


def _engines(store: Path, bundle: Path) -> dict[str, tuple[int, float]]:
    """Network to (bytes, seconds) of its engine in a bundle."""
    manifest = json.loads((bundle / "bundle.json").read_bytes())
    wanted = {record["engine"]: record["network"] for record in manifest["engines"]}
    return {
        wanted[stage.files[0].path]: (stage.files[0].size_bytes, facts.seconds)
        for stage, facts in _stages(store)
        if stage.files[0].path in wanted
    }


def _stages(store: Path) -> list[tuple[Stage, EngineFacts]]:
    return [(stage, from_json(EngineFacts, stage.facts)) for stage in stages(store) if stage.kind == "engine"]


if __name__ == "__main__":
    main()
