"""One resumable build for every kind of store: slides come from a source, and go into an index.

A kill costs seconds, and no tile stays in memory. `done.bin` tells what was done: 16 bytes for every slide found whole,
a digest of its names and sizes, written once its tiles are durable. A build that goes on lists every folder again, but
opens no file of a slide that is in it. Of a packed store, it passes over the slides at the head of `done.bin`, whose
tiles are in the shards, and cuts off what follows: so it ends with the bytes of an undisturbed one.

Nothing is written behind a slide with bad files: the build will fail, and goes on there once they are mended.

A store that is new appears at once, as a whole. In a folder that is there already, the index gets a folder of its own,
and `store.json`, replaced last, names it: whoever opens the store finds it whole at any moment.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO, TypeAlias

import numpy as np
import pandas as pd

from hpcssl.core.atomic import remove_temporary, sync, write_atomic
from hpcssl.core.errors import StoreError, UserError
from hpcssl.core.ordered import in_order
from hpcssl.stores.index_writer import IndexWriter, SlideEntry, seal
from hpcssl.stores.store import Store
from hpcssl.stores.tar import ShardWriter

COMMIT_S = 5.0
_DONE = "done.bin"
_MARK_BYTES = 16
SlidesRead: TypeAlias = Iterator[tuple[SlideEntry, list[int]]]  # of each what it holds, and where its tiles are


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a build makes, and where."""

    out: Path  # folder of the store
    kind: type[Store]
    slides: pd.DataFrame  # all as they will be in its table, those of `base` first
    base: Store | None  # the store at `out` that is extended
    work: Path  # folder in which the index grows; on the file system of `out`
    header: Mapping[str, Any]  # of this store alone; with `index` where the store's folder is there already
    shard_bytes: int | None = None  # from which on a shard ends with the slide that fills it; of a packed store


class SlideSource(ABC):
    """Where a build has its slides from."""

    keys: list[str]  # what the index knows every slide by, those of an extended store first
    about: Mapping[str, Any]  # what must be the same for a killed build to go on
    root: Path  # of the tile files, for errors
    threads: int = 1  # that the build may use

    @abstractmethod
    def look(self, number: int) -> SlideEntry:
        """Return what a slide holds now, as cheaply as that is known."""

    def read(self, first: int, pool: Executor, build: Build) -> SlidesRead:
        """Yield (what it holds, offsets of its tiles in `build.shards`) of every slide from number `first` on."""
        return ((self.look(number), []) for number in range(first, len(self.keys)))

    def check(self, counts: np.ndarray) -> None:  # noqa: B027 (most sources have nothing to refuse)
        """Refuse what a complete store may not be, by the number of tiles of every slide; StoreError."""


