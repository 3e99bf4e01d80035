"""What synthetic tissue is made of: noise fields, nuclei in many shapes, and the colours of two stains.

Lengths are pixels at 0.5 microns per pixel. Stain maps are uint8, STAIN_LEVEL grey levels to one optical density.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = np.float32
U8 = np.uint8
STAIN_LEVEL = 80.0
LARGEST_HALF = 24  # of a stamp's side
ATLAS_PX = 512  # side of the periodic noise fields
ANGLES = 12  # orientations of a stamp over half a turn
VARIANTS = 14  # shapes of a stamp in each orientation


@dataclass(frozen=True, kw_only=True)
class NucleusKind:
    """Distribution of a kind of nucleus: pairs are the ends of a uniform draw."""

    radius: tuple[float, float]  # geometric mean of the half-axes
    aspect: tuple[float, float]  # long over short axis
    ragged: float  # standard deviation of the outline relative to the radius
    density: tuple[float, float]  # optical density
    chromatin: float  # contrast inside


NUCLEI = {
    "regular": NucleusKind(radius=(4.2, 5.4), aspect=(1.15, 1.6), ragged=0.05, density=(0.8, 1.3), chromatin=0.16),
    "atypical": NucleusKind(radius=(5.8, 9.4), aspect=(1.0, 1.7), ragged=0.07, density=(0.75, 1.3), chromatin=0.22),
    "spindle": NucleusKind(radius=(3.0, 3.9), aspect=(2.6, 4.5), ragged=0.06, density=(0.75, 1.25), chromatin=0.15),
    "lymphocyte": NucleusKind(radius=(3.6, 4.4), aspect=(1.0, 1.15), ragged=0.03, density=(1.3, 1.7), chromatin=0.12),
}

Stamp = tuple[NDArray[np.uint8], NDArray[np.uint8]]  # least haematoxylin, most eosin; both (side, side)


@dataclass(frozen=True, kw_only=True)
class Materials:
    """What all tiles of one seed are cut from."""

    fine: NDArray[np.float32]  # periodic noise of unit variance, grain of about a pixel
    medium: NDArray[np.float32]  # the same, 6 pixels
    coarse: NDArray[np.float32]  # the same, 22 pixels
    fibre: NDArray[np.float32]  # the same, drawn out along the second axis; (512, 512)
    stamps: dict[str, list[Stamp]]  # of a kind: orientation-major, ANGLES × VARIANTS


def prepare(random: np.random.Generator) -> Materials:
    """Return noise fields and stamps (a tenth of a second)."""
    fine, medium = _noise(random, 0.9, 0.9), _noise(random, 6, 6)
    return Materials(
        fine=_wrapped(fine),
        medium=_wrapped(medium),
        coarse=_wrapped(_noise(random, 22, 22)),
        fibre=_noise(random, 1.7, 16),
        stamps={
            name: [_nucleus(random, kind, np.pi * a / ANGLES, fine) for a in range(ANGLES) for _ in range(VARIANTS)]
            for name, kind in NUCLEI.items()
        },
    )


def colour_table(random: np.random.Generator) -> NDArray[np.uint8]:
    """Return RGB and a pad for every pair of stain levels: Beer-Lambert with a slide's own stains and scanner."""
    level = np.arange(256) / STAIN_LEVEL
    haem = np.array([0.86, 1.04, 0.40]) * np.exp(random.normal(0, [0.12, 0.07, 0.22])) * random.uniform(0.75, 1.25)
    eosin = np.array([0.14, 0.86, 0.42]) * np.exp(random.normal(0, [0.35, 0.1, 0.22])) * random.uniform(0.7, 1.3)
    white = np.array([242, 240, 243]) + random.normal(0, [4, 5, 4])
    red = np.maximum(level - 1.3, 0)[:, None] * np.array([-0.04, 0.0, 0.7])  # haemoglobin takes more blue
    through = np.exp(-level[:, None] * haem)[:, None] * np.exp(-level[:, None] * eosin - red)[None]
    table = np.full((256, 256, 4), 255, U8)
    table[..., :3] = np.clip(white * through + 0.5, 0, 255)
    return table.reshape(-1, 4)


def mean_area(kind: str) -> float:
    """Return the mean area of a kind of nucleus, in pixels."""
    low, high = NUCLEI[kind].radius
    return np.pi * (low * low + low * high + high * high) / 3


def disc(reach: int, radius: float) -> NDArray[np.float64]:
    """Return a soft-edged disc of ones, (2 reach + 1) squared."""
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return np.clip(radius + 0.5 - np.hypot(y, x), 0, 1)


def _nucleus(random: np.random.Generator, kind: NucleusKind, turn: float, grain: NDArray[np.float32]) -> Stamp:
    """Draw one nucleus: a ragged ellipse with a membrane, clumps of chromatin and, if large, a nucleolus."""
    radius, aspect = random.uniform(*kind.radius), random.uniform(*kind.aspect)
    half = int(radius * np.sqrt(aspect) * (1 + 2 * kind.ragged)) + 2
    assert half <= LARGEST_HALF, half
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(F32)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    distance = np.hypot(along / np.sqrt(aspect), across * np.sqrt(aspect))
    theta = np.arctan2(across, along)
    waves = [a * np.cos(k * theta + p) for k, a, p in zip((2, 3, 4), random.normal(0, 1, 3), random.uniform(0, 6.3, 3))]
    outline = radius * (1 + kind.ragged * np.sum(waves, axis=0))
    cover = np.clip((outline - distance) * 0.8 / np.sqrt(aspect) + 0.5, 0, 1)
    oy, ox = random.integers(0, ATLAS_PX - 2 * half, 2)
    clumps = grain[oy : oy + 2 * half + 1, ox : ox + 2 * half + 1] * kind.chromatin
    membrane = np.exp(-(((outline - distance - 1.2) / 1.2) ** 2)) * kind.chromatin
    density = random.uniform(*kind.density) * (1 - kind.chromatin * 0.5 + clumps + 1.5 * membrane)
    if kind.chromatin > 0.2 and random.uniform() < 0.6:
        ny, nx = random.normal(0, radius * 0.25, 2)
        density = density + 0.7 * np.exp(-((y - ny) ** 2 + (x - nx) ** 2) / 3.0)
    haem = np.clip(cover * density * STAIN_LEVEL, 0, 255).astype(U8)
    return haem, (255 - cover * (255 - 0.3 * STAIN_LEVEL)).astype(U8)


def _noise(random: np.random.Generator, grain_y: float, grain_x: float) -> NDArray[np.float32]:
    """Return periodic Gaussian noise of unit variance, (512, 512), smooth over the given lengths."""
    fy, fx = np.fft.fftfreq(ATLAS_PX)[:, None], np.fft.rfftfreq(ATLAS_PX)[None, :]
    smooth = np.exp(-2 * np.pi**2 * ((grain_y * fy) ** 2 + (grain_x * fx) ** 2))
    field = np.fft.irfft2(np.fft.rfft2(random.standard_normal((ATLAS_PX, ATLAS_PX))) * smooth, s=(ATLAS_PX, ATLAS_PX))
    return ((field - field.mean()) / field.std()).astype(F32)


def _wrapped(field: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.tile(field, (2, 2))
