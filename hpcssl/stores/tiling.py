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
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd

from hpcssl.core.atomic import alone, atomic_dir, atomic_file, digest_bytes, read_json, remove_temporary, write_atomic
from hpcssl.core.config import first_difference
from hpcssl.core.errors import SlideError, StoreError
from hpcssl.core.ordered import in_order
from hpcssl.slides.cutting import Cut, CutOptions, plan_cut, tile_name
from hpcssl.slides.qc import qc_picture
from hpcssl.slides.slide_list import FAILED, mpp_from, slides_to_read, told_mpp, write_failed
from hpcssl.stores.extend import relabelled
from hpcssl.stores.scan import Build, BuildOptions
from hpcssl.stores.store import Store
from hpcssl.stores.tile_files import Tiles

_SLIDES_AT_A_TIME = 4  # while one is opened or written, the others are cut
_TOGETHER = 256  # tiles that are copied into a shard at a time


@dataclass(frozen=True, kw_only=True)
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
    threads: int = 4

    def __post_init__(self) -> None:
        BuildOptions(shard_gb=self.shard_gb, threads=self.threads)  # checks them


def tile_slides(
    slides: pd.DataFrame,
    out: Path,
    options: TilingOptions,
    *,
    share: tuple[int, int] | None = None,
    on_total: Callable[[int], None] = lambda n: None,
    on_progress: Callable[[int], None] = lambda n: None,
) -> tuple[Store | None, list[dict[str, str]]]:
    """Cut slides into tiles and write their store.

    Parameters
    ----------
    slides : `slide_id, organ, path, mpp` and other columns, as `hpcssl.slides.slide_list.slides_to_read` gives them
    out : folder of the tiles and their store
    share : (k, n): only cut every n-th slide from the k-th on, from 0, and leave the store to a call without it
    on_total : called once with the number of slides to cut
    on_progress : called with 1 after every slide

    Returns
    -------
    (store, failed) : the store, None if there is none yet; the rows of `failed_slides.csv`

    Raises
    ------
    StoreError
        If `out` holds something else, or tiles that were cut otherwise.
    """
    if share and not 0 <= share[0] < share[1]:
        raise StoreError(f"--share {share[0] + 1}/{share[1]}; expected K/N with K from 1 to N")
    _claim(out, options)
    with alone(out / ".tiling" / ("all" if share is None else f"share-{share[0]}")):
        base, held, rows = _rows_to_hold(slides, out, options)
        todo = _not_cut(rows[share[0] :: share[1]] if share else rows, out, options)
        on_total(len(todo))
        failed = _cut_all(todo, out, options, on_progress)
        if share is None:
            lost = {row["slide_id"] for row in failed}
            whole = [row for row in rows if row["slide_id"] not in lost]
            if whole or (base and not held.equals(base.slides.drop(columns="first_tile"))):
                _assemble(whole, out, base, held, options)
            _finish(out, failed, {_file(out, row, options, ".json") for row in whole})
        return _store_at(out), failed


def slides_to_cut(slides: pd.DataFrame, out: Path, options: TilingOptions) -> list[str]:
    """Take the folder for a job array, and return the ids of the slides that are not cut yet."""
    _claim(out, options)
    return [row["slide_id"] for row in _not_cut(_rows_to_hold(slides, out, options)[2], out, options)]


def cut_slides(source: Path, out: Path, options: TilingOptions, slide_ids: Sequence[str]) -> None:
    """Cut some slides of a table or folder: one task of a job array, after which `tile_source` writes the store.

    A slide that cannot be read is left to that, too, which tries it again and records it.
    """
    wanted = set(slide_ids)
    rows = [row for row in _rows_to_hold(slides_to_read(source), out, options)[2] if row["slide_id"] in wanted]
    _cut_all(_not_cut(rows, out, options), out, options, lambda n: None)


def tile_source(source: Path, out: Path, options: TilingOptions) -> None:
    """Tile a table or folder of slides; SlideError, after all is done, where slides failed."""
    slides = slides_to_read(source)
    _, failed = tile_slides(slides, out, options)
    if failed:
        raise SlideError(describe_failed(failed, len(slides), f"all are in {out / FAILED}"))


def describe_failed(failed: Sequence[Mapping[str, str]], num_slides: int, what_next: str) -> str:
    """Say in one line how many slides failed, and why the first one did."""
    return f"{len(failed)} of {num_slides} slides failed ({what_next}); first: {failed[0]['reason']}"


