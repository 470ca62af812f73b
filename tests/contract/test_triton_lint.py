"""Every rule of the lint against a real server: what lint refuses, a server refuses or serves wrongly, and the reverse.

The verdicts of all variations are recorded; the server is asked about the quick ones in every run, about all of them by
`make test-slow`.
"""

from __future__ import annotations

import json
import os
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from conftest import run_cli
from contract.variations import MACHINE, REFUSES, SERVES, UNASKED, VARIATIONS, WRONG, Verdict
from l2p_export.serving.lint import Finding, lint_repository
from l2p_runtime import Coarse
from l2p_runtime.client import Client
from l2p_runtime.client.health import check_health
from tools.triton_server import Server, serve

if TYPE_CHECKING:
    from conftest import Bundles

QUICK = (
    "as written",
    "no name",
    "no count",
    "unknown backend",
    "empty model.py",
    "broken model.py",
    "cache of a stream",
    "batches",
    "unknown plan",
    "model.py above",
)
REPORTED = {SERVES: False, MACHINE: False, REFUSES: True, UNASKED: True, WRONG: True}
SMALL: dict[str, Any] = {"height": 16, "width": 16, "steps": 1}
LOAD_SECONDS = 8
ANSWER_SECONDS = 5


@pytest.fixture(scope="module")
def base(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the written repository, and an empty one to vary."""
    root = tmp_path_factory.mktemp("variations")
    asked = ("--out", root / "written", "--kind", "cpu", "--max-pixels", "4096")
    result = run_cli("triton", bundles.path("tiny-16-fused"), *asked)
    assert result.returncode == 0, result.stderr
    (root / "repository").mkdir()
    return root


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Gives a server on the repository; `again=True` gives another one, the old one being stuck."""
    with ExitStack() as stack:
        running: list[Server] = []

        def give(*, again: bool = False) -> Server:
            if again or not running or running[-1].process.poll() is not None:
                if running:
                    running[-1].process.kill()
                    stack.close()
                work = tmp_path_factory.mktemp("server")
                running.append(stack.enter_context(serve(base / "repository", work, exit_seconds=3, cache=True)))
            return running[-1]

        yield give


@pytest.fixture
def repository(base: Path, case: str) -> Path:
    """A repository with one variation of one model."""
    variation, root = VARIATIONS[case], base / "repository"
    for entry in root.iterdir():
        shutil.rmtree(entry)

    def copy(source: str, target: str) -> None:
        (os.link if "/bundle/" in source else shutil.copy2)(source, target)

    shutil.copytree(base / "written" / variation.model, root / variation.model, copy_function=copy)
    variation.change(root / variation.model)
    return root


@pytest.mark.parametrize("case", VARIATIONS)
def test_lint_says_what_the_server_says(case: str, repository: Path) -> None:
    variation, found = VARIATIONS[case], lint_repository(repository)
    assert bool(found) == REPORTED[variation.verdict], found
    assert variation.needle in "\n".join(f"{finding.place}: {finding.text}" for finding in found)


CASES = [
    pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow)
    for case, variation in VARIATIONS.items()
    if variation.verdict is not UNASKED
]


@pytest.mark.parametrize("case", CASES)
def test_the_server_says_it(case: str, repository: Path, server: Callable[..., Server]) -> None:
    variation, running = VARIATIONS[case], server()
    verdict, reason = _verdict(running, variation.model, repository / variation.model)
    if verdict is WRONG or not _unloaded(running, variation.model):
        server(again=True)
    assert verdict == (REFUSES if variation.verdict is MACHINE else variation.verdict), reason


@pytest.mark.slow
def test_a_folder_that_is_no_model_stops_a_server_that_loads_all(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "written" / "l2p", tmp_path / "r" / "l2p")
    (tmp_path / "r" / "README.md").touch()
    (tmp_path / "server").mkdir()
    with serve(tmp_path / "r", tmp_path / "server", control="none") as running:
        assert _complaints(running, "l2p") == []
    assert lint_repository(tmp_path / "r") == []
    for name in (".git", "lost+found"):
        (tmp_path / "r" / name).mkdir()
        with pytest.raises(AssertionError, match="Poll failed"), serve(tmp_path / "r", tmp_path / name, control="none"):
            pass
        (finding,) = lint_repository(tmp_path / "r")
        assert finding.model == name
        (tmp_path / "r" / name).rmdir()


FOREIGN = 'input { name: "a" data_type: TYPE_FP32 dims: 1 }\noutput { name: "b" data_type: TYPE_FP32 dims: 1 }\n'
OWN = "class TritonPythonModel:\n    def execute(self, requests):\n        return []\n"


@pytest.mark.parametrize(
    ("config", "needle"),
    [
        ('backend: "python"', ""),
        (f'backend: "python"\n{FOREIGN}', ""),
        ('backend: "our_own"', ""),
        ('backend: "pyton"', "did you mean `python`?"),
        ('platform: "onnxruntime"', "platform: is `onnxruntime`"),
        (f'backend: "onnxruntime"\n{FOREIGN}', "1/model.onnx: is missing"),
        ('platform: "ensemble"', "ensemble_scheduling: is missing"),
    ],
)
def test_models_of_others_are_held_to_the_servers_rules(config: str, needle: str, tmp_path: Path) -> None:
    (tmp_path / "other" / "1").mkdir(parents=True)
    (tmp_path / "other" / "config.pbtxt").write_text(config)
    (tmp_path / "other" / "1" / "model.py").write_text(OWN)
    found = lint_repository(tmp_path)
    assert bool(found) == bool(needle), found
    assert needle in "\n".join(_said(finding) for finding in found)


