"""Reads and writes stored reference cases: the inputs of one denoising call, and its torch float32 outputs.

A small image is stored whole. A larger one is stored as the seed of its noise, which gives the same bits on every
machine; of its prediction only some pixels are stored. Tokens are stored whole, since the next network reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_runtime.contract import DType, ReferenceCase
from l2p_runtime.errors import ArtifactError
from l2p_runtime.tensorfile import TensorFile, open_tensorfile, write_tensorfile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l2p_runtime.bundle import Bundle

    Tensors = Mapping[str, NDArray[Any]]

WHOLE_PIXELS_MAX = 1 << 19
"""Images up to this many pixels are stored whole."""

PIXEL_STEP = 3
"""Of a larger image's prediction only every third row and column are stored, a ninth of its pixels. No patch size is a
multiple of three, so every position within a patch is among them."""

_IMAGE, _SEED, _STEP, _PREDICTION = "image", "noise_seed", "pixel_step", "head.prediction"
_STORED = {"float32": "F32", "int64": "I64", "bool": "BOOL"}


def write_case(path: Path, values: Tensors, seed: int) -> None:
    """Store one case.

    Args:
        path: the file to write.
        values: inputs from `cases.case_inputs` and, as `network.output`, every network's outputs.
        seed: seed of the noise that its image is.
    """
    import numpy as np

    kept = dict(values)
    if kept[_IMAGE].shape[2] * kept[_IMAGE].shape[3] > WHOLE_PIXELS_MAX:
        del kept[_IMAGE]
        kept[_SEED] = np.asarray([seed], np.int64)
        kept[_PREDICTION] = kept[_PREDICTION][..., ::PIXEL_STEP, ::PIXEL_STEP]
    write_tensorfile(path, kept)


def read_case(bundle: Bundle, case: ReferenceCase) -> dict[str, NDArray[Any]]:
    """Read one case.

    Returns:
        All tensors of the case, with the image. If the image is stored by its seed, `pixel_step` int64 [1] is n, and
        `head.prediction` has only every n-th row and column.

    Raises:
        ArtifactError: the file is damaged, or its tensors do not fit the case and the networks.
    """
    import numpy as np

    from l2p_runtime.noise import normal_noise

    file = open_tensorfile(bundle.path(case.file))
    by_seed = _SEED in file.tensors
    try:
        wanted = _wanted(bundle, case, by_seed=by_seed)
    except KeyError as error:
        raise ArtifactError(f"the bundle's networks lack {error}", hint="build the bundle again") from error
    _require_tensors(file, wanted, case)
    values = {name: file.read(name) for name in file.tensors}
    patch_px = bundle.manifest.model.patch_px
    rows, columns = case.height_px // patch_px, case.width_px // patch_px
    values["grid"] = np.asarray([rows, columns], np.int64)
    if by_seed:
        seed = int(values.pop(_SEED)[0])
        if seed < 0:
            raise ArtifactError(f"reference `{case.file}` has the seed {seed}, expected 0 or more")
        values[_STEP] = np.asarray([PIXEL_STEP], np.int64)
        # At most nine times the bytes of the file, whatever the manifest says: a prediction of this size was in it.
        values[_IMAGE] = normal_noise(seed, rows=(0, rows * patch_px), cols=(0, columns * patch_px))[np.newaxis]
    return values


def pixel_step(case: Tensors) -> int:
    """n, if only every n-th row and column of the prediction is stored; 1 if all are."""
    return int(case[_STEP][0]) if _STEP in case else 1


def _wanted(bundle: Bundle, case: ReferenceCase, *, by_seed: bool) -> dict[str, tuple[DType, tuple[int, ...]]]:
    """Dtype and shape of every tensor of the file, from the networks' inputs and outputs; nothing is allocated."""
    manifest, model = bundle.manifest, bundle.manifest.model
    rows, columns = case.height_px // model.patch_px, case.width_px // model.patch_px
    sizes = model.symbols(1, (rows, columns), model.padded(case.caption_tokens), rows)
    # The stem's rotary tables are those of the whole sequence; the caption network reads the end of them.
    inputs = {spec.name: spec for name in ("caption", "stem") for spec in manifest.network(name).inputs}
    del inputs["caption"]
    specs = inputs | {f"{net.name}.{out.name}": out for net in manifest.networks for out in net.outputs}
    wanted: dict[str, tuple[DType, tuple[int, ...]]] = {
        name: (spec.dtype, spec.resolve(sizes)) for name, spec in specs.items()
    }
    wanted["grid"] = "int64", (2,)
    if by_seed:
        del wanted[_IMAGE]
        wanted[_SEED] = "int64", (1,)
        dtype, shape = wanted[_PREDICTION]
        wanted[_PREDICTION] = dtype, (*shape[:2], *(-(-size // PIXEL_STEP) for size in shape[2:]))
    return wanted


def _require_tensors(
    file: TensorFile, wanted: Mapping[str, tuple[DType, tuple[int, ...]]], case: ReferenceCase
) -> None:
    expected = {name: (_STORED.get(dtype), shape) for name, (dtype, shape) in wanted.items()}
    found = {name: (info.dtype, info.shape) for name, info in file.tensors.items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ArtifactError(f"reference `{case.file}` does not hold case `{case.name}`: {', '.join(wrong[:6])}")
