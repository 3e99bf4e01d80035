"""Tiles that cannot be used: transient errors are tried again, permanent faults recorded and substituted."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hpcssl.core.errors import StoreError
from hpcssl.core.rng import below, uniforms
from hpcssl.schedule.file import Schedule
from hpcssl.stores.store import Store, TileData

COLUMNS = ("tile", "position", "file", "reason")
_PAUSES_S = (0.1, 0.5, 2.0)
_MOST_SUBSTITUTES = 16


def read_patiently(store: Store, position: int, tile: int) -> TileData:
    """Return a tile; an error of the file system is tried again three times.

    BadTileError where the tile is missing, which is permanent; StoreError where reading still fails after about three
    seconds, which ends the run.
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
    """The tiles of a run that cannot be used; all ranks append to one file, and read what the others appended.

    What was found once stays so for the rest of the run, even if the file is mended meanwhile: a run that goes on from
    an earlier step takes the same substitutes. A line that a kill cut short counts for nothing.

    A tile is bad wherever it stands, or, where its place is drawn from the position (`of_positions`), at that one.
    StoreError, when made and from `add`, where more than `most` tiles are known, those of all ranks together.
    """

    def __init__(self, path: Path | None, *, most: int, of_positions: bool = False):
        self._path, self._most, self._lock = path, most, threading.Lock()
        self._of_positions = of_positions
        self._known: set[tuple[int, int]] = set()
        self._end = 0  # of the lines read so far
        if path and path.exists():
            with path.open("rb") as stream:
                self._read(stream)
            self._check(f"all are in {path}")

    def __contains__(self, tile_and_position: tuple[int, int]) -> bool:
        return self._key(*tile_and_position) in self._known

    def _key(self, tile: int, position: int) -> tuple[int, int]:
        return tile, position if self._of_positions else -1

    def add(self, tile: int, position: int, file: str, reason: str) -> None:
        """Record a tile, once."""
        with self._lock:
            if (tile, position) not in self and self._path:
                self._append(self._path, tile, position, file, reason)
            self._known.add(self._key(tile, position))
            self._check(f"all are in {self._path} ({reason})" if self._path else f"the last is {file} ({reason})")

    def _check(self, where: str) -> None:
        if len(self._known) > self._most:
            raise StoreError(
                f"{len(self._known)} tiles cannot be used, more than the {self._most} that loader.max_bad_tiles"
                f" allows; {where}; allow more with --set loader.max_bad_tiles, or mend the store for another run"
            )

    def _append(self, path: Path, tile: int, position: int, file: str, reason: str) -> None:
        """Append a tile, unless another rank did."""
        with path.open("a+b") as stream:
            with contextlib.suppress(OSError):  # a file system without locks: go without
                fcntl.flock(stream, fcntl.LOCK_EX)  # until it is closed
            self._read(stream)
            if (tile, position) in self:
                return
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            if not stream.seek(0, os.SEEK_END):
                writer.writerow(COLUMNS)
            elif stream.tell() > self._end:  # a kill cut the last line short
                text.write("\n")
            words = (part.replace("\r", "\\r").replace("\n", "\\n") for part in (file, reason))
            writer.writerow([tile, position, *words])
            stream.write(text.getvalue().encode())

    def _read(self, stream: BinaryIO) -> None:
        """Take over what was appended since the last time, up to the last whole line."""
        stream.seek(self._end)
        data = stream.read()
        data = data[: data.rfind(b"\n") + 1]
        self._end += len(data)
        for line in data.decode(errors="replace").split("\n"):
            with contextlib.suppress(csv.Error):
                row = next(csv.reader([line]), [])
                if len(row) == len(COLUMNS) and row[0].isdecimal() and row[1].isdecimal():
                    self._known.add(self._key(int(row[0]), int(row[1])))
