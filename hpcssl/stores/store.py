"""Tile stores: where the bytes of tile number t are.

A store is a folder:

    store.json        format version, kind, counts, SHA-256 of the index files; of a loose store the root of the tile
                      files, of a packed one the bytes of every shard, of an extended one the folder of its index
    slides.parquet    the slide table, with `first_tile`
    folders.bin/.npy  folder of every slide below the root: text and end offsets
    names.bin/.npy    file name of every tile in its slide's folder: text and end offsets
    sizes.npy         uint32, bytes of every tile
    offsets.npy       packed: uint64, shard << 40 | offset of every tile's bytes in it
    tiles-000000.tar  packed: plain tar shards, slide after slide, members named <organ>/<slide_id>/<name>
    index-000001/     extended: the files above but the shards, of the store as it is now

Tile number t is global: its slide's first tile + its index in the slide. All but `slides.parquet` are memory-mapped, so
that opening costs the same for a thousand tiles and for three billion.

Stores of slides, the third kind, are in `hpcssl.stores.online`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hpcssl.core.arrays import map_array
from hpcssl.core.atomic import digest_bytes, digest_file, read_json
from hpcssl.core.errors import BadTileError, StoreError
from hpcssl.slides.slide_table import digest_slides, slide_of
from hpcssl.stores.shards import Shards, unpack_place
from hpcssl.stores.tile_checks import check_files, check_pixels

FORMAT = 1
INDEX_FILES = ("slides.parquet", "folders.bin", "folders.npy", "names.bin", "names.npy", "sizes.npy")
_COORDINATES = re.compile(r"_x(\d+)_y(\d+)\.jpe?g$", re.IGNORECASE)


def index_files(*, packed: bool) -> tuple[str, ...]:
    """Return the names of the files of a store's index."""
    return (*INDEX_FILES, "offsets.npy") if packed else INDEX_FILES


def identity(slides: pd.DataFrame, files: Mapping[str, str]) -> dict[str, str]:
    """Return the digests of a store: of its slides, and of slides, names and sizes together.

    Where the bytes lie is no part of it: a packed store is the same store as the loose one that it was packed from.
    """
    slides_digest = digest_slides(slides)
    whole = digest_bytes("".join([slides_digest, files["names.bin"], files["sizes.npy"]]).encode())
    return {"slides_digest": slides_digest, "digest": whole}


def _mapped(path: Path, dtype: str) -> np.ndarray:
    try:
        array = map_array(path)
    except ValueError as error:
        raise StoreError(f"{path}: damaged ({error}); build the store anew") from None
    if array.dtype != np.dtype(dtype) or array.ndim != 1:
        raise StoreError(f"{path}: damaged (holds {array.dtype} {array.shape}); build the store anew")
    return array


