"""`l2p-export import` and the options that `build` shares with it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import run_cli
from l2p_export.build.bundle import check_build
from l2p_export.checkpoint.demo import write_demo_checkpoint
from l2p_runtime.files import atomic_file, partial_path
from unit.export.checkpoint.spellings import adapters, fused, latent_state, random_state, save_sharded

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters, their source as a pipeline folder, and the merged file."""
    folder = tmp_path_factory.mktemp("import")
    state = random_state(0)
    save_file(adapters(state), folder / "adapters.safetensors", {"license": "MIT", "l2p.steps": "7"})
    save_sharded(latent_state(state), folder / "pipe" / "transformer", "diffusion_pytorch_model", 2)
    save_file(state, folder / "merged.safetensors")
    save_file(fused(state, "model.diffusion_model."), folder / "ui.safetensors")
    halves = {"A": (2, 96), "B": (96, 2)}
    lora = {
        f"diffusion_model.layers.{layer}.attention.to_q.lora_{half}.weight": torch.randn(shape)
        for layer in (0, 2)
        for half, shape in halves.items()
    }
    save_file(lora, folder / "lora.safetensors")
    save_file(lora | {"lora_te_x.lora_down.weight": torch.ones(2, 2)}, folder / "with-text.safetensors")
    return folder


