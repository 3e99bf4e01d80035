"""One slide into tiles: found once where they are, then cut region by region by many threads, in the grid's order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from hpcssl.core.errors import ConfigError, SlideError
from hpcssl.core.ordered import in_order
from hpcssl.slides.foreground import Foreground, find_foreground
from hpcssl.slides.grid import grid, regions
from hpcssl.slides.opening import open_slide
from hpcssl.slides.sampling import Sampling, read_tile, sample
from hpcssl.slides.slide import Slide
from hpcssl.slides.slide_list import mpp_of

_CACHE_MB = 24.0  # for each thread: decoded blocks that the tiles of a region share, twice
COARSER = 1.1  # a slide may be so much coarser than the tiles: scanners say 0.5045 where 0.5 is meant
_CHROMA = "444"  # in full: at the same bytes closer to the slide than a higher quality with halved chrominance


@dataclass(frozen=True, kw_only=True)
class CutOptions:
    """What tiles are cut."""

    mpp: float = 0.5  # microns per pixel of the tiles
    tile_px: int = 224  # side of a tile
    min_tissue: float = 0.4  # share of a tile that must be tissue
    quality: int = 90  # of the JPEGs (libjpeg's scale), with chrominance in full; 90 gives about 26 kB a tile of 224 px
    assume_mpp: float | None = None  # of slides whose MPP neither the table nor the file says

    def __post_init__(self) -> None:
        bounds = {"mpp": (0.05, 100), "tile_px": (16, 8192), "min_tissue": (0, 1), "quality": (1, 100)}
        bounds["assume_mpp"] = (0.05, 20)
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ConfigError(f"--{name.replace('_', '-')} {value:g}; expected {least:g} to {most:g}")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A slide whose tiles are known, but not cut yet."""

    slide: Slide
    slide_mpp: float
    foreground: Foreground
    sampling: Sampling
    corners: NDArray[np.int64]  # of the tiles, (tiles, 2), level-0 pixels; there may be none
    quality: int

    @property
    def facts(self) -> dict[str, Any]:
        """What the slide table says of the slide."""
        read_by = {"scanner": self.slide.about.scanner, "reader": self.slide.reader}
        return {"mpp": self.slide_mpp, "tissue_mm2": round(self.foreground.tissue_mm2, 4), **read_by}

    def jpegs(self, pool: Executor, *, window: int) -> Iterator[list[bytes]]:
        """Yield the tiles in the grid's order, some at a time; `window` regions at most are under way.

        SlideError where the slide cannot be read.
        """
        for _, some in in_order(pool, self._encoded, regions(self.corners, self.sampling), window=window):
            yield some

    def _encoded(self, span: tuple[int, int]) -> list[bytes]:
        options: dict[str, Any] = {"quality": self.quality, "colorspace": "RGB", "colorsubsampling": _CHROMA}
        with reading(self.slide.path):
            tiles = (read_tile(self.slide, self.sampling, x, y) for x, y in self.corners[slice(*span)].tolist())
            return [simplejpeg.encode_jpeg(np.ascontiguousarray(tile), **options) for tile in tiles]


def plan_cut(row: Mapping[str, Any], options: CutOptions, pool: Executor, *, threads: int) -> Cut:
    """Open the slide of a row of the slide table, and find its tiles; `threads` are those of the pool.

    SlideError where it cannot be read, says no MPP, or is too coarse.
    """
    with reading(row["path"]):
        slide = pool.submit(open_slide, row["path"], cache_mb=_CACHE_MB * threads).result()
        slide_mpp = mpp_of(slide, row, options.assume_mpp)
        if slide_mpp > COARSER * options.mpp:
            coarser = f"{slide_mpp:g} microns per pixel, coarser than --mpp {options.mpp:g}"
            raise SlideError(f"{slide.path}: {coarser}; tile it with --mpp {slide_mpp:g} or more")
        sampling = sample(slide, slide_mpp=slide_mpp, mpp=options.mpp, tile_px=options.tile_px)
        foreground = find_foreground(slide, slide_mpp=slide_mpp, each=pool.map)
        corners = grid(slide, foreground, sampling, options.min_tissue)
    return Cut(
        slide=slide,
        slide_mpp=slide_mpp,
        foreground=foreground,
        sampling=sampling,
        corners=corners,
        quality=options.quality,
    )


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn whatever reading a slide raises into its SlideError: one bad slide must not stop the others."""
    try:
        yield
    except SlideError:
        raise
    except OSError as error:  # of a disk or a server
        raise SlideError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # readers of damaged files raise anything
        text = " ".join(str(error).split())
        raise SlideError(f"{path}: cannot be read ({type(error).__name__}{': ' if text else ''}{text})") from error


def tile_name(index: int, x: int, y: int) -> str:
    """Return the file name of a slide's tile: its number in the slide, and its corner in level-0 pixels.

    >>> tile_name(7, 448, 0)
    '000007_x448_y0.jpg'
    """
    return f"{index:06d}_x{x}_y{y}.jpg"
