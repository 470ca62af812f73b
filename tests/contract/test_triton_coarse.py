"""Coarse to fine, position policies and trained grids through a service and a real Triton server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from conftest import run_cli
from l2p_runtime import Coarse, Pipeline, UsageError
from l2p_runtime.bundle import open_bundle
from l2p_runtime.client import Client
from l2p_runtime.serving import Limits, Service, ServiceSpec
from tools.triton_server import Server, serve

if TYPE_CHECKING:
    from conftest import Bundles

KIND = "tiny-16-fused"
PROMPT = "a red circle"
MODELS = ("l2p", "l2p_stream", "l2p_embeddings")
NEW = ("positions", "base_grid", "coarse_height", "coarse_width", "renoise", "fine_steps", "fine_guidance")
ASKED: dict[str, Any] = {"height": 64, "width": 96, "seed": 7, "steps": 2, "guidance": 2.1}
CASES: dict[str, dict[str, Any]] = {
    "coarse": {"coarse": Coarse(32, 48)},
    "coarse, all set": {"coarse": Coarse(32, 48, renoise=0.55, steps=3, guidance=1.7)},
    "positions": {"positions": "vision-yarn+temperature", "base_grid": (2, 3)},
    "together": {"coarse": Coarse(32, 48, 0.9, 1), "positions": "linear", "base_grid": (2, 2)},
}
VALUES: dict[str, Any] = {"prompt": PROMPT.encode(), "height": 64, "width": 64, "steps": 2}
COARSE: dict[str, Any] = {"coarse_height": 32, "coarse_width": 32}


@pytest.fixture(scope="module")
def pipe(bundles: Bundles) -> Iterator[Pipeline]:
    with Pipeline.open(bundles.path(KIND), backend="onnx") as opened:
        yield opened


@pytest.fixture(scope="module")
def service(bundles: Bundles) -> Iterator[Service]:
    digest = open_bundle(bundles.path(KIND)).digest
    spec = ServiceSpec("", digest, "onnx", "", "", "uint8", 512, Limits(64 * 96, 8, 1000))
    opened = Service.open(spec, bundles.path(KIND))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def repository(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("triton") / "repository"
    written = run_cli("triton", bundles.path(KIND), "--out", root, "--kind", "cpu", "--max-pixels", "16384")
    assert written.returncode == 0, written.stderr
    return root


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(repository, tmp_path_factory.mktemp("server")) as running:
        for model in MODELS:
            assert not running.load(model), running.log.read_text()
        yield running


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one side": ({"coarse_height": 32}, "the request has coarse_height and no coarse_width"),
    "the other side": ({"coarse_width": 32}, "the request has coarse_width and no coarse_height"),
    "no sides": ({"renoise": 0.5}, "belong to coarse_height and coarse_width"),
    "as large": ({"coarse_height": 64, "coarse_width": 64}, "the coarse image is 64x64, expected one smaller than"),
    "does not divide": (COARSE | {"coarse_height": 33}, "size 32x33 does not divide by 16 px"),
    "negative": (COARSE | {"coarse_height": -16}, "height is -16 px, expected 16 to"),
    "another shape": (COARSE | {"coarse_height": 64}, "would be stretched 2.00 times in width"),
    "renoise": (COARSE | {"renoise": 1.0}, "renoise is 1.0, expected more than 0 and less than 1"),
    "NaN": (COARSE | {"renoise": np.nan}, "renoise is nan"),
    "no fine steps": (COARSE | {"fine_steps": 0}, "steps is 0, expected 1 to 1000"),
    "steps together": (COARSE | {"fine_steps": 7}, "steps is 2 and fine_steps is 7, this server takes up to 8"),
    "fine guidance": (COARSE | {"fine_guidance": -1.0}, "guidance is -1.0, expected 0 to 100"),
    "policy": ({"positions": b"sideways"}, "position policy is 'sideways', expected one of auto, native"),
    "no policy": ({"positions": b""}, "position policy is ''"),
    "bytes of a policy": ({"positions": b"\xff"}, "the position policy is not UTF-8 at byte 0"),
    "long policy": ({"positions": b"a" * 1001}, "the position policy has 1,001 bytes, this server takes up to 1,000"),
    "grid": ({"base_grid": np.array([0, 4])}, "grid"),
    "large grid": ({"base_grid": np.array([4, 10**6])}, "grid"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_service_refuses_in_words(case: str, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service._pipe, "encode", lambda texts: pytest.fail("the text encoder ran"))
    given, needle = REFUSED[case]
    with pytest.raises(UsageError, match=re.escape(needle)) as caught:
        service.draw(VALUES | given)
    assert service.describe(caught.value)[0] == "INVALID_ARG"


def test_fine_guidance_needs_a_negative_without_a_text_encoder(bundles: Bundles) -> None:
    path = bundles.path("tiny-16")
    spec = ServiceSpec("", open_bundle(path).digest, "onnx", "", "", "uint8", 512, Limits(64 * 64, 8, 1000))
    service = Service.open(spec, path)
    values = {"prompt_embeds": np.ones((3, 40), np.float32), "height": 64, "width": 64, "steps": 1, "guidance": 1.0}
    with pytest.raises(UsageError, match=r"fine_guidance 2\.0 needs negative_embeds"):
        service.draw(values | COARSE | {"fine_guidance": 2.0})
    drawn = service.draw(values | COARSE | {"fine_steps": 1})
    service.close()
    assert drawn.report["coarse"] == {"height": 32, "width": 32, "renoise": 0.7, "steps": 1, "guidance": 1.0}


@pytest.mark.parametrize("case", CASES)
def test_a_served_picture_is_the_pipelines(case: str, server: Server, pipe: Pipeline) -> None:
    given = CASES[case]
    expected = pipe.generate(PROMPT, **ASKED, **given)
    assert (expected != pipe.generate(PROMPT, **ASKED)).any()
    (embeds, negative) = pipe.encode([PROMPT, ""])
    with Client.open(server.grpc) as grpc, Client.open(server.http) as http:
        replies = [client.generate(PROMPT, **ASKED, **given) for client in (grpc, http)]
        replies.append(grpc.stream(PROMPT, shown=lambda *_: None, **ASKED, **given))
        replies.append(grpc.generate(prompt_embeds=embeds, negative_embeds=negative, **ASKED, **given))
        for reply in replies:
            np.testing.assert_array_equal(reply.pixels, expected)
            assert reply.report["positions"] == given.get("positions", pipe.bundle.manifest.profiles[0].positions)
            assert ("coarse" in reply.report) == ("coarse" in given)


def test_the_first_preview_is_the_coarse_image_enlarged(server: Server, pipe: Pipeline) -> None:
    shown: list[tuple[int, int, np.ndarray]] = []
    expected: list[tuple[int, int, np.ndarray]] = []
    coarse = Coarse(32, 48, steps=2)
    with Client.open(server.grpc) as client:
        client.stream(PROMPT, shown=lambda *step: shown.append(step), coarse=coarse, **ASKED)
    pipe.generate(PROMPT, preview=lambda *step: expected.append(step), coarse=coarse, **ASKED)
    assert [step[:2] for step in shown] == [step[:2] for step in expected] == [(2, 4), (3, 4), (4, 4)]
    for found, wanted in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(found[2], wanted[2])


def test_a_server_refuses_as_the_pipeline(server: Server, pipe: Pipeline) -> None:
    wrong: list[dict[str, Any]] = [
        {"coarse": Coarse(64, 96)},
        {"coarse": Coarse(40, 48)},
        {"coarse": Coarse(64, 32)},
        {"positions": "sideways"},
        {"base_grid": (0, 4)},
    ]
    with Client.open(server.grpc) as client:
        for given in wrong:
            with pytest.raises(UsageError) as local:
                pipe.generate(PROMPT, **ASKED, **given)
            with pytest.raises(UsageError, match=re.escape(str(local.value))):
                client.generate(PROMPT, **ASKED, **given)


def test_the_command_draws_the_local_picture_on_a_server(server: Server, bundles: Bundles, tmp_path: Path) -> None:
    asked = ("--prompt", PROMPT, "--size", "64x64", "--steps", "1", "--coarse", "32x32", "--fine-steps", "2")
    asked += (
        "--guidance",
        "2.1",
        "--fine-guidance",
        "1.7",
        "--renoise",
        "0.6",
        "--positions",
        "linear",
        "--base-grid",
        "2x2",
        "--json",
    )
    local = run_cli("generate", bundles.path(KIND), *asked, "--out", tmp_path / "local.png")
    remote = run_cli("generate", "--server", server.grpc, *asked, "--out", tmp_path / "remote.png")
    assert (local.returncode, remote.returncode) == (0, 0), local.stderr + remote.stderr
    pictures = [Image.open(tmp_path / name) for name in ("local.png", "remote.png")]
    np.testing.assert_array_equal(*(np.asarray(picture) for picture in pictures))
    facts = [json.loads(picture.text["parameters"]) for picture in pictures]
    assert facts[0] == facts[1]


@pytest.fixture
def older_server(server: Server, repository: Path) -> Iterator[Server]:
    """A server whose models lack the optional inputs of this file."""
    configs = {model: (repository / model / "config.pbtxt") for model in MODELS}
    texts = {model: path.read_text() for model, path in configs.items()}
    for model, path in configs.items():
        path.write_text(
            re.sub(rf'input \{{\n  name: "({"|".join(NEW)})"\n.*?\n\}}\n', "", texts[model], flags=re.DOTALL)
        )
        assert not server.load(model), server.log.read_text()
    yield server
    for model, path in configs.items():
        path.write_text(texts[model])
        assert not server.load(model), server.log.read_text()


def test_an_older_server_is_said_to_lack_inputs(older_server: Server, pipe: Pipeline, tmp_path: Path) -> None:
    embeds = pipe.encode([PROMPT])[0]
    negative = embeds
    for url in (older_server.grpc, older_server.http):
        with Client.open(url) as client:
            expected = pipe.generate(PROMPT, **ASKED)
            np.testing.assert_array_equal(client.generate(PROMPT, **ASKED).pixels, expected)
            with pytest.raises(UsageError, match="model `l2p` has no input `coarse_height`"):
                client.generate(PROMPT, coarse=Coarse(32, 48), **ASKED)
            with pytest.raises(UsageError, match=r"model `l2p` has no input `positions`$"):
                client.generate(PROMPT, positions="linear")
            with pytest.raises(UsageError, match=r"model `l2p_embeddings` has no input `base_grid`$"):
                client.generate(prompt_embeds=embeds, negative_embeds=negative, base_grid=(2, 2), **ASKED)
            if url == older_server.grpc:
                with pytest.raises(UsageError, match="model `l2p_stream` has no input `coarse_height`"):
                    client.stream(PROMPT, shown=lambda *_: None, coarse=Coarse(32, 48), **ASKED)
    refused = run_cli(
        *("generate", "--server", older_server.grpc, "--prompt", PROMPT, "--size", "64x64", "--coarse", "32x32"),
        *("--out", tmp_path / "x.png"),
    )
    assert refused.returncode == 2
    assert "model `l2p` has no input `coarse_height`" in refused.stderr
    assert not (tmp_path / "x.png").exists()
