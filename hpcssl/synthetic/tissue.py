"""One tile of synthetic tissue: glands, fibres, nuclei and red cells laid on two maps of stain, then coloured.

Suffixes: G glands, N points, Q the coarse grid. Points are (row, column); lengths are pixels at 0.5 microns per pixel.
Stain maps are uint8, haematoxylin and eosin, _LEVELS to one optical density.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpcssl.core.rng import key_of

F32, U8 = np.float32, np.uint8
ATLAS_PX = 512  # period of the noise fields
COARSE_PX = 4  # glands are computed on every fourth pixel
_LEVELS = 80.0
_MARGIN = 24  # of the stain maps: no stamp reaches further
_ANGLES, _VARIANTS = 12, 14  # orientations of a stamp over half a turn, and shapes in each of them
_SCATTER_PX = 15.0  # between large nuclei
_FAR = 9999.0

Floats = NDArray[np.float32]
Points = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Stamp = tuple[Bytes, Bytes]  # bounds of haematoxylin and of eosin, both (side, side)
Range = tuple[float, float]  # ends of a uniform draw
Shape = tuple[Range, Range, float, Range, float]

ORGANS: dict[str, dict[str, Any]] = {  # see `Slide`
    "breast": {"spacing": 104, "present": 0.5, "radius": 38, "wall": 21, "shed": 0.35, "red_cells": 0.15},
    "lung": {"spacing": 92, "present": 1.0, "radius": 46, "wall": 13, "red_cells": 1.6},
    "colon": {"spacing": 84, "present": 0.94, "radius": 38, "wall": 23, "goblets": 0.55, "red_cells": 0.2},
}
# mean half-axis; long over short axis; deviation of the outline over the radius; optical density; contrast inside
NUCLEI: dict[str, Shape] = {
    "regular": ((4.2, 5.4), (1.15, 1.6), 0.05, (0.8, 1.3), 0.16),
    "atypical": ((5.8, 9.4), (1.0, 1.7), 0.07, (0.75, 1.3), 0.22),
    "spindle": ((3.0, 3.9), (2.6, 4.5), 0.06, (0.75, 1.25), 0.15),
    "lymphocyte": ((3.6, 4.4), (1.0, 1.15), 0.03, (1.3, 1.7), 0.12),
}
_DISTANCE = np.hypot(*np.mgrid[-7:8, -7:8])
*_DISCS, _CELL, _HOLLOW = np.clip(np.array([3.3, 4.3, 5.3, 6.3, 3.4, 1.0])[:, None, None] + 0.5 - _DISTANCE, 0, 1)
_DROPS = [((255 - disc * (255 - 0.14 * _LEVELS)).astype(U8),) * 2 for disc in _DISCS]  # of mucus: most of both stains
_RED = ((_CELL * 1.7 - _HOLLOW * 0.3) * _LEVELS).astype(U8)
_RED_CELL = (255 - _RED, _RED)  # most haematoxylin, least eosin
_AREAS = {kind: a * a + a * b + b * b for kind, ((a, b), *_) in NUCLEI.items()}  # means, relative to each other
# of glands, even and altered: deviation of place over spacing, of log radius and of log wall; bend; ragged lumen
_DISORDER = (0.08, 0.07, 0.08, 3.5, 1.2), (0.17, 0.16, 0.35, 7.0, 3.0)


class Slide(NamedTuple):
    """One slide to draw: its row of the table, and what its tiles have in common."""

    slide_id: str
    organ: str
    patient_id: str
    label: str
    num_tiles: int
    altered: frozenset[int]  # tiles that carry the texture of the positive label; empty on a negative slide
    colours: NDArray[np.uint32]  # (65536,): RGB and a pad, by haematoxylin · 256 + eosin
    spacing: float  # between gland centres
    present: float  # share of the places that hold a gland
    radius: float  # outer, of a gland
    wall: float  # epithelium between stroma and lumen
    cells: float  # nuclei in the stroma, relative
    gaps: float  # white between the fibres, 0 to 1
    crowding: float  # share of the places for epithelial nuclei that are taken
    haem: float  # optical density in the epithelium
    eosin: float  # the same
    shed: float = 0.0  # share of the places without a gland that hold a fat cell
    goblets: float = 0.0  # mucous vacuoles for every epithelial nucleus
    red_cells: float = 0.0  # mean number of groups of red cells in a tile


class Materials:
    """What all tiles of one seed are cut from: periodic noise of unit variance, and stamps (a tenth of a second)."""

    def __init__(self, seed: int) -> None:
        self.seed, random = seed, generator(seed, "materials")
        # (1024, 1024), grain of 1, 6 and 22 pixels
        self.fine, self.medium, self.coarse = (np.tile(_noise(random, px, px), (2, 2)) for px in (0.9, 6, 22))
        self.fibre = _noise(random, 1.7, 16)  # (512, 512)
        turns = [np.pi * angle / _ANGLES for angle in range(_ANGLES) for _ in range(_VARIANTS)]
        self.stamps = {kind: [_nucleus(random, self.fine, t, shape) for t in turns] for kind, shape in NUCLEI.items()}


def generator(seed: int, purpose: str) -> np.random.Generator:
    """Return random numbers that are a function of seed and purpose alone."""
    return np.random.Generator(np.random.PCG64(key_of(seed, f"synthetic/{purpose}")))


def colour_table(random: np.random.Generator) -> NDArray[np.uint32]:
    """Return a slide's colours: Beer and Lambert's law with stains and a scanner of its own."""
    level = np.arange(256)[:, None] / _LEVELS
    haem = np.array([0.86, 1.04, 0.40]) * np.exp(random.normal(0, [0.12, 0.07, 0.22])) * random.uniform(0.75, 1.25)
    eosin = np.array([0.14, 0.86, 0.42]) * np.exp(random.normal(0, [0.35, 0.1, 0.22])) * random.uniform(0.7, 1.3)
    white = np.array([242, 240, 243]) + random.normal(0, [4, 5, 4])
    red = np.maximum(level - 1.3, 0) * np.array([-0.04, 0.0, 0.7])  # haemoglobin takes more blue
    table = np.full((256, 256, 4), 255, U8)
    table[..., :3] = np.clip(white * (np.exp(-level * haem)[:, None] * np.exp(-level * eosin - red)) + 0.5, 0, 255)
    return table.view(np.uint32).ravel()


def draw_tile(materials: Materials, slide: Slide, index: int, *, tile_px: int) -> Bytes:
    """Return one tile of a slide, (tile_px, tile_px, 4) uint8: RGB and a pad."""
    tile = _Tile(materials, slide, index, tile_px)
    tile.fill()
    tile.lay_stroma_cells()
    tile.lay_epithelium()
    tile.lay_red_cells()
    stains = tile.stains[:, _MARGIN - 1 : 1 - _MARGIN, _MARGIN - 1 : 1 - _MARGIN].astype(np.uint16)
    stains = stains[:, :-2] + stains[:, 2:] + 2 * stains[:, 1:-1]  # blurred as by a microscope
    haem, eosin = (stains[..., :-2] + stains[..., 2:] + 2 * stains[..., 1:-1]) >> 4
    return slide.colours[(haem << 8) | eosin].view(U8).reshape(tile_px, tile_px, 4)


class _Tile:
    """A tile in the making: its glands, what is known of them on the coarse grid, and two stain maps with margins."""

    def __init__(self, materials: Materials, slide: Slide, index: int, size: int) -> None:
        self.materials, self.slide, self.size, self.altered = materials, slide, size, index in slide.altered
        self.random = random = generator(materials.seed, f"tile/{slide.organ}/{slide.slide_id}/{index}")
        self.stains = np.zeros((2, size + 2 * _MARGIN, size + 2 * _MARGIN), U8)
        jitter, radius_spread, wall_spread, bend, ragged = _DISORDER[self.altered]
        n = int(np.ceil(size / slide.spacing)) + 2
        place = self._hexagons(n, n, slide.spacing, height=0.9, shift=0.25, jitter=jitter)
        kind = random.uniform(size=n * n)
        gland, fat = kind < slide.present, kind > 1 - (1 - slide.present) * slide.shed
        radius = slide.radius * np.where(fat, 0.95, 1.0) * np.exp(random.normal(0, radius_spread, n * n))
        wall = np.where(fat, 2.5, slide.wall * np.exp(random.normal(0, wall_spread, n * n)))
        used = gland | fat
        self.is_gland = gland[used]
        self.centre_G2, self.radius_G, self.wall_G = (values[used].astype(F32) for values in (place, radius, wall))
        bend_2QQ = bend * np.stack([self._crop(materials.coarse)[::COARSE_PX, ::COARSE_PX] for _ in range(2)])
        axis = np.arange(0, size, COARSE_PX, dtype=F32)
        dy = axis[:, None] + bend_2QQ[0] - self.centre_G2[:, 0, None, None]
        dx = axis + bend_2QQ[1] - self.centre_G2[:, 1, None, None]
        depth_GQQ = self.radius_G[:, None, None] - np.sqrt(dy * dy + dx * dx)
        lumen_GQQ = depth_GQQ - self.wall_G[:, None, None]
        depth_QQ, lumen_QQ = (inside.max(axis=0, initial=-99) for inside in (depth_GQQ, lumen_GQQ))
        lumen_QQ += ragged * self._crop(materials.medium)[::COARSE_PX, ::COARSE_PX]
        self.fields_4QQ = np.stack([depth_QQ, lumen_QQ, *bend_2QQ])  # depth in a gland, in its lumen; bend of space
        self.angle = random.uniform(0, np.pi)  # of the fibres

    def fill(self) -> None:
        """Fill the stain maps with stroma, cytoplasm and lumen."""
        slide, materials = self.slide, self.materials
        depth, lumen = map(self._enlarged, self.fields_4QQ[:2])
        medium, fine, bend = (self._crop(field) for field in (materials.medium, materials.fine, materials.coarse))
        fibre = 0.24 * self._fibres(bend, self.angle)
        fibre += 0.18 * self._fibres(bend[::-1], self.angle + self.random.uniform(0.2, 0.7))
        stroma = np.clip((0.95 - slide.gaps) + fibre + 0.2 * medium, 0.06, 1.5)
        epithelium, tissue = np.clip(depth * 0.5 + 0.5, 0, 1), np.clip(0.5 - lumen * 0.5, 0, 1)
        texture = 1 + 0.13 * fine + 0.1 * medium
        for stain, in_stroma, in_epithelium in zip(self.stains, (0.1, 0.62), (slide.haem, slide.eosin)):
            density = stroma * in_stroma
            density += epithelium * (in_epithelium - density)
            density *= tissue
            density *= texture
            stain[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN] = np.clip(density * _LEVELS + 2.5, 0, 255)

    def lay_stroma_cells(self) -> None:
        """Lay spindle nuclei along the fibres and, now and then, a cluster of lymphocytes."""
        random, relative = self.random, self.slide.cells
        points = random.uniform(0, self.size, (int(self.size * self.size / 900 * relative), 2))
        turns = self.angle + random.normal(0, 0.25, len(points))
        outside = self._within(points, below=-3)
        self._lay_nuclei("spindle", points[outside], turns[outside])
        if random.uniform() < 0.3 * relative:
            cluster = self._cluster(20, 8, 36, depth=-2)
            self._lay_nuclei("lymphocyte", cluster, np.zeros(len(cluster)))

    def lay_epithelium(self) -> None:
        """Lay the glands' nuclei: even rows near the outline, or large ones in disorder, of the same area in all."""
        random = self.random
        nuclei_N3 = self._rows()
        nuclei_N3 = nuclei_N3[random.uniform(size=len(nuclei_N3)) < self.slide.crowding]
        points, turns = nuclei_N3[:, :2], nuclei_N3[:, 2]
        if self.slide.goblets and len(points):
            drops = points[random.uniform(size=len(points)) < self.slide.goblets] + random.normal(0, 7, (1, 2))
            drops = drops[self._within(drops, above=10, lumen=1)]
            self._lay(drops, (_DROPS[n] for n in random.integers(0, 4, len(drops))), np.minimum, np.minimum)
        if self.altered:
            number = round(len(points) * _AREAS["regular"] / _AREAS["atypical"])
            n = int(self.size / _SCATTER_PX) + 2
            points = self._hexagons(int(n * 1.16), n, _SCATTER_PX, height=0.866, shift=0, jitter=0.15)
            points = random.permutation(points[self._within(points, above=2, lumen=-2)])[:number]
            turns = random.uniform(0, np.pi, len(points))
        self._lay_nuclei("atypical" if self.altered else "regular", points, turns)

    def lay_red_cells(self) -> None:
        """Lay groups of red cells: strong eosin, no haematoxylin."""
        for _ in range(self.random.poisson(self.slide.red_cells)):
            cluster = self._cluster(12, 3, 16)
            self._lay(cluster, [_RED_CELL] * len(cluster), np.minimum, np.maximum)

    def _rows(self) -> Points:
        """Return places and orientations, (N, 3), of nuclei in two rows along the outlines of the glands."""
        rows = []
        tolerance = 99.0 if self.altered else 5.0  # ragged glands count the rows that they would hold
        for inset, pitch in ((7.0, 10.5), (18.0, 13.0)):
            chosen = self.is_gland & (self.wall_G > inset + 1.0)
            radius = self.radius_G[chosen] - inset
            counts = np.maximum(2 * np.pi * radius / pitch, 1).astype(np.int64)
            owner = np.repeat(np.arange(len(counts)), counts)
            nth = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
            theta = 2 * np.pi * nth / counts[owner] + self.random.normal(0, 0.045, len(owner))
            reach = radius[owner] + self.random.normal(0, 1.5, len(owner))
            place = np.stack([np.sin(theta), np.cos(theta)], axis=1) * reach[:, None] + self.centre_G2[chosen][owner]
            place -= self._at(place)[2:].T
            seated = self._within(place, lumen=-2) & (np.abs(self._at(place)[0] - inset) < tolerance)
            rows.append(np.column_stack([place, theta])[seated])
        return np.concatenate(rows)

    def _hexagons(self, rows: int, columns: int, pitch: float, *, height: float, shift: float, jitter: float) -> Points:
        """Return a jittered hexagonal grid from a random place on; height, shift and jitter relative to the pitch."""
        row, column = np.indices((rows, columns)).reshape(2, -1)
        points = np.stack([row * height, column + 0.5 * (row % 2)], axis=1) * pitch - shift * pitch
        return points + (self.random.uniform(-pitch, 0, 2) + self.random.normal(0, jitter * pitch, points.shape))

    def _enlarged(self, field_QQ: Floats) -> Floats:
        """Interpolate a coarse field linearly to every pixel."""
        place = np.arange(self.size, dtype=F32) / COARSE_PX
        left = np.minimum(place.astype(np.int64), len(field_QQ) - 2)
        right = place - left.astype(F32)
        for _ in range(2):
            field_QQ = field_QQ[left].T * (1 - right) + field_QQ[left + 1].T * right
        return field_QQ

    def _fibres(self, bend: Floats, angle: float) -> Floats:
        """Return wavy fibres across an angle: drawn-out noise looked up in turned, bent coordinates."""
        axis = np.arange(self.size, dtype=F32)
        cos, sin = axis * F32(np.cos(angle)), axis * F32(np.sin(angle))
        across, along = cos[:, None] - sin + bend * 9, sin[:, None] + cos
        row, column = (place.astype(np.int32) & (ATLAS_PX - 1) for place in (across, along))
        return self.materials.fibre.take(row * ATLAS_PX + column)

    def _cluster(self, spread: float, least: int, below: int, depth: float = _FAR) -> Points:
        centre = self.random.uniform(0, self.size, 2)
        points = centre + self.random.normal(0, spread, (int(self.random.integers(least, below)), 2))
        return points[self._within(points, below=depth)]

    def _crop(self, field: Floats) -> Floats:
        y, x = self.random.integers(0, ATLAS_PX, 2)
        return field[y : y + self.size, x : x + self.size]

    def _at(self, points: Points) -> Floats:
        """Return the four coarse fields' values at points, or at the edge, (4, N)."""
        cells = np.ravel_multi_index((points / COARSE_PX).astype(np.int64).T, self.fields_4QQ.shape[1:], mode="clip")
        return self.fields_4QQ.reshape(4, -1)[:, cells]

    def _within(self, points: Points, above: float = -_FAR, below: float = _FAR, lumen: float = _FAR) -> Mask:
        """Return which points are in the tile, between two depths in a gland and less deep in its lumen."""
        depth, lumen_depth, _, _ = self._at(points)
        inside = ((points >= 0) & (points < self.size)).all(axis=1)
        return inside & (depth > above) & (depth < below) & (lumen_depth < lumen)

    def _lay_nuclei(self, kind: str, points: Points, turns: Points) -> None:
        angles = np.rint(turns * (_ANGLES / np.pi)).astype(np.int64) % _ANGLES
        numbers = angles * _VARIANTS + self.random.integers(0, _VARIANTS, len(angles))
        self._lay(points, (self.materials.stamps[kind][n] for n in numbers), np.maximum, np.minimum)

    def _lay(self, points: Points, stamps: Iterable[Stamp], bound_haem: np.ufunc, bound_eosin: np.ufunc) -> None:
        """Bound both stains by a stamp around every point in the tile."""
        haem, eosin = self.stains
        for (y, x), (haem_stamp, eosin_stamp) in zip((points.astype(np.int64) + _MARGIN).tolist(), stamps):
            half = len(haem_stamp) // 2
            block = np.s_[y - half : y + half + 1, x - half : x + half + 1]
            bound_haem(haem[block], haem_stamp, out=haem[block])
            bound_eosin(eosin[block], eosin_stamp, out=eosin[block])


