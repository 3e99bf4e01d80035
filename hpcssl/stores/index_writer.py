"""Writing the index of a store, of whatever kind: files that only grow, slide after slide."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from hpcssl.core.arrays import map_array, npy_header
from hpcssl.core.atomic import digest_file, sync
from hpcssl.stores.store import FORMAT, TABLE, IndexLayout, Store

_HEADER = 128  # bytes of the header of a .npy file; numpy leaves room in it for any length of the array
_CHUNK = 1 << 20  # entries of an array that are copied at a time


@dataclass(kw_only=True)
class SlideEntry:
    """What an index holds of one slide."""

    count: int  # number of its tiles
    arrays: Mapping[str, Any]  # what is appended to each array
    names: list[bytes] = field(default_factory=list)  # of its tiles, where they have any
    bad: list[tuple[str, str]] = field(default_factory=list)  # files that are no tiles: (path below the root, fault)


class IndexWriter:
    """The growing files of an index, in a folder of their own, which begin empty."""

    def __init__(self, folder: Path, layout: IndexLayout):
        self._layout = layout
        self._counts: list[int] = []
        self._streams: dict[str, BinaryIO] = {}
        for name in layout.files[1:]:
            self._streams[name] = (folder / name).open("wb")
            if name in layout.dtypes:
                self._streams[name].write(bytes(_HEADER))

    def add(self, key: str, slide: SlideEntry, offsets: Sequence[int] = ()) -> None:
        """Append a slide that is known by `key`; `offsets` of its tiles are for a packed store."""
        by_slide, *by_tile = self._layout.texts
        self._append_texts(by_slide, [key.encode()])
        for stem in by_tile:
            self._append_texts(stem, slide.names)
        arrays, before = {**slide.arrays, "offsets.npy": offsets}, self._ends_before()
        for name in self._layout.arrays:
            self._append(name, arrays[name], before.get(name, 0))
        self._counts.append(slide.count)

    def add_index(self, folder: Path, *, offset: int = 0) -> None:
        """Append all slides of another index of this layout; `offset` is added to its offsets in shards."""
        before = self._ends_before() | {"offsets.npy": offset}
        for stem in self._layout.texts:
            before[f"{stem}.npy"] = self._streams[f"{stem}.bin"].tell()
            with (folder / f"{stem}.bin").open("rb") as stream:
                shutil.copyfileobj(stream, self._streams[f"{stem}.bin"])
        for name in self._layout.dtypes:
            array = map_array(folder / name)
            for start in range(0, len(array), _CHUNK):
                self._append(name, array[start : start + _CHUNK], before.get(name, 0))
        self._counts += pd.read_parquet(folder / TABLE, columns=["num_tiles"])["num_tiles"].tolist()

    def finish(self) -> np.ndarray:
        """End the files; returns the number of tiles of every slide, (slides,) int64."""
        for name, dtype in self._layout.dtypes.items():
            header = npy_header(dtype, self._length(name))
            assert len(header) == _HEADER, len(header)
            self._streams[name].seek(0)
            self._streams[name].write(header)
        self.close()
        return np.array(self._counts, np.int64)

    def close(self) -> None:
        """Close the files as they are."""
        for stream in self._streams.values():
            stream.close()

    def _ends_before(self) -> dict[str, int]:
        """Return for each array of ends how many entries there are in the array that these count in."""
        return {name: self._length(counted) for name, counted in self._layout.ends_in.items()}

    def _length(self, name: str) -> int:
        return (self._streams[name].tell() - _HEADER) // np.dtype(self._layout.dtypes[name]).itemsize

    def _append(self, name: str, values: ArrayLike, before: int) -> None:
        dtype = np.dtype(self._layout.dtypes[name])
        self._streams[name].write((np.asarray(values, dtype) + dtype.type(before)).tobytes())

    def _append_texts(self, stem: str, texts: list[bytes]) -> None:
        stream = self._streams[f"{stem}.bin"]
        self._append(f"{stem}.npy", np.cumsum([len(text) for text in texts], dtype="<u8"), stream.tell())
        stream.write(b"".join(texts))


def seal(folder: Path, kind: type[Store], slides: pd.DataFrame, about: Mapping[str, Any]) -> dict[str, Any]:
    """Complete an index whose writer has finished by the slide table; returns the store's header.

    `slides` has `num_tiles`; `about` is what the header says of a store of this kind.
    """
    counts = slides["num_tiles"]
    slides = slides.assign(first_tile=counts.cumsum() - counts)
    slides.to_parquet(folder / TABLE, index=False)
    for name in kind.layout.files:
        sync(folder / name)
    header = {"format": FORMAT, "kind": kind.kind, **about, "num_slides": len(slides), "num_tiles": int(counts.sum())}
    return kind.sealed(header, slides, {name: digest_file(folder / name) for name in kind.layout.files})
