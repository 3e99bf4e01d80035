"""Building a store: one pass over `<organ>/<slide_id>/*.jpg`, so that nothing lists folders twice.

A build works in `.STORE.partial` beside the store, or in `STORE/.partial` where the store's folder is there already: it
may be a link, or a disk of its own. The same command after a kill goes on there, if the slides done are what they were,
and so it does after an error, once its cause is mended. Files that are no whole JPEG are listed in
`STORE.bad_tiles.csv` beside the store, all of them; slides found whole are not opened again. An extension of a store
keeps what is there: the new index gets a folder of its own in the store, and new tiles get shards of their own,
until `store.json`, replaced last, names them. So whoever opens the store finds it whole at any moment; shards beyond
those that it counts are still being written.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hpcssl.core.atomic import alone, remove_temporary, sync_dir, write_atomic
from hpcssl.core.errors import StoreError, UserError
from hpcssl.core.ordered import in_order
from hpcssl.stores.extend import check_unchanged, extended
from hpcssl.stores.index_writer import StoreWriter
from hpcssl.stores.shards import MOST_SHARD_BYTES
from hpcssl.stores.store import FORMAT, Store, identity, index_files
from hpcssl.stores.tar import ShardWriter
from hpcssl.stores.tile_files import Tiles, check_tiles, list_names, list_tiles, read_tiles, slides_below

THREADS = 8
_READ_TOGETHER = 32  # files that one thread reads for a shard before it hands them over
_COMMIT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How a store is built.

    Attributes
    ----------
    pack : copy the tiles into tar shards; else index the files where they are
    shard_gb : size from which on a shard ends with the slide that fills it, in 10^9 bytes
    check : look at both ends of every JPEG; else only its name and size are taken
    threads : files read at a time
    commit_s : seconds of work that a kill may cost
    """

    pack: bool = False
    shard_gb: float = 16.0
    check: bool = True
    threads: int = THREADS
    commit_s: float = _COMMIT_S

    def __post_init__(self) -> None:
        if not 0 < self.shard_gb * 1e9 < MOST_SHARD_BYTES:
            raise StoreError(
                f"shards of {self.shard_gb} GB; expected more than 0 and less than {MOST_SHARD_BYTES / 1e9:.0f}"
            )
        if self.threads < 1:
            raise StoreError(f"{self.threads} threads; expected at least 1")


