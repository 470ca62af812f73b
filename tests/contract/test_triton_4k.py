"""The trained 4k demo on a real Triton server: at 4096x4096 the pipeline's bytes come back on every way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import run_cli
from l2p_runtime import Pipeline
from l2p_runtime.client import Client
from tools.triton_server import serve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PROMPT = "a red circle to the left of a blue square"
ASKED: dict[str, Any] = {"height": 4096, "width": 4096, "seed": 7, "steps": 1, "guidance": 1.0}


def test_the_largest_image_has_the_pipelines_bytes(tmp_path: Path) -> None:
    bundle, repository = tmp_path / "demo.bundle", tmp_path / "repository"
    for command in (("build", "--profile", "4k"), ("triton", bundle, "--kind", "cpu")):
        made = run_cli(*command, "--out", repository if command[0] == "triton" else bundle)
        assert made.returncode == 0, made.stderr
    with Pipeline.open(bundle, backend="onnx") as pipe:
        expected = pipe.generate(PROMPT, **ASKED)
    with serve(repository, tmp_path) as server:
        assert not server.load("l2p"), server.log.read_text()
        for url, shared in ((server.http, False), (server.grpc, False), (server.grpc, True)):
            with Client.open(url, shared_memory=shared) as client:
                np.testing.assert_array_equal(client.generate(PROMPT, **ASKED).pixels, expected)
