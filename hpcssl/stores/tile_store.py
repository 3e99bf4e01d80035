"""What loose and packed stores have in common: JPEG tiles that have names, `<organ>/<slide_id>/<name>.jpg`.

folders.bin/.npy  folder of every slide below the root: text and end offsets
names.bin/.npy    file name of every tile in its slide's folder: text and end offsets
sizes.npy         uint32, bytes of every tile
"""

from __future__ import annotations

import io
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError

from hpcssl.core.atomic import digest_bytes
from hpcssl.core.errors import StoreError
from hpcssl.slides.slide_table import digest_slides, slide_of
from hpcssl.stores.store import Store, Texts
from hpcssl.stores.tile_files import PADDING, jpeg_fault

TEXTS, SIZES = ("folders", "names"), {"sizes.npy": "<u4"}
_COORDINATES = re.compile(r"_x(\d+)_y(\d+)\.jpe?g$", re.IGNORECASE)
_DECODED_TOGETHER = 32
_UNDECODABLE = (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError)


class TileStore(Store):
    """An opened store of JPEG tiles."""

    sizes: np.ndarray  # (num_tiles,) uint32, memory-mapped: bytes of every tile

    def __init__(self, path: Path, header: dict[str, Any]):
        super().__init__(path, header)
        self._folders = Texts(self.index, "folders", self.num_slides)
        self._names = Texts(self.index, "names", self.num_tiles)
        self.sizes = self._array("sizes.npy", self.num_tiles)

    @classmethod
    def sealed(cls, header: Mapping[str, Any], slides: pd.DataFrame, files: Mapping[str, str]) -> dict[str, Any]:
        """See `Store.sealed`; the digest is that of slides, names and sizes together."""
        slides_digest = digest_slides(slides)
        digest = digest_bytes("".join([slides_digest, files["names.bin"], files["sizes.npy"]]).encode())
        return {**header, "slides_digest": slides_digest, "digest": digest, "files": files}

    @abstractmethod
    def fetch(self, position: int, tile: int) -> bytes:
        """See `Store.fetch`."""

    @abstractmethod
    def _prefix(self, tile: int) -> str:
        """Return what stands in front of `<organ>/<slide_id>/<name>` in the name of a tile's file."""

    def folder_of_slide(self, slide: int) -> str:
        """Return the folder of slide number `slide` below the root."""
        return self._folders[slide]

    def names_of(self, first: int, count: int) -> list[bytes]:
        """Return the file names of `count` tiles from `first` on, UTF-8."""
        return self._names.span(first, count)

    def file_of(self, tile: int) -> Path:
        """See `Store.file_of`."""
        return Path(f"{self._prefix(tile)}{self._folders[self.slide_of(tile)]}/{self._names[tile]}")

    def files_of(self, tiles: np.ndarray) -> list[str]:
        """See `Store.files_of`."""
        slides = slide_of(tiles, self.first_tiles)
        folders = {slide: self._folders[slide] for slide in np.unique(slides).tolist()}
        pairs = zip(slides.tolist(), tiles.tolist())
        return [f"{self._prefix(tile)}{folders[slide]}/{self._names[tile]}" for slide, tile in pairs]

    def coordinates_of(self, tile: int) -> tuple[int, int]:
        """Return a tile's corner (x, y) in level-0 pixels, from a name that ends in `_x<x>_y<y>.jpg`; else (-1, -1)."""
        match = _COORDINATES.search(self._names[tile])
        return (int(match[1]), int(match[2])) if match else (-1, -1)

    def _check_pixels(self, on_progress: Callable[[int], None], *, threads: int) -> None:
        """Raise StoreError if a tile is no JPEG that can be decoded: the first, and how many."""

        def undecodable(start: int) -> tuple[int, list[str]]:
            tiles = range(start, min(start + _DECODED_TOGETHER, self.num_tiles))
            return len(tiles), [fault for fault in map(self._fault, tiles) if fault]

        starts, advice = range(0, self.num_tiles, _DECODED_TOGETHER), "mend or remove them and build the store anew"
        what = f"{self.num_tiles} tiles cannot be decoded"
        self._refuse_faults(undecodable, starts, on_progress, threads, what=what, advice=advice)

    def _fault(self, tile: int) -> str | None:
        try:
            jpeg = self.fetch(tile, tile)
        except StoreError as error:
            return str(error)
        fault = jpeg_fault(jpeg[:3], jpeg[-PADDING:])  # decoders fill a missing end with grey and say nothing
        if fault:
            return f"{self.file_of(tile)} ({fault})"
        try:
            Image.open(io.BytesIO(jpeg), formats=("JPEG",)).load()
        except _UNDECODABLE as error:
            return f"{self.file_of(tile)} ({' '.join(str(error).split())})"
        return None