def build_store(
    tiles: Path,
    out: Path,
    *,
    table: Path | None = None,
    options: BuildOptions | None = None,
    append: bool = False,
    on_total: Callable[[int], None] = lambda n: None,
    on_progress: Callable[[int], None] = lambda n: None,
) -> Store:
    """Index a folder of JPEG tiles laid out as `<organ>/<slide_id>/<name>.jpg`, or pack it.

    Parameters
    ----------
    tiles : root of the tiles
    out : folder of the store; must not exist, unless for `append`
    table : slide table that selects and orders the slides and adds columns; else `tiles/slides.csv` where there is one,
        else every folder, by organ and slide_id
    append : keep the slides of the store at `out` and add those that it lacks at its end; it keeps its kind
    on_total : called once with the number of slides
    on_progress : called with 1 after every slide; with those that a killed build had done at once

    Raises
    ------
    StoreError
        For an empty folder, files that are no whole JPEG (with their number and list), a table that does not match, or
        a slide of an extended store that is not what it was.
    """
    options = options or BuildOptions()
    slides, counted = slides_below(tiles, table, out=out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with alone(out):
        if out.exists() and not append:
            raise StoreError(f"{out}: exists already; remove it, choose another --out, or add new slides with --append")
        base = Store.open(out) if out.exists() else None
        if base is not None:
            slides = extended(base, slides, tiles, counted=counted)
        on_total(len(slides))
        build = Build(tiles, out, slides, base, options, on_progress)
        if base is not None:
            check_unchanged(base, tiles, threads=options.threads, on_progress=on_progress)
            if slides.equals(base.slides.drop(columns="first_tile")):
                build.discard()
                return base
        build.run(counted=counted)
    return Store.open(out)


class Build:
    """One build, or one extension of `base`; `in_place`: in the folder `out`, which is there already."""

    def __init__(
        self,
        tiles: Path,
        out: Path,
        slides: pd.DataFrame,
        base: Store | None,
        options: BuildOptions,
        on_progress: Callable[[int], None],
        *,
        in_place: bool = False,
    ):
        self.tiles, self.out, self.slides, self.base, self.options = tiles, out, slides, base, options
        self.on_progress = on_progress
        self.in_place = in_place or base is not None
        self.partial = out / ".partial" if self.in_place else out.with_name(f".{out.name}.partial")
        self.folders = [f"{organ}/{slide_id}" for organ, slide_id in zip(slides["organ"], slides["slide_id"])]
        self.packed = base.packed if base else options.pack
        self.shards: ShardWriter | None = None
        if self.packed:
            old = len(base.header["shards"]) if base else 0
            self.shards = ShardWriter(out if self.in_place else self.partial, int(options.shard_gb * 1e9), first=old)
        about = {"format": FORMAT, "root": str(tiles.resolve()), "packed": self.packed, "check": options.check}
        about |= {"shard_gb": options.shard_gb, "base": base.digest if base else None}
        self.bad_list = out.with_name(f"{out.name}.bad_tiles.csv")
        self.writer = StoreWriter(self.partial, self.shards, about=about, root=tiles, bad_list=self.bad_list)
        self._worth_keeping = False

    def run(self, *, counted: bool) -> None:
        """Build what a killed try left to do, and publish it."""
        self.bad_list.unlink(missing_ok=True)
        try:
            self._fill()
            self._publish(counted=counted)
        except (UserError, PermissionError):  # the input must change first
            if not self._worth_keeping:
                self.discard()
            raise
        finally:
            self.writer.close()

    def discard(self) -> None:
        """Remove what this build, or a killed one before it, has done so far."""
        self.writer.close()
        shutil.rmtree(self.partial, ignore_errors=True)
        if self.in_place and self.shards is not None:
            self.shards.drop_from(len(self.base.header["shards"]) if self.base else 0)

    def _fill(self) -> None:
        done = self.writer.resume(self.folders)
        self._worth_keeping = bool(self.writer.whole)
        if not self._unchanged(self.folders[self.base.num_slides if self.base else 0 : done]):
            done = 0
        if not done:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir()
            self.writer.begin(self.base)
            done = self.base.num_slides if self.base else 0
        done_before = done - (self.base.num_slides if self.base else 0)
        if done_before:
            self.on_progress(done_before)
        last = time.monotonic()
        with ThreadPoolExecutor(self.options.threads) as pool:
            work = self._pack(pool, done) if self.shards else self._index(pool, done)
            for folder, found, places in work:
                self.writer.add(folder, found, places)
                if time.monotonic() - last >= self.options.commit_s:
                    self.writer.commit()
                    self._worth_keeping = True
                    last = time.monotonic()
                self.on_progress(1)
        self.writer.commit()

    def _unchanged(self, folders: list[str]) -> bool:
        """Return whether slides that were done hold what they held then."""
        with ThreadPoolExecutor(self.options.threads) as pool:
            return all(
                not found.bad and self.writer.mark(folder, found) in self.writer.whole
                for folder, found in in_order(pool, self._tiles, folders, window=4 * self.options.threads)
            )

    def _tiles(self, folder: str) -> Tiles:
        """Return names and sizes of a slide's tiles, none of which is opened."""
        return list_tiles(self.tiles, folder)

    def _look(self, folder: str) -> Tiles:
        """Return what a slide's folder holds, without opening files that were found whole by a try before."""
        if not self.options.check or self.writer.whole:
            found = self._tiles(folder)
            if not self.options.check or self.writer.mark(folder, found) in self.writer.whole:
                return found
        return check_tiles(self.tiles, folder)

    def _index(self, pool: ThreadPoolExecutor, done: int) -> Iterator[tuple[str, Tiles, list[tuple[int, int]]]]:
        """Yield what the slides' folders hold."""
        for folder, found in in_order(pool, self._look, self.folders[done:], window=4 * self.options.threads):
            yield folder, found, []

    def _pack(self, pool: ThreadPoolExecutor, done: int) -> Iterator[tuple[str, Tiles, list[tuple[int, int]]]]:
        """Copy the slides' tiles into the shards and yield what they hold."""
        assert self.shards is not None
        threads = self.options.threads
        listings = in_order(pool, partial(list_names, self.tiles), self.folders[done:], window=2 * threads)

        def pieces() -> Iterator[tuple[str, list[bytes], bool]]:
            for folder, names in listings:
                for start in range(0, max(1, len(names)), _READ_TOGETHER):
                    end = start + _READ_TOGETHER
                    yield folder, names[start:end], end >= len(names)

        def read(piece: tuple[str, list[bytes], bool]) -> Tiles:
            return read_tiles(self.tiles, piece[0], piece[1], check=self.options.check)

        slide: Tiles | None = None
        for (folder, _, last), found in in_order(pool, read, pieces(), window=2 * threads):
            if slide is None:
                slide, places = Tiles(), []
                self.shards.begin_slide()
            if not self.writer.num_bad and not found.bad:  # else this build fails: the rest is only counted
                places += self.shards.write(folder, found.names, found.contents)
            slide.names += found.names
            slide.sizes += found.sizes
            slide.bad += found.bad
            if last:
                yield folder, slide, places
                slide = None

    def _publish(self, *, counted: bool) -> None:
        writer = self.writer
        if writer.num_bad:
            total = writer.num_bad + writer.num_tiles
            raise StoreError(
                f"{self.tiles}: {writer.num_bad} of {total} tile files are no whole JPEG;"
                f" first: {writer.first_bad}; all are listed in {self.bad_list}; mend or remove them and build again"
            )
        counts = writer.finish()
        _check_counts(self.slides, counts, self.tiles, counted=counted)
        slides = self.slides.assign(num_tiles=counts, first_tile=np.cumsum(counts) - counts)
        slides.to_parquet(self.partial / "slides.parquet", index=False)
        header = self._header(slides, writer.digests())
        if self.in_place:
            self._replace(header)
        else:
            write_atomic(self.partial / "store.json", header)
            writer.forget()
            sync_dir(self.partial)
            os.replace(self.partial, self.out)
            sync_dir(self.out.parent)

    def _header(self, slides: pd.DataFrame, files: dict[str, str]) -> str:
        header: dict[str, Any] = {"format": FORMAT, "kind": "packed" if self.packed else "loose"}
        if self.shards:
            header["shards"] = [*(self.base.header["shards"] if self.base else []), *self.shards.sizes]
        else:
            header["root"] = str(self.tiles.resolve())
        if self.in_place:
            header["index"] = _next_index(self.base)
        header |= {"num_slides": len(slides), "num_tiles": int(slides["num_tiles"].sum())}
        return json.dumps(header | identity(slides, files) | {"files": files}, indent=1) + "\n"

    def _replace(self, header: str) -> None:
        """Give the store its new index; the one before stays until the next time, for those who have it open."""
        before = self.base.index if self.base else None
        new = self.out / _next_index(self.base)
        self.writer.forget()
        sync_dir(self.partial)
        shutil.rmtree(new, ignore_errors=True)  # a try that was killed before it wrote store.json
        os.replace(self.partial, new)
        sync_dir(self.out)
        remove_temporary(self.out)
        write_atomic(self.out / "store.json", header)
        for folder in self.out.glob("index-*"):
            if folder not in (new, before):
                shutil.rmtree(folder, ignore_errors=True)
        if before != self.out:
            for name in index_files(packed=self.packed):
                (self.out / name).unlink(missing_ok=True)


def _next_index(base: Store | None) -> str:
    before = int(base.index.name.removeprefix("index-")) if base and base.index != base.path else 0
    return f"index-{before + 1:06d}"


def _check_counts(slides: pd.DataFrame, counts: np.ndarray, tiles: Path, *, counted: bool) -> None:
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        slide = slides.iloc[empty[0]]
        raise StoreError(
            f"{tiles}: slide {slide['slide_id']} has no tiles ({len(empty)} such slides);"
            f" expected JPEG files in {slide['organ']}/{slide['slide_id']}"
        )
    differs = np.flatnonzero(slides["num_tiles"].to_numpy() != counts)
    if counted and len(differs):
        slide = slides.iloc[differs[0]]
        raise StoreError(
            f"{tiles}: slide {slide['slide_id']} has {counts[differs[0]]} tiles, but the slide table says"
            f" {slide['num_tiles']} ({len(differs)} such slides); correct the table"
        )
