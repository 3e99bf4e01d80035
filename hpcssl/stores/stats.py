"""What a store holds, in memory that does not grow with its tiles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

from hpcssl.stores.online import OnlineStore
from hpcssl.stores.tile_store import TileStore

_CHUNK = 1 << 22


class Spread(NamedTuple):
    """Smallest, median (of an even number the lower) and largest."""

    smallest: int
    median: int
    largest: int


def per_organ(store: TileStore) -> pd.DataFrame:
    """Return a row an organ: `organ, slides, tiles, bytes`, by organ."""
    slides, sizes = store.slides, store.sizes
    spans = zip(slides["first_tile"].tolist(), slides["num_tiles"].tolist())
    size = [int(sizes[first : first + count].sum(dtype=np.uint64)) for first, count in spans]
    grouped = slides.assign(bytes=size, slides=1, tiles=slides["num_tiles"]).groupby("organ", as_index=False)
    return grouped[["slides", "tiles", "bytes"]].sum()


def tissue_per_organ(store: OnlineStore) -> pd.DataFrame:
    """Return a row an organ of a store of slides: `organ, slides, tiles, tissue_mm2`, by organ."""
    slides = store.slides
    grouped = slides.assign(slides=1, tiles=slides["num_tiles"]).groupby("organ", as_index=False)
    return grouped[["slides", "tiles", "tissue_mm2"]].sum()


def spread_of(values: np.ndarray) -> Spread:
    """Return the spread of some uint32, by counting: no copy of them is sorted.

    >>> spread_of(np.array([7, 70_000, 9, 70_001], np.uint32))
    Spread(smallest=7, median=9, largest=70001)
    """
    rank = (len(values) - 1) // 2
    chunks = [values[start : start + _CHUNK] for start in range(0, len(values), _CHUNK)]  # views
    high = _counted(chunk >> 16 for chunk in chunks)
    upper = int(np.searchsorted(np.cumsum(high), rank, side="right"))
    low = _counted(chunk[chunk >> 16 == upper] & 0xFFFF for chunk in chunks)
    before = int(high[:upper].sum())
    lower = int(np.searchsorted(np.cumsum(low), rank - before, side="right"))
    return Spread(int(values.min()), upper << 16 | lower, int(values.max()))


def _counted(chunks: Iterable[np.ndarray]) -> np.ndarray:
    """Return how often each number of 16 bits stands in the chunks."""
    return sum((np.bincount(chunk, minlength=1 << 16) for chunk in chunks), np.zeros(1 << 16, np.int64))
