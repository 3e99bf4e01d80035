"""Online stores: tiles straight from the slides, at a place that the position draws.

Its folder has, beside what every store has,

    store.json        kind "slides", MPPs, side of a tile, least share of tissue, whether it is one of the grid alone,
                      SHA-256 of the index files, and their folder in the store
    slides.parquet    the slide table, with `first_tile`, and of every slide MPP, size and reader
    paths.bin/.npy    where every slide is: text and end offsets
    corners.npy       uint32, x and y of every tile of the grid, in level-0 pixels
    run_starts.npy    uint32, first cell of every run of every area (see `hpcssl.stores.online_places`)
    run_ends.npy      uint32, cells of its area up to and with the run
    areas.npy         uint64, runs up to the end of every area: of each slide the tissue, then the corners at each MPP

Tile number t is a tile of the grid at the first MPP, the one that `hpcssl tile` cuts: one schedule serves both. As it
is opened, a store gives these tiles. Unless it was built for the grid, `drawn_by` a schedule it gives every position a
place of its own on the slide of tile t, a function of position and t, so that a substitute for t is elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hpcssl.core.atomic import digest_bytes
from hpcssl.core.errors import BadTileError, SlideError, StoreError, UnreachableTileError
from hpcssl.core.rng import uniforms
from hpcssl.slides.opening import OpenSlides
from hpcssl.slides.ranges import Ranges, is_remote
from hpcssl.slides.sampling import read_tile, sample
from hpcssl.slides.slide_table import digest_slides, slide_of
from hpcssl.stores.online_places import Runs, choose, draw_corner, whole_weights
from hpcssl.stores.store import IndexLayout, Store, Texts

_MOST_OPEN = 64  # slides; each holds a file and a table of its blocks
_MOST_HELD = 1 << 27  # bytes of these tables; a slide of 200,000 blocks has about 4 MB


class Place(NamedTuple):
    """Where a tile is: upper left corner in level-0 pixels, microns per pixel of the tile."""

    slide: int
    x: int
    y: int
    mpp: float

    def __str__(self) -> str:
        return f"x {self.x}, y {self.y}, MPP {self.mpp:g}"


class OnlineStore(Store):
    """An opened store of slides; threads may share it, also with what `drawn_by` returns."""

    kind = "slides"
    layout = IndexLayout(
        texts=("paths",),
        arrays={"corners.npy": "<u4", "run_starts.npy": "<u4", "run_ends.npy": "<u4", "areas.npy": "<u8"},
        ends_in={"areas.npy": "run_ends.npy"},
    )
    _draws: tuple[int, list[int]] | None = None  # of places: seed, and the weight of every MPP of the store

    def __init__(self, path: Path, header: dict[str, Any]):
        super().__init__(path, header)
        self.mpps: list[float] = header["mpps"]  # microns per pixel of its tiles; the first is the grid's
        self.tile_px: int = header["tile_px"]
        self.of_grid: bool = header["of_grid"]  # built to give the tiles of the grid, whatever the position
        self._paths = Texts(self.index, "paths", self.num_slides)
        self._areas = self._array("areas.npy", self.num_slides * (1 + len(self.mpps)))
        num_runs = int(self._areas[-1]) if self.num_slides else 0
        self._run_starts = self._array("run_starts.npy", num_runs)
        self._run_ends = self._array("run_ends.npy", num_runs)
        self._corners = self._array("corners.npy", 2 * self.num_tiles)
        self._open = OpenSlides(_MOST_OPEN, _MOST_HELD)
        self._columns = self.slides["mask_columns"].to_numpy(np.int64)
        self._cell = self.slides["mask_cell"].to_numpy(np.float64)
        self._slide_mpp = self.slides["mpp"].to_numpy(np.float64)

    @classmethod
    def sealed(cls, header: Mapping[str, Any], slides: pd.DataFrame, files: Mapping[str, str]) -> dict[str, Any]:
        """See `Store.sealed`; the digest is that of all that tiles depend on, but not where the slides lie."""
        slides_digest = digest_slides(slides)
        settings = {key: header[key] for key in ("mpps", "tile_px", "of_grid")}
        arrays = {name: files[name] for name in cls.layout.arrays}
        whole = json.dumps([slides_digest, settings, arrays, slides["bytes"].tolist(), slides["mpp"].tolist()])
        return {**header, "files": files, "slides_digest": slides_digest, "digest": digest_bytes(whole.encode())}

    @property
    def drawn(self) -> bool:
        """See `Store.drawn`."""
        return self._draws is not None

    def drawn_by(self, seed: int, mpp_weights: Mapping[float, float]) -> Store:
        """See `Store.drawn_by`; a slide that lacks an MPP shares its weight among the others."""
        unknown = [mpp for mpp in mpp_weights if mpp not in self.mpps]
        if unknown:
            known = ", ".join(map(str, self.mpps))
            raise StoreError(f"{self.path}: mpp_weights names MPP {unknown[0]}; this store has places at {known}")
        if self.of_grid:
            return self
        weights = whole_weights([mpp_weights.get(mpp, 0) if mpp_weights else 1 for mpp in self.mpps])
        runs = np.diff(self._areas, prepend=np.uint64(0)).reshape(self.num_slides, 1 + len(self.mpps))
        lost = np.flatnonzero(~((runs[:, 1:] > 0) & (np.array(weights) > 0)).any(axis=1))
        if len(lost):
            named = ", ".join(str(mpp) for mpp, weight in zip(self.mpps, weights) if weight)
            raise StoreError(
                f"{self.path}: slide {self.slides['slide_id'].iloc[lost[0]]} has no place for a tile at MPP {named}"
                f" ({len(lost)} such slides); name another MPP in mpp_weights, or build the store without them"
            )
        store = type(self).__new__(type(self))  # shares all with this one but how it draws
        vars(store).update(vars(self), _draws=(seed, weights))
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        return (*super().__reduce__(), {"_draws": self._draws})

    def area(self, slide: int, mpp: float | None = None) -> Runs:
        """Return the tissue of a slide, or the cells in which a tile's corner at one of the store's MPPs may lie."""
        number = slide * (1 + len(self.mpps)) + (0 if mpp is None else 1 + self.mpps.index(mpp))
        runs = slice(int(self._areas[number - 1]) if number else 0, int(self._areas[number]))
        return Runs(self._run_starts[runs], self._run_ends[runs])

    def place_of(self, position: int, tile: int) -> Place:
        """Return where the tile at a position is."""
        slide = self.slide_of(tile)
        if self._draws is None:
            return Place(slide, *self.coordinates_of(tile), self.mpps[0])
        seed, weights = self._draws
        words = uniforms(seed, "place", position, view=tile % 2**32, stream=tile >> 32).tolist()
        areas = [self.area(slide, mpp) for mpp in self.mpps]
        number = choose(words[0], [w if a.total else 0 for w, a in zip(weights, areas)])
        x, y = draw_corner(areas[number], words[1:], int(self._columns[slide]), float(self._cell[slide]))
        return Place(slide, x, y, self.mpps[number])

    def fetch(self, position: int, tile: int) -> NDArray[np.uint8]:
        """Return a tile's pixels, (tile_px, tile_px, 3) RGB; see `Store.fetch`.

        UnreachableTileError where the slide's server does not answer, after the tries and within the time of
        `hpcssl.slides.ranges`.
        """
        place = self.place_of(position, tile)
        path, slide_mpp = self._paths[place.slide], float(self._slide_mpp[place.slide])
        try:
            slide = self._open.get(path)
            sampling = sample(slide, slide_mpp=slide_mpp, mpp=place.mpp, tile_px=self.tile_px)
            return read_tile(slide, sampling, place.x, place.y)
        except SlideError as error:
            if not is_remote(path) and not Path(path).parent.is_dir():  # not a slide that is missing, but a disk
                raise StoreError(f"{Path(path).parent}: no such folder; is its file system mounted?") from None
            raise BadTileError(f"{error} ({place})") from None
        except OSError as error:
            if not is_remote(path):
                raise
            raise UnreachableTileError(f"{path}: {error.strerror or error} ({place})") from None

    def file_of(self, tile: int) -> Path:
        """Return the file of a tile's slide."""
        return Path(self._paths[self.slide_of(tile)])

    def files_of(self, tiles: NDArray[np.int64]) -> list[str]:
        """Return the files of the slides of many tiles, as text."""
        return [self._paths[slide] for slide in slide_of(tiles, self.first_tiles).tolist()]

    def name_of(self, position: int, tile: int) -> str:
        """See `Store.name_of`; with the place that the position draws."""
        place = self.place_of(position, tile)
        organ, slide_id = self.slides[["organ", "slide_id"]].iloc[place.slide]
        return f"{organ}/{slide_id} at {place}"

    def coordinates_of(self, tile: int) -> tuple[int, int]:
        """Return the corner (x, y) of a tile of the grid in level-0 pixels."""
        return int(self._corners[2 * tile]), int(self._corners[2 * tile + 1])

    def describe_tiles(self) -> str:
        """See `Store.describe_tiles`."""
        return f"all {self.num_slides} slides"

    def _check_tiles(self, on_progress: Callable[[int], None], *, deep: bool, threads: int) -> None:
        """Check that every slide is there with its size, and with `deep` that every tile of the grid can be read."""
        sizes = self.slides["bytes"].tolist()

        def changes(slide: int) -> tuple[int, list[str]]:
            first, count = self.tiles_of_slide(slide)
            try:
                size = Ranges.open(self._paths[slide]).size
                if size != sizes[slide]:
                    return count, [f"{self._paths[slide]} has {size} bytes, not {sizes[slide]}"]
                if deep:
                    for tile in range(first, first + count):
                        self.fetch(tile, tile)
            except UnreachableTileError:  # tells nothing of the slide
                raise
            except (SlideError, StoreError) as error:
                return count, [str(error)]
            return count, []

        what, advice = f"{self.num_slides} slides changed since it was built", "put them back or build the store anew"
        self._refuse_faults(changes, range(self.num_slides), on_progress, threads, what=what, advice=advice)
