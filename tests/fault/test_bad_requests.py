"""Requests that cannot be drawn: refused before anything is allocated, with the word that was wrong."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from conftest import Bundles, run_cli
from l2p_export.cli.embeddings import read_embeddings
from l2p_export.cli.main import main
from l2p_runtime import Pipeline
from l2p_runtime.errors import ArtifactError, HostError, L2PError, UsageError
from l2p_runtime.memory import parse_bytes
from l2p_runtime.policies import Policy, native

WIDTH = 40
"""Caption width of the tiny checkpoints."""


@pytest.fixture(scope="module")
def bundle(bundles: Bundles) -> Path:
    return bundles.path("tiny-16")


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embeddings") / "good.npy"
    np.save(path, np.ones((7, WIDTH), np.float32))
    return path


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[Pipeline]:
    """One for all tests: what was refused leaves it as it was, and the last test of them draws with it."""
    with Pipeline.open(bundle) as opened:
        yield opened


def files(folder: Path) -> set[Path]:
    return set(folder.iterdir()) if folder.is_dir() else set()


def refuse(code: int, *arguments: str | Path, needles: tuple[str, ...], out: Path) -> None:
    """Draw in this process, expect an error that says each needle, and no file."""
    before = files(out.parent)
    with pytest.raises((L2PError, click.ClickException)) as caught:
        main.main(["generate", *map(str, arguments), "--out", str(out)], standalone_mode=False)
    error = caught.value
    message = f"{error}\n{error.hint}" if isinstance(error, L2PError) else error.format_message()
    assert error.exit_code == code, message
    for needle in needles:
        assert needle in message
    assert files(out.parent) == before


def refuse_cli(code: int, *arguments: str | Path, needles: tuple[str, ...], out: Path) -> None:
    """The same as a user meets it."""
    before = files(out.parent)
    result = run_cli("generate", *arguments, "--out", out)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert "Warning" not in result.stderr
    assert result.stdout == ""
    for needle in needles:
        assert needle in result.stderr
    assert files(out.parent) == before


OPTIONS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "size does not divide": (
        2,
        ("--size", "4000x4100"),
        ("size 4000x4100 does not divide by 16", "4000x4096, 4000x4112"),
    ),
    "size absurd": (2, ("--size", "1000000x1000000"), ("1000000 px", "8192 px")),
    "size just over": (2, ("--size", "16x8208"), ("height is 8208 px", "8192 px")),
    "size zero": (2, ("--size", "0x16"), ("width is 0 px", "16 to 8192")),
    "size negative": (2, ("--size", "-5"), ("--size is '-5'", "WIDTHxHEIGHT")),
    "size negative pair": (2, ("--size", "-16x-16"), ("--size is '-16x-16'",)),
    "size text": (2, ("--size", "abc"), ("--size is 'abc'",)),
    "size endless": (2, ("--size", "9" * 5000 + "x16"), ("--size is", "WIDTHxHEIGHT")),
    "size three": (2, ("--size", "16x16x16"), ("--size is '16x16x16'",)),
    "steps zero": (2, ("--steps", "0"), ("steps is 0", "1 to 1000")),
    "steps negative": (2, ("--steps", "-3"), ("steps is -3",)),
    "steps absurd": (2, ("--steps", "100000"), ("steps is 100000", "1 to 1000")),
    "steps text": (2, ("--steps", "many"), ("--steps", "many")),
    "guidance nan": (2, ("--guidance", "nan"), ("guidance is nan", "0 to 100")),
    "guidance inf": (2, ("--guidance", "inf"), ("guidance is inf",)),
    "guidance negative": (2, ("--guidance", "-1"), ("guidance is -1.0",)),
    "guidance without negative": (2, ("--guidance", "4"), ("guidance 4.0 needs", "--negative-embeddings")),
    "negative text": (2, ("--guidance", "4", "--negative", "ugly"), ("negative prompt", "--negative-embeddings")),
    "guidance of diffusers": (
        2,
        ("--guidance", "99.5", "--guidance-convention", "diffusers"),
        ("guidance is 99.5, expected 0 to 99", "diffusers"),
    ),
    "guidance of nobody": (2, ("--guidance-convention", "cfg"), ("--guidance-convention", "'l2p', 'diffusers'")),
    "prompt of half a character": (2, ("--prompt", "a\udcff"), ("prompt holds what is no character at position 1",)),
    "shift zero": (2, ("--shift", "0"), ("shift is 0.0",)),
    "shift nan": (2, ("--shift", "nan"), ("shift is nan",)),
    "seed negative": (2, ("--seed", "-1"), ("seed is -1", "2^64")),
    "seed too large": (2, ("--seed", str(2**64)), (f"seed is {2**64}", "2^64")),
    "seed fractional": (2, ("--seed", "7.5"), ("--seed", "7.5")),
    "rng": (2, ("--rng", "mersenne"), ("--rng", "philox")),
    "positions": (2, ("--positions", "rope"), ("--positions", "yarn")),
    "plan": (2, ("--plan", "int4"), ("no plan `int4`", "fp32, fp16")),
    "backend": (2, ("--backend", "abacus"), ("no backend `abacus`", "onnx")),
    "backend that is a module": (2, ("--backend", "host"), ("no backend `host`",)),
    "backend that climbs": (2, ("--backend", "..memory"), ("no backend `..memory`",)),
    "budget in parsecs": (2, ("--memory-budget", "12 parsecs"), ("'12 parsecs' is no size",)),
    "budget zero": (2, ("--memory-budget", "0"), ("'0' is no size",)),
    "budget negative": (2, ("--memory-budget", "-1GiB"), ("'-1GiB' is no size",)),
    "budget under the weights": (3, ("--memory-budget", "1MiB"), ("in plan `fp32` take", "1,048,576 bytes")),
    "budget under the buffers": (3, ("--memory-budget", "62MB", "--size", "1024x1024"), ("bytes", "memory budget")),
    "larger than the budget": (
        3,
        ("--size", "8192x8192", "--memory-budget", "1GiB"),
        ("8192x8192 needs", "for attention", "raise the memory budget to"),
    ),
}


def test_budget_endless() -> None:
    with pytest.raises(UsageError, match="is no size"):
        parse_bytes("9" * 400)


@pytest.mark.parametrize("case", OPTIONS)
def test_option(case: str, bundle: Path, embeddings: Path, tmp_path: Path) -> None:
    code, options, needles = OPTIONS[case]
    given_size = () if "--size" in options else ("--size", "32x32")
    refuse(code, bundle, "--embeddings", embeddings, *given_size, *options, needles=needles, out=tmp_path / "x.png")


@pytest.mark.parametrize("case", ["size negative", "steps text", "guidance inf", "seed too large", "backend", "plan"])
def test_option_at_the_command_line(case: str, bundle: Path, embeddings: Path, tmp_path: Path) -> None:
    code, options, needles = OPTIONS[case]
    refuse_cli(code, bundle, "--embeddings", embeddings, *options, needles=needles, out=tmp_path / "x.png")


@pytest.mark.parametrize(
    "case",
    [
        *("size absurd", "steps zero", "guidance nan", "guidance without negative", "shift nan", "plan"),
        *("seed negative", "backend", "budget in parsecs"),
    ],
)
def test_dry_run_refuses_the_same(case: str, bundle: Path, embeddings: Path, tmp_path: Path) -> None:
    code, options, needles = OPTIONS[case]
    arguments = (bundle, "--embeddings", embeddings, "--dry-run", *options)
    refuse(code, *arguments, needles=needles, out=tmp_path / "x.png")


def test_prompt_without_a_text_encoder(bundle: Path, tmp_path: Path) -> None:
    needles = ("no text encoder", "--embeddings FILE.npy", f"[L, {WIDTH}]")
    refuse_cli(2, bundle, "--prompt", "a red circle", "--size", "32x32", needles=needles, out=tmp_path / "x.png")


def test_neither_prompt_nor_embeddings(bundle: Path, tmp_path: Path) -> None:
    refuse(2, bundle, "--size", "32x32", needles=("was given no prompt", "--embeddings"), out=tmp_path / "x.png")


def npy(shape: tuple[int, ...], descr: object = "<f4", data_bytes: int = 64) -> bytes:
    """A .npy file whose header may lie."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})  # type: ignore[arg-type]
    return file.getvalue() + bytes(data_bytes)


