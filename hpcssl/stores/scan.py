"""Building a store of tiles: one pass over `<organ>/<slide_id>/*.jpg`, so that nothing lists folders twice.

A build works in `.STORE.partial` beside the store; an extension in `STORE/.partial`: the store's folder may be a link,
or a disk of its own. The same command after a kill goes on there, if the slides done are what they were, and so it does
after an error, once its cause is mended. Files that are no whole JPEG are listed in `STORE.bad_tiles.csv` beside the
store, all of them; slides found whole are not opened again. An extension of a store keeps what is there: new tiles get
shards of their own; those beyond the ones that `store.json` counts are still being written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hpcssl.core.atomic import alone
from hpcssl.core.config import AtLeast1, NotNegative, settings
from hpcssl.core.errors import StoreError
from hpcssl.core.ordered import in_order
from hpcssl.stores.extend import check_unchanged, extended
from hpcssl.stores.index_writer import SlideEntry
from hpcssl.stores.kinds import open_store
from hpcssl.stores.loose import LooseStore
from hpcssl.stores.packed import PackedStore
from hpcssl.stores.store import FORMAT, Store
from hpcssl.stores.store_build import COMMIT_S, Build, SlideSource, SlidesRead, Target, next_index
from hpcssl.stores.tar import MOST_SHARD_BYTES, ShardWriter
from hpcssl.stores.tile_files import Tiles, check_tiles, list_names, list_tiles, read_tiles, slides_below
from hpcssl.stores.tile_store import TileStore

THREADS = 8
_READ_TOGETHER = 32  # files that one thread reads for a shard before it hands them over


@settings
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
    threads: AtLeast1 = THREADS
    commit_s: NotNegative = COMMIT_S

    def __post_init__(self) -> None:
        if not 0 < self.shard_gb * 1e9 < MOST_SHARD_BYTES:
            most = f"{MOST_SHARD_BYTES / 1e9:.0f}"
            raise StoreError(f"shards of {self.shard_gb} GB; expected more than 0 and less than {most}")


def build_store(
    tiles: Path,
    out: Path,
    *,
    table: Path | None = None,
    options: BuildOptions | None = None,
    append: bool = False,
    on_total: Callable[[int], None] = lambda n: None,
    on_progress: Callable[[int], None] = lambda n: None,
) -> TileStore:
    """Index a folder of JPEG tiles laid out as `<organ>/<slide_id>/<name>.jpg`, or pack it.

    StoreError for an empty folder, files that are no whole JPEG (with their number and list), a table that does not
    match, or a slide of an extended store that is not what it was.

    Parameters
    ----------
    tiles : root of the tiles
    out : folder of the store; must not exist, unless for `append`
    table : slide table that selects and orders the slides and adds columns; else `tiles/slides.csv` where there is one,
        else every folder, by organ and slide_id
    append : keep the slides of the store at `out` and add those that it lacks at its end; it keeps its kind
    on_total : called once with the number of slides
    on_progress : called with 1 after every slide
    """
    options = options or BuildOptions()
    slides, counted = slides_below(tiles, table, out=out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with alone(out):
        if out.exists() and not append:
            raise StoreError(f"{out}: exists already; remove it, choose another --out, or add new slides with --append")
        base = tile_store_at(out)
        if base is not None:
            slides = extended(base, slides, tiles, counted=counted)
        on_total(len(slides))
        target = tile_target(out, tiles, slides, base, options, in_place=base is not None)
        source = Folders(tiles, target, options, counted=counted)
        build = Build(target, source, commit_s=options.commit_s, on_progress=on_progress)
        if base is not None:
            check_unchanged(base, tiles, threads=options.threads, on_progress=on_progress)
            if slides.equals(base.slides.drop(columns="first_tile")):
                build.discard()
                return base
        build.run()
    store = tile_store_at(out)
    assert store is not None
    return store


def tile_store_at(out: Path) -> TileStore | None:
    """Return the store of tiles at a path, None where there is nothing; StoreError for a store of slides."""
    store = open_store(out) if out.exists() else None
    if store is not None and not isinstance(store, TileStore):
        raise StoreError(f"{store.path}: a store of slides; to extend it with slides, give --online, too")
    return store


def tile_target(
    out: Path, tiles: Path, slides: pd.DataFrame, base: Store | None, options: BuildOptions, *, in_place: bool
) -> Target:
    """Return what a build of a store of tiles makes: a packed one or a loose one, whose tiles are below `tiles`."""
    kind: type[Store] = type(base) if base else PackedStore if options.pack else LooseStore
    packed = kind is PackedStore
    header: dict[str, Any] = {"shards": []} if packed else {"root": str(tiles.resolve())}
    return Target(
        out=out,
        kind=kind,
        slides=slides,
        base=base,
        work=out / ".partial" if in_place else out.with_name(f".{out.name}.partial"),
        header=header | ({"index": next_index(base)} if in_place else {}),
        shard_bytes=int(options.shard_gb * 1e9) if packed else None,
    )


class TileSource(SlideSource):
    """Slides whose tiles are, or will be, `<organ>/<slide_id>/<name>.jpg`."""

    def __init__(self, root: Path, target: Target, options: BuildOptions):
        slides = target.slides
        self.root, self.threads = root, options.threads
        self.keys = [f"{organ}/{slide_id}" for organ, slide_id in zip(slides["organ"], slides["slide_id"])]
        kind = {"packed": target.kind is PackedStore, "check": options.check, "shard_gb": options.shard_gb}
        base = target.base and target.base.digest
        self.about = {"format": FORMAT, "root": str(root.resolve()), **kind, "base": base}


class Folders(TileSource):
    """Slides that are folders of files."""

    def __init__(self, tiles: Path, target: Target, options: BuildOptions, *, counted: bool):
        """`counted`: the slide table says how many tiles there are."""
        super().__init__(tiles, target, options)
        self._slides, self._check, self._counted = target.slides, options.check, counted

    def look(self, number: int) -> SlideEntry:
        """Return names and sizes of a slide's tiles, none of which is opened."""
        return list_tiles(self.root, self.keys[number]).entry

    def read(self, first: int, pool: Executor, build: Build) -> SlidesRead:
        """See `SlideSource.read`."""
        if build.shards:
            yield from self._pack(first, pool, build.shards, build)
            return

        def look_inside(key: str) -> Tiles:
            """Return what a folder holds, without opening files that were found whole by a try before."""
            if not self._check or build.whole:
                tiles = list_tiles(self.root, key)
                if not self._check or build.is_known(key, tiles.entry):
                    return tiles
            return check_tiles(self.root, key)

        for _, tiles in in_order(pool, look_inside, self.keys[first:], window=4 * self.threads):
            yield tiles.entry, []

    def _pack(self, first: int, pool: Executor, shards: ShardWriter, build: Build) -> SlidesRead:
        """Copy the slides' tiles into the shards and yield what they hold."""
        listings = in_order(pool, partial(list_names, self.root), self.keys[first:], window=2 * self.threads)

        def pieces() -> Iterator[tuple[str, list[bytes], bool]]:
            for key, names in listings:
                for start in range(0, max(1, len(names)), _READ_TOGETHER):
                    end = start + _READ_TOGETHER
                    yield key, names[start:end], end >= len(names)

        def read(piece: tuple[str, list[bytes], bool]) -> Tiles:
            return read_tiles(self.root, piece[0], piece[1], check=self._check)

        slide: Tiles | None = None
        for (key, _, last), tiles in in_order(pool, read, pieces(), window=2 * self.threads):
            if slide is None:
                slide, offsets = Tiles(), []
                shards.begin_slide()
            if not build.num_bad and not tiles.bad:  # else this build fails: the rest is only counted
                offsets += shards.write(key, tiles.names, tiles.contents)
            slide.names += tiles.names
            slide.sizes += tiles.sizes
            slide.bad += tiles.bad
            if last:
                yield slide.entry, offsets
                slide = None

    def check(self, counts: np.ndarray) -> None:
        """Refuse slides without tiles, and numbers of tiles that are not the table's."""
        slides = self._slides
        empty = np.flatnonzero(counts == 0)
        if len(empty):
            slide = slides.iloc[empty[0]]
            raise StoreError(
                f"{self.root}: slide {slide['slide_id']} has no tiles ({len(empty)} such slides);"
                f" expected JPEG files in {slide['organ']}/{slide['slide_id']}"
            )
        differs = np.flatnonzero(slides["num_tiles"].to_numpy() != counts)
        if self._counted and len(differs):
            slide = slides.iloc[differs[0]]
            raise StoreError(
                f"{self.root}: slide {slide['slide_id']} has {counts[differs[0]]} tiles, but the slide table says"
                f" {slide['num_tiles']} ({len(differs)} such slides); correct the table"
            )
