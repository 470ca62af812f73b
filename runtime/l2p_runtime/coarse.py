"""Coarse to fine: an image is drawn small, enlarged, mixed with noise again and finished at its full size.

The first steps decide the layout and need few tokens; the last ones draw edges (docs/positions.md, "Coarse to fine").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from l2p_runtime.arguments import integer, real_number
from l2p_runtime.contract import Sampling
from l2p_runtime.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from l2p_runtime.backends import Array, Device

_CUBIC = -0.75
"""Slope of the cubic kernel, that of `torch.nn.functional.interpolate`."""


@dataclass(frozen=True, slots=True)
class Coarse:
    """How an image is drawn coarse to fine.

    Attributes:
        height: of the coarse image, in pixels; drawn with the steps, guidance and shift of the call.
        width: of the coarse image, in pixels.
        renoise: sigma to which the enlarged image is mixed with noise: 1 keeps nothing of it.
        steps: at the full size, from `renoise` to 0 in equal parts.
        guidance: at the full size; 1 is none.
    """

    height: int
    width: int
    renoise: float = 0.7
    steps: int = 4
    guidance: float = 1.0

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            object.__setattr__(self, name, integer(name, getattr(self, name)))
        object.__setattr__(self, "renoise", real_number("renoise", self.renoise))
        object.__setattr__(self, "steps", integer("steps", self.steps))
        object.__setattr__(self, "guidance", real_number("guidance", self.guidance))
        # NaN fails every comparison, so this is written as what must hold.
        if not 0 < self.renoise < 1:
            raise UsageError(f"renoise is {self.renoise}, expected more than 0 and less than 1")
        Sampling(self.steps, self.guidance)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Sigma of each step at the full size, and the final 0."""
        return (*(self.renoise * (1.0 - index / self.steps) for index in range(self.steps)), 0.0)


def check_coarse(coarse: Coarse, height: int, width: int) -> None:
    """Refuse a coarse image that is not smaller than the image, or of another shape.

    Raises:
        UsageError: it is not.
    """
    if coarse.height > height or coarse.width > width or (coarse.height, coarse.width) == (height, width):
        raise UsageError(
            f"the coarse image is {coarse.width}x{coarse.height}, expected one smaller than {width}x{height}"
        )
    wide, tall = width / coarse.width, height / coarse.height
    if not 0.8 < wide / tall < 1.25:
        raise UsageError(
            f"the coarse image {coarse.width}x{coarse.height} would be stretched {wide:.2f} times in width and "
            f"{tall:.2f} in height",
            hint="give it the shape of the image",
        )


def mix_enlarged(device: Device, noise: Array, coarse: Array, sigma: float) -> None:
    """Turn noise [1,3,H,W] into sigma * noise + (1 - sigma) * the image [1,3,h,w] enlarged, in place.

    The enlargement is bicubic with edges repeated, as `torch.nn.functional.interpolate(mode="bicubic")`.
    """
    tables = []
    for axis in (2, 3):
        taps, weights = cubic_taps(coarse.shape[axis], noise.shape[axis])
        tables += [device.upload(taps), device.upload(weights)]
    device.launch("mix_enlarged", noise[0], coarse[0], *tables, sigma)


def cubic_taps(size: int, enlarged: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """For each place of an enlarged axis, the four places that it is made of and their weights, each [enlarged, 4]."""
    import numpy as np

    place = (np.arange(enlarged) + 0.5) * size / enlarged - 0.5
    first = np.floor(place)
    distance = np.abs(place[:, None] - (first[:, None] + np.arange(-1, 3)))
    near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * _CUBIC - 4 * _CUBIC
    taps = np.clip(first[:, None] + np.arange(-1, 3), 0, size - 1)
    return taps.astype(np.int32), np.where(distance <= 1, near, far).astype(np.float32)