def _rows_to_hold(
    slides: pd.DataFrame, out: Path, options: TilingOptions
) -> tuple[Store | None, pd.DataFrame, list[dict[str, Any]]]:
    """Return the store, if there is one yet, the slides that it holds as they are named now, and rows of the others."""
    base = _store_at(out)
    held = relabelled(base, slides, options.cut.assume_mpp) if base else slides[:0]
    table: Any = slides[~slides["slide_id"].isin(held["slide_id"])].to_dict("records")
    return base, held, table


def _not_cut(rows: list[dict[str, Any]], out: Path, options: TilingOptions) -> list[dict[str, Any]]:
    return [row for row in rows if not _file(out, row, options, ".json").exists()]


def _store_at(out: Path) -> Store | None:
    return Store.open(out) if (out / "store.json").exists() else None


def _claim(out: Path, options: TilingOptions) -> None:
    """Take the folder for these tiles; refuse one of something else, or of tiles that were cut otherwise."""
    note, asked = out / "tiling.json", asdict(options.cut) | {"pack": options.pack, "shard_gb": options.shard_gb}
    del asked["assume_mpp"]  # of single slides; their records say it
    if note.exists():
        found = read_json(note, StoreError(f"{note}: damaged; remove {out} or choose another --out"))
        if difference := first_difference(found, asked):
            key, before, now = difference
            raise StoreError(f"{out}: tiles cut with {key} = {before}, asked for is {now}; choose another --out")
    elif out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise StoreError(f"{out}: not empty, and nothing of hpcssl tile; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(note, json.dumps(asked, indent=1) + "\n")
    for folder in (out / "qc", out / ".tiling"):
        folder.mkdir(exist_ok=True)


def _file(out: Path, row: Mapping[str, Any], options: TilingOptions, suffix: str) -> Path:
    """Return a file of a slide that is cut; its name says from which row, so that a changed row is cut again.

    So is one whose row has no MPP where another is to be assumed.

    `.jpegs` are the tiles for a packed store, `.npy` their corners and sizes, and `.json`, written last, the facts.
    """
    cut_from = repr([str(row["organ"]), str(row["path"]), told_mpp(row, options.cut.assume_mpp)])
    return out / ".tiling" / f"{row['slide_id']}-{digest_bytes(cut_from.encode())[:16]}{suffix}"


def _cut_all(
    rows: list[dict[str, Any]], out: Path, options: TilingOptions, on_progress: Callable[[int], None]
) -> list[dict[str, str]]:
    """Cut slides, several at a time; returns those that cannot be read, with the reason."""
    failed = []
    at_a_time = min(_SLIDES_AT_A_TIME, options.threads)
    stop = threading.Event()
    with ThreadPoolExecutor(options.threads) as pool, ThreadPoolExecutor(at_a_time) as slides:

        def cut(row: dict[str, Any]) -> str | None:
            if stop.is_set():
                return None
            try:
                _cut_slide(row, out, options, pool)
            except SlideError as error:
                return str(error)
            return None

        try:
            for row, fault in in_order(slides, cut, rows, window=2 * at_a_time):
                if fault:
                    failed.append({key: row[key] for key in ("slide_id", "organ", "path")} | {"reason": fault})
                on_progress(1)
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)  # after an error: slides under way are not finished
    return failed


def _cut_slide(row: Mapping[str, Any], out: Path, options: TilingOptions, pool: ThreadPoolExecutor) -> None:
    """Cut one slide: first its picture, then the tiles, then where they are, last the record that it is done."""
    cut = plan_cut(row, options.cut, pool, threads=options.threads)
    write_atomic(out / "qc" / f"{row['slide_id']}.jpg", qc_picture(cut.foreground, cut.corners, cut.sampling.side))
    if not len(cut.corners):
        raise SlideError(
            f"{row['path']}: no tile of which {100 * options.cut.min_tissue:g} % is tissue"
            f" ({cut.foreground.tissue_mm2:.3f} mm² of tissue in it); see its picture in {out / 'qc'}"
        )
    jpegs = cut.jpegs(pool, window=2 * options.threads)
    if options.pack:
        with atomic_file(_file(out, row, options, ".jpegs")) as temporary, temporary.open("wb") as stream:
            sizes = _write_joined(jpegs, stream)
    else:
        folder = out / row["organ"] / row["slide_id"]
        shutil.rmtree(folder, ignore_errors=True)  # of a try that was killed before its record
        with atomic_dir(folder) as partial:
            sizes = _write_files(jpegs, cut, partial)
    with atomic_file(_file(out, row, options, ".npy")) as temporary, temporary.open("wb") as stream:
        np.save(stream, np.column_stack([cut.corners, sizes]))
    record = {"organ": row["organ"]} | cut.facts | {"mpp_from": mpp_from(cut.slide, row)}
    write_atomic(_file(out, row, options, ".json"), json.dumps(record) + "\n")


