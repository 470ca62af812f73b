"""SHA-256 digests of weights, one for each network; they are part of the keys that stages are found by."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from l2p_engines.store.stages import StageOutput, StageRunner
from l2p_export.tensors.sources import TensorSource
from l2p_export.toolchain import toolchain
from l2p_runtime.contract.codec import from_json
from l2p_runtime.errors import HostError

if TYPE_CHECKING:
    from l2p_export.tensors.sources import TensorSource
    from l2p_runtime.progress import Reporter


@dataclass(frozen=True, slots=True)
class WeightDigests:
    """SHA-256 of the weights of each group, by name.

    Attributes:
        groups: name of a group, and the digest over its tensors in sorted order: name in UTF-8, a zero byte, values as
            little-endian float32. Files that store equal values in other dtypes or spellings agree.
        trunk_sha256: the trunk digest, over values rounded to BF16 (docs/design.md, "Trunk digest"); empty without a
            trunk.
    """

    groups: tuple[tuple[str, str], ...]
    trunk_sha256: str = ""

    def of(self, group: str) -> str:
        """The digest of one group."""
        return dict(self.groups)[group]


def weight_digests(
    run: StageRunner,
    label: str,
    tensors: Mapping[str, TensorSource],
    groups: Mapping[str, Sequence[str]],
    files: Sequence[Path],
    recipe: Mapping[str, object],
    reporter: Reporter,
) -> WeightDigests:
    """Hash weights as a stage; files that were hashed before and have not changed since are not read again.

    Args:
        run: runs the stage, or finds it.
        label: name of the weights in messages.
        tensors: published name to tensor.
        groups: name of a group to its tensors; the group `trunk` also gets the trunk digest.
        files: files that the tensors are read from.
        recipe: everything else that decides the values, such as LoRAs and their strengths.
        reporter: shows the bytes hashed.

    Returns:
        One digest for each group.

    Raises:
        HostError: a file changed while it was read.
    """
    inputs = {
        "files": [_identity(path) for path in files],
        "groups": {name: sorted(members) for name, members in groups.items()},
        "recipe": dict(recipe),
        "tools": toolchain(),
    }

    def make(work: Path) -> StageOutput:
        del work
        total = sum(4 * math.prod(tensors[name].shape) for members in groups.values() for name in members)
        with reporter.task(f"hashing {label}", total) as advance:
            found = [(name, _digests(tensors, members, name == "trunk", advance)) for name, members in groups.items()]
        if [_identity(path) for path in files] != inputs["files"]:
            raise HostError(f"{label}: a file changed while it was read", hint="wait until it is written, then again")
        trunk = next((both[1] for name, both in found if name == "trunk"), "")
        return StageOutput(facts=WeightDigests(tuple((name, both[0]) for name, both in found), trunk))

    return from_json(WeightDigests, run("digests", label, inputs, make).facts)


def _identity(path: Path) -> list[object]:
    """Path, size, times and inode, equal for an unchanged file. Only the kernel sets the change time."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _digests(
    tensors: Mapping[str, TensorSource], names: Sequence[str], is_trunk: bool, advance: Callable[[int], None]
) -> tuple[str, str]:
    """The digest over float32 values, and for the trunk the one over BF16 values, in one pass."""
    import ml_dtypes

    exact, rounded = hashlib.sha256(), hashlib.sha256()
    for name in sorted(names):
        exact.update(name.encode() + b"\0")
        rounded.update(name.encode() + b"\0")
        for chunk in tensors[name].chunks():
            exact.update(chunk.data)
            if is_trunk:
                rounded.update(chunk.astype(ml_dtypes.bfloat16).tobytes())
            advance(chunk.nbytes)
    return exact.hexdigest(), rounded.hexdigest()


def weights_digest(tensors: Mapping[str, TensorSource], names: Iterable[str]) -> str:
    """SHA-256 over tensors in sorted order, values rounded to BF16, so that F32 and BF16 copies agree.

    Each tensor adds its name in UTF-8, a zero byte, and its values as little-endian BF16
    (docs/design.md, "Trunk digest").

    Returns:
        64 hexadecimal digits.
    """
    import ml_dtypes

    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode() + b"\0")
        for chunk in tensors[name].chunks():
            digest.update(chunk.astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()