def _noise(random: np.random.Generator, grain_y: float, grain_x: float) -> Floats:
    """Return periodic Gaussian noise of unit variance, (512, 512), smooth over the given lengths."""
    fy, fx = np.fft.fftfreq(ATLAS_PX)[:, None], np.fft.rfftfreq(ATLAS_PX)
    smooth = np.exp(-2 * np.pi**2 * ((grain_y * fy) ** 2 + (grain_x * fx) ** 2))
    field = np.fft.irfft2(np.fft.rfft2(random.standard_normal((ATLAS_PX, ATLAS_PX))) * smooth, s=(ATLAS_PX, ATLAS_PX))
    return ((field - field.mean()) / field.std()).astype(F32)


def _nucleus(random: np.random.Generator, grain: Floats, turn: float, shape: Shape) -> Stamp:
    """Draw a ragged ellipse with a membrane, clumps of chromatin and, if large, a nucleolus."""
    radii, aspects, ragged, densities, chromatin = shape
    radius, aspect = random.uniform(*radii), random.uniform(*aspects)
    half = int(radius * np.sqrt(aspect) * (1 + 2 * ragged)) + 2
    assert half <= _MARGIN, half
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(F32)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    theta = np.arctan2(across, along)
    waves = [a * np.cos(k * theta + p) for k, a, p in zip((2, 3, 4), random.normal(0, 1, 3), random.uniform(0, 6.3, 3))]
    outline = radius * (1 + ragged * np.sum(waves, axis=0))
    depth = outline - np.hypot(along / np.sqrt(aspect), across * np.sqrt(aspect))
    cover = np.clip(depth * 0.8 / np.sqrt(aspect) + 0.5, 0, 1)
    oy, ox = random.integers(0, ATLAS_PX - 2 * half, 2)
    clumps = grain[oy : oy + 2 * half + 1, ox : ox + 2 * half + 1] * chromatin
    membrane = np.exp(-(((depth - 1.2) / 1.2) ** 2)) * chromatin
    density = random.uniform(*densities) * (1 - chromatin * 0.5 + clumps + 1.5 * membrane)
    if chromatin > 0.2 and random.uniform() < 0.6:
        ny, nx = random.normal(0, radius * 0.25, 2)
        density = density + 0.7 * np.exp(-((y - ny) ** 2 + (x - nx) ** 2) / 3.0)
    least_haem = np.clip(cover * density * _LEVELS, 0, 255).astype(U8)
    return least_haem, (255 - cover * (255 - 0.3 * _LEVELS)).astype(U8)
