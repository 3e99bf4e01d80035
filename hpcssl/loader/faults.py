"""Tiles that cannot be used: transient errors are tried again, permanent faults recorded and substituted."""

from __future__ import annotations

import csv
import io
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from hpcssl.core.errors import StoreError
from hpcssl.core.rng import below, uniforms
from hpcssl.schedule.file import Schedule
from hpcssl.tiles.store import Store

COLUMNS = ("tile", "position", "file", "reason")
_PAUSES_S = (0.1, 0.5, 2.0)
_MOST_SUBSTITUTES = 16


def read_patiently(store: Store, position: int, tile: int) -> bytes:
    """Return a tile's bytes; an error of the file system is tried again three times.

    Raises
    ------
    BadTileError
        If the tile is missing: that is permanent.
    StoreError
        If reading still fails after about three seconds: that ends the run.
    """
    for pause in (*_PAUSES_S, None):
        try:
            return store.fetch(position, tile)
        except OSError as error:
            if pause is None:
                raise StoreError(
                    f"{store.file_of(tile)}: cannot be read, tried {len(_PAUSES_S) + 1} times"
                    f" ({error.strerror or error}); see to the file system, then run the same command again"
                ) from None
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def substitutes(schedule: Schedule, seed: int, position: int) -> Iterator[int]:
    """Yield the tiles that stand in for the one at a position: those at keyed positions of the same pseudo-epoch."""
    size = schedule.positions_per_pseudo_epoch
    first = position // size * size
    for number in range(_MOST_SUBSTITUTES):
        at = first + int(below(uniforms(seed, "substitute", position, view=number)[..., 0], size))
        yield int(schedule.tiles_at(at, at + 1)[0])


class BadTiles:
    """The tiles of a run that cannot be used; all ranks append to one file, and read it when they start.

    What was found once stays so for the rest of the run, even if the file is mended meanwhile: a run that goes on from
    an earlier step takes the same substitutes.

    A tile is bad wherever it stands, or, where its place is drawn from the position (`of_positions`), at that one.

    Raises
    ------
    StoreError
        From `add`, when more than `most` tiles are known.
    """

    def __init__(self, path: Path | None, *, most: int, of_positions: bool = False):
        self._path, self._most, self._lock = path, most, threading.Lock()
        self._of_positions = of_positions
        self._known: set[tuple[int, int]] = set()
        if path and path.exists():
            with path.open(newline="", encoding="utf-8") as stream:
                rows = csv.reader(stream)
                self._known = {self._key(int(row[0]), int(row[1])) for row in rows if row and row[0].isdecimal()}

    def __contains__(self, tile_and_position: tuple[int, int]) -> bool:
        return self._key(*tile_and_position) in self._known

    def _key(self, tile: int, position: int) -> tuple[int, int]:
        return tile, position if self._of_positions else -1

    def add(self, tile: int, position: int, file: str, reason: str) -> None:
        """Record a tile, once."""
        with self._lock:
            if (tile, position) not in self:
                self._known.add(self._key(tile, position))
                self._append(tile, position, file, reason)
            if len(self._known) > self._most:
                where = f"all are in {self._path}" if self._path else f"the last is {file}"
                raise StoreError(
                    f"{len(self._known)} tiles cannot be used, more than the {self._most} that loader.max_bad_tiles"
                    f" allows; {where} ({reason})"
                )

    def _append(self, *row: object) -> None:
        if self._path is None:
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not self._path.exists():
            writer.writerow(COLUMNS)
        writer.writerow(row)
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(fd, text.getvalue().encode())  # in one piece: other ranks append, too
        finally:
            os.close(fd)
