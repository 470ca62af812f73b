"""DoRA: rescales a changed weight to learned magnitudes, as PEFT and LyCORIS do.

With W the weight, C its scaled change, m the magnitudes, s the strength, and norms over each row or each input:

PEFT      m (W + s C) / |W + s C|
LyCORIS   (W + C) (1 + s (m / (|W + C| + eps) - 1)), where eps is float32's
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from l2p_export.checkpoint.lora.model import Decomposition
from l2p_export.tensors.sources import read_tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Block = NDArray[np.float64]
    Moved = Callable[[int, Block, float], Block]

_EPSILON = 2.0**-23


def rescaled(
    decomposition: Decomposition, moved: Moved, strength: float, first_row: int, norms: Block | None
) -> Callable[[int, Block], Block]:
    """A function of a tensor's row number and rows to what the DoRA adds to them.

    Args:
        decomposition: the magnitudes, and whose they are.
        moved: the rows of the layer with their change added, given the first row's number, rows, and a strength.
        strength: of the whole LoRA.
        first_row: where the tensor begins in the layer.
        norms: of each column, where magnitudes are by input; else each row's are computed.
    """
    import numpy as np

    magnitudes = read_tensor(decomposition.magnitudes).astype(np.float64).reshape(-1)

    def change(first: int, base: Block) -> Block:
        first += first_row
        added: Block
        changed = moved(first, base, strength if decomposition.is_peft else 1.0)
        if norms is None:
            norm = np.sqrt(np.square(changed).sum(axis=1, keepdims=True))
            wanted = magnitudes[first : first + len(base), None]
        else:
            norm, wanted = norms, np.repeat(magnitudes, norms.size // magnitudes.size)
        if decomposition.is_peft:
            # A row of zeros has no direction: it becomes NaN as in PEFT, which `write_weights` refuses.
            with np.errstate(divide="ignore", invalid="ignore"):
                added = changed * (wanted / norm) - base
        else:
            added = changed * (1 + strength * (wanted / (norm + _EPSILON) - 1)) - base
        return added

    return change


def input_norms(layer: Iterable[tuple[int, Block]], moved: Moved, shape: tuple[int, ...]) -> Block:
    """The norm of each input of a changed layer [out, in, kernel...], repeated for each column of its kernel."""
    import numpy as np

    kernel = math.prod(shape[2:])
    total = np.zeros(shape[1])
    for first, rows in layer:
        total += np.square(moved(first, rows, 1.0)).sum(axis=0).reshape(-1, kernel).sum(axis=1)
    return np.repeat(np.sqrt(total), kernel)
