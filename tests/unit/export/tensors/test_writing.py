from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from l2p_export.tensors.sources import FileTensor
from l2p_export.tensors.writing import write_weights
from l2p_runtime.errors import ArtifactError
from l2p_runtime.tensorfile import open_tensorfile


def _sources(folder: Path, tensors: dict[str, np.ndarray]) -> dict[str, FileTensor]:
    save_file(tensors, folder / "source.safetensors")
    file = open_tensorfile(folder / "source.safetensors")
    return {name: FileTensor(file, info, info.shape) for name, info in file.tensors.items()}


def test_values_and_places_are_right(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {"a": rng.standard_normal((5, 7)).astype(np.float32), "b": rng.standard_normal(3).astype(np.float32)}
    advanced: list[int] = []
    path = tmp_path / "out.safetensors"
    digest, places = write_weights(path, _sources(tmp_path, tensors), {"a": "F16", "b": "F32"}, advanced.append)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sum(advanced) == 5 * 7 * 2 + 3 * 4
    written = load_file(path)
    np.testing.assert_array_equal(written["a"], tensors["a"].astype(np.float16))
    np.testing.assert_array_equal(written["b"], tensors["b"])
    data = path.read_bytes()[places["b"].offset :][: places["b"].size_bytes]
    assert data == tensors["b"].tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_found(tmp_path: Path, bad: float) -> None:
    tensors = {"layers.0.w": np.ones(9, np.float32)}
    tensors["layers.0.w"][4] = bad
    with pytest.raises(ArtifactError, match=r"`layers\.0\.w` holds NaN or Inf"):
        write_weights(tmp_path / "o", _sources(tmp_path, tensors), {"layers.0.w": "F32"}, lambda size: None)


def test_values_beyond_float16_are_named(tmp_path: Path) -> None:
    sources = _sources(tmp_path, {"w": np.asarray([1.0, 70000.0], np.float32)})
    with pytest.raises(ArtifactError, match=r"`w` reaches 7e\+04, beyond the 65504"):
        write_weights(tmp_path / "o", sources, {"w": "F16"}, lambda size: None)
    write_weights(tmp_path / "o", sources, {"w": "F32"}, lambda size: None)
