"""Tiles at a target MPP: the level, the size of what they show, and exact halves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hpcssl.slides.pixel_kernels import resampled
from hpcssl.slides.sampling import SNAP, read_tile, sample
from hpcssl.slides.slide import About, Level, Slide

PROMISED = 0.005  # of a tile's physical size


class Ramp(Slide):
    """A slide whose red grows from left to right, from 0 to 255 over the width; each level by its own pixels."""

    reader = "ramp"

    def __init__(self, downsamples: Sequence[float] = (1,), side: int = 2048):
        levels = [Level(width=round(side / d), height=round(side / d), downsample=d) for d in downsamples]
        super().__init__("ramp", levels, About(mpp=None, mpp_places="", scanner=""))

    def read(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        centres = (x + np.arange(width) + 0.5) * self.levels[level].downsample
        red = np.clip(255 * centres / self.width, 0, 255)
        dither = np.random.default_rng(0).uniform(0, 1, (height, width))  # the mean over rows is exact to 0.1 levels
        return np.stack([np.floor(red + dither), np.zeros_like(dither), np.zeros_like(dither)], -1).astype(np.uint8)


def shown(slide: Slide, sampling, x: float) -> tuple[float, float]:
    """Return where a tile begins, and its side, in level-0 pixels: read off the ramp in it."""
    red = read_tile(slide, sampling, x, 300)[..., 0].mean(0)
    inner = np.arange(len(red))[8:-8]
    slope, at_0 = np.polyfit(inner + 0.5, red[8:-8], 1)
    return at_0 * slide.width / 255, slope * len(red) * slide.width / 255


@pytest.mark.parametrize(
    ("slide_mpp", "downsamples", "mpp", "level", "halving"),
    [
        (0.25, (1, 2, 4), 0.5, 1, 1),  # the nearest level that is at least as fine
        (0.25, (1, 4, 16), 0.5, 0, 2),
        (0.25, (1, 4, 16), 1.0, 1, 1),
        (0.25, (1, 4, 16), 4.0, 2, 1),
        (0.25, (1, 4), 0.25, 0, 1),
        (0.499, (1,), 0.5, 0, 1),
        (0.2495, (1,), 0.5, 0, 2),
        (0.2527, (1, 4), 0.5, 0, 0),  # 1.1 % from a half: resampled
        (0.2527, (1, 2), 0.5, 0, 0),  # level 1 is too coarse by 1.1 %
        (0.5045, (1,), 0.5, 0, 0),  # a little coarser than the tiles: made larger
        (0.3, (1, 2), 1.0, 1, 0),
    ],
)
def test_the_level_and_what_is_exact(slide_mpp, downsamples, mpp, level, halving):
    sampling = sample(Ramp(downsamples), slide_mpp=slide_mpp, mpp=mpp, tile_px=64)
    assert (sampling.level, sampling.halving) == (level, halving)
    assert sampling.side * slide_mpp == pytest.approx(64 * mpp, rel=PROMISED)
    begins, side = shown(Ramp(downsamples), sampling, 200.0)
    assert side == pytest.approx(64 * mpp / slide_mpp, rel=PROMISED if sampling.side > 100 else 0.02)
    assert begins == pytest.approx(200, abs=max(0.6, 0.01 * side))


def test_the_physical_size_of_a_tile_at_half_a_micron_from_499_nanometres():
    for slide_mpp in (0.499, 0.4952, 0.2527, 0.2531):
        sampling = sample(Ramp(), slide_mpp=slide_mpp, mpp=0.5, tile_px=224)
        _, side = shown(Ramp(), sampling, 100.0)
        assert side * slide_mpp == pytest.approx(224 * 0.5, rel=PROMISED)
    assert SNAP < PROMISED


def test_a_half_is_the_mean_of_2_by_2_rounded():
    class Noise(Ramp):
        def read(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
            random = np.random.default_rng((x, y))
            return random.integers(0, 256, (height, width, 3), np.uint8)

    sampling = sample(Noise(), slide_mpp=0.25, mpp=0.5, tile_px=32)
    pixels = Noise().read(100, 50, 0, 64, 64).astype(int)
    means = (pixels[::2, ::2] + pixels[1::2, ::2] + pixels[::2, 1::2] + pixels[1::2, 1::2] + 2) // 4
    np.testing.assert_array_equal(read_tile(Noise(), sampling, 100, 50), means)


def test_resampled_neighbours_meet_without_a_seam():
    """The kernel reaches beyond a tile: cut at its edge, the last column would differ."""
    wide = sample(Ramp(), slide_mpp=0.3, mpp=0.5, tile_px=96)
    half = sample(Ramp(), slide_mpp=0.3, mpp=0.5, tile_px=48)
    whole = read_tile(Ramp(), wide, 120, 120).astype(int)[:48]
    parts = [read_tile(Ramp(), half, 120 + n * half.side, 120).astype(int) for n in (0, 1)]
    assert np.abs(whole - np.concatenate(parts, 1)).mean(0).max() < 2.5


def test_resampling_is_pillows_bicubic_within_a_rounding():
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).resize((160, 160))
    for step in (0.95, 1.2, 1.613):
        side = 64 * step
        ours = resampled(np.array(noise), 8.2, 9.7, step, 64).astype(int)
        theirs = noise.resize((64, 64), Image.Resampling.BICUBIC, box=(8.2, 9.7, 8.2 + side, 9.7 + side))
        assert np.abs(ours - np.asarray(theirs)).max() <= 2
        shifted = noise.resize((64, 64), Image.Resampling.BICUBIC, box=(8.7, 9.7, 8.7 + side, 9.7 + side))
        assert np.abs(ours - np.asarray(shifted)).max() > 10
