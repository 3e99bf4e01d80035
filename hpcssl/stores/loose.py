"""Loose stores: one JPEG file a tile, where it is; `root` in store.json says below which folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpcssl.core.errors import BadTileError, StoreError
from hpcssl.stores.store import IndexLayout
from hpcssl.stores.tile_files import sizes_in
from hpcssl.stores.tile_store import SIZES, TEXTS, TileStore


class LooseStore(TileStore):
    """An opened store of tile files."""

    kind = "loose"
    layout = IndexLayout(texts=TEXTS, arrays=SIZES)

    def __init__(self, path: Path, header: dict[str, Any]):
        super().__init__(path, header)
        self.root = Path(header["root"])

    def _prefix(self, tile: int) -> str:
        return f"{self.root}/"

    def fetch(self, position: int, tile: int) -> bytes:
        """See `Store.fetch`."""
        path = self.file_of(tile)
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            if not self.root.is_dir():  # not a tile that is missing, but a disk
                raise StoreError(f"{self.root}: no such folder; is its file system mounted?") from None
            raise BadTileError(f"{path}: tile {tile} is gone; run hpcssl store verify {self.path}") from None
        try:
            return os.read(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)

    def describe_tiles(self) -> str:
        """See `Store.describe_tiles`."""
        return f"all {self.num_tiles} tile files"

    def _check_tiles(self, on_progress: Callable[[int], None], *, deep: bool, threads: int) -> None:
        advance = (lambda n: None) if deep else on_progress
        what, advice = f"{self.num_tiles} tiles changed since it was built", "build the store anew"
        slides = range(self.num_slides)
        self._refuse_faults(self._changed_files, slides, advance, threads, what=what, advice=advice)
        if deep:
            self._check_pixels(on_progress, threads=threads)

    def _changed_files(self, slide: int) -> tuple[int, list[str]]:
        """Return how many tiles a slide has, and which of their files are gone or have another size."""
        first, count = self.tiles_of_slide(slide)
        folder, faults = self.folder_of_slide(slide), []
        sizes = sizes_in(self.root, folder)
        for name, expected in zip(self.names_of(first, count), self.sizes[first : first + count].tolist()):
            size = sizes.get(name)
            if size != expected:
                path = self.root / folder / name.decode()
                faults.append(f"{path} is missing" if size is None else f"{path} has {size} bytes, not {expected}")
        return count, faults
