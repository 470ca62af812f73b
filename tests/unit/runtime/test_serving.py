from __future__ import annotations

import base64
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from l2p_runtime import ArtifactError, CancelledError, HostError, InternalError, UsageError
from l2p_runtime.client.transport import Address, parse_address, to_l2p_error
from l2p_runtime.images.png import encode_png
from l2p_runtime.serving import Service, picture_text, png_base64, small_preview


@pytest.fixture
def service(tmp_path: Any) -> Service:
    """A service that only has a bundle's place."""
    made = Service.__new__(Service)
    made._pipe = SimpleNamespace(bundle=SimpleNamespace(root=tmp_path / "models" / "bundle", store=None))  # type: ignore[assignment]
    return made


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            UsageError("size 3x3 does not divide", hint="use 16x16"),
            "INVALID_ARG",
            "size 3x3 does not divide (use 16x16)",
        ),
        (CancelledError("drawing was cancelled"), "CANCELLED", "drawing was cancelled"),
        (HostError("out of memory", hint="raise the budget"), "UNAVAILABLE", "out of memory"),
        (MemoryError("Unable to allocate 2.73 TiB"), "UNAVAILABLE", "this server is out of memory"),
        (ValueError("in /opt/secret.py"), "INTERNAL", "this server failed in a way that it does not know"),
        (InternalError("in /opt/secret.py"), "INTERNAL", "this server failed in a way that it does not know"),
    ],
)
def test_what_a_caller_is_told(error: Exception, code: str, words: str, service: Service) -> None:
    found, text = service.describe(error)
    assert found == code
    assert text.startswith(words)
    assert "secret" not in text
    assert "budget" not in text


def test_a_caller_is_told_no_path(service: Service) -> None:
    root = service._pipe.bundle.root
    _, text = service.describe(ArtifactError(f"`{root}/graphs/head.onnx` is damaged, and `{root}` too"))
    assert text == "`graphs/head.onnx` is damaged, and `bundle` too"


def test_a_caller_is_told_no_options_of_the_command_line(service: Service) -> None:
    assert service.describe(UsageError("too long", hint="cut it with --truncate-prompt"))[1] == "too long"


def test_pixels_become_a_file_that_json_can_carry() -> None:
    pixels = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    assert base64.b64decode(png_base64(pixels, {"seed": "7"})) == encode_png(pixels, {"seed": "7"}, level=1)
    half = np.array([[[0, 0.5, 1]]], np.float16)
    whole = np.array([[[0, 32768, 65535]]], np.uint16)
    assert base64.b64decode(png_base64(half, {})) == encode_png(whole, {}, level=1)


def test_a_picture_says_how_it_was_drawn() -> None:
    names = ("steps", "guidance", "shift", "positions", "plan", "bundle", "trained")
    text = picture_text({"seed": 7, "seconds": {}, **dict.fromkeys(names, "x")}, "a red circle", None)
    assert (text["prompt"], text["negative_prompt"], text["seed"]) == ("a red circle", "", "7")
    assert json.loads(text["parameters"]) == {"seed": 7, **dict.fromkeys(names, "x"), "rng": "philox"}


def test_previews_are_small_and_of_uint8() -> None:
    pixels = np.arange(100 * 60 * 3, dtype=np.uint8).reshape(100, 60, 3)
    assert small_preview(pixels, 100) is not pixels
    np.testing.assert_array_equal(small_preview(pixels, 100), pixels)
    np.testing.assert_array_equal(small_preview(pixels, 50), pixels[::2, ::2])
    assert small_preview(pixels, 30).shape == (25, 15, 3)
    assert small_preview(pixels, 1).shape == (1, 1, 3)
    half = np.full((4, 4, 3), 0.5, np.float16)
    np.testing.assert_array_equal(small_preview(half, 4), np.full((4, 4, 3), 128, np.uint8))


def test_addresses() -> None:
    assert parse_address("grpc://127.0.0.1:8001") == Address("grpc", "127.0.0.1", 8001)
    assert parse_address("http://[::1]:8000/").place == "[::1]:8000"
    for text in ("127.0.0.1:8001", "grpc://host", "grpc://host:0", "grpc://host:70000", "http://a b:1", "https://a:1"):
        with pytest.raises(UsageError, match="is no address"):
            parse_address(text)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("400", UsageError),
        ("StatusCode.INVALID_ARGUMENT", UsageError),
        ("404", HostError),
        ("503", HostError),
        ("StatusCode.UNAVAILABLE", HostError),
        ("StatusCode.DEADLINE_EXCEEDED", HostError),
        ("StatusCode.CANCELLED", CancelledError),
        (None, HostError),
    ],
)
def test_what_a_status_means(status: str | None, kind: type[Exception]) -> None:
    class ServerError(Exception):
        def status(self) -> str | None:
            return status

        def message(self) -> str:
            return "the words"

    assert type(to_l2p_error(ServerError())) is kind
