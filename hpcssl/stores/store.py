"""Tile stores: where tile number t is, and its bytes or pixels.

A store is a folder:

    store.json        format version, kind, counts, SHA-256 of the index files; what else its kind needs
    slides.parquet    the slide table, with `first_tile`
    …                 the other files of its index, as its kind lays it out
    index-000001/     of an extended store: the folder of its index as it is now, which store.json names

Tile number t is global: its slide's first tile + its index in the slide. All but `slides.parquet` are memory-mapped, so
that opening costs the same for a thousand tiles and for three billion.

The kinds are in modules of their own: `loose`, `packed` and `online`. `hpcssl.stores.kinds` opens whatever there is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hpcssl.core.arrays import map_array
from hpcssl.core.atomic import digest_file, read_json
from hpcssl.core.errors import StoreError
from hpcssl.core.ordered import in_order
from hpcssl.slides.slide_table import slide_of

FORMAT = 1
TABLE = "slides.parquet"
TileData: TypeAlias = bytes | NDArray[np.uint8]  # a JPEG, or pixels (height, width, 3) RGB


@dataclass(frozen=True, kw_only=True)
class IndexLayout:
    """The files of an index beside the slide table."""

    # stems of files of texts, `.bin` and `.npy`; the first holds one text a slide, by which the slide is known
    texts: tuple[str, ...]
    arrays: Mapping[str, str]  # dtype of every array, by file name
    ends_in: Mapping[str, str] = field(default_factory=dict)  # of arrays that hold ends, the array these count in

    @property
    def dtypes(self) -> dict[str, str]:
        """Dtype of every .npy file."""
        return {f"{stem}.npy": "<u8" for stem in self.texts} | dict(self.arrays)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all files, the table first."""
        return (TABLE, *(f"{stem}.{kind}" for stem in self.texts for kind in ("bin", "npy")), *self.arrays)