def _said(finding: Finding) -> str:
    return f"{finding.place}: {finding.text}"


def _verdict(server: Server, model: str, folder: Path) -> tuple[Verdict, str]:
    drawn = server.metric("l2p_requests_total", model=model, result="drawn")
    reason = server.load(model, LOAD_SECONDS)
    if reason:
        return REFUSES, reason
    found = []
    if "model_warmup" in (folder / "config.pbtxt").read_text(errors="replace"):
        found += [] if server.metric("l2p_requests_total", model=model, result="drawn") > drawn else ["no warm-up"]
    found += _complaints(server, model)
    return (WRONG, "; ".join(found)) if found else (SERVES, "")


def _complaints(server: Server, model: str) -> list[str]:
    """What a loaded model does not do as it states, or as docs/serving.md says."""
    found = []
    checks = (
        (_health, _client, _settings, _stream_outputs)
        if model == "l2p_stream"
        else (_health, _client, _settings, _outputs, _leftovers)
    )
    for check in checks:
        try:
            check(server, model)
        except Exception as error:  # noqa: BLE001 - whatever a user would see
            found.append(f"{check.__name__}: {type(error).__name__}: {error}"[:300])
    return found


def _health(server: Server, model: str) -> None:
    (found,) = check_health(server.http, timeout_s=ANSWER_SECONDS, models=(model,))
    assert found.healthy, found.reason


def _client(server: Server, model: str) -> None:
    previews: list[Any] = []
    for url in (server.grpc, *([] if model == "l2p_stream" else [server.http])):
        with Client.open(url, timeout_s=ANSWER_SECONDS) as client:
            if model == "l2p_stream":
                reply = client.stream("x", shown=lambda *shown: previews.append(shown[-1].shape), **SMALL)
                assert previews == [(16, 16, 3)]
            elif model == "l2p":
                reply = client.generate("x", negative_prompt="y", guidance=2.0, **SMALL)
            else:
                embeds = np.ones((1, 40), np.float32)
                reply = client.generate(prompt_embeds=embeds, negative_embeds=embeds, guidance=2.0, **SMALL)
            assert reply.pixels.shape == (16, 16, 3)


def _settings(server: Server, model: str) -> None:
    """Every optional setting at once."""
    asked: dict[str, Any] = {"height": 32, "width": 32, "seed": 1, "steps": 1, "guidance": 1.0}
    asked |= {"coarse": Coarse(16, 16, steps=1), "positions": "native", "base_grid": (2, 2)}
    with Client.open(server.grpc, timeout_s=ANSWER_SECONDS) as client:
        if model == "l2p_stream":
            reply = client.stream("x", shown=lambda *_: None, **asked)
        elif model == "l2p":
            reply = client.generate("x", **asked)
        else:
            reply = client.generate(prompt_embeds=np.ones((1, 40), np.float32), **asked)
        assert reply.pixels.shape == (32, 32, 3)


def _outputs(server: Server, model: str) -> None:
    """Every output that the server names comes as it is described, pixels or PNG file."""
    described = {tensor["name"]: tensor for tensor in _get(server, f"/v2/models/{model}")["outputs"]}
    for png in (False, True):
        answer = {tensor["name"]: tensor for tensor in _infer(server, model, png=png, steps=1, width=16)["outputs"]}
        assert answer.keys() == (described.keys() | {"image_png" if png else "image"}) - {
            "image" if png else "image_png"
        }
        for name, tensor in answer.items():
            shape = described[name]["shape"]
            assert tensor["datatype"] == described[name]["datatype"], name
            assert len(shape) == len(tensor["shape"]), name
            assert all(a in (-1, b) for a, b in zip(shape, tensor["shape"], strict=True)), name


def _stream_outputs(server: Server, model: str) -> None:
    """Every output that the server names is one of docs/serving.md."""
    described = {tensor["name"] for tensor in _get(server, f"/v2/models/{model}")["outputs"]}
    assert described == {"image", "image_png", "report", "preview", "preview_png", "step"}


def _leftovers(server: Server, model: str) -> None:
    """Whatever is optional may be left out, and then has the default that the configuration states."""
    if model == "l2p":
        answer = {tensor["name"]: tensor["data"] for tensor in _infer(server, model)["outputs"]}
        stated = _get(server, f"/v2/models/{model}/config")["parameters"]
        report = json.loads(bytes(answer["report"]))
        for name in ("height", "width", "steps"):
            assert str(report[name]) == stated[f"default_{name}"]["string_value"]


def _infer(server: Server, model: str, *, png: bool = False, **numbers: int) -> Any:
    first = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["x"]}
    if model == "l2p_embeddings":
        first = {"name": "prompt_embeds", "datatype": "FP32", "shape": [1, 40], "data": [1.0] * 40}
    rest = [{"name": name, "datatype": "INT32", "shape": [1], "data": [value]} for name, value in numbers.items()]
    status, body = server.post(
        f"/v2/models/{model}/infer", {"parameters": {"png": png}, "inputs": [first, *rest]}, ANSWER_SECONDS
    )
    assert status == 200, body
    return json.loads(body)


def _get(server: Server, path: str) -> Any:
    with urllib.request.urlopen(server.http + path, timeout=ANSWER_SECONDS) as reply:
        return json.loads(reply.read())


def _unloaded(server: Server, model: str) -> bool:
    """Unload a model; false if it stays."""
    server.post(f"/v2/repository/models/{model}/unload", {})
    return all(entry.get("state") in (None, "UNAVAILABLE") for entry in server.index())