def saved(values: object, *, pickled: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(values), allow_pickle=pickled)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    np.savez(file, prompt_embeds=np.ones((7, WIDTH), np.float32))
    return file.getvalue()


NOT_FINITE = np.ones((7, WIDTH), np.float32)
NOT_FINITE[3, 3] = np.nan

FILES: dict[str, tuple[int, bytes, tuple[str, ...]]] = {
    "wrong width": (2, saved(np.ones((7, WIDTH + 1), np.float32)), ("[7, 41], expected [L, 40]",)),
    "one axis": (4, saved(np.ones(WIDTH, np.float32)), ("bad.npy", "[40]", "[L, C]")),
    "batch of two": (2, saved(np.ones((2, 7, WIDTH), np.float32)), ("2 captions for 1 image",)),
    "513 tokens": (2, saved(np.ones((513, WIDTH), np.float32)), ("513 tokens, expected 1 to 512",)),
    "NaN": (2, saved(NOT_FINITE), ("prompt embeddings holds NaN or Inf",)),
    "integers": (4, saved(np.ones((7, WIDTH), np.int64)), ("bad.npy", "int64", "expected floats")),
    "complex": (4, saved(np.ones((7, WIDTH), np.complex64)), ("bad.npy", "complex64", "expected floats")),
    "text": (4, saved([["a"] * WIDTH]), ("bad.npy", "expected floats")),
    "pickled": (4, saved([{"run": "me"}], pickled=True), ("bad.npy", "no .npy array")),
    "pickle": (4, pickle.dumps([1.0] * 40), ("bad.npy", "no .npy array")),
    "archive": (4, zipped(), ("bad.npy", "no .npy array")),
    "empty file": (4, b"", ("bad.npy", "no .npy array")),
    "truncated": (4, saved(np.ones((7, WIDTH), np.float32))[:-4], ("bad.npy", "no .npy array")),
    "huge": (4, npy((2**40, WIDTH)), ("bad.npy", "no .npy array")),
    "overflowing": (4, npy((2**70, WIDTH)), ("bad.npy", "no .npy array")),
    "wrapping": (4, npy((2**62, 2**62)), ("bad.npy", "no .npy array")),
    "negative": (4, npy((-3, WIDTH)), ("bad.npy", "no .npy array")),
    "header not a dictionary": (4, b"\x93NUMPY\x01\x00\x10\x00" + b"[1, 2, (3, 4)]  \n" * 4, ("no .npy array",)),
}


