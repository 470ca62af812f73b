"""Scales of blocks, against loops that follow the definition."""

from __future__ import annotations

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from l2p_export.tensors.files import open_weights
from l2p_export.tensors.quantized import canonical_dtype, with_scales
from l2p_export.tensors.sources import FileTensor, read_tensor
from l2p_runtime.errors import ArtifactError
from unit.export.tensors.raw import Raw, e4m3, raw, write_raw


def joined(folder: Path, weight: Raw, scale: Raw, *, suffix: str = ".weight_scale") -> FileTensor:
    path = write_raw(folder / "x.safetensors", {"x.weight": weight, f"x{suffix}": scale})
    return with_scales(open_weights(path)).tensors["x.weight"]


def by_definition(
    stored: NDArray[np.float32], scales: NDArray[np.float32], block_rows: int, block_columns: int
) -> NDArray[np.float32]:
    """One multiplication in float32 for each value."""
    out = np.empty(stored.shape, np.float32)
    for row in range(stored.shape[0]):
        for column in range(stored.shape[1]):
            out[row, column] = stored[row, column] * scales[row // block_rows, column // block_columns]
    return out


BLOCKS = st.sampled_from([(128, 128), (1, 32), (1, 128), (64, 64), (16, 16), (1, 16), (32, 1), (256, 256)])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 150),
    block=BLOCKS,
    dtype=st.sampled_from(["F32", "BF16", "F8_E8M0", "U8"]),
    chunk_bytes=st.integers(1, 4000),
    seed=st.integers(0, 2**32 - 1),
    cut=st.floats(0, 1),
)
def test_any_block_of_any_matrix_with_partial_last_blocks(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    columns: int,
    block: tuple[int, int],
    dtype: str,
    chunk_bytes: int,
    seed: int,
    cut: float,
) -> None:
    random = np.random.default_rng(seed)
    grid = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    stored = e4m3(random.standard_normal((rows, columns)).astype(np.float32) * 100)
    if dtype in ("F8_E8M0", "U8"):
        # Shapes of E8M0 that are padded to whole tiles have a test of their own.
        if grid[0] % 128 == 0 and grid[1] % 4 == 0:
            return
        exponents = random.integers(100, 150, grid).astype(np.uint8)
        scales, scale = np.exp2(exponents.astype(np.float64) - 127).astype(np.float32), raw(exponents, dtype)
    else:
        scales = random.uniform(1e-3, 2, grid).astype(ml_dtypes.bfloat16 if dtype == "BF16" else np.float32)
        scale, scales = raw(scales), scales.astype(np.float32)
    tensor = joined(tmp_path_factory.mktemp("b"), raw(stored), scale)
    expected = by_definition(stored.astype(np.float32), scales, *block)
    np.testing.assert_array_equal(read_tensor(tensor), expected)
    np.testing.assert_array_equal(np.concatenate(list(tensor.chunks(chunk_bytes))), expected.reshape(-1))
    first = int(cut * (rows - 1))
    np.testing.assert_array_equal(read_tensor(tensor.rows(first, rows - first)), expected[first:])
    assert canonical_dtype(tensor) == "F32"


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (192,), (192, 1), (192, 1, 1), (192, 2, 1), (3, 1, 2, 1), (1, 64)])
def test_axes_of_size_1_change_nothing(tmp_path: Path, shape: tuple[int, ...]) -> None:
    stored = e4m3(np.random.default_rng(1).standard_normal((192, 64)).astype(np.float32))
    scales = np.random.default_rng(2).uniform(1, 2, shape).astype(np.float32)
    grid = {1: (1, 1), 192: (192, 1), 384: (192, 2), 6: (3, 2), 64: (1, 64)}[scales.size]
    whole = np.kron(scales.reshape(grid), np.ones((192 // grid[0], 64 // grid[1]), np.float32))
    tensor = joined(tmp_path, raw(stored), raw(np.asarray(scales)))
    np.testing.assert_array_equal(read_tensor(tensor), stored.astype(np.float32) * whole)


@pytest.mark.parametrize(
    ("rows", "columns", "shape"),
    [
        (192, 64, (64,)),
        (192, 64, (5,)),
        (192, 64, (0, 0)),
        (192, 64, (193, 2)),
        (192, 64, (2, 3)),
        (480, 64, (6, 1)),
        (192, 64, (192, 2, 2)),
        (192, 64, (1, 1, 1, 1, 1)),
        (192, 64, (64, 192)),
    ],
)
def test_shapes_that_fit_no_block_are_named(tmp_path: Path, rows: int, columns: int, shape: tuple[int, ...]) -> None:
    weight = raw(e4m3(np.zeros((rows, columns), np.float32)))
    with pytest.raises(ArtifactError, match=r"scale `x\.weight_scale` has shape .* expected one number") as caught:
        joined(tmp_path, weight, raw(np.ones(shape, np.float32)))
    assert str(list(shape)) in str(caught.value)
    assert f"{rows} rows of `x.weight` [{rows}, {columns}]" in str(caught.value)


@pytest.mark.parametrize(("dtype", "value"), [("F32", 0.0), ("F32", -1.0), ("F32", math.nan), ("F32", math.inf)])
def test_scales_that_are_no_positive_numbers_are_named(tmp_path: Path, dtype: str, value: float) -> None:
    scales = np.ones((2, 1), np.float32)
    scales[1] = value
    tensor = joined(tmp_path, raw(e4m3(np.ones((256, 64), np.float32))), raw(scales, dtype))
    with pytest.raises(ArtifactError, match=r"scale `x\.weight_scale` holds .* \(1 of 2 values"):
        read_tensor(tensor)


@pytest.mark.parametrize("dtype", ["U8", "F8_E8M0"])
def test_the_nan_of_e8m0_is_named_and_its_limits_are_exact(tmp_path: Path, dtype: str) -> None:
    stored = e4m3(np.full((3, 32), 1.5, np.float32))
    exponents = np.asarray([[0], [127], [254]], np.uint8)
    found = read_tensor(joined(tmp_path, raw(stored), raw(exponents, dtype)))
    assert found[:, 0].tolist() == [1.5 * 2.0**-127, 1.5, 1.5 * 2.0**127]
    exponents[0] = 255
    with pytest.raises(ArtifactError, match="holds nan"):
        read_tensor(joined(tmp_path, raw(stored), raw(exponents, dtype)))


@pytest.mark.parametrize(("rows", "columns"), [(192, 64), (128, 128), (256, 256), (130, 160), (1, 32), (300, 170)])
def test_scales_in_the_order_of_cublas(tmp_path: Path, rows: int, columns: int) -> None:
    blocks = math.ceil(columns / 32)
    exponents = np.random.default_rng(3).integers(110, 140, (rows, blocks)).astype(np.uint8)
    padded_rows, padded_blocks = math.ceil(rows / 128) * 128, math.ceil(blocks / 4) * 4
    stored_scales = np.zeros(padded_rows * padded_blocks, np.uint8)
    for row in range(rows):
        for block in range(blocks):
            # cuBLAS: tiles of 128 x 4 in order of rows; in one, 16 bytes for each row modulo 32.
            tile = row // 128 * (padded_blocks // 4) + block // 4
            stored_scales[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4] = exponents[row, block]
    stored = e4m3(np.random.default_rng(4).standard_normal((rows, columns)).astype(np.float32))
    path = write_raw(
        tmp_path / "x.safetensors",
        {"x.weight": raw(stored), "x.weight_scale": raw(stored_scales.reshape(padded_rows, padded_blocks), "U8")},
        {"_quantization_metadata": '{"format_version": "1.0", "layers": {"x": {"format": "mxfp8"}}}'},
    )
    scales = np.exp2(exponents.astype(np.float32) - 127)
    found = read_tensor(with_scales(open_weights(path)).tensors["x.weight"])
    np.testing.assert_array_equal(found, by_definition(stored.astype(np.float32), scales, 1, 32))


def test_two_scales_of_one_weight_contradict(tmp_path: Path) -> None:
    tensors = {"x.weight": e4m3(np.ones((2, 2), np.float32))}
    tensors |= {f"x{suffix}": np.ones((), np.float32) for suffix in (".weight_scale", ".weight_scale_inv")}
    with pytest.raises(ArtifactError, match=r"are both the scale of `x\.weight`"):
        with_scales(open_weights(write_raw(tmp_path / "x.safetensors", tensors)))


def test_a_bare_scale_belongs_to_fp8_only(tmp_path: Path) -> None:
    """`X.scale` may be a weight of its own beside a weight that is no FP8."""
    tensor = joined(tmp_path, raw(e4m3(np.ones((2, 2), np.float32))), raw(np.full((), 3, np.float32)), suffix=".scale")
    assert read_tensor(tensor).tolist() == [[3, 3], [3, 3]]
    tensors = {"x.weight": np.ones((2, 2), np.float32), "x.scale": np.ones(2, np.float32)}
    found = with_scales(open_weights(write_raw(tmp_path / "y.safetensors", tensors))).tensors
    assert found.keys() == {"x.weight", "x.scale"}


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]
)
def test_every_code_of_fp8_is_widened_as_ml_dtypes_does(tmp_path: Path, dtype: str) -> None:
    codes = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, dtype))
    tensor = open_weights(write_raw(tmp_path / "x.safetensors", {"x": codes})).tensors["x"]
    np.testing.assert_array_equal(read_tensor(tensor), codes.astype(np.float32))
    # Unscaled FP8 is written as BF16, which holds each value.
    bf16 = codes.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(bf16, codes.astype(np.float32))
    assert canonical_dtype(tensor) == "BF16"
