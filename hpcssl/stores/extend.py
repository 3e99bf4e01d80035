"""Extending a store: its slides stay where they are, and must be what they were."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

from hpcssl.core.errors import StoreError
from hpcssl.core.ordered import in_order
from hpcssl.slides.slide_table import REQUIRED
from hpcssl.stores.packed import PackedStore
from hpcssl.stores.store import Store
from hpcssl.stores.tile_files import Tiles, list_tiles
from hpcssl.stores.tile_store import TileStore

READ_BY = ("organ", "path", "mpp")  # what a whole slide was read by


def extended(base: TileStore, slides: pd.DataFrame, tiles: Path, *, counted: bool) -> pd.DataFrame:
    """Return the store's slides in their order, then those that it lacks.

    Of a slide that both know, the other columns are the new table's; one that the table does not list keeps its own.
    """
    if not isinstance(base, PackedStore) and tiles.resolve() != base.root:
        raise StoreError(f"{base.path}: its tiles are below {base.root}; extend it with tiles below that, not {tiles}")
    old = base.slides.drop(columns="first_tile")
    known = slides["slide_id"].isin(old["slide_id"])
    given = slides[known].set_index("slide_id").reindex(old["slide_id"])
    listed = given["organ"].notna().to_numpy()
    for column in ("organ", *(["num_tiles"] if counted else [])):
        differs = listed & (given[column].to_numpy() != old[column].to_numpy())
        if differs.any():
            place = int(differs.argmax())
            slide = old.iloc[place]
            raise StoreError(
                f"{base.path}: slide {slide['slide_id']} has {column} {slide[column]} in it, but"
                f" {given[column].iloc[place]:{'.0f' if column == 'num_tiles' else ''}} in the table"
                f" ({differs.sum()} such slides); a store is only extended, build it anew"
            )
    old = _with_columns(old, given, slides.columns.difference(REQUIRED, sort=False))
    return pd.concat([old, slides[~known]], ignore_index=True).fillna("")


def relabelled(base: Store, slides: pd.DataFrame, assume_mpp: float | None) -> pd.DataFrame:
    """Return the store's slides as a table of whole slides names them now: its other columns are taken.

    StoreError where a slide was read from elsewhere, or at another MPP than is stated now, or has another organ: what
    the store holds of it would be wrong.
    """
    old = base.slides.drop(columns="first_tile")
    given = slides[slides["slide_id"].isin(old["slide_id"])].set_index("slide_id").reindex(old["slide_id"])
    assumed = old["mpp_from"] == "assumed" if "mpp_from" in old else np.zeros(len(old), bool)
    before, now = (zip(*(table[column] for column in READ_BY)) for table in (old, given))
    for slide_id, was, (organ, path, stated), was_assumed in zip(old["slide_id"], before, now, assumed, strict=True):
        if pd.isna(organ):
            continue
        mpp = str(stated).strip() or (assume_mpp if was_assumed else None) or was[-1]
        for column, stored, requested in zip(READ_BY, was, (organ, path, float(mpp)), strict=True):
            if stored != requested:
                raise StoreError(
                    f"{base.path}: slide {slide_id} has {column} {stored} in it, asked for is {requested}; a store is"
                    " only extended: leave the row out, or choose another --out"
                )
    return _with_columns(old, given, slides.columns.difference([*REQUIRED, *READ_BY], sort=False))


def _with_columns(old: pd.DataFrame, given: pd.DataFrame, columns: pd.Index) -> pd.DataFrame:
    """Return a table with some columns of what is given for its slides in the same order; others keep their own."""
    listed = given["organ"].notna().to_numpy()
    for column in columns:
        before = old[column].to_numpy(object) if column in old else [""] * len(old)
        old[column] = [new if there else was for new, was, there in zip(given[column], before, listed)]
    return old


def check_unchanged(base: TileStore, tiles: Path, *, threads: int, on_progress: Callable[[int], None]) -> None:
    """Raise StoreError for the first slide of the store whose folder holds other names or sizes than it says.

    The tiles of a packed store are in its shards: a folder that is gone since is no change.
    """
    table = base.slides

    def differs(slide: int) -> str | None:
        folder = base.folder_of_slide(slide)
        if not (tiles / folder).is_dir():
            return None if isinstance(base, PackedStore) else "its folder is gone"
        there = list_tiles(tiles, folder)
        first, count = base.tiles_of_slide(slide)
        return describe_difference(there, base.names_of(first, count), base.sizes[first : first + count].tolist())

    with ThreadPoolExecutor(threads) as pool:
        for slide, difference in in_order(pool, differs, range(len(table)), window=4 * threads):
            if difference:
                raise StoreError(
                    f"{base.path}: slide {table['slide_id'].iloc[slide]} is not what it was when the store was built"
                    f" ({difference}); a store is only extended, build it anew"
                )
            on_progress(1)


def describe_difference(there: Tiles, names: list[bytes], sizes: list[int]) -> str | None:
    """Say what is other in a folder than in the index, or None.

    >>> describe_difference(Tiles(names=[b"a.jpg", b"c.jpg"], sizes=[1, 2]), [b"a.jpg", b"b.jpg"], [1, 2])
    '1 tile gone, 1 new; first: b.jpg'
    """
    if there.bad:
        return f"{there.bad[0][0]}: {there.bad[0][1]}"
    if there.names == names and there.sizes == sizes:
        return None
    gone, new = set(names) - set(there.names), set(there.names) - set(names)
    if gone or new:
        first = sorted(gone or new)[0].decode()
        return f"{len(gone)} tile{'s' * (len(gone) != 1)} gone, {len(new)} new; first: {first}"
    name, was, now = next(t for t in zip(names, sizes, there.sizes) if t[1] != t[2])
    return f"{name.decode()} has {now} bytes, not {was}"