@pytest.mark.parametrize("case", FILES)
def test_embeddings_file(case: str, bundle: Path, tmp_path: Path) -> None:
    code, content, needles = FILES[case]
    (tmp_path / "bad.npy").write_bytes(content)
    arguments = (bundle, "--size", "32x32", "--embeddings", tmp_path / "bad.npy")
    refuse(code, *arguments, needles=needles, out=tmp_path / "x.png")


def test_no_tokens(bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "bad.npy", np.ones((0, WIDTH), np.float32))
    arguments = (bundle, "--size", "32x32", "--embeddings", tmp_path / "bad.npy")
    refuse(2, *arguments, needles=("0 tokens, expected 1 to 512",), out=tmp_path / "x.png")


@pytest.mark.parametrize(
    ("name", "needle"),
    [
        ("absent.npy", "no embeddings file"),
        (".", "(--embeddings), which is read"),
        ("x.txt", "neither .npy nor .safetensors"),
    ],
)
def test_embeddings_path(name: str, needle: str, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("1 2 3")
    arguments = (bundle, "--size", "32x32", "--embeddings", tmp_path / name)
    refuse(2, *arguments, needles=(needle, str(tmp_path / name)), out=tmp_path / "x.png")


def test_embeddings_too_large_for_a_prompt(tmp_path: Path) -> None:
    with (tmp_path / "x.npy").open("wb") as file:
        file.truncate(300 << 20)
    with pytest.raises(UsageError, match=r"x.npy` has 314,572,800 bytes"):
        read_embeddings(tmp_path / "x.npy")


TENSORS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "several": ({"a": np.ones((3, 4), np.float32), "b": np.ones((3, 4), np.float32)}, "none called `prompt_embeds`"),
    "integers": ({"prompt_embeds": np.ones((3, 4), np.int32)}, "`prompt_embeds` is I32"),
    "scalar": ({"prompt_embeds": np.full((), 3, np.float32)}, r"float32 \[\], expected floats"),
    "mask of floats": (
        {"prompt_embeds": np.ones((3, 4), np.float32), "caption_mask": np.full(3, np.nan, np.float32)},
        "`caption_mask` is F32",
    ),
    "mask of another length": (
        {"prompt_embeds": np.ones((3, 4), np.float32), "caption_mask": np.ones((1, 5), np.bool_)},
        r"`caption_mask` is BOOL \[1, 5\], expected 3",
    ),
    "mask with holes": (
        {"prompt_embeds": np.ones((3, 4), np.float32), "caption_mask": np.array([True, False, True])},
        "expected 3 BOOL with the true ones first",
    ),
    "mask alone": ({"caption_mask": np.ones(3, np.bool_)}, "none called `prompt_embeds`"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_embeddings_tensors(case: str, tmp_path: Path) -> None:
    tensors, needle = TENSORS[case]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match=needle):
        read_embeddings(tmp_path / "x.safetensors")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_fuzz_npy(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    content = bytearray(npy((2, 8)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 80))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(
            st.binary(max_size=4) | st.sampled_from([b"9" * 30, b"'", b"(", b"]", b"<V8", b"O", b"\n", b"#"])
        )
    path = tmp_path_factory.getbasetemp() / "fuzz.npy"
    path.write_bytes(content)
    try:
        values = read_embeddings(path)
    except L2PError:
        return
    assert values is not None
    assert values.nbytes <= len(content)


@pytest.mark.parametrize("name", ["x.jpg", "x", "x.png.txt"])
def test_out_is_no_png(name: str, bundle: Path, embeddings: Path, tmp_path: Path) -> None:
    refuse(2, bundle, "--embeddings", embeddings, needles=(name, "ending in .png"), out=tmp_path / name)


def test_out_folder_is_absent(bundle: Path, embeddings: Path, tmp_path: Path) -> None:
    out = tmp_path / "missing" / "x.png"
    refuse(2, bundle, "--embeddings", embeddings, needles=("missing` does not exist", "mkdir -p"), out=out)
    assert not out.parent.exists()


def test_out_is_a_folder(bundle: Path, embeddings: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    needles = ("x.png` is a folder",)
    refuse(2, bundle, "--embeddings", embeddings, needles=needles, out=tmp_path / "x.png")


def test_out_below_a_file(bundle: Path, embeddings: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    needles = ("file` does not exist",)
    refuse(2, bundle, "--embeddings", embeddings, needles=needles, out=tmp_path / "file" / "x.png")
    assert (tmp_path / "file").read_text() == "precious"


IMAGE = np.zeros((1, 3, 32, 32), np.float32)
EMBEDS = np.ones((1, 7, WIDTH), np.float32)
WITH_NAN = IMAGE.copy()
WITH_NAN[0, 1, 2, 3] = np.nan

CALLS: dict[str, tuple[object, object, object, str]] = {
    "rank": (IMAGE[0], 0.5, EMBEDS, r"image has shape \[3, 32, 32\], expected \[B, 3, H, W\]"),
    "channels": (IMAGE[:, :2], 0.5, EMBEDS, r"\[1, 2, 32, 32\], expected \[B, 3, H, W\]"),
    "channels last": (IMAGE.transpose(0, 2, 3, 1), 0.5, EMBEDS, r"\[1, 32, 32, 3\], expected \[B, 3, H, W\]"),
    "no image": (IMAGE[:0], 0.5, EMBEDS[:0], r"\[0, 3, 32, 32\]"),
    "size": (IMAGE[..., :31], 0.5, EMBEDS, "size 31x32 does not divide by 16 px"),
    "no rows": (IMAGE[:, :, :0], 0.5, EMBEDS, "height is 0 px"),
    "NaN image": (WITH_NAN, 0.5, EMBEDS, "image holds NaN or Inf"),
    "image of text": (np.full((1, 3, 32, 32), "x"), 0.5, EMBEDS, "image cannot be read as float32"),
    "image None": (None, 0.5, EMBEDS, "image"),
    "ragged image": ([[1.0], [1.0, 2.0]], 0.5, EMBEDS, "image cannot be read as float32"),
    "time before": (IMAGE, -0.01, EMBEDS, "expected 1 values from 0 to 1"),
    "time after": (IMAGE, 1.01, EMBEDS, "expected 1 values from 0 to 1"),
    "time NaN": (IMAGE, float("nan"), EMBEDS, "time holds NaN or Inf"),
    "times": (IMAGE, np.array([0.1, 0.2], np.float32), EMBEDS, "expected 1 values from 0 to 1"),
    "time of rank 2": (IMAGE, np.zeros((1, 1), np.float32), EMBEDS, "expected 1 values from 0 to 1"),
    "batches": (IMAGE, 0.5, np.ones((2, 7, WIDTH), np.float32), "2 captions for 1 image"),
    "more images": (np.repeat(IMAGE, 2, 0), 0.5, EMBEDS, "1 caption for 2 images"),
    "unequal captions": (
        np.repeat(IMAGE, 2, 0),
        0.5,
        [np.ones((7, WIDTH), np.float32), np.ones((33, WIDTH), np.float32)],
        r"padded to \[32, 64\] tokens, expected one length",
    ),
    "caption width": (IMAGE, 0.5, EMBEDS[..., :39], r"\[7, 39\], expected \[L, 40\]"),
    "caption tokens": (IMAGE, 0.5, np.ones((1, 513, WIDTH), np.float32), "513 tokens, expected 1 to 512"),
    "caption empty": (IMAGE, 0.5, EMBEDS[:, :0], "0 tokens, expected 1 to 512"),
    "caption NaN": (IMAGE, 0.5, EMBEDS * np.float32("nan"), "prompt embeddings holds NaN or Inf"),
    "caption text": (IMAGE, 0.5, "a red circle", "prompt embeddings are a str"),
    "caption None": (IMAGE, 0.5, None, "prompt embeddings are a NoneType"),
}


@pytest.mark.parametrize("case", CALLS)
def test_denoise(case: str, pipe: Pipeline) -> None:
    image, time, embeds, needle = CALLS[case]
    with pytest.raises(UsageError, match=needle):
        pipe.denoise(image, time, embeds)  # type: ignore[arg-type]


def test_denoise_still_works_after_a_refusal(pipe: Pipeline) -> None:
    with pytest.raises(UsageError):
        pipe.denoise(WITH_NAN, 0.5, EMBEDS)
    assert np.isfinite(pipe.denoise(IMAGE, 0.5, EMBEDS)).all()


def test_denoise_with_an_unknown_policy(pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match="rope"):
        pipe.denoise(IMAGE, 0.5, EMBEDS, positions="rope")


def test_closed_pipeline(bundle: Path) -> None:
    pipe = Pipeline.open(bundle)
    pipe.close()
    pipe.close()
    with pytest.raises(UsageError, match="the pipeline is closed"):
        pipe.denoise(IMAGE, 0.5, EMBEDS)
    with pytest.raises(UsageError, match="the pipeline is closed"):
        pipe.generate(height=32, width=32, prompt_embeds=EMBEDS)


@pytest.mark.parametrize(("height", "width"), [(33, 32), (-16, 32), (0, 32), (32.0, 32), (True, 32), ("32", 32)])
def test_generate_sizes(height: object, width: object, pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match=r"height|does not divide"):
        pipe.generate(height=height, width=width, prompt_embeds=EMBEDS)  # type: ignore[arg-type]


class Unshowable:
    """Nothing can be said of it but its type."""

    def __repr__(self) -> str:
        raise RuntimeError


def nan_positions(rotary: object, axis: int, grid: int) -> tuple[np.ndarray, float]:
    frequencies, factor = native(rotary, axis, grid)  # type: ignore[arg-type]
    return frequencies * np.nan, factor


ARGUMENTS: dict[str, tuple[object, ...]] = {
    "height": ("32", 32.0, None, True, np.True_, np.float32(32), [32], 2**70, -(2**70), 10**5000, Unshowable()),
    "seed": (-1, 10**5000, 1.5, 2**64, True, np.True_, "7", None, np.nan, [7], np.uint8),
    "image_index": (-1, 2**32, 0.0, True, "0", None, np.array([1, 2])),
    "steps": ("2", 0, 2.0, True, np.float64(2), [2], 1001, np.inf, 2**70, b"2"),
    "guidance": ("1", True, np.nan, np.inf, -1, 101, [1.0], np.ones(1), 1j, 10**400, np.False_),
    "guidance_convention": ("cfg", None, 1, "L2P", b"l2p", ["l2p"]),
    "shift": ("3", True, np.nan, 0, -np.inf, 101.0, [3.0], 3j),
    "truncate_prompt": (1, 0, "no", None, np.ones(2)),
    "positions": ("rope", 3, ["native"], b"native", np.nan, {"native": 1}),
    "rng": ("mersenne", None, 1, ["philox"], b"philox"),
    "dtype": ("float64", None, np.uint8, ["uint8"], 8),
    "progress": (None, 3, "print"),
    "preview": (3, "show"),
    "cancelled": (None, False, "no"),
    "prompt": (3, b"a circle", ["a"], "a\0b", "\ud800"),
    "negative_prompt": (3, b"a circle", ["a"], "a\0b", "\ud800"),
    "prompt_embeds": ("a", b"a", 3, np.ones(3), np.ones((3, 4)), EMBEDS * 1j, EMBEDS > 0, EMBEDS.astype(str), {1: 2}),
}
"""Argument of `generate` to values that it is not."""


@pytest.mark.parametrize("name", ARGUMENTS)
def test_generate_arguments(name: str, pipe: Pipeline) -> None:
    call = {"height": 32, "width": 32, "prompt_embeds": EMBEDS, "guidance": 1, "steps": 1}
    word = {"positions": "position policy", "prompt_embeds": "prompt embeddings"}.get(name, name)
    for value in ARGUMENTS[name]:
        with pytest.raises(UsageError, match=rf"{word} (is|are|holds?|have|cannot)\b"):
            pipe.generate(**{**call, name: value})  # type: ignore[arg-type]


def test_generate_takes_the_numbers_of_numpy(pipe: Pipeline) -> None:
    plain = pipe.generate(
        height=32, width=48, prompt_embeds=EMBEDS, seed=7, steps=2, guidance=1, shift=3, image_index=2
    )
    sizes = {"height": np.int8(32), "width": np.uint8(48), "seed": np.uint64(7), "steps": np.int16(2)}
    more = {"guidance": np.float32(1), "shift": np.float64(3), "image_index": np.int32(2), "truncate_prompt": np.False_}
    np.testing.assert_array_equal(pipe.generate(**sizes, **more, prompt_embeds=EMBEDS.astype(np.float64)), plain)


def test_one_image_of_a_seed_where_torch_makes_the_noise(pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match="image_index is 1, and rng torch-cpu has one image per seed"):
        pipe.generate(height=32, width=32, prompt_embeds=EMBEDS, guidance=1, rng="torch-cpu", image_index=1)


POLICIES: dict[str, tuple[Policy, str]] = {
    "nan": (nan_positions, "gave NaN or Inf for axis 0"),
    "inf": (lambda rotary, axis, grid: (native(rotary, axis, grid)[0], np.inf), "gave NaN or Inf for axis 0"),
    "text": (lambda rotary, axis, grid: (native(rotary, axis, grid)[0], "1"), "factor for axis 0 is '1'"),
    "shape": (lambda rotary, axis, grid: (np.ones(99), 1.0), r"gave frequencies \[99\] for axis 0"),
    "words": (lambda rotary, axis, grid: (["a", "b"], 1.0), "that are no numbers for axis 0"),  # type: ignore[dict-item, return-value]
    "array": (lambda rotary, axis, grid: native(rotary, axis, grid)[0], "gave a ndarray for axis 0"),  # type: ignore[dict-item, return-value]
    "none": (lambda rotary, axis, grid: None, "gave a NoneType for axis 0"),  # type: ignore[dict-item, return-value]
}


@pytest.mark.parametrize("case", POLICIES)
def test_a_policy_that_gives_no_positions(case: str, pipe: Pipeline) -> None:
    policy, needle = POLICIES[case]
    with pytest.raises(UsageError, match=needle):
        pipe.denoise(IMAGE, 0.5, EMBEDS, positions=policy)
    with pytest.raises(UsageError, match=needle):
        pipe.generate(height=32, width=32, prompt_embeds=EMBEDS, guidance=1, steps=1, positions=policy)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("path", value) for value in (None, 3, b"bundle", "", "a\0b", ["bundle"])),
        *(("store", value) for value in (3, b"store", "", "a\0b")),
        *(("backend", value) for value in (None, 3, b"onnx", ["onnx"])),
        *(("device", value) for value in (None, -1, "0", 0.0, True, 2**40)),
        *(("plan", value) for value in (3, b"fp32", ["fp32"])),
        *(("memory_budget", value) for value in (0, -5, True, np.nan, np.inf, [1], b"1GiB", 2**80)),
    ],
)
def test_open_arguments(name: str, value: object, bundle: Path) -> None:
    with pytest.raises(UsageError, match=rf"{name} is "):
        Pipeline.open(**{"path": bundle, name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [10**9, np.int64(10**9), np.float64(1e9), "1GB"])
def test_open_takes_a_budget_as_any_number(budget: object, bundle: Path) -> None:
    with Pipeline.open(str(bundle), memory_budget=budget, device=np.int64(0)) as pipe:  # type: ignore[arg-type]
        assert pipe._networks.budget_bytes == 10**9
    with pytest.raises(UsageError, match="opened is a PosixPath"):
        Pipeline.on_backend(bundle)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompts", [None, 3, "one text", b"bytes", [3], [b"a"], [None], [["a"]], ["a\0b"]])
def test_encode_arguments(prompts: object, pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match="prompt"):
        pipe.encode(prompts)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["auto", "onnx"])
def test_without_onnx_runtime_its_extra_is_named(backend: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle of ONNX graphs runs on any CPU, whatever GPU libraries are missing too."""
    for module in ("onnxruntime", "cuda.bindings.driver", "tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(HostError, match="ONNX Runtime cannot be imported") as caught:
        Pipeline.open(bundle, backend)
    assert caught.value.hint == "pip install 'l2p-export[cpu]'"


def test_memory_goes_back_when_a_pipeline_is_closed(bundle: Path) -> None:
    """What the C library keeps of freed memory counts too; a first pipeline leaves what a library is loaded into."""
    code = (
        "import re, sys\nimport numpy as np\nfrom pathlib import Path\nfrom l2p_runtime import Pipeline\n"
        "def held(): return int(re.search(r'RssAnon:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "def draw(px):\n"
        "    with Pipeline.open(sys.argv[1]) as pipe:\n"
        "        pipe.generate(height=px, width=px, prompt_embeds=np.ones((7, 40)), guidance=1, steps=1)\n"
        "        return held()\n"
        "draw(32); before = held(); within = draw(512); print(within - before, held() - before)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, bundle], capture_output=True, text=True, check=True)
    within, after = map(int, result.stdout.split())
    assert within > 16 << 10
    assert after < 4 << 10


def test_call_beyond_the_budget(bundle: Path) -> None:
    with Pipeline.open(bundle, memory_budget="70MiB") as pipe, pytest.raises(HostError, match=r"needs [0-9,]+ bytes"):
        pipe.denoise(np.zeros((1, 3, 2048, 2048), np.float32), 0.5, EMBEDS)
