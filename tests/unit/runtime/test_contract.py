from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2p_runtime.contract import FileRecord, NetworkSpec, Profile, Range, Sampling, TensorSpec, split_dim
from l2p_runtime.contract.codec import from_json, to_json
from l2p_runtime.errors import ArtifactError, InternalError, L2PError, UsageError

IMAGE = TensorSpec("image", "float32", ("B", 3, "64*h", "64*w"))
TOKENS = TensorSpec("tokens", "float32", ("B", "h", "w", 96))
HEAD = NetworkSpec("head", (IMAGE, TOKENS), (TensorSpec("prediction", "float32", ("B", 3, "64*h", "64*w")),))


@pytest.mark.parametrize(("dim", "split"), [(3, (3, "")), ("B", (1, "B")), ("64*h", (64, "h")), ("2*r", (2, "r"))])
def test_dimensions_split(dim: int | str, split: tuple[int, str]) -> None:
    assert split_dim(dim) == split


@pytest.mark.parametrize("dim", ["", "h*64", "0*h", "-1*h", "h+w", "64 * h"])
def test_other_dimensions_are_a_bug(dim: str) -> None:
    with pytest.raises(InternalError):
        TensorSpec("x", "float32", (dim,))


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 40))
def test_shapes_bind_and_resolve(batch: int, rows: int, columns: int) -> None:
    sizes = HEAD.sizes({"image": (batch, 3, 64 * rows, 64 * columns), "tokens": (batch, rows, columns, 96)})
    assert sizes == {"B": batch, "h": rows, "w": columns}
    assert HEAD.outputs[0].resolve(sizes) == (batch, 3, 64 * rows, 64 * columns)


@pytest.mark.parametrize(
    ("image", "tokens"),
    [
        ((1, 3, 64, 100), (1, 1, 1, 96)),
        ((1, 4, 64, 64), (1, 1, 1, 96)),
        ((1, 3, 64), (1, 1, 1, 96)),
        ((1, 3, 64, 64), (2, 1, 1, 96)),
        ((1, 3, 64, 128), (1, 1, 1, 96)),
        ((1, 3, 64, 64), (1, 1, 1, 95)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(image: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"has shape .* expected \["):
        HEAD.sizes({"image": image, "tokens": tokens})


def test_symbols_come_in_order() -> None:
    assert HEAD.symbols() == ("B", "h", "w")


@dataclass(frozen=True)
class _Inner:
    count: int
    ratio: float = 0.5


@dataclass(frozen=True)
class _Outer:
    name: str
    kind: Literal["a", "b"]
    inner: _Inner
    pair: tuple[int, int]
    many: tuple[_Inner, ...]
    maybe: float | None = None


OUTER = _Outer("x", "a", _Inner(1), (1, 2), (_Inner(2, 3.0),), None)


def test_specs_survive_json() -> None:
    assert from_json(_Outer, json.loads(json.dumps(to_json(OUTER)))) == OUTER


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"kind": "c"}, "kind"),
        ({"name": 3}, "name"),
        ({"inner": {"count": "1"}}, "inner.count"),
        ({"inner": {"count": True}}, "inner.count"),
        ({"inner": {"count": 1, "extra": 2}}, "inner"),
        ({"inner": {}}, "inner"),
        ({"inner": []}, "inner"),
        ({"pair": [1]}, "pair"),
        ({"pair": [1, 2, 3]}, "pair"),
        ({"pair": "12"}, "pair"),
        ({"many": [{"count": 1}, {"count": None}]}, r"many\[1\]\.count"),
        ({"maybe": "x"}, "maybe"),
    ],
)
def test_wrong_json_names_the_place(change: dict[str, object], place: str) -> None:
    with pytest.raises(ArtifactError, match=place):
        from_json(_Outer, to_json(OUTER) | change)


@pytest.mark.parametrize(
    "path",
    ["../x", "/etc/passwd", "graphs/../x", "graphs/..", "graphs//x", "graphs/a/b", "x", "graphs/", "graphs/.x", "a\\b",
     "graphs/x\n", "graphs/x\0", "other/x", "graphs/a..b"],
)  # fmt: skip
def test_paths_that_could_leave_the_bundle_are_refused(path: str) -> None:
    with pytest.raises(ArtifactError, match="refused"):
        FileRecord(path, 1, "0" * 64, "0" * 64)


def test_a_plain_path_is_fine() -> None:
    assert FileRecord("graphs/head.fp32.0123.onnx", 1, "0" * 64, "f" * 64).size_bytes == 1


def test_digests_are_checked() -> None:
    with pytest.raises(ArtifactError, match="SHA-256"):
        FileRecord("graphs/x", 1, "zz", "0" * 64)


SIDE = Range(64, 128, 256)


def test_a_profile_needs_little() -> None:
    profile = Profile("mine", 64, SIDE, SIDE)
    assert profile.sampling == Sampling(50, 4.0, 3.0)
    assert profile.positions == "auto"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"height_px": Range(64, 64, 64)}, "min < max"),
        ({"width_px": Range(60, 64, 128)}, "60 not a multiple of 64"),
        ({"caption_tokens": Range(32, 40, 64)}, "multiples of 32"),
        ({"patch_px": 0}, "patch_px is 0"),
    ],
)
def test_profiles_that_cannot_be_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        dataclasses.replace(Profile("mine", 64, SIDE, SIDE), **change)


@pytest.mark.parametrize("values", [(0, 1, 1), (2, 1, 3), (1, 3, 2)])
def test_ranges_are_ordered(values: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="min <= opt <= max"):
        Range(*values)


@pytest.mark.parametrize(
    "values",
    [(0, 1.0, 3.0), (1001, 1.0, 3.0), (4, -1.0, 3.0), (4, float("nan"), 3.0), (4, 1.0, 0.0), (4, 1.0, float("inf"))],
)
def test_sampling_is_bounded(values: tuple[int, float, float]) -> None:
    with pytest.raises(UsageError, match="expected"):
        Sampling(*values)


def test_every_error_has_its_exit_code() -> None:
    # Other packages may add their own, and do once they are imported.
    own = [kind for kind in L2PError.__subclasses__() if kind.__module__ == L2PError.__module__]
    codes = {kind.__name__: kind.exit_code for kind in own}
    assert codes == {
        "UsageError": 2,
        "HostError": 3,
        "ArtifactError": 4,
        "ParityError": 5,
        "FramesError": 6,
        "InternalError": 70,
        "CancelledError": 130,
    }