def _write_joined(jpegs: Iterator[list[bytes]], stream: BinaryIO) -> list[int]:
    sizes = []
    for some in jpegs:
        stream.writelines(some)
        sizes += [len(jpeg) for jpeg in some]
    return sizes


def _write_files(jpegs: Iterator[list[bytes]], cut: Cut, folder: Path) -> list[int]:
    sizes: list[int] = []
    for some in jpegs:
        for jpeg in some:
            x, y = cut.corners[len(sizes)].tolist()
            with open(f"{folder}/{tile_name(len(sizes), x, y)}", "wb") as stream:
                stream.write(jpeg)
            sizes.append(len(jpeg))
    return sizes


def _assemble(
    rows: list[dict[str, Any]], out: Path, base: Store | None, held: pd.DataFrame, options: TilingOptions
) -> None:
    """Add the slides that are cut to the store, whose table becomes `held`."""
    damaged = StoreError(f"{out}: damaged; choose another --out")
    facts = [read_json(_file(out, row, options, ".json"), damaged) for row in rows]
    slides = pd.DataFrame([row | {"num_tiles": 1} | found for row, found in zip(rows, facts, strict=True)])
    if base:
        slides = pd.concat([held, slides], ignore_index=True).fillna("") if rows else held
    _Assembly(out, slides, [_file(out, row, options, "") for row in rows], base, options).run(counted=False)


def _finish(out: Path, failed: list[dict[str, str]], used: set[Path]) -> None:
    """Write the tables, and remove what the store holds now, and tiles of records that were not used."""
    write_failed(out, failed)
    store = _store_at(out)
    held = set(store.slides["organ"] + "/" + store.slides["slide_id"]) if store else set()
    for record in set((out / ".tiling").glob("*.json")) - used:  # of a row that was changed since
        organ = read_json(record, StoreError(f"{record}: damaged; remove it")).get("organ")
        former = f"{organ}/{record.stem.rpartition('-')[0]}"
        if organ and former not in held:
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


class _Assembly(Build):
    """The build of a store from slides that are cut: names and sizes are known, nothing is listed or opened."""

    def __init__(self, out: Path, slides: pd.DataFrame, stems: list[Path], base: Store | None, options: TilingOptions):
        """`stems` are the files of the slides that `base` lacks, without their suffix."""
        build = BuildOptions(pack=options.pack, shard_gb=options.shard_gb, check=False, threads=1)
        super().__init__(out, out, slides, base, build, lambda n: None, in_place=True)
        self._stems = dict(zip(self.folders[len(slides) - len(stems) :], stems, strict=True))

    def _tiles(self, folder: str) -> Tiles:
        table = np.load(f"{self._stems[folder]}.npy").tolist()
        names = [tile_name(n, x, y).encode() for n, (x, y, _) in enumerate(table)]
        return Tiles(names=names, sizes=[size for _, _, size in table])

    def _index(self, pool: ThreadPoolExecutor, done: int) -> Iterator[tuple[str, Tiles, list[tuple[int, int]]]]:
        for folder in self.folders[done:]:
            yield folder, self._tiles(folder), []

    def _pack(self, pool: ThreadPoolExecutor, done: int) -> Iterator[tuple[str, Tiles, list[tuple[int, int]]]]:
        assert self.shards is not None
        for folder in self.folders[done:]:
            tiles, places = self._tiles(folder), []
            self.shards.begin_slide()
            with open(f"{self._stems[folder]}.jpegs", "rb") as stream:
                for first in range(0, len(tiles.names), _TOGETHER):
                    some = slice(first, first + _TOGETHER)
                    jpegs = [stream.read(size) for size in tiles.sizes[some]]
                    places += self.shards.write(folder, tiles.names[some], jpegs)
            yield folder, tiles, places
