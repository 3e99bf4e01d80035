"""What a whole slide offers, whoever reads it.

Two coordinate systems, both with x to the right and y down: *level-0 pixels*, which tile names and tables hold, and the
pixels of one level, which `Slide.read` takes. A level's pixel covers `downsample` level-0 pixels a side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpcssl.core.errors import SlideError

_FINEST_MPP, _COARSEST_MPP = 0.05, 20.0  # what a scanner may have meant; outside, it is the resolution of a printer
_MOST_OBLONG = 0.005  # as exact as tiles are in size; scanners' own two numbers differ by less


@dataclass(frozen=True, kw_only=True)
class Level:
    """One picture of the pyramid."""

    width: int
    height: int
    downsample: float  # level-0 pixels a side of one pixel; 1 for level 0, which is the finest


@dataclass(frozen=True, kw_only=True)
class About:
    """What a file says of itself."""

    mpp: float | None  # microns per pixel of level 0 from left to right, None where the file does not say
    mpp_places: str  # where it was looked for, to be told when it is not there
    scanner: str  # manufacturer and device as far as told, else ""
    mpp_y: float | None = None  # from top to bottom, where the file says it apart


class Slide(ABC):
    """An opened slide; threads may share it. Its files are closed when nobody holds it any more.

    Attributes
    ----------
    path : as it was given, a path or a URL
    reader : "tiff" (blocks read directly) or "openslide"
    levels : finest first
    about : MPP and scanner
    width, height : level-0 pixels
    mpp : microns per pixel of level 0, None where the file does not say
    held_bytes : memory that the places of its blocks take, 0 where that is not known; decoded blocks are not counted
    """

    reader: str
    held_bytes = 0

    def __init__(self, path: str, levels: Sequence[Level], about: About):
        """Keep what a reader found; SlideError where pixels are not square: tiles would be too wide or too high."""
        if about.mpp and about.mpp_y and abs(about.mpp_y / about.mpp - 1) > _MOST_OBLONG:
            told = f"{about.mpp:g} × {about.mpp_y:g} microns by {about.mpp_places}"
            raise SlideError(f"{path}: its pixels are not square ({told}); save it with square ones")
        self.path, self.levels, self.about, self.mpp = path, tuple(levels), about, about.mpp
        self.width, self.height = self.levels[0].width, self.levels[0].height

    @abstractmethod
    def read(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        """Return a rectangle of a level, (height, width, 3) RGB; white outside the slide and where nothing was scanned.

        Its upper left corner (x, y), in pixels of that level, may lie outside. SlideError where a block cannot be
        decoded or is not there: reading again will not help. OSError where a disk or server does not answer: reading
        again may help; TimeoutError is one of them.
        """


def plausible_mpp(mpp: float) -> float | None:
    """Return an MPP that a slide may have, None for others: placeholders and resolutions of printers.

    >>> plausible_mpp(0.25), plausible_mpp(352.8), plausible_mpp(float("nan"))
    (0.25, None, None)
    """
    return mpp if _FINEST_MPP <= mpp <= _COARSEST_MPP else None


def parse_mpp(text: str | None, unit: float = 1.0) -> float | None:
    """Return the MPP that a file tells in units of so many microns, None where it tells no plausible one.

    >>> parse_mpp("250", 1e-3), parse_mpp("unknown"), parse_mpp(None)
    (0.25, None, None)
    """
    try:
        return plausible_mpp(float(text or "nan") * unit)
    except ValueError:
        return None


def nominal_downsample(full: tuple[int, int], reduced: tuple[int, int]) -> float:
    """Return how many level-0 pixels a pixel covers; a whole number where rounding of the level's size explains it.

    >>> nominal_downsample((3236, 2638), (404, 329)), nominal_downsample((46000, 32914), (11500, 8228))
    (8, 4)
    >>> round(nominal_downsample((1000, 1000), (300, 300)), 3)
    3.333
    """
    ratio = sum(f / r for f, r in zip(full, reduced, strict=True)) / 2
    whole = max(1, round(ratio))
    return whole if all(abs(f / whole - r) < 1 for f, r in zip(full, reduced, strict=True)) else ratio
