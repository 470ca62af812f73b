"""A served repository that breaks: dead stubs, changed files, foreign bundles, full queues, swaps under load."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from conftest import run_cli
from fakes.engine_bundles import add_engines
from l2p_export.serving.configs import Placement
from l2p_export.serving.repository import RepositorySpec, write_repository
from l2p_runtime import HostError, Pipeline
from l2p_runtime.bundle import open_bundle
from l2p_runtime.client import Client
from l2p_runtime.client.health import ModelHealth, check_health, main
from l2p_runtime.contract import manifest_to_bytes
from l2p_runtime.progress import Silent
from tools.triton_server import STUB, STUB_NUMPY_2, Server, serve

if TYPE_CHECKING:
    from conftest import Bundles

PROMPT = "a red circle"
SMALL: dict[str, Any] = {"height": 16, "width": 16, "steps": 1}
CPU = Placement(kind="cpu")
ONE_MODEL = RepositorySpec(models=("l2p",), placement=CPU)
EXIT_SECONDS = 3


@pytest.fixture
def bundle(bundles: Bundles, tmp_path: Path) -> Path:
    """A bundle to change."""
    return Path(shutil.copytree(bundles.path("tiny-16-fused"), tmp_path / "bundle"))


@pytest.fixture
def repository(bundle: Path, tmp_path: Path) -> Path:
    """`l2p` alone."""
    write(bundle, tmp_path / "repository", ONE_MODEL)
    return tmp_path / "repository"


@pytest.fixture
def server(repository: Path, tmp_path: Path) -> Iterator[Server]:
    with _serve(repository, tmp_path) as running:
        yield running


def _serve(repository: Path, tmp_path: Path, packages: tuple[str, ...] = STUB) -> Any:
    (tmp_path / "server").mkdir()
    return serve(repository, tmp_path / "server", packages, EXIT_SECONDS)


def write(bundle: Path, root: Path, spec: RepositorySpec) -> dict[str, int]:
    return dict(write_repository(open_bundle(bundle), root, spec, Silent()).versions)


def health(server: Server) -> ModelHealth:
    (found,) = check_health(server.http)
    return found


def test_a_model_has_drawn_before_it_is_ready(server: Server) -> None:
    assert not server.load("l2p"), server.log.read_text()
    assert server.metric("l2p_requests_total", model="l2p", result="drawn") == 1
    assert server.metric("l2p_megapixels_total", model="l2p") == pytest.approx(16 * 16 / 1e6)


def test_a_killed_stub_is_seen_and_loading_again_brings_it_back(server: Server) -> None:
    assert not server.load("l2p")
    assert health(server).healthy
    (stub,) = server.stubs("l2p")
    os.kill(stub, signal.SIGKILL)
    found = health(server)
    assert not found.healthy
    assert "not healthy" in found.reason
    assert main([server.http]) == 3
    with Client.open(server.grpc) as client, pytest.raises(HostError, match="not healthy"):
        client.generate(PROMPT, **SMALL)
    server.unload("l2p")
    assert not server.load("l2p")
    assert health(server).healthy


def test_a_changed_file_is_seen(server: Server, repository: Path) -> None:
    assert not server.load("l2p")
    bundle = open_bundle(repository / "l2p" / "1" / "bundle")
    weights = bundle.path(bundle.manifest.graph("head", "fp32").weights)
    content = bytearray(weights.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 1
    weights.write_bytes(content)
    found = health(server)
    assert not found.healthy
    assert f"`graphs/{weights.name}` was changed after it was built" in found.reason
    assert str(repository) not in found.reason
    content[middle] ^= 1
    weights.write_bytes(content)
    assert health(server).healthy
    weights.unlink()
    assert "lacks" in health(server).reason


def test_a_bundle_that_was_replaced_is_seen_and_not_loaded(server: Server, repository: Path) -> None:
    assert not server.load("l2p")
    manifest = repository / "l2p" / "1" / "bundle" / "bundle.json"
    manifest.write_bytes(_with_steps(manifest.parent, 5))
    assert "was replaced after it was loaded" in health(server).reason
    server.unload("l2p")
    reason = server.load("l2p")
    assert "the bundle here is" in reason
    assert "the configuration names" in reason
    assert "the configuration names" in health(server).reason


def test_a_backend_that_cannot_run_here_says_why(bundle: Path, tmp_path: Path) -> None:
    write(bundle, tmp_path / "repository", replace(ONE_MODEL, backend="tensorrt"))
    with _serve(tmp_path / "repository", tmp_path) as server:
        reason = server.load("l2p")
        assert "cuda-bindings cannot be imported" in reason
        assert "cuda-bindings cannot be imported" in health(server).reason


def test_a_queue_that_is_full_refuses_at_once(bundle: Path, tmp_path: Path) -> None:
    write(bundle, tmp_path / "repository", replace(ONE_MODEL, placement=Placement("cpu", queue_size=1)))
    with _serve(tmp_path / "repository", tmp_path) as server:
        assert not server.load("l2p")
        with Client.open(server.grpc) as client, ThreadPoolExecutor(6) as pool:
            large: dict[str, Any] = {"height": 64, "width": 64, "steps": 2}
            futures = [pool.submit(client.generate, PROMPT, **large) for _ in range(6)]
            errors = [future.exception() for future in futures]
        refused = [error for error in errors if error is not None]
        assert refused
        assert len(refused) < 6
        assert all(isinstance(error, HostError) and "queue" in str(error) for error in refused), refused


def test_a_bundle_is_swapped_under_load_without_a_failed_request(
    server: Server, repository: Path, bundle: Path
) -> None:
    assert not server.load("l2p")
    first = open_bundle(repository / "l2p" / "1" / "bundle").digest
    expected = {}
    stop, failures, seen = threading.Event(), [], set()

    def ask(client: Client) -> None:
        while not stop.is_set():
            try:
                reply = client.generate(PROMPT, height=16, width=16)
            except Exception as error:  # noqa: BLE001 - any is what is looked for
                failures.append(error)
                return
            seen.add((reply.report["bundle"], reply.report["steps"], reply.pixels.tobytes()))

    with Client.open(server.grpc) as client:
        threads = [threading.Thread(target=ask, args=(client,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        _wait(lambda: len(seen) >= 1)
        (bundle / "bundle.json").write_bytes(_with_steps(bundle, 3))
        second = open_bundle(bundle).digest
        assert write(bundle, repository, ONE_MODEL) == {"l2p": 2}
        assert not server.load("l2p"), server.log.read_text()
        _wait(lambda: any(digest == second for digest, _, _ in seen))
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert health(server).bundle == second
    with Pipeline.open(bundle, backend="onnx") as pipe:
        for steps in (2, 3):
            expected[steps] = pipe.generate(PROMPT, height=16, width=16, steps=steps).tobytes()
    assert seen == {(first, 2, expected[2]), (second, 3, expected[3])}


def test_networks_are_refused_for_the_missing_backend_alone(bundle: Path, tmp_path: Path) -> None:
    add_engines(bundle, "fp32", target="tensorrt11.0-sm90", version="11.0.0.1")
    root = tmp_path / "repository"
    versions = write(bundle, root, RepositorySpec(models=("networks",)))
    assert len(versions) == 5
    linted = run_cli("triton", "lint", root)
    assert linted.returncode == 0, linted.stdout
    with _serve(root, tmp_path) as server:
        for model in versions:
            assert "unable to find backend library for backend 'tensorrt'" in server.load(model)


@pytest.mark.slow
def test_numpy_2_serves_embeddings_and_says_why_it_cannot_read_texts(bundle: Path, tmp_path: Path) -> None:
    write(bundle, tmp_path / "repository", RepositorySpec(placement=CPU))
    with Pipeline.open(bundle, backend="onnx") as pipe:
        embeds = pipe.encode([PROMPT])[0]
        expected = pipe.generate(prompt_embeds=embeds, seed=7, **SMALL)
    with _serve(tmp_path / "repository", tmp_path, STUB_NUMPY_2) as server:
        assert not server.load("l2p_embeddings"), server.log.read_text()
        assert "cannot read texts with NumPy 2" in server.load("l2p")
        for options in ({"shared_memory": True}, {"shared_memory": False}):
            with Client.open(server.grpc, **options) as client:
                reply = client.generate(prompt_embeds=embeds, seed=7, **SMALL)
                np.testing.assert_array_equal(reply.pixels, expected)


def _with_steps(bundle: Path, steps: int) -> bytes:
    """A bundle's manifest with other sampling defaults: another bundle of the same files."""
    manifest = open_bundle(bundle).manifest
    return manifest_to_bytes(replace(manifest, sampling=replace(manifest.sampling, steps=steps)))


def _wait(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
