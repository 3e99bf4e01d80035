"""Tile stores: where the bytes of tile number t are.

A store is a folder:

    store.json       format version, kind, root of the tile files, counts, SHA-256 of the files below
    slides.parquet   the slide table, with `first_tile`
    folders.bin/.npy folder of every slide below the root: text and end offsets
    names.bin/.npy   file name of every tile in its slide's folder: text and end offsets
    sizes.npy        uint32, bytes of every tile file

Tile number t is global: its slide's first tile + its index in the slide. All but `slides.parquet` are memory-mapped, so
that opening costs the same for a thousand tiles and for three billion.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hpcssl.core.atomic import digest_bytes, digest_file, read_json
from hpcssl.core.errors import StoreError
from hpcssl.tiles.slides import digest_slides

FORMAT = 1
INDEX_FILES = ("slides.parquet", "folders.bin", "folders.npy", "names.bin", "names.npy", "sizes.npy")
_COORDINATES = re.compile(r"_x(\d+)_y(\d+)\.jpe?g$", re.IGNORECASE)


def identity(slides: pd.DataFrame, files: Mapping[str, str]) -> dict[str, str]:
    """Return the digests of a store: of its slides, and of slides, names and sizes together."""
    slides_digest = digest_slides(slides)
    whole = digest_bytes("".join([slides_digest, files["names.bin"], files["sizes.npy"]]).encode())
    return {"slides_digest": slides_digest, "digest": whole}


class Texts:
    """Many short texts in one file: UTF-8 bytes after each other, and a uint64 array of where each ends."""

    def __init__(self, folder: Path, stem: str):
        try:
            self._ends = np.load(folder / f"{stem}.npy", mmap_mode="r")
        except Exception as error:  # noqa: BLE001 - numpy parses a header with Python's own parser and its many errors
            reason = " ".join(str(error).split())
            raise StoreError(f"{folder / stem}.npy: damaged ({reason}); build the store anew") from None
        has_bytes = (folder / f"{stem}.bin").stat().st_size > 0
        self._bytes = (
            np.memmap(folder / f"{stem}.bin", dtype=np.uint8, mode="r") if has_bytes else np.zeros(0, np.uint8)
        )

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return self._bytes[start : int(self._ends[index])].tobytes().decode()


class Store:
    """An opened loose store.

    Attributes
    ----------
    path : folder of the store
    root : folder of the tile files
    num_tiles, num_slides : int
    digest : str, SHA-256 over slide table, names and sizes; the store's identity
    """

    def __init__(self, path: Path, header: dict[str, Any]):
        self.path = path
        self.header = header
        self.root = Path(header["root"])
        self.num_tiles: int = header["num_tiles"]
        self.num_slides: int = header["num_slides"]
        self.digest: str = header["digest"]
        self._folders = Texts(path, "folders")
        self._names = Texts(path, "names")

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open a store; StoreError where there is none, or one of another format."""
        try:
            damaged = StoreError(f"{path / 'store.json'}: damaged; build the store anew")
            header = read_json(path / "store.json", damaged)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(
                f"{path}: no tile store (no store.json); make one with hpcssl store build TILES --out {path}"
            ) from None
        if header.get("format") != FORMAT:
            raise StoreError(f"{path}: store format {header.get('format')}; this version reads {FORMAT}")
        missing = [name for name in INDEX_FILES if not (path / name).is_file()]
        if missing:
            raise StoreError(f"{path}: {missing[0]} is missing; build the store anew")
        return cls(path, header)

    @cached_property
    def slides(self) -> pd.DataFrame:
        """The slide table, with `first_tile`."""
        return pd.read_parquet(self.path / "slides.parquet")

    @cached_property
    def first_tiles(self) -> np.ndarray:
        """First tile number of every slide, (num_slides,) int64."""
        return self.slides["first_tile"].to_numpy()

    def file_of(self, tile: int) -> Path:
        """Return the file of a tile."""
        slide = int(np.searchsorted(self.first_tiles, tile, side="right")) - 1
        return self.root / self._folders[slide] / self._names[tile]

    def coordinates_of(self, tile: int) -> tuple[int, int]:
        """Return a tile's corner (x, y) in level-0 pixels, from a name that ends in `_x<x>_y<y>.jpg`; else (-1, -1)."""
        match = _COORDINATES.search(self._names[tile])
        return (int(match[1]), int(match[2])) if match else (-1, -1)

    def fetch(self, position: int, tile: int) -> bytes:
        """Return the JPEG bytes of a tile, by one read; `position` matters to stores that draw the place from it."""
        path = self.file_of(tile)
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise StoreError(f"{path}: tile {tile} is gone; run hpcssl store verify {self.path}") from None
        try:
            return os.read(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)

    def verify(self, on_progress: Callable[[int], None] = lambda n: None) -> None:
        """Check every checksum of the index and that every tile file is there with its size.

        Raises
        ------
        StoreError
            Naming the first file that differs, and how many do.
        """
        for name, digest in self.header["files"].items():
            if digest_file(self.path / name) != digest:
                raise StoreError(f"{self.path / name}: not what was written (checksum differs); build the store anew")
        sizes = np.load(self.path / "sizes.npy", mmap_mode="r")
        true = identity(self.slides, self.header["files"]) | {"num_slides": len(self._folders), "num_tiles": len(sizes)}
        for key, value in true.items():
            if self.header[key] != value:
                raise StoreError(f"{self.path / 'store.json'}: {key} is not that of its files; build the store anew")
        bad: list[str] = []
        for tile in range(self.num_tiles):
            path = self.file_of(tile)
            try:
                found = path.stat().st_size
            except FileNotFoundError:
                found = None
            if found != sizes[tile]:
                bad.append(f"{path} is missing" if found is None else f"{path} has {found} bytes, not {sizes[tile]}")
            on_progress(1)
        if bad:
            raise StoreError(
                f"{self.path}: {len(bad)} of {self.num_tiles} tiles changed since it was built; first: {bad[0]};"
                " build the store anew"
            )
