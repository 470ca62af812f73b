"""The demo model that ships: what it states, and that a newcomer's pictures show what the prompt says."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from conftest import DEMO_PX, Bundles, run_cli
from l2p_export.checkpoint.demo import DEMO, demo_model

LARGEST_BYTES = 24 << 20
PROMPTS = (
    "a red circle",
    "a green triangle",
    "a yellow circle to the left of a red square",
    "a blue square above a red circle",
)


def test_adapters_of_both_variants_share_the_sources_trunk(tmp_path: Path) -> None:
    digests = set()
    for patch_px in (16, 64):
        model = demo_model(patch_px, tmp_path)
        assert model.source == model.text_encoder == DEMO / "source"
        with safe_open(model.checkpoint, "pt") as file:
            metadata = file.metadata()
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
        assert metadata["l2p.trained"] == "true"
        assert metadata["license"] == "Apache-2.0"
        assert {"l2p.steps", "l2p.guidance", "l2p.shift"} <= metadata.keys()
        digests.add(metadata["l2p.trunk_sha256"])
    assert len(digests) == 1


def test_the_weights_are_small_and_readable_by_all() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LARGEST_BYTES
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)


def test_pictures_show_what_prompts_say(bundles: Bundles, tmp_path: Path) -> None:
    """Of four easy prompts at the size that the adapters learnt at, three at least are right."""
    right = []
    for prompt in PROMPTS:
        picture = tmp_path / "picture.png"
        asked = ("--prompt", prompt, "--plan", "fp32", "--size", f"{DEMO_PX}x{DEMO_PX}", "--seed", "3")
        made = run_cli("generate", bundles.path("demo-16"), *asked, "--out", picture)
        assert made.returncode == 0, made.stderr
        judged = run_cli("judge", picture, "--prompt", prompt, "--json")
        right.append(json.loads(judged.stdout)["passed"])
    assert sum(right) >= 3, right