class Texts:
    """Many short texts in one file: UTF-8 bytes after each other, and a uint64 array of where each ends."""

    def __init__(self, folder: Path, stem: str, length: int):
        self._ends = _mapped(folder / f"{stem}.npy", "<u8", length)
        size, expected = (folder / f"{stem}.bin").stat().st_size, int(self._ends[-1]) if length else 0
        if size != expected:
            raise StoreError(
                f"{folder / stem}.npy ends at {expected}, {stem}.bin at {size} bytes; build the store anew"
            )
        self._bytes = np.memmap(folder / f"{stem}.bin", dtype=np.uint8, mode="r") if size else np.zeros(0, np.uint8)

    def __getitem__(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return self._bytes[start : int(self._ends[index])].tobytes().decode()

    def span(self, first: int, count: int) -> list[bytes]:
        """Return some texts that follow each other, as bytes."""
        begin = int(self._ends[first - 1]) if first else 0
        ends = (self._ends[first : first + count].astype(np.int64) - begin).tolist()
        data = self._bytes[begin : begin + (ends[-1] if ends else 0)].tobytes()
        return [data[start:end] for start, end in zip([0, *ends], ends)]


class Store(ABC):
    """An opened store of whatever kind. Threads may share it; pickling it opens it again.

    Attributes
    ----------
    kind : as store.json names it
    path, index : folder of the store, and of its index files
    root : folder of the tile files, where every tile is a file; else the store's
    digest : SHA-256 of all that tiles depend on, but not of where they lie; the store's identity
    """

    kind: ClassVar[str]
    layout: ClassVar[IndexLayout]
    root: Path

    def __init__(self, path: Path, header: dict[str, Any]):
        """Map the index; StoreError where parts of it are missing or damaged."""
        self.path, self.header = path, header
        self.index = path / header.get("index", "")
        self.num_tiles: int = header["num_tiles"]
        self.num_slides: int = header["num_slides"]
        self.digest: str = header["digest"]
        self.root = path
        missing = [name for name in self.layout.files if not (self.index / name).is_file()]
        if missing:
            raise StoreError(f"{self.index}: {missing[0]} is missing; build the store anew")

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened_again, (type(self), self.path)

    def _array(self, name: str, length: int) -> np.ndarray:
        return _mapped(self.index / name, self.layout.arrays[name], length)

    @classmethod
    @abstractmethod
    def sealed(cls, header: Mapping[str, Any], slides: pd.DataFrame, files: Mapping[str, str]) -> dict[str, Any]:
        """Return a header with `files`, the digests of the index files, and `slides_digest` and `digest` of the store.

        Where the tiles lie is no part of `digest`: a packed store is the same store as the loose one it was packed
        from.
        """

    @abstractmethod
    def fetch(self, position: int, tile: int) -> TileData:
        """Return a tile: the bytes of its JPEG, by one read, or its pixels.

        `position` is of the schedule: a store that draws places draws this tile's from it. BadTileError where the tile
        is not there or cannot be read, StoreError where many tiles are lost with it, OSError where a disk fails.
        """

    @abstractmethod
    def file_of(self, tile: int) -> Path:
        """Return the file of a tile; of a packed store a name for messages, `shard.tar:member`."""

    def files_of(self, tiles: np.ndarray) -> list[str]:
        """Return the files of many tiles, as text."""
        return [str(self.file_of(tile)) for tile in tiles.tolist()]

    @abstractmethod
    def coordinates_of(self, tile: int) -> tuple[int, int]:
        """Return a tile's corner (x, y) in level-0 pixels; (-1, -1) where it is not known."""

    @abstractmethod
    def describe_tiles(self) -> str:
        """Say what `verify` finds there."""

    @abstractmethod
    def _check_tiles(self, on_progress: Callable[[int], None], *, deep: bool, threads: int) -> None:
        """Check the tiles; see `verify`."""

    def expect(self, tiles: Iterable[int]) -> None:  # noqa: B027 (most kinds need not know)
        """Take note that these tiles will be fetched soon; a packed store has the system read them ahead, at once."""

    @property
    def drawn(self) -> bool:
        """Whether a tile's place is a function of its position."""
        return False

    def drawn_by(self, seed: int, mpp_weights: Mapping[float, float]) -> Store:
        """Return the store as the positions of a schedule see it: a store of slides draws places, any other is itself.

        `seed` is the schedule's; `mpp_weights` maps an MPP to its share of the positions, and is empty for all alike.
        StoreError where the store has no places at one of these MPPs.
        """
        if mpp_weights:
            raise StoreError(f"{self.path}: a store of tiles of one MPP; mpp_weights is for stores of slides")
        return self

    @cached_property
    def slides(self) -> pd.DataFrame:
        """The slide table, with `first_tile`."""
        return pd.read_parquet(self.index / TABLE)

    @cached_property
    def first_tiles(self) -> np.ndarray:
        """First tile number of every slide, (num_slides,) int64."""
        return self.slides["first_tile"].to_numpy()

    def slide_of(self, tile: int) -> int:
        """Return the number of a tile's slide."""
        return int(slide_of(tile, self.first_tiles))

    def tiles_of_slide(self, slide: int) -> tuple[int, int]:
        """Return (first tile, number of tiles) of slide number `slide`."""
        first = int(self.first_tiles[slide])
        return first, (int(self.first_tiles[slide + 1]) if slide + 1 < self.num_slides else self.num_tiles) - first

    def name_of(self, position: int, tile: int) -> str:
        """Return what tells people which tile stands at a position: its file below the root."""
        return str(self.file_of(tile).relative_to(self.root))

    def verify(
        self, on_progress: Callable[[int], None] = lambda n: None, *, deep: bool = False, threads: int = 8
    ) -> None:
        """Check every checksum of the index, and that every tile file, shard or slide is there with its size.

        With `deep`, decode every tile, too. `on_progress` is called with numbers of tiles. StoreError names the first
        file that differs, and how many do.
        """
        for name, digest in self.header["files"].items():
            if digest_file(self.index / name) != digest:
                raise StoreError(f"{self.index / name}: not what was written (checksum differs); build the store anew")
        sealed = self.sealed(self.header, self.slides, self.header["files"])
        for key in ("slides_digest", "digest"):
            if self.header[key] != sealed[key]:
                raise StoreError(f"{self.path / 'store.json'}: {key} is not that of its files; build the store anew")
        self._check_tiles(on_progress, deep=deep, threads=threads)

    def _refuse_faults(
        self,
        look: Callable[[int], tuple[int, list[str]]],
        at: Iterable[int],
        on_progress: Callable[[int], None],
        threads: int,
        *,
        what: str,
        advice: str,
    ) -> None:
        """Raise StoreError where `look` finds faults at some place; it returns tiles looked at, and faults."""
        total, first = 0, ""
        with ThreadPoolExecutor(threads) as pool:
            for _, (num_tiles, faults) in in_order(pool, look, at, window=4 * threads):
                total += len(faults)
                first = first or (faults[0] if faults else "")
                on_progress(num_tiles)
        if total:
            raise StoreError(f"{self.path}: {total} of {what}; first: {first}; {advice}")


def read_header(path: Path) -> dict[str, Any]:
    """Return the content of a store's `store.json`; StoreError where there is none, or one of another format."""
    try:
        header = read_json(path / "store.json", StoreError(f"{path / 'store.json'}: damaged; build the store anew"))
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(
            f"{path}: no tile store (no store.json); make one with hpcssl store build TILES --out {path}"
        ) from None
    if header.get("format") != FORMAT:
        raise StoreError(f"{path}: store format {header.get('format')}; this version reads {FORMAT}")
    return header


def _opened_again(kind: type[Store], path: Path) -> Store:
    return kind(path, read_header(path))


def _mapped(path: Path, dtype: str, length: int) -> np.ndarray:
    try:
        array = map_array(path)
    except ValueError as error:
        raise StoreError(f"{path}: damaged ({error}); build the store anew") from None
    if array.dtype != np.dtype(dtype):
        raise StoreError(f"{path}: damaged (holds {array.dtype} {array.shape}); build the store anew")
    if len(array) != length:
        raise StoreError(f"{path}: {len(array)} entries, not {length}; build the store anew")
    return array