class Texts:
    """Many short texts in one file: UTF-8 bytes after each other, and a uint64 array of where each ends."""

    def __init__(self, folder: Path, stem: str, length: int):
        self._ends = _mapped(folder / f"{stem}.npy", "<u8")
        if len(self._ends) != length:
            raise StoreError(f"{folder / stem}.npy: {len(self._ends)} entries, not {length}; build the store anew")
        found, size = (folder / f"{stem}.bin").stat().st_size, int(self._ends[-1]) if length else 0
        if found != size:
            raise StoreError(f"{folder / stem}.npy ends at {size}, {stem}.bin at {found} bytes; build the store anew")
        self._bytes = np.memmap(folder / f"{stem}.bin", dtype=np.uint8, mode="r") if size else np.zeros(0, np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return self._bytes[start : int(self._ends[index])].tobytes().decode()

    def span(self, first: int, count: int) -> list[bytes]:
        """Return some texts that follow each other, as bytes."""
        begin = int(self._ends[first - 1]) if first else 0
        ends = (self._ends[first : first + count].astype(np.int64) - begin).tolist()
        data = self._bytes[begin : begin + (ends[-1] if ends else 0)].tobytes()
        return [data[start:end] for start, end in zip([0, *ends], ends)]


class Store:
    """An opened store, loose or packed, or an `OnlineStore`. Threads may share it; pickling it opens it again.

    Attributes
    ----------
    path : folder of the store
    index : folder of its index files
    packed : whether the tiles are in shards
    root : folder of the tile files; of a packed store, of its shards
    shards : of a packed store, else None
    num_tiles, num_slides : int
    sizes : (num_tiles,) uint32, memory-mapped: bytes of every tile
    digest : str, SHA-256 over slide table, names and sizes; the store's identity
    """

    sizes: np.ndarray

    def __init__(self, path: Path, header: dict[str, Any]):
        self.path = path
        self.header = header
        self.index = path / header.get("index", "")
        self.packed: bool = header["kind"] == "packed"
        self.num_tiles: int = header["num_tiles"]
        self.num_slides: int = header["num_slides"]
        self.digest: str = header["digest"]
        self.shards: Shards | None = None
        self._open_index()

    def _open_index(self) -> None:
        self.root = self.path if self.packed else Path(self.header["root"])
        self._folders = Texts(self.index, "folders", self.num_slides)
        self._names = Texts(self.index, "names", self.num_tiles)
        self.sizes = self._array("sizes.npy", "<u4", self.num_tiles)
        if self.packed:
            self._offsets = self._array("offsets.npy", "<u8", self.num_tiles)
            self.shards = Shards(self.path, self.header["shards"])
            self.shards.check()

    def _array(self, name: str, dtype: str, length: int) -> np.ndarray:
        array = _mapped(self.index / name, dtype)
        if len(array) != length:
            raise StoreError(f"{self.index / name}: {len(array)} entries, not {length}; build the store anew")
        return array

    def __reduce__(self) -> tuple[Callable[[Path], Store], tuple[Path]]:
        return Store.open, (self.path,)

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open a store; StoreError where there is none, one of another format, or one that lacks parts."""
        try:
            damaged = StoreError(f"{path / 'store.json'}: damaged; build the store anew")
            header = read_json(path / "store.json", damaged)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(
                f"{path}: no tile store (no store.json); make one with hpcssl store build TILES --out {path}"
            ) from None
        if header.get("format") != FORMAT:
            raise StoreError(f"{path}: store format {header.get('format')}; this version reads {FORMAT}")
        opened, files = Store, index_files(packed=header.get("kind") == "packed")
        if header.get("kind") == "slides":
            from hpcssl.stores import online  # which is built on this module, and on readers of slides

            opened, files = online.OnlineStore, online.INDEX_FILES
        elif header.get("kind") not in ("loose", "packed"):
            raise StoreError(
                f"{path}: a store of kind {header.get('kind')!r}; this version reads loose, packed and slides"
            )
        index = path / header.get("index", "")
        missing = [n for n in files if not (index / n).is_file()]
        if missing:
            raise StoreError(f"{index}: {missing[0]} is missing; build the store anew")
        return opened(path, header)

    @property
    def drawn(self) -> bool:
        """Whether a tile's place is a function of its position."""
        return False

    def drawn_by(self, seed: int, mpp_weights: Mapping[float, float]) -> Store:
        """Return the store as the positions of a schedule see it: a store of slides draws places, any other is itself.

        Parameters
        ----------
        seed : of the schedule
        mpp_weights : MPP → share of the positions; empty for all MPPs alike

        Raises
        ------
        StoreError
            If the store has no places at one of these MPPs.
        """
        if mpp_weights:
            raise StoreError(f"{self.path}: a store of tiles of one MPP; mpp_weights is for stores of slides")
        return self

    @cached_property
    def slides(self) -> pd.DataFrame:
        """The slide table, with `first_tile`."""
        return pd.read_parquet(self.index / "slides.parquet")

    @cached_property
    def first_tiles(self) -> np.ndarray:
        """First tile number of every slide, (num_slides,) int64."""
        return self.slides["first_tile"].to_numpy()

    def tiles_of_slide(self, slide: int) -> tuple[int, int]:
        """Return (first tile, number of tiles) of slide number `slide`."""
        first = int(self.first_tiles[slide])
        return first, (int(self.first_tiles[slide + 1]) if slide + 1 < self.num_slides else self.num_tiles) - first

    def folder_of_slide(self, slide: int) -> str:
        """Return the folder of slide number `slide` below the root."""
        return self._folders[slide]

    def names_of(self, first: int, count: int) -> list[bytes]:
        """Return the file names of `count` tiles from `first` on, UTF-8."""
        return self._names.span(first, count)

    def _name_in(self, tile: int) -> str:
        """Return `<organ>/<slide_id>/<name>` of a tile."""
        slide = int(slide_of(tile, self.first_tiles))
        return f"{self._folders[slide]}/{self._names[tile]}"

    def _prefix(self, tile: int) -> str:
        """Return what stands in front of `<organ>/<slide_id>/<name>` in the place of a tile."""
        if self.shards is None:
            return f"{self.root}/"
        return f"{self.shards.path(unpack_place(int(self._offsets[tile]))[0])}:"

    def file_of(self, tile: int) -> Path:
        """Return the file of a tile; of a packed store a name for messages, `shard.tar:member`."""
        return Path(self._prefix(tile) + self._name_in(tile))

    def files_of(self, tiles: np.ndarray) -> list[str]:
        """Return the files of many tiles, as text; of a packed store as `shard.tar:member`."""
        slides = slide_of(tiles, self.first_tiles)
        folders = {int(slide): self._folders[int(slide)] for slide in np.unique(slides)}
        names, pairs = self._names, zip(slides.tolist(), tiles.tolist())
        if self.shards is None:
            return [f"{self.root}/{folders[slide]}/{names[tile]}" for slide, tile in pairs]
        return [f"{self._prefix(tile)}{folders[slide]}/{names[tile]}" for slide, tile in pairs]

    def name_of(self, position: int, tile: int) -> str:
        """Return what tells people which tile stands at a position: `<organ>/<slide_id>/<name>`."""
        return str(self.file_of(tile).relative_to(self.root))

    def coordinates_of(self, tile: int) -> tuple[int, int]:
        """Return a tile's corner (x, y) in level-0 pixels, from a name that ends in `_x<x>_y<y>.jpg`; else (-1, -1)."""
        match = _COORDINATES.search(self._names[tile])
        return (int(match[1]), int(match[2])) if match else (-1, -1)

    def fetch(self, position: int, tile: int) -> bytes:
        """Return the bytes of a tile's JPEG, by one read; `position` matters to stores that draw the place from it.

        Raises
        ------
        BadTileError
            If a loose store's tile is not there.
        StoreError
            If a packed store's shard is not there, or ends before the tile does: many tiles are lost with it.
        """
        if self.shards is not None:
            return self.shards.read(int(self._offsets[tile]), int(self.sizes[tile]))
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

    def expect(self, tiles: Iterable[int]) -> None:
        """Say that these tiles will be fetched soon; a packed store has the system read them ahead, all at once."""
        if self.shards is not None:
            for tile in tiles:
                self.shards.expect(int(self._offsets[tile]), int(self.sizes[tile]))

    def verify(
        self, on_progress: Callable[[int], None] = lambda n: None, *, deep: bool = False, threads: int = 8
    ) -> None:
        """Check every checksum of the index, and that every tile file or shard is there with its size.

        With `deep`, decode every tile, too.

        Raises
        ------
        StoreError
            Naming the first file that differs, and how many do.
        """
        for name, digest in self.header["files"].items():
            if digest_file(self.index / name) != digest:
                raise StoreError(f"{self.index / name}: not what was written (checksum differs); build the store anew")
        for key, value in self._identity().items():
            if self.header[key] != value:
                raise StoreError(f"{self.path / 'store.json'}: {key} is not that of its files; build the store anew")
        self._check_tiles(on_progress, deep=deep, threads=threads)

    def _identity(self) -> dict[str, str]:
        return identity(self.slides, self.header["files"])

    def _check_tiles(self, on_progress: Callable[[int], None], *, deep: bool, threads: int) -> None:
        if self.shards is not None:
            self.shards.check()
            if not deep:
                on_progress(self.num_tiles)
        else:
            check_files(self, (lambda n: None) if deep else on_progress, threads=threads)
        if deep:
            check_pixels(self, on_progress, threads=threads)
