"""Whole slides that are read one by one, each once: records say what was seen, and a store is made of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import pandas as pd

from hpcssl.core.atomic import digest_bytes
from hpcssl.core.errors import SlideError
from hpcssl.core.ordered import in_order
from hpcssl.stores.extend import relabelled
from hpcssl.stores.store import Store

Row = Mapping[str, Any]  # of a slide table
_SLIDES_AT_A_TIME = 4  # while one is opened or written, the threads read the others


def record_stem(row: Row, read_by: object) -> str:
    """Return the name of a slide's record; it says what the slide was read by, so that a changed row is read again."""
    return f"{row['slide_id']}-{digest_bytes(repr(read_by).encode())[:16]}"


def old_and_new(
    base: Store | None, slides: pd.DataFrame, assume_mpp: float | None
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Return the slides of the store that is extended as the table names them now, and the rows of the others.

    Raises
    ------
    StoreError
        For a row that was corrected of a slide that is in the store.
    """
    old = slides[:0] if base is None else relabelled(base, slides, assume_mpp)
    rows: Any = slides[~slides["slide_id"].isin(old["slide_id"])].to_dict("records")
    return old, rows


def is_table_of(base: Store | None, slides: pd.DataFrame) -> bool:
    """Say whether these are the slides of a store, with all their columns."""
    return base is not None and slides.equals(base.slides.drop(columns="first_tile"))


def read_each(
    rows: Sequence[Row], read: Callable[[Row, Executor], None], *, threads: int, on_progress: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Read slides, several at a time; returns the rows of those that cannot be read, with the `reason`.

    Parameters
    ----------
    read : reads one slide with the help of a pool of `threads`, and writes its record; SlideError if that fails
    on_progress : called with 1 after every slide
    """
    failed = []
    at_a_time = min(_SLIDES_AT_A_TIME, threads)
    stop = threading.Event()
    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(at_a_time) as slides:

        def fault_of(row: Row) -> str | None:
            if stop.is_set():
                return None
            try:
                read(row, pool)
            except SlideError as error:
                return " ".join(str(error).split())
            return None

        try:
            for row, fault in in_order(slides, fault_of, rows, window=2 * at_a_time):
                failed += [{**row, "reason": fault}] if fault else []
                on_progress(1)
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)  # after an error: slides under way are not finished
    return failed


def with_facts(old: pd.DataFrame, rows: Sequence[Row], facts: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return the table of a store: its old slides, then new ones with what their records say."""
    if not rows:
        return old
    new = pd.DataFrame([{**row, **more} for row, more in zip(rows, facts, strict=True)])
    return pd.concat([old, new], ignore_index=True).fillna("") if len(old) else new