def test_adapters_and_source_become_one_canonical_file(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    result = run_cli("import", files / "adapters.safetensors", "--source", files / "pipe", "--out", out)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{out}\n"
    merged = load_file(files / "merged.safetensors")
    found = load_file(out)
    assert found.keys() == merged.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in merged.items())
    facts = json.loads(run_cli("inspect", out, "--digest", "--json").stdout)
    assert facts["licence"] == "MIT"
    assert facts["metadata"]["l2p.steps"] == "7"
    assert facts["metadata"]["l2p.trunk_sha256"] == facts["trunk_sha256"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.safetensors"]


def test_every_spelling_gives_the_same_bytes(files: Path, tmp_path: Path) -> None:
    outputs = []
    for name in ("merged", "ui"):
        out = tmp_path / f"{name}.safetensors"
        assert run_cli("import", files / f"{name}.safetensors", "--out", out, "--quiet").returncode == 0
        outputs.append(out.read_bytes())
    assert outputs[0] == outputs[1]


def test_the_node_ui_spelling_can_be_written_and_read_again(files: Path, tmp_path: Path) -> None:
    ui, back = tmp_path / "ui.safetensors", tmp_path / "back.safetensors"
    result = run_cli("import", files / "merged.safetensors", "--spelling", "node-ui", "--out", ui, "--json")
    assert json.loads(result.stdout)["tensors"] == len(load_file(files / "merged.safetensors"))
    assert load_file(ui).keys() == load_file(files / "ui.safetensors").keys()
    run_cli("import", ui, "--out", back)
    first, second = load_file(files / "merged.safetensors"), load_file(back)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inspect_names_the_equal_layers(files: Path) -> None:
    facts = json.loads(run_cli("inspect", files / "adapters.safetensors", "--source", files / "pipe", "--json").stdout)
    assert facts["equal_layers"] == [1, 2, 3, 4]
    assert facts["model"]["trunk_layers"] == [1, 5]
    demo = ROOT / "export" / "l2p_export" / "data" / "demo" / "demo-4k.safetensors"
    facts = json.loads(run_cli("inspect", demo, "--json").stdout)
    assert facts["kind"] == "adapters"
    assert "lacks layers 1 to 4, those of trunk" in facts["problem"]
    alone = json.loads(run_cli("inspect", files / "adapters.safetensors", "--json").stdout)
    assert alone["kind"] == "adapters"
    assert "--source" not in alone
    assert json.loads(run_cli("inspect", files / "pipe", "--json").stdout)["kind"] == "latent source"
    assert json.loads(run_cli("inspect", files / "lora.safetensors", "--json").stdout)["kind"] == "LoRA"


def test_a_lora_changes_what_it_names_and_the_trunk(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    result = run_cli(
        "import", files / "merged.safetensors", "--lora", f"{files / 'lora.safetensors'}:0.5", "--out", out
    )
    assert result.returncode == 0, result.stderr
    assert "makes another trunk: layers.2.attention.to_q\n" in result.stderr
    before, after = load_file(files / "merged.safetensors"), load_file(out)
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed == {"layers.0.attention.to_q.weight", "layers.2.attention.to_q.weight"}


def test_what_a_lora_changes_in_a_text_encoder_is_left_out_when_asked(files: Path, tmp_path: Path) -> None:
    arguments = ("import", files / "merged.safetensors", "--out", tmp_path / "x.safetensors", "--lora")
    refused = run_cli(*arguments, files / "with-text.safetensors")
    assert refused.returncode == 4
    assert "`lora_te_x.lora_down.weight`" in refused.stderr
    assert "--skip-text-encoder-lora" in refused.stderr
    result = run_cli(*arguments, files / "with-text.safetensors", "--skip-text-encoder-lora", "--quiet")
    assert result.returncode == 0, result.stderr
    assert "note: left out 1 keys of a text encoder from `with-text.safetensors`\n" in result.stderr
    run_cli(*arguments[:3], tmp_path / "y.safetensors", "--lora", files / "lora.safetensors")
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_build_takes_all_of_these_directly(files: Path) -> None:
    lora = f"{files / 'with-text.safetensors'}:1"
    inputs = {"source": files / "pipe", "loras": (lora,)}
    with check_build(
        files / "adapters.safetensors", ("1k",), ("fp32",), None, skip_text_encoder_lora=True, **inputs
    ) as plan:
        assert plan.loaded.equal_layers == (1, 2, 3, 4)
        assert plan.sampling.steps == 7
        assert len(plan.loaded.loras) == 1


def test_inspect_answers_for_files_that_import_refuses(tmp_path: Path) -> None:
    for name, content, kind in (
        ("a.gguf", b"GGUF\x03\x00\x00\x00" + bytes(40), "GGUF file"),
        ("b.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ("c.safetensors", b"<!DOCTYPE html><html></html>", "HTML page"),
        ("d.ckpt", b"\x80\x02}q\x00.", "pickle"),
    ):
        (tmp_path / name).write_bytes(content)
        facts = json.loads(run_cli("inspect", tmp_path / name, "--json").stdout)
        assert facts["kind"].startswith(kind)
        assert facts["hint"]
        refused = run_cli("import", tmp_path / name, "--out", tmp_path / "x.safetensors")
        assert refused.returncode == 4
        assert kind in refused.stderr
        assert facts["hint"] in refused.stderr
    assert not (tmp_path / "x.safetensors").exists()


def test_import_never_writes_over_a_file_that_it_reads(files: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    shard = tmp_path / "model" / "x-00001-of-00001.safetensors"
    shard.write_bytes((files / "merged.safetensors").read_bytes())
    result = run_cli("import", tmp_path / "model", "--out", shard)
    assert result.returncode == 2
    assert "which is read" in result.stderr


def test_dry_runs_write_nothing(files: Path, tmp_path: Path) -> None:
    result = run_cli("import", files / "merged.safetensors", "--out", tmp_path / "x.safetensors", "--dry-run")
    assert result.returncode == 0
    assert "would write" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_commands_that_the_readme_names_run(files: Path, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    for name, file in (("merged", "merged"), ("adapters", "adapters"), ("style", "lora")):
        (tmp_path / f"{name}.safetensors").symlink_to(files / f"{file}.safetensors")
    (tmp_path / "Z-Image").symlink_to(files / "pipe")
    write_demo_checkpoint(tmp_path / "l2p_4k_sft.safetensors", 64)
    commands = re.findall(r"`l2p-export ((?:import|build) \S+\.safetensors [^`]*)`", readme)
    assert len(commands) == 5
    for command in commands:
        dry = ["--dry-run"] if command.startswith("build") else []
        result = run_cli(*command.split(), *dry, cwd=tmp_path)
        assert result.returncode == 0, command + "\n" + result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("adapters.safetensors", "--out", "x.safetensors"), 4, "--source"),
        (("merged.safetensors", "--out", "merged.safetensors"), 2, "which is read"),
        (("merged.safetensors", "--out", "x.pt"), 2, ".safetensors"),
        (("merged.safetensors", "--out", "no/where.safetensors"), 2, "does not exist"),
        (("merged.safetensors", "--source", "nowhere", "--out", "x.safetensors"), 2, "nowhere"),
        (("merged.safetensors", "--lora", "lora.safetensors:nan", "--out", "x.safetensors"), 2, "nan"),
        (("merged.safetensors", "--lora", "nowhere.safetensors:1", "--out", "x.safetensors"), 2, "nowhere"),
        (("lora.safetensors", "--out", "x.safetensors"), 4, "lora"),
        (("pipe", "--out", "x.safetensors"), 4, "latent"),
    ],
)
def test_bad_calls(files: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    result = run_cli("import", *arguments, cwd=files)
    assert result.returncode == code, result.stderr
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert not (files / "x.safetensors").exists()


def test_what_a_killed_command_left_is_removed_by_the_next(files: Path, tmp_path: Path) -> None:
    left = partial_path(tmp_path / "another.png")
    left.write_bytes(b"half")
    command = ("import", files / "merged.safetensors", "--out", tmp_path / "x.safetensors")
    with atomic_file(tmp_path / "third.png"):
        assert run_cli(*command, "--dry-run").returncode == 0
        assert left.exists()
        assert run_cli(*command).returncode == 0
        assert not left.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["third.png", "x.safetensors"]
