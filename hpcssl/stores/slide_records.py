"""Whole slides that are read one by one, each once: records say what was seen, and a store is made of them."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
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


class SlideWork(ABC):
    """What is done with every slide, and how a store is made of them; it can be pickled for a job array."""

    out: Path  # folder of the store
    threads: int  # that read and decode
    assume_mpp: float | None  # of slides whose MPP nothing says

    @abstractmethod
    def claim(self) -> Store | None:
        """Take the folder for this work; returns the store that is extended, None where there is none.

        StoreError if it holds something else.
        """

    @abstractmethod
    def record(self, row: Row) -> Path:
        """Return the file that a slide has once its work is done."""

    @abstractmethod
    def read(self, row: Row, pool: Executor) -> None:
        """Read a slide with the help of a pool of `threads`, and write its record; SlideError if that fails."""

    @abstractmethod
    def facts(self, record: Path) -> dict[str, Any]:
        """Return what the slide table says of a slide beyond its row, `num_tiles` with it."""

    @abstractmethod
    def write(self, base: Store | None, slides: pd.DataFrame, records: Sequence[Path]) -> None:
        """Write the store of these slides; the last ones are new, and these are their records."""

    def old_and_new(self, base: Store | None, slides: pd.DataFrame) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
        """Return the slides of the store that is extended as the table names them now, and the rows of the others.

        StoreError for a row that was corrected of a slide that is in the store.
        """
        old = slides[:0] if base is None else relabelled(base, slides, self.assume_mpp)
        rows: Any = slides[~slides["slide_id"].isin(old["slide_id"])].to_dict("records")
        return old, rows

    def missing(self, slides: pd.DataFrame) -> list[dict[str, Any]]:
        """Take the folder, and return the rows of the slides that are neither in the store nor done."""
        _, rows = self.old_and_new(self.claim(), slides)
        return [row for row in rows if not self.record(row).exists()]

    def read_some(self, slides: pd.DataFrame, slide_ids: Collection[str]) -> None:
        """Do the work of some of the slides, one task of a job array, and leave the store to a later call.

        A slide that cannot be read is left to that, too, which tries it again and lists it.
        """
        _, rows = self.old_and_new(self.claim(), slides[slides["slide_id"].isin(slide_ids)])
        self.read_each(rows)

    def read_each(
        self, rows: Sequence[Row], on_progress: Callable[[int], None] = lambda n: None
    ) -> list[dict[str, Any]]:
        """Read slides, several at a time; returns the rows of those that cannot be read, with the `reason`.

        `on_progress` is called with 1 after every slide.
        """
        failed = []
        at_a_time = min(_SLIDES_AT_A_TIME, self.threads)
        stop = threading.Event()
        with ThreadPoolExecutor(self.threads) as pool, ThreadPoolExecutor(at_a_time) as slides:

            def fault_of(row: Row) -> str | None:
                try:
                    if not stop.is_set() and not self.record(row).exists():
                        self.read(row, pool)
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

    def add_slides(
        self, base: Store | None, old: pd.DataFrame, rows: Sequence[Row], failed: Sequence[Row]
    ) -> list[Path]:
        """Add the slides that did not fail to the store, whose others become `old`; returns their records."""
        lost = {row["slide_id"] for row in failed}
        whole = [row for row in rows if row["slide_id"] not in lost]
        records = [self.record(row) for row in whole]
        if whole:
            new = pd.DataFrame([{**row, **self.facts(record)} for row, record in zip(whole, records)])
            old = pd.concat([old, new], ignore_index=True).fillna("") if len(old) else new
        if whole or (base and not old.equals(base.slides.drop(columns="first_tile"))):
            self.write(base, old, records)
        return records
