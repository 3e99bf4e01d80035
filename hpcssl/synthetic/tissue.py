"""One tile of synthetic tissue: glands, fibres, nuclei and red cells laid on two maps of stain, then coloured.

Suffixes: G glands, N points, Q the coarse grid. Points are (row, column); lengths are pixels at 0.5 microns per pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpcssl.synthetic.materials import (
    ANGLES,
    ATLAS_PX,
    F32,
    LARGEST_HALF,
    STAIN_LEVEL,
    U8,
    VARIANTS,
    Materials,
    Stamp,
    disc,
    mean_area,
)

COARSE_PX = 4  # glands are computed on every fourth pixel
_MARGIN = LARGEST_HALF  # of the stain maps, so that a stamp never needs clipping
_SCATTER_PX = 15.0  # between large nuclei
_FAR_OUTSIDE = -99.0


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How an organ is built; lengths in pixels."""

    spacing: float  # between gland centres
    present: float  # share of the places that hold a gland
    radius: float  # outer, of a gland
    wall: float  # epithelium between stroma and lumen
    shed: float = 0.0  # share of the places without a gland that hold a fat cell
    goblets: float = 0.0  # mucous vacuoles for every epithelial nucleus
    red_cells: float = 0.0  # mean number of groups of red cells in a tile


ORGANS = {
    "breast": Architecture(spacing=104, present=0.5, radius=38, wall=21, shed=0.35, red_cells=0.15),
    "lung": Architecture(spacing=92, present=1.0, radius=46, wall=13, red_cells=1.6),
    "colon": Architecture(spacing=84, present=0.94, radius=38, wall=23, goblets=0.55, red_cells=0.2),
}


@dataclass(frozen=True, kw_only=True)
class Look:
    """What all tiles of a slide have in common."""

    architecture: Architecture
    cellularity: float  # nuclei in the stroma, relative
    looseness: float  # white between the fibres, 0 to 1
    crowding: float  # share of the places for epithelial nuclei that are taken
    cytoplasm: tuple[float, float]  # optical density of haematoxylin and eosin in the epithelium
    colours: NDArray[np.uint8]  # (65536, 4): RGB and a pad at haematoxylin · 256 + eosin


# stamps: drops of mucus by radius (the most stain that is left there), a red cell (the least eosin)
_DROPS = {reach: (255 - disc(reach, reach - 0.7) * (255 - 0.14 * STAIN_LEVEL)).astype(U8) for reach in range(4, 8)}
_RED_CELL = ((disc(5, 3.4) * 1.7 - disc(5, 1.0) * 0.3) * STAIN_LEVEL).astype(U8)


def draw_tissue(
    random: np.random.Generator, materials: Materials, look: Look, *, altered: bool, tile_px: int
) -> NDArray[np.uint8]:
    """Return one tile, (tile_px, tile_px, 4) uint8: RGB and a pad; `altered` is the texture of the positive label."""
    glands = _Glands(random, materials, look.architecture, altered, tile_px)
    angle = random.uniform(0, np.pi)
    haem, eosin = _background(random, materials, look, glands, angle, tile_px)
    _lay_stroma_cells(random, materials, look, glands, angle, haem, eosin)
    _lay_epithelium(random, materials, look, glands, haem, eosin)
    _lay_red_cells(random, look.architecture, haem, eosin, tile_px)
    codes = (_softened(haem) << 8) | _softened(eosin)
    return look.colours.view(np.uint32).ravel()[codes].view(U8).reshape(tile_px, tile_px, 4)


