"""Whole slides into a store of tiles: `hpcssl tile`.

    TILES/<organ>/<slide_id>/000007_x448_y0.jpg   loose: number in the slide, corner in level-0 pixels
    TILES/tiles-000000.tar                        packed
    TILES/store.json, index-000001/               the store: it is whole when store.json names it
    TILES/slides.csv                              the slide table, with what reading told
    TILES/qc/<slide_id>.jpg                       a picture of every slide: tissue, pen, tiles
    TILES/failed_slides.csv                       slides that could not be read, with the reason
    TILES/tiling.json                             what tiles are cut
    TILES/.tiling/<slide_id>-….json               slides that are cut, until the store holds them
    TILES/.partial/                               the store's next index, until it is whole

A slide is cut as a whole or not at all; the same command after a kill goes on with the next one, tries those again that
failed, and leaves the same bytes as one that was not killed. Slides that are new in the table are added at the store's
end.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hpcssl.core.atomic import alone, atomic_dir, atomic_file, read_json, remove_temporary, write_atomic
from hpcssl.core.claim import claim
from hpcssl.core.config import AtLeast1, settings
from hpcssl.core.errors import SlideError, StoreError
from hpcssl.slides.cutting import CutOptions, plan_cut, tile_name
from hpcssl.slides.qc import qc_picture
from hpcssl.slides.slide_list import mpp_from, mpp_to_go_by, write_failed
from hpcssl.stores.index_writer import SlideEntry
from hpcssl.stores.scan import BuildOptions, TileSource, tile_store_at, tile_target
from hpcssl.stores.slide_records import Row, SlideWork, record_stem
from hpcssl.stores.store import Store
from hpcssl.stores.store_build import Build, SlidesRead, Target
from hpcssl.stores.tile_store import TileStore

_TOGETHER = 256  # tiles that are copied into a shard at a time


@settings
class TilingOptions:
    """How slides are tiled.

    Attributes
    ----------
    cut : what tiles are cut
    pack : write tar shards instead of a file a tile
    shard_gb : size from which on a shard ends with the slide that fills it, in 10^9 bytes
    threads : that decode and encode
    """

    cut: CutOptions = field(default_factory=CutOptions)
    pack: bool = False
    shard_gb: float = 16.0
    threads: AtLeast1 = 4

    @property
    def build(self) -> BuildOptions:
        """How the store of the tiles is built."""
        return BuildOptions(pack=self.pack, shard_gb=self.shard_gb, check=False, threads=1)

    def __post_init__(self) -> None:
        _ = self.build  # refuses a size of shards that cannot be


def tile_slides(
    slides: pd.DataFrame,
    out: Path,
    options: TilingOptions,
    *,
    on_total: Callable[[int], None] = lambda n: None,
    on_progress: Callable[[int], None] = lambda n: None,
) -> tuple[TileStore | None, list[dict[str, Any]]]:
    """Cut slides into tiles; return their store, None if there is none yet, and the rows of `failed_slides.csv`.

    StoreError where `out` holds something else, or tiles that were cut otherwise.

    Parameters
    ----------
    slides : `slide_id, organ, path, mpp` and other columns, as `hpcssl.slides.slide_list.slides_to_read` gives them
    out : folder of the tiles and their store
    on_total : called once with the number of slides to cut
    on_progress : called with 1 after every slide
    """
    work = Tiling(out, options)
    work.claim()
    with alone(out / ".tiling" / "all"):
        base = _store_at(out)
        old, rows = work.old_and_new(base, slides)
        missing = [row for row in rows if not work.record(row).exists()]
        on_total(len(missing))
        failed = work.read_each(missing, on_progress)
        used = work.add_slides(base, old, rows, failed)
        _finish(out, failed, set(used))
        return _store_at(out), failed


def _store_at(out: Path) -> TileStore | None:
    return tile_store_at(out) if (out / "store.json").exists() else None


class Tiling(SlideWork):
    """Cutting slides into tiles."""

    def __init__(self, out: Path, options: TilingOptions):
        self.out, self.options = out, options
        self.threads, self.assume_mpp = options.threads, options.cut.assume_mpp

    def claim(self) -> TileStore | None:
        """See `SlideWork.claim`; refuses tiles that were cut otherwise, too."""
        out, options = self.out, self.options
        file, cut = out / "tiling.json", asdict(options.cut) | {"pack": options.pack, "shard_gb": options.shard_gb}
        del cut["assume_mpp"]  # of single slides; their records say it
        if not file.exists() and out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
            raise StoreError(f"{out}: not empty, and nothing of hpcssl tile; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        made, advice = f"{out}: tiles cut with", "choose another --out"
        damaged = f"remove {out} or {advice}"
        claim(file, cut, made=made, now="asked for is", advice=advice, error=StoreError, damaged=damaged)
        for folder in (out / "qc", out / ".tiling"):
            folder.mkdir(exist_ok=True)
        return _store_at(out)

    def record(self, row: Row) -> Path:
        """Return the file of the facts of a slide that is cut, written last.

        Beside it are `.jpegs`, the tiles for a packed store, and `.npy`, their corners and sizes. The name says from
        which row, so that a changed row is cut again; so is one without MPP where another is to be assumed.
        """
        cut_from = [str(row["organ"]), str(row["path"]), mpp_to_go_by(row, self.assume_mpp)]
        return self.out / ".tiling" / f"{record_stem(row, cut_from)}.json"

    def read(self, row: Row, pool: Executor) -> None:
        """Cut a slide: first its picture, then the tiles, then where they are, last the record that it is done."""
        out, options, record = self.out, self.options, self.record(row)
        cut = plan_cut(row, options.cut, pool, threads=options.threads)
        write_atomic(out / "qc" / f"{row['slide_id']}.jpg", qc_picture(cut.foreground, cut.corners, cut.sampling.side))
        if not len(cut.corners):
            raise SlideError(
                f"{row['path']}: no tile of which {100 * options.cut.min_tissue:g} % is tissue"
                f" ({cut.foreground.tissue_mm2:.3f} mm² of tissue in it); see its picture in {out / 'qc'}"
            )
        jpegs = chain.from_iterable(cut.jpegs(pool, window=2 * options.threads))
        if options.pack:
            with atomic_file(record.with_suffix(".jpegs")) as temporary, temporary.open("wb") as stream:
                sizes = [stream.write(jpeg) for jpeg in jpegs]
        else:
            folder = out / row["organ"] / row["slide_id"]
            shutil.rmtree(folder, ignore_errors=True)  # of a try that was killed before its record
            with atomic_dir(folder) as partial:
                files = (partial / tile_name(n, x, y) for n, (x, y) in enumerate(cut.corners.tolist()))
                sizes = [file.write_bytes(jpeg) for file, jpeg in zip(files, jpegs, strict=True)]
        with atomic_file(record.with_suffix(".npy")) as temporary, temporary.open("wb") as stream:
            np.save(stream, np.column_stack([cut.corners, sizes]))
        facts = {"organ": row["organ"]} | cut.facts | {"mpp_from": mpp_from(cut.slide, row)}
        write_atomic(record, json.dumps(facts) + "\n")

    def facts(self, record: Path) -> dict[str, Any]:
        """See `SlideWork.facts`."""
        return {"num_tiles": 1} | read_json(record, StoreError(f"{self.out}: damaged; choose another --out"))

    def write(self, base: Store | None, slides: pd.DataFrame, records: Sequence[Path]) -> None:
        """See `SlideWork.write`."""
        options = self.options.build
        target = tile_target(self.out, self.out, slides, base, options, in_place=True)
        Build(target, _CutSlides(target, options, records)).run()


def _finish(out: Path, failed: list[dict[str, Any]], used: set[Path]) -> None:
    """Write the tables, and remove what the store holds now, and tiles of records that were not used."""
    write_failed(out, failed)
    store = _store_at(out)
    folders = set(store.slides["organ"] + "/" + store.slides["slide_id"]) if store else set()
    for record in set((out / ".tiling").glob("*.json")) - used:  # of a row that was changed since
        organ = read_json(record, StoreError(f"{record}: damaged; remove it")).get("organ")
        former = f"{organ}/{record.stem.rpartition('-')[0]}"
        if organ and former not in folders:
            shutil.rmtree(out / former, ignore_errors=True)
            with contextlib.suppress(OSError):  # it holds other slides
                (out / organ).rmdir()
    if store:
        write_atomic(out / "slides.csv", store.slides.drop(columns="first_tile").to_csv(index=False))
    for folder in (out, out / "qc", out / ".tiling"):
        remove_temporary(folder)
    for suffix in ("json", "npy", "jpegs"):
        for path in (out / ".tiling").glob(f"*.{suffix}"):
            path.unlink()


class _CutSlides(TileSource):
    """Slides that are cut: names and sizes are known, nothing is listed or opened."""

    def __init__(self, target: Target, options: BuildOptions, records: Sequence[Path]):
        """`records` are those of the slides that the store lacks."""
        super().__init__(target.out, target, options)
        self._records = dict(enumerate(records, len(target.slides) - len(records)))

    def look(self, number: int) -> SlideEntry:
        """See `SlideSource.look`."""
        table = np.load(self._records[number].with_suffix(".npy")).tolist()
        names = [tile_name(n, x, y).encode() for n, (x, y, _) in enumerate(table)]
        return SlideEntry(count=len(table), arrays={"sizes.npy": [size for _, _, size in table]}, names=names)

    def read(self, first: int, pool: Executor, build: Build) -> SlidesRead:
        """See `SlideSource.read`."""
        for number, (slide, offsets) in enumerate(super().read(first, pool, build), first):
            if build.shards:
                build.shards.begin_slide()
                with self._records[number].with_suffix(".jpegs").open("rb") as stream:
                    for start in range(0, slide.count, _TOGETHER):
                        some = slice(start, start + _TOGETHER)
                        jpegs = [stream.read(size) for size in slide.arrays["sizes.npy"][some]]
                        offsets += build.shards.write(self.keys[number], slide.names[some], jpegs)
            yield slide, offsets