class Build:
    """A build of a target from a source."""

    def __init__(
        self,
        target: Target,
        source: SlideSource,
        *,
        commit_s: float = COMMIT_S,
        on_progress: Callable[[int], None] = lambda n: None,
    ):
        """Prepare a build of which a kill costs `commit_s`; `on_progress` is called with 1 after every new slide."""
        self._target, self._source = target, source
        self._commit_s, self._on_progress = commit_s, on_progress
        self._in_place = "index" in target.header
        self._num_old = target.base.num_slides if target.base else 0
        self._old_shards: list[int] = target.base.header.get("shards", []) if target.base else []
        self.shards: ShardWriter | None = None  # of a packed store, to be written by the source
        if target.shard_bytes is not None:
            folder = target.out if self._in_place else target.work
            self.shards = ShardWriter(folder, target.shard_bytes, first=len(self._old_shards))
        self._index: IndexWriter
        self._marks: BinaryIO
        self._done: list[bytes] = []
        self._new_marks: list[bytes] = []
        self.whole: set[bytes] = set()  # what tells the slides that tries before this one found whole
        self._bad_list = Path(f"{target.out.absolute()}.bad_tiles.csv")
        self._bad: TextIO | None = None
        self.num_bad, self._first_bad = 0, ""  # files found so far that are no tiles
        self._num_tiles = 0
        self._worth_keeping = False

    def run(self) -> None:
        """Build what a killed try left to do, and publish it."""
        self._bad_list.unlink(missing_ok=True)
        try:
            self._fill()
            self._publish()
        except (UserError, PermissionError):  # the input must change first
            if not self._worth_keeping:
                self.discard()
            raise
        finally:
            self._close()

    def discard(self) -> None:
        """Remove what this build, or a killed one before it, has done so far."""
        self._close()
        shutil.rmtree(self._target.work, ignore_errors=True)
        if self._in_place and self.shards is not None:
            self.shards.drop_from(len(self._old_shards))

    def is_known(self, key: str, slide: SlideEntry) -> bool:
        """Return whether a try before this one found the slide whole, with what it holds now."""
        return self._mark(key, slide) in self.whole

    def _fill(self) -> None:
        source = self._source
        self._begin()
        last = time.monotonic()
        with ThreadPoolExecutor(source.threads) as pool:
            done = self._skip(pool) if self.shards else self._num_old
            for key, (slide, offsets) in zip(source.keys[done:], source.read(done, pool, self), strict=True):
                self._add(key, slide, offsets)
                if time.monotonic() - last >= self._commit_s:
                    self._commit()
                    self._worth_keeping = True
                    last = time.monotonic()
                self._on_progress(1)
        self._commit()

    def _begin(self) -> None:
        """Begin a new index, with a copy of the one that is extended, and read what tries before found whole."""
        work, base = self._target.work, self._target.base
        if not (work / _DONE).exists():
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
        for path in work.iterdir():
            if path.name != _DONE and not (self.shards and path.suffix == ".tar"):
                path.unlink()
        self._marks = (work / _DONE).open("a+b")
        self._marks.seek(0)
        data = self._marks.read()
        self._done = [data[i : i + _MARK_BYTES] for i in range(0, len(data) - _MARK_BYTES + 1, _MARK_BYTES)]
        self.whole = set(self._done)
        self._marks.truncate(_MARK_BYTES * len(self._done))
        self._worth_keeping = bool(self._done)
        self._index = IndexWriter(work, self._target.kind.layout)
        if base is not None:
            self._index.add_index(base.index)
            self._num_tiles = base.num_tiles

    def _skip(self, pool: Executor) -> int:
        """Pass over the slides that are in the shards, as they were; returns the number of the first other one."""
        assert self.shards is not None
        source, done, first = self._source, self._done, self._num_old
        number, numbers = first, range(first, min(len(source.keys), first + len(done)))
        for number, slide in in_order(pool, source.look, numbers, window=4 * source.threads):
            key, offsets = source.keys[number], None
            if not slide.bad and self._mark(key, slide) == done[number - first]:
                offsets = self.shards.skip(key, slide.names, slide.arrays["sizes.npy"])
            if offsets is None:
                break
            self._index.add(key, slide, offsets)
            self._num_tiles += slide.count
            self._on_progress(1)
            number += 1
        self._marks.truncate(_MARK_BYTES * (number - first))
        self.shards.begin()
        return number

    def _mark(self, key: str, slide: SlideEntry) -> bytes:
        """Return what tells a slide that holds this, looked at in this way, from every other."""
        about = json.dumps([self._source.about, key, slide.count]).encode()
        arrays = b"".join(np.asarray(values, "<u8").tobytes() for values in slide.arrays.values())
        return hashlib.blake2b(about + b"\0".join(slide.names) + arrays, digest_size=_MARK_BYTES).digest()

    def _add(self, key: str, slide: SlideEntry, offsets: list[int]) -> None:
        """Append a slide; from the first one with bad files on, slides are only counted."""
        self._num_tiles += slide.count
        for path, fault in slide.bad:
            self._note_bad(f"{self._source.root}/{path}", fault)
        mark = self._mark(key, slide)
        if not slide.bad and (not self.num_bad if self.shards else mark not in self.whole):
            self._new_marks.append(mark)
        if not self.num_bad:
            self._index.add(key, slide, offsets)

    def _note_bad(self, path: str, fault: str) -> None:
        if self._bad is None:
            self._bad = self._bad_list.open("w", encoding="utf-8", errors="backslashreplace", newline="")
            csv.writer(self._bad, lineterminator="\n").writerow(["file", "fault"])
        csv.writer(self._bad, lineterminator="\n").writerow([path, fault])
        self._first_bad = self._first_bad or f"{path} ({fault})"
        self.num_bad += 1

    def _commit(self) -> None:
        """Make what was added durable: a build that is killed later need not do it again."""
        if self.shards is not None:
            self.shards.sync()
        self._marks.write(b"".join(self._new_marks))
        self._marks.flush()
        os.fsync(self._marks.fileno())
        self._new_marks.clear()

    def _close(self) -> None:
        """Close all files as they are."""
        for name in ("_index", "_marks", "_bad"):
            if getattr(self, name, None):
                getattr(self, name).close()
        if self.shards is not None:
            self.shards.abandon()

    def _publish(self) -> None:
        target, work = self._target, self._target.work
        if self.num_bad:
            raise StoreError(
                f"{self._source.root}: {self.num_bad} of {self.num_bad + self._num_tiles} tile files are no whole JPEG;"
                f" first: {self._first_bad}; all are listed in {self._bad_list}; mend or remove them and build again"
            )
        header = dict(target.header)
        if self.shards is not None:
            self.shards.close()
            header["shards"] = [*self._old_shards, *self.shards.sizes]
        counts = self._index.finish()
        self._source.check(counts)
        header = seal(work, target.kind, target.slides.assign(num_tiles=counts), header)
        remove_temporary(work)
        (work / _DONE).unlink()
        if self._in_place:
            self._replace(header)
        else:
            write_header(work, header)
            move_synced(work, target.out)

    def _replace(self, header: Mapping[str, Any]) -> None:
        """Give the store its new index; the one before stays until the next time, for those who have it open."""
        out, before = self._target.out, self._target.base and self._target.base.index
        new = out / header["index"]
        shutil.rmtree(new, ignore_errors=True)  # a try that was killed before it wrote store.json
        move_synced(self._target.work, new)
        remove_temporary(out)
        write_header(out, header)
        for folder in out.glob("index-*"):
            if folder not in (new, before):
                shutil.rmtree(folder, ignore_errors=True)
        if before != out:
            for name in self._target.kind.layout.files:
                (out / name).unlink(missing_ok=True)


def move_synced(folder: Path, to: Path) -> None:
    """Give a folder with all that is in it its place."""
    sync(folder)
    os.replace(folder, to)
    sync(to.parent)


def write_header(folder: Path, header: Mapping[str, Any]) -> None:
    """Write `store.json`, which makes a folder with a whole index a store."""
    write_atomic(folder / "store.json", json.dumps(header, indent=1) + "\n")


def next_index(base: Store | None) -> str:
    """Return the name of the folder of an index that takes the place of the one that a store has."""
    before = int(base.index.name.removeprefix("index-")) if base and base.index != base.path else 0
    return f"index-{before + 1:06d}"