class _Glands:
    """The gland places of one tile, and how deep every point lies in them."""

    def __init__(
        self, random: np.random.Generator, materials: Materials, build: Architecture, altered: bool, tile_px: int
    ) -> None:
        n = int(np.ceil(tile_px / build.spacing)) + 2
        row, column = (a.ravel() for a in np.mgrid[:n, :n])
        jitter = build.spacing * (0.17 if altered else 0.08)
        offset = random.uniform(-build.spacing, 0, 2)
        places = np.stack([row * 0.9, column + 0.5 * (row % 2)], axis=1) * build.spacing - 0.25 * build.spacing
        places += offset + random.normal(0, jitter, (n * n, 2))
        kind = random.uniform(size=n * n)
        gland, fat = kind < build.present, kind > 1 - (1 - build.present) * build.shed
        used = gland | fat
        self.altered = altered
        self.is_gland = gland[used]
        self.centre_G2 = places[used].astype(F32)
        spread = 0.16 if altered else 0.07
        radius_G = build.radius * np.where(fat, 0.95, 1.0) * np.exp(random.normal(0, spread, n * n))
        self.radius_G = radius_G[used].astype(F32)
        wall_G = build.wall * np.exp(random.normal(0, 0.35 if altered else 0.08, n * n))
        self.wall_G = np.where(fat, 2.5, wall_G)[used].astype(F32)
        self._bend(random, materials, 7.0 if altered else 3.5, tile_px)

    def _bend(self, random: np.random.Generator, materials: Materials, bend_px: float, tile_px: int) -> None:
        """Compute the depth inside the outline and inside the lumen on the coarse grid, space bent by smooth noise."""
        size, step = tile_px, COARSE_PX
        self.bend_2QQ = np.stack([bend_px * _crop(random, materials.coarse, size)[::step, ::step] for _ in range(2)])
        axis = np.arange(0, size, step, dtype=F32)
        y_QQ = axis[:, None] + self.bend_2QQ[0]
        x_QQ = axis[None, :] + self.bend_2QQ[1]
        dy = y_QQ - self.centre_G2[:, 0, None, None]
        dx = x_QQ - self.centre_G2[:, 1, None, None]
        depth_GQQ = self.radius_G[:, None, None] - np.sqrt(dy * dy + dx * dx)
        self.depth_QQ = depth_GQQ.max(axis=0, initial=_FAR_OUTSIDE)
        ragged = (3.0 if self.altered else 1.2) * _crop(random, materials.medium, size)[::step, ::step]
        self.lumen_QQ = (depth_GQQ - self.wall_G[:, None, None]).max(axis=0, initial=_FAR_OUTSIDE) + ragged

    def at(self, field_QQ: NDArray[np.float32], points_N2: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return a coarse field's values at points inside the tile."""
        cells = np.clip((points_N2 / COARSE_PX).astype(np.int64), 0, len(field_QQ) - 1)
        return field_QQ[cells[:, 0], cells[:, 1]]


def _background(
    random: np.random.Generator,
    materials: Materials,
    look: Look,
    glands: _Glands,
    angle: float,
    tile_px: int,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the two stain maps of stroma, cytoplasm and lumen, with margins."""
    depth, lumen = _enlarge(glands.depth_QQ, tile_px), _enlarge(glands.lumen_QQ, tile_px)
    medium = _crop(random, materials.medium, tile_px)
    fine = _crop(random, materials.fine, tile_px)
    bend = _crop(random, materials.coarse, tile_px)
    fibre = F32(0.24) * _fibres(materials, bend, angle, tile_px)
    fibre += F32(0.18) * _fibres(materials, bend[::-1], angle + random.uniform(0.2, 0.7), tile_px)
    stroma = np.clip(F32(0.95 - look.looseness) + fibre + F32(0.2) * medium, 0.06, 1.5)
    epithelium = np.clip(depth * F32(0.5) + F32(0.5), 0, 1)
    tissue = np.clip(F32(0.5) - lumen * F32(0.5), 0, 1)
    texture = F32(1) + F32(0.13) * fine + F32(0.1) * medium
    maps = []
    for in_stroma, in_epithelium in ((0.1, look.cytoplasm[0]), (0.62, look.cytoplasm[1])):
        stain = stroma * F32(in_stroma)
        stain += epithelium * (F32(in_epithelium) - stain)
        stain *= tissue
        stain *= texture
        whole = np.zeros((tile_px + 2 * _MARGIN,) * 2, U8)
        inner = slice(_MARGIN, _MARGIN + tile_px)
        np.clip(stain * F32(STAIN_LEVEL) + F32(2.5), 0, 255, out=stain)
        whole[inner, inner] = stain
        maps.append(whole)
    return maps[0], maps[1]


def _fibres(materials: Materials, bend: NDArray[np.float32], angle: float, size: int) -> NDArray[np.float32]:
    """Return wavy fibres across an angle: the drawn-out noise looked up in turned, bent coordinates."""
    axis = np.arange(size, dtype=F32)
    cos, sin = F32(np.cos(angle)), F32(np.sin(angle))
    across = (axis * cos)[:, None] - (axis * sin)[None, :] + bend * F32(9)
    along = (axis * sin)[:, None] + (axis * cos)[None, :]
    index = (across.astype(np.int32) & (ATLAS_PX - 1)) * ATLAS_PX + (along.astype(np.int32) & (ATLAS_PX - 1))
    return materials.fibre.ravel()[index]


def _lay_stroma_cells(
    random: np.random.Generator,
    materials: Materials,
    look: Look,
    glands: _Glands,
    angle: float,
    haem: NDArray[np.uint8],
    eosin: NDArray[np.uint8],
) -> None:
    """Lay spindle nuclei along the fibres and, now and then, a cluster of lymphocytes."""
    tile_px = len(haem) - 2 * _MARGIN
    area = tile_px * tile_px
    points = random.uniform(0, tile_px, (int(area / 900 * look.cellularity), 2))
    outside = glands.at(glands.depth_QQ, points) < -3
    turn = angle + random.normal(0, 0.25, len(points))
    _lay(random, materials.stamps["spindle"], points[outside], turn[outside], haem, eosin)
    if random.uniform() < 0.3 * look.cellularity:
        centre = random.uniform(0, tile_px, 2)
        cluster = centre + random.normal(0, 20, (int(random.integers(8, 36)), 2))
        cluster = cluster[((cluster >= 0) & (cluster < tile_px)).all(axis=1)]
        cluster = cluster[glands.at(glands.depth_QQ, cluster) < -2]
        _lay(random, materials.stamps["lymphocyte"], cluster, np.zeros(len(cluster)), haem, eosin)


def _lay_epithelium(
    random: np.random.Generator,
    materials: Materials,
    look: Look,
    glands: _Glands,
    haem: NDArray[np.uint8],
    eosin: NDArray[np.uint8],
) -> None:
    """Lay the nuclei of the glands: even rows near the outline, or large ones in disorder, of the same area in all."""
    tile_px = len(haem) - 2 * _MARGIN
    points, turns = _rows(random, glands, tile_px)
    taken = random.uniform(size=len(points)) < look.crowding
    points, turns = points[taken], turns[taken]
    _lay_vacuoles(random, look.architecture.goblets, points, glands, haem, eosin)
    if glands.altered:
        number = round(len(points) * mean_area("regular") / mean_area("atypical"))
        points = _scattered(random, _SCATTER_PX, tile_px)
        inside = (glands.at(glands.depth_QQ, points) > 2) & (glands.at(glands.lumen_QQ, points) < -2)
        points = random.permutation(points[inside])[:number]
        turns = random.uniform(0, np.pi, len(points))
    _lay(random, materials.stamps["atypical" if glands.altered else "regular"], points, turns, haem, eosin)


def _rows(
    random: np.random.Generator, glands: _Glands, tile_px: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return points and orientations of nuclei in rows along the outlines of the glands."""
    points, turns = [], []
    depth = 99.0 if glands.altered else 5.0  # ragged glands count the rows that they would hold
    for row, inset in enumerate((7.0, 18.0)):
        chosen = glands.is_gland & (glands.wall_G > inset + 1.0)
        radius = glands.radius_G[chosen] - inset
        counts = np.maximum(2 * np.pi * radius / (10.5 + 2.5 * row), 1).astype(np.int64)
        owner = np.repeat(np.arange(len(counts)), counts)
        nth = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        theta = 2 * np.pi * nth / counts[owner] + random.normal(0, 0.045, len(owner))
        reach = radius[owner] + random.normal(0, 1.5, len(owner))
        place = np.stack([np.sin(theta), np.cos(theta)], axis=1) * reach[:, None]
        place += glands.centre_G2[chosen][owner]
        place -= np.stack([glands.at(bend, place) for bend in glands.bend_2QQ], axis=1)
        inside = ((place >= 0) & (place < tile_px)).all(axis=1)
        place, theta = place[inside], theta[inside]
        seated = (np.abs(glands.at(glands.depth_QQ, place) - inset) < depth) & (glands.at(glands.lumen_QQ, place) < -2)
        points.append(place[seated])
        turns.append(theta[seated])
    return np.concatenate(points), np.concatenate(turns)


def _scattered(random: np.random.Generator, pitch: float, size: int) -> NDArray[np.float64]:
    """Return points of a hexagonal grid, strongly jittered, inside the tile."""
    n = int(size / pitch) + 2
    row, column = (a.ravel() for a in np.mgrid[: int(n * 1.16), :n])
    points = np.stack([row * 0.866, column + 0.5 * (row % 2)], axis=1) * pitch
    points += random.uniform(-pitch, 0, 2) + random.normal(0, 0.15 * pitch, points.shape)
    return points[((points >= 0) & (points < size)).all(axis=1)]


def _lay_vacuoles(
    random: np.random.Generator,
    share: float,
    points: NDArray[np.float64],
    glands: _Glands,
    haem: NDArray[np.uint8],
    eosin: NDArray[np.uint8],
) -> None:
    """Lay pale drops of mucus between nuclei and lumen."""
    if not share or not len(points):
        return
    near = points[random.uniform(size=len(points)) < share] + random.normal(0, 7, (1, 2))
    size = len(haem) - 2 * _MARGIN
    near = near[((near >= 0) & (near < size)).all(axis=1)]
    near = near[(glands.at(glands.depth_QQ, near) > 10) & (glands.at(glands.lumen_QQ, near) < 1)]
    for (y, x), reach in zip(near.astype(np.int64).tolist(), random.integers(4, 8, len(near)).tolist()):
        cap = _DROPS[reach]
        block = np.s_[y + _MARGIN - reach : y + _MARGIN + reach + 1, x + _MARGIN - reach : x + _MARGIN + reach + 1]
        np.minimum(haem[block], cap, out=haem[block])
        np.minimum(eosin[block], cap, out=eosin[block])


def _lay_red_cells(
    random: np.random.Generator,
    build: Architecture,
    haem: NDArray[np.uint8],
    eosin: NDArray[np.uint8],
    tile_px: int,
) -> None:
    """Lay groups of red cells: strong eosin, no haematoxylin."""
    for _ in range(random.poisson(build.red_cells)):
        centre = random.uniform(0, tile_px, 2)
        group = centre + random.normal(0, 12, (int(random.integers(3, 16)), 2))
        group = group[((group >= 0) & (group < tile_px)).all(axis=1)]
        for y, x in group.astype(np.int64).tolist():
            block = np.s_[y + _MARGIN - 5 : y + _MARGIN + 6, x + _MARGIN - 5 : x + _MARGIN + 6]
            np.maximum(eosin[block], _RED_CELL, out=eosin[block])
            np.minimum(haem[block], 255 - _RED_CELL, out=haem[block])


def _lay(
    random: np.random.Generator,
    stamps: list[Stamp],
    points_N2: NDArray[np.float64],
    turns_N: NDArray[np.float64],
    haem: NDArray[np.uint8],
    eosin: NDArray[np.uint8],
) -> None:
    """Stamp nuclei on the maps; points are (row, column) inside the tile."""
    bins = np.rint(turns_N * (ANGLES / np.pi)).astype(np.int64) % ANGLES
    which = bins * VARIANTS + random.integers(0, VARIANTS, len(bins))
    for (y, x), k in zip((points_N2.astype(np.int64) + _MARGIN).tolist(), which.tolist()):
        least, most = stamps[k]
        half = least.shape[0] // 2
        block = np.s_[y - half : y + half + 1, x - half : x + half + 1]
        np.maximum(haem[block], least, out=haem[block])
        np.minimum(eosin[block], most, out=eosin[block])


def _softened(stain: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Return a stain map without its margin, blurred as by a microscope (1 2 1 both ways), 0 to 255."""
    inner = slice(_MARGIN - 1, 1 - _MARGIN)
    rows = stain[inner, inner].astype(np.uint16)
    rows = rows[:-2] + rows[2:] + 2 * rows[1:-1]
    rows = rows[:, :-2] + rows[:, 2:] + 2 * rows[:, 1:-1]
    rows >>= 4
    return rows


def _crop(random: np.random.Generator, field: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    y, x = random.integers(0, ATLAS_PX, 2)
    return field[y : y + size, x : x + size]


def _enlarge(field_QQ: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Interpolate a coarse field linearly to every pixel."""
    place = np.arange(size, dtype=F32) / F32(COARSE_PX)
    left = np.minimum(place.astype(np.int64), len(field_QQ) - 2)
    right = (place - left).astype(F32)
    rows = field_QQ[left] * (1 - right)[:, None] + field_QQ[left + 1] * right[:, None]
    rows = np.ascontiguousarray(rows.T)
    return (rows[left] * (1 - right)[:, None] + rows[left + 1] * right[:, None]).T
