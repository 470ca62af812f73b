"""A written repository on a real Triton server: the same pixels on every way, refusals, streams, load."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import run_cli
from l2p_runtime import CancelledError, HostError, Pipeline, UsageError
from l2p_runtime.client import Client
from l2p_runtime.client.health import check_health
from tools.triton_server import Server, serve

if TYPE_CHECKING:
    from conftest import Bundles

MODELS = ("l2p", "l2p_stream", "l2p_embeddings")
MAX_PIXELS, MAX_STEPS = 1024 * 576, 8
SIZES = [(48, 32), (32, 80)]
LARGE = [pytest.param(256, 256, marks=pytest.mark.slow), pytest.param(576, 1024, marks=pytest.mark.slow)]
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def repository(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("triton") / "repository"
    limits = ("--max-pixels", str(MAX_PIXELS), "--max-steps", str(MAX_STEPS), "--queue-size", "1000")
    written = run_cli("triton", bundles.path("tiny-16-fused"), "--out", root, "--kind", "cpu", *limits)
    assert written.returncode == 0, written.stderr
    return root


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(repository, tmp_path_factory.mktemp("server")) as running:
        for model in MODELS:
            assert not running.load(model), running.log.read_text()
        yield running


@pytest.fixture(scope="module")
def pipe(bundles: Bundles) -> Iterator[Pipeline]:
    with Pipeline.open(bundles.path("tiny-16-fused"), backend="onnx") as opened:
        yield opened


@pytest.fixture(params=["http", "grpc", "shared memory"])
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[Client]:
    url = server.http if request.param == "http" else server.grpc
    shared = request.param == "shared memory"
    with Client.open(url, shared_memory=shared) as opened:
        assert opened.shares_memory == shared
        yield opened


@pytest.fixture(scope="module")
def fast(server: Server) -> Iterator[Client]:
    with Client.open(server.grpc) as opened:
        assert opened.shares_memory
        yield opened


@pytest.mark.parametrize(("height", "width"), [*SIZES, *LARGE])
def test_an_image_has_the_pipelines_bytes(height: int, width: int, client: Client, pipe: Pipeline) -> None:
    asked: dict[str, Any] = {"height": height, "width": width, "seed": 2**64 - 1, "steps": 2, "guidance": 2.5}
    reply = client.generate(PROMPT, negative_prompt="blue", **asked)
    expected = pipe.generate(PROMPT, negative_prompt="blue", **asked)
    np.testing.assert_array_equal(reply.pixels, expected)
    said = {name: reply.report[name] for name in ("height", "width", "seed", "steps", "guidance", "plan")}
    assert said == {**asked, "plan": "fp32"}


def test_an_image_from_embeddings_has_the_pipelines_bytes(fast: Client, pipe: Pipeline) -> None:
    embeds, negative = pipe.encode([PROMPT, "blue"])
    asked: dict[str, Any] = {"height": 32, "width": 48, "seed": 3, "steps": 2, "guidance": 3.0}
    reply = fast.generate(prompt_embeds=embeds, negative_embeds=negative, **asked)
    expected = pipe.generate(prompt_embeds=embeds, negative_embeds=negative, **asked)
    np.testing.assert_array_equal(reply.pixels, expected)


def test_what_is_left_out_has_the_bundles_defaults(fast: Client, pipe: Pipeline) -> None:
    profile, sampling = pipe.bundle.manifest.profiles[0], pipe.bundle.manifest.sampling
    reply = fast.generate(PROMPT)
    assert reply.pixels.shape == (profile.height_px.opt, profile.width_px.opt, 3)
    assert (reply.report["steps"], reply.report["guidance"]) == (sampling.steps, sampling.guidance)
    assert reply.report["seed"] == 0


def test_a_stream_shows_every_step_and_ends_with_the_image(fast: Client, pipe: Pipeline) -> None:
    asked: dict[str, Any] = {"height": 32, "width": 48, "seed": 5, "steps": 3}
    shown: list[tuple[int, int, np.ndarray]] = []
    reply = fast.stream(PROMPT, shown=lambda step, steps, pixels: shown.append((step, steps, pixels)), **asked)
    expected: list[np.ndarray] = []
    image = pipe.generate(PROMPT, preview=lambda step, steps, pixels: expected.append(pixels), **asked)
    np.testing.assert_array_equal(reply.pixels, image)
    assert [step[:2] for step in shown] == [(1, 3), (2, 3), (3, 3)]
    for (_, _, found), wanted in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert not np.array_equal(shown[0][2], image)
    np.testing.assert_array_equal(shown[2][2], image)


def test_a_stream_that_is_cancelled_stops_the_drawing(server: Server, fast: Client) -> None:
    before = server.metric("l2p_requests_total", model="l2p_stream", result="cancelled")
    shown: list[int] = []
    asked: dict[str, Any] = {"height": 128, "width": 128, "steps": MAX_STEPS}
    with pytest.raises(CancelledError):
        fast.stream(PROMPT, shown=lambda step, *_: shown.append(step), cancelled=lambda: bool(shown), **asked)
    assert len(shown) < MAX_STEPS
    end = time.monotonic() + 20
    while server.metric("l2p_requests_total", model="l2p_stream", result="cancelled") == before:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert fast.stream(PROMPT, shown=lambda *_: None, height=16, width=16).pixels.shape == (16, 16, 3)


def test_a_stream_needs_grpc(server: Server) -> None:
    with Client.open(server.http) as client, pytest.raises(UsageError, match="need gRPC"):
        client.stream(PROMPT, shown=lambda *_: None)


def test_every_model_is_healthy_and_says_of_which_bundle(server: Server) -> None:
    found = check_health(server.http)
    assert {model.model for model in found} == set(MODELS)
    assert all(model.healthy for model in found), found
    status, body = server.post("/v2/models/l2p/infer", _body(outputs=["report"]))
    assert status == 200, body
    report = json.loads(bytes(json.loads(body)["outputs"][0]["data"]))
    assert {model.bundle for model in found} == {report["bundle"]}


def test_health_goes_before_the_images_that_wait(server: Server, fast: Client) -> None:
    with ThreadPoolExecutor(5) as pool:
        images = [pool.submit(fast.generate, PROMPT, height=96, width=96, steps=2) for _ in range(5)]
        while not server.metric("nv_inference_pending_request_count", model="l2p"):
            time.sleep(0.01)
        (found,) = check_health(server.http, models=["l2p"])
        assert found.healthy
        assert not all(image.done() for image in images)


def test_a_caller_that_gives_up_stops_the_drawing(server: Server) -> None:
    before = server.metric("l2p_requests_total", model="l2p", result="cancelled")
    with Client.open(server.grpc, timeout_s=0.3) as client, pytest.raises(HostError, match="no image in time"):
        client.generate(PROMPT, height=128, width=128, steps=MAX_STEPS)
    end = time.monotonic() + 20
    while server.metric("l2p_requests_total", model="l2p", result="cancelled") == before:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_request_that_waits_longer_than_it_says_is_unavailable(server: Server, fast: Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        image = pool.submit(fast.generate, PROMPT, height=96, width=96, steps=2)
        time.sleep(0.1)
        status, body = server.post("/v2/models/l2p/infer", _body() | {"parameters": {"timeout": 1000}})
        image.result()
    assert (status, json.loads(body)["error"]) == (503, "Request timeout expired")


def test_counters_say_what_was_done(server: Server, fast: Client) -> None:
    def counted() -> list[float]:
        return [
            server.metric("l2p_requests_total", model="l2p", result="drawn"),
            server.metric("l2p_requests_total", model="l2p", result="refused"),
            server.metric("l2p_megapixels_total", model="l2p"),
            server.metric("l2p_stage_seconds_total", model="l2p", stage="draw"),
        ]

    before = counted()
    seconds = fast.generate(PROMPT, height=16, width=32, steps=1).report["seconds"]
    with pytest.raises(UsageError):
        fast.generate(PROMPT, height=17, width=32)
    drawn, refused, megapixels, draw = np.subtract(counted(), before)
    assert (drawn, refused) == (1, 1)
    assert megapixels == pytest.approx(16 * 32 / 1e6)
    assert draw == pytest.approx(seconds["draw"])


def _body(outputs: list[str] | None = None, **inputs: Any) -> dict[str, Any]:
    """A small request over HTTP with some inputs replaced, by (shape, type, data)."""
    given_inputs: dict[str, Any] = {
        "prompt": ([1], "BYTES", [PROMPT]),
        "height": ([1], "INT32", [16]),
        "width": ([1], "INT32", [16]),
        "steps": ([1], "INT32", [1]),
        **inputs,
    }
    sent = [
        {"name": name, "shape": value[0], "datatype": value[1], "data": value[2]}
        for name, value in given_inputs.items()
        if value is not None
    ]
    wanted = {"outputs": [{"name": name} for name in outputs]} if outputs is not None else {}
    return {"inputs": sent, **wanted}


ONE = [1]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"height": ([1, 1], "INT32", [16])}, "unexpected shape for input 'height'"),
    "fixed size": ({"height": ([2], "INT32", [16, 16])}, "unexpected shape for input 'height'"),
    "dtype": ({"height": (ONE, "FP32", [16.0])}, "'height'"),
    "missing": ({"prompt": None}, "prompt"),
    "unknown input": ({"colour": (ONE, "BYTES", ["red"])}, "colour"),
    "does not divide": ({"height": (ONE, "INT32", [63])}, "size 16x63 does not divide by 16 px"),
    "negative": ({"height": (ONE, "INT32", [-16])}, "height is -16 px, expected 16 to"),
    "zero": ({"width": (ONE, "INT32", [0])}, "width is 0 px, expected 16 to"),
    "absurd": ({"height": (ONE, "INT32", [10**6]), "width": (ONE, "INT32", [10**6])}, "height is 1000000 px"),
    "pixel cap": (
        {"height": (ONE, "INT32", [1024]), "width": (ONE, "INT32", [1024])},
        "1024x1024 has 1,048,576 pixels, this server draws up to 589,824",
    ),
    "no steps": ({"steps": (ONE, "INT32", [0])}, "steps is 0, expected 1 to 1000"),
    "steps": ({"steps": (ONE, "INT32", [MAX_STEPS + 1])}, "steps is 9, this server takes up to 8"),
    "guidance": ({"guidance": (ONE, "FP32", [-1.0])}, "guidance is -1.0, expected 0 to 100"),
    "long prompt": ({"prompt": (ONE, "BYTES", ["a" * 20_000])}, "the prompt has 20,000 bytes, this server takes up to"),
    "many tokens": ({"prompt": (ONE, "BYTES", ["a b " * 2000])}, "tokens with its template, expected up to"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_request_is_refused_in_words(case: str, server: Server, repository: Path) -> None:
    inputs, needle = REFUSED[case]
    status, body = server.post("/v2/models/l2p/infer", _body(**inputs))
    text = json.loads(body)["error"]
    assert status == 400, text
    assert needle in text
    assert str(repository) not in text
    assert ".py" not in text


def test_unknown_names_are_refused(server: Server) -> None:
    status, body = server.post("/v2/models/l2p/infer", _body(outputs=["picture"]))
    assert (status, "picture" in body.decode()) == (400, True)
    assert server.post("/v2/models/l2q/infer", _body())[0] == 404
    assert server.post("/v2/models/l2p/versions/99/infer", _body())[0] == 404
    assert server.post("/v2/models/l2p_stream/infer", _body())[0] >= 400
    assert server.post("/v2/models/l2p/infer", b"{ no json")[0] >= 400


NOT_FINITE = np.ones((3, 40), np.float32)
NOT_FINITE[1, 1] = np.inf
EMBEDS: dict[str, tuple[np.ndarray, str]] = {
    "NaN": (NOT_FINITE * np.nan, "prompt_embeds holds NaN or Inf"),
    "Inf": (NOT_FINITE, "prompt_embeds holds NaN or Inf"),
    "no tokens": (np.ones((0, 40), np.float32), "0 tokens"),
    "too many tokens": (np.ones((513, 40), np.float32), "513 tokens, expected 1 to 512"),
    "width": (np.ones((3, 41), np.float32), "unexpected shape for input 'prompt_embeds'"),
}


@pytest.mark.parametrize("case", EMBEDS)
def test_wrong_embeddings_are_refused(case: str, fast: Client) -> None:
    embeds, needle = EMBEDS[case]
    with pytest.raises(UsageError, match=needle):
        fast.generate(prompt_embeds=embeds, height=16, width=16, steps=1)


def test_guidance_that_is_not_finite_is_refused(fast: Client) -> None:
    for value in (np.nan, np.inf):
        with pytest.raises(UsageError, match=f"guidance is {value}"):
            fast.generate(PROMPT, height=16, width=16, guidance=float(value))


def test_what_does_not_fit_the_wire_is_refused_by_the_client(fast: Client) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: fast.generate(PROMPT, seed=2**64),
        lambda: fast.generate(PROMPT, seed=-1),
        lambda: fast.generate(PROMPT, height=2**31, width=16),
        lambda: fast.generate("\ud800"),
        fast.generate,
        lambda: fast.generate(PROMPT, prompt_embeds=np.ones((1, 40), np.float32)),
        lambda: Client.open("ftp://localhost:1"),
        lambda: Client.open("grpc://example.org:1", shared_memory=True),
    ]
    for call in calls:
        with pytest.raises(UsageError):
            call()
    with pytest.raises(HostError, match="no server answers"):
        Client.open("http://127.0.0.1:1")


@pytest.mark.parametrize("count", [100, pytest.param(400, marks=pytest.mark.slow)])
def test_of_mixed_requests_from_sixteen_threads_none_is_lost(count: int, server: Server, pipe: Pipeline) -> None:
    expected = {seed: pipe.generate(PROMPT, height=16, width=16, steps=1, seed=seed) for seed in range(4)}
    embeds = pipe.encode([PROMPT])[0]
    clients = [Client.open(server.grpc), Client.open(server.grpc, shared_memory=False), Client.open(server.http)]

    def ask(number: int) -> str:
        client, seed = clients[number % 3], number % 4
        small: dict[str, Any] = {"height": 16, "width": 16, "steps": 1, "seed": seed}
        kind = number % 5
        if kind == 0:
            with pytest.raises(UsageError, match="does not divide"):
                client.generate(PROMPT, **small | {"height": 24})
            return "refused"
        if kind == 1:
            with pytest.raises(UsageError, match="NaN"):
                client.generate(prompt_embeds=embeds * np.float32("nan"), **small)
            return "refused"
        if kind == 2:
            reply = client.generate(prompt_embeds=embeds, **small)
        elif kind == 3 and client is not clients[2]:
            reply = client.stream(PROMPT, shown=lambda *_: None, **small)
        else:
            reply = client.generate(PROMPT, **small)
        np.testing.assert_array_equal(reply.pixels, expected[seed])
        return "drawn"

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(count)))
    for client in clients:
        client.close()
    assert (answers.count("drawn"), answers.count("refused")) == (count * 3 // 5, count * 2 // 5)


SMALL_PX = st.sampled_from([16, 32])
FIELDS = {
    "prompt": (np.object_, st.text(max_size=40).map(str.encode) | st.binary(max_size=40)),
    "negative_prompt": (np.object_, st.none() | st.just(b"blue") | st.binary(max_size=10)),
    "height": (np.int32, SMALL_PX | st.none() | SMALL_PX | st.integers(-(2**31), 2**31 - 1)),
    "width": (np.int32, SMALL_PX | SMALL_PX | SMALL_PX | st.integers(-(2**31), 2**31 - 1)),
    "seed": (np.uint64, st.none() | st.integers(0, 2**64 - 1)),
    "steps": (np.int32, st.just(1) | st.just(2) | st.integers(-(2**31), 0) | st.integers(MAX_STEPS + 1, 2**31 - 1)),
    "guidance": (np.float32, st.none() | st.just(1.0) | st.floats(0, 100, width=32) | st.floats(width=32)),
}
OTHER_DTYPES = [np.int32, np.int64, np.uint8, np.float32, np.float64, np.bool_]


def _fuzz(examples: int, server: Server, repository: Path) -> Counter[str]:
    """Ask with fields of all kinds; how often the server drew and refused."""
    import tritonclient.grpc as library
    from tritonclient.utils import InferenceServerException, np_to_triton_dtype

    outcomes: Counter[str] = Counter()

    @settings(max_examples=examples, deadline=None)
    @given(data=st.data())
    def ask(data: st.DataObject) -> None:
        inputs: dict[str, np.ndarray] = {}
        for name, (dtype, values) in FIELDS.items():
            value = data.draw(values, label=name)
            if value is not None:
                inputs[name] = np.array([value], dtype)
        if data.draw(st.integers(0, 4), label="odd") == 4:
            name = data.draw(st.sampled_from([*FIELDS, "positions", "base_grid", "coarse_width", "renoise", "picture"]))
            shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
            inputs[name] = np.zeros(shape, data.draw(st.sampled_from(OTHER_DTYPES)))
        sent = []
        for name, array in inputs.items():
            sent.append(library.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
            sent[-1].set_data_from_numpy(array)
        try:
            result = client.infer("l2p", sent)
        except InferenceServerException as error:
            refusal = error
        else:
            assert result.as_numpy("image").shape[2] == 3
            outcomes["drawn"] += 1
            return
        assert refusal.status() == "StatusCode.INVALID_ARGUMENT", refusal
        assert str(repository) not in str(refusal)
        assert ".py" not in str(refusal)
        outcomes["refused"] += 1

    with library.InferenceServerClient(server.grpc.removeprefix("grpc://")) as client:
        ask()
    return outcomes


@pytest.mark.parametrize("examples", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_fuzz_request_fields(examples: int, server: Server, repository: Path) -> None:
    outcomes = _fuzz(examples, server, repository)
    assert min(outcomes["drawn"], outcomes["refused"]) >= 3, outcomes
    assert check_health(server.http, models=["l2p"])[0].healthy


def test_generate_on_a_server_writes_the_local_picture(server: Server, bundles: Bundles, tmp_path: Path) -> None:
    asked = ("--prompt", PROMPT, "--size", "32x16", "--seed", "9", "--steps", "2")
    local = run_cli("generate", bundles.path("tiny-16-fused"), *asked, "--out", tmp_path / "local.png")
    assert local.returncode == 0, local.stderr
    for url in (server.http, server.grpc):
        out = tmp_path / "remote.png"
        remote = run_cli("generate", "--server", url, *asked, "--out", out, "--json")
        assert remote.returncode == 0, remote.stderr
        assert json.loads(remote.stdout)["steps"] == 2
        assert _pixels(out) == _pixels(tmp_path / "local.png")


def test_generate_on_a_server_refuses_with_the_right_code(server: Server, tmp_path: Path) -> None:
    out = ("--prompt", PROMPT, "--out", tmp_path / "x.png")
    assert run_cli("generate", "--server", server.http, *out, "--size", "33x16").returncode == 2
    assert run_cli("generate", "--server", server.http, *out, "--plan", "fp16").returncode == 2
    assert run_cli("generate", "--server", "http://127.0.0.1:1", *out).returncode == 3
    assert run_cli("generate", *out).returncode == 2
    assert not (tmp_path / "x.png").exists()


def test_health_at_the_command_line(server: Server) -> None:
    found = run_cli("triton", "health", server.http)
    assert found.returncode == 0, found.stdout
    assert found.stdout.count("ready") == 3
    assert run_cli("triton", "health", server.http, "--model", "absent").returncode == 3
    assert run_cli("triton", "health", "http://127.0.0.1:1").returncode == 3


def test_threads_share_a_client_that_keeps_its_memory(fast: Client) -> None:
    replies: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: replies.append(fast.generate(PROMPT, height=16, width=16, steps=1).pixels))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(replies) == 4
    assert all(np.array_equal(replies[0], pixels) for pixels in replies)


def _pixels(path: Path) -> bytes:
    """The image data of a PNG file, as it is compressed."""
    data, found, place = path.read_bytes(), b"", 8
    while place < len(data):
        size, kind = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        found += data[place + 8 : place + 8 + size] if kind == b"IDAT" else b""
        place += 12 + size
    return found
