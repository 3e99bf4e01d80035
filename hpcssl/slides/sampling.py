"""Tiles at a target MPP: the nearest level that is at least as fine, then one resampling step.

Where a level's MPP, or twice or four times that, is the target to within `SNAP`, tiles are that level's pixels, or
exact means of 2 × 2 or 4 × 4 of them; a tile is then up to `SNAP` larger or smaller than it says. Else pixels are
resampled by an antialiased bicubic, from a window of the exact size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpcssl.slides.pixel_kernels import REACH, means, resampled
from hpcssl.slides.slide import Slide

SNAP = 0.0025
_HALVINGS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tiles are taken from a slide."""

    level: int  # of the slide
    step: float  # that level's pixels for one pixel of a tile
    downsample: float  # of that level
    tile_px: int  # side of a tile

    @property
    def side(self) -> float:
        """Side of a tile, in level-0 pixels."""
        return self.tile_px * self.step * self.downsample

    @property
    def halving(self) -> int:
        """How many of the level's pixels a side are averaged exactly; 0 where pixels are resampled."""
        return int(self.step) if self.step in _HALVINGS else 0


def sample(slide: Slide, *, slide_mpp: float, mpp: float, tile_px: int) -> Sampling:
    """Return how tiles of `mpp` are taken from a slide whose level 0 has `slide_mpp`.

    A slide that is coarser than `mpp` is taken from level 0, and made larger.
    """
    downsample = mpp / slide_mpp
    fit = [n for n, level in enumerate(slide.levels) if downsample / level.downsample >= 1 - SNAP]
    level = fit[-1] if fit else 0
    step = downsample / slide.levels[level].downsample
    near = min(_HALVINGS, key=lambda whole: abs(step - whole))
    step = float(near) if abs(step / near - 1) <= SNAP else step
    return Sampling(level=level, step=step, downsample=slide.levels[level].downsample, tile_px=tile_px)


def read_tile(slide: Slide, sampling: Sampling, x: float, y: float) -> NDArray[np.uint8]:
    """Return the tile whose upper left corner is at (x, y) in level-0 pixels, (tile_px, tile_px, 3) RGB.

    Raises as `Slide.read`.
    """
    left, top = x / sampling.downsample, y / sampling.downsample
    px, halving = sampling.tile_px, sampling.halving
    if halving:
        side = px * halving
        pixels = slide.read(round(left), round(top), sampling.level, side, side)
        return pixels if halving == 1 else means(pixels, halving)
    side_px = px * sampling.step
    margin = math.ceil(REACH * max(1.0, sampling.step)) + 1
    x0, y0 = math.floor(left) - margin, math.floor(top) - margin
    side = math.ceil(side_px) + 2 * margin + 1
    window = slide.read(x0, y0, sampling.level, side, side)
    return resampled(window, left - x0, top - y0, sampling.step, px)
