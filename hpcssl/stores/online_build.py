"""Building an online store: every slide is looked at once, for its tissue, its grid and where tiles may lie.

A build works in `STORE/.partial`, a record a slide; the same command after a kill goes on there. Several nodes may look
at slides of one store at the same time. A slide that cannot be used is left out and told with its reason.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hpcssl.core.atomic import alone, write_atomic
from hpcssl.core.claim import check_same, claim
from hpcssl.core.config import AtLeast1, settings
from hpcssl.core.errors import SlideError, StoreError
from hpcssl.slides.cutting import COARSER, CutOptions, reading
from hpcssl.slides.foreground import Foreground, find_foreground
from hpcssl.slides.grid import MOST_PEN, grid
from hpcssl.slides.opening import open_slide
from hpcssl.slides.ranges import Ranges, is_remote
from hpcssl.slides.sampling import sample
from hpcssl.slides.slide import Slide
from hpcssl.slides.slide_list import FAILED, mpp_from, mpp_of, mpp_to_go_by, write_failed
from hpcssl.stores.index_writer import SlideEntry
from hpcssl.stores.kinds import open_store
from hpcssl.stores.online import OnlineStore
from hpcssl.stores.online_places import Cells, corner_cells, runs_of
from hpcssl.stores.slide_records import Row, SlideWork, record_stem
from hpcssl.stores.store import FORMAT, Store
from hpcssl.stores.store_build import Build, SlideSource, Target, next_index


@settings
class OnlineOptions:
    """How an online store is built.

    Attributes
    ----------
    mpps : microns per pixel that tiles are read at; the first is that of the grid, whose tiles a slide counts for, even
        one that is coarser, whose places are drawn at the others
    tile_px : side of a tile
    of_grid : give the tiles of the grid, as `hpcssl tile` cuts them, instead of drawing places; only with one MPP
    min_tissue : share of a tile that must be tissue
    assume_mpp : of slides that do not say theirs
    threads : that read and decode
    """

    mpps: tuple[float, ...]
    tile_px: int = 224
    of_grid: bool = False
    min_tissue: float = 0.4
    assume_mpp: float | None = None
    threads: AtLeast1 = 4

    def __post_init__(self) -> None:
        for mpp in self.mpps:
            CutOptions(mpp=mpp, tile_px=self.tile_px, min_tissue=self.min_tissue, assume_mpp=self.assume_mpp)  # checks
        if len(set(self.mpps)) != len(self.mpps):
            raise StoreError(f"--mpp {','.join(map(str, self.mpps))}; expected each MPP once")
        if self.of_grid and len(self.mpps) > 1:
            raise StoreError(f"--grid: tiles of the grid are of one MPP, not of {len(self.mpps)}")

    @property
    def about(self) -> dict[str, Any]:
        """What the store's header says of them."""
        return {"mpps": list(self.mpps), **{key: getattr(self, key) for key in ("tile_px", "of_grid", "min_tissue")}}


def build_online(
    slides: pd.DataFrame,
    out: Path,
    options: OnlineOptions,
    *,
    append: bool = False,
    on_progress: Callable[[int], None] = lambda n: None,
) -> OnlineStore:
    """Look at every slide, and write the store; the same call after a kill goes on.

    Slides that cannot be used are not in the store, but in its `failed_slides.csv` with their reasons. StoreError where
    no slide can be used, or the store at `out` is another one.

    Parameters
    ----------
    slides : slide_id, organ, path (or URL), and mpp, blank where the file says it; other columns are carried along
    out : folder of the store; must hold nothing else, and a store only for `append`
    append : keep the slides of the store at `out`, and add those that it lacks at its end
    on_progress : called with 1 after every slide
    """
    out.mkdir(parents=True, exist_ok=True)
    with alone(out / "store.json"):
        work = Looking(out, options, append=append)
        base = work.claim()
        old, rows = work.old_and_new(base, slides)
        failed = work.read_each(rows, on_progress)
        if base is None and len(failed) == len(rows):
            raise StoreError(f"{out}: none of {len(rows)} slides can be used; first: {failed[0]['reason']}")
        write_failed(out, failed)
        work.add_slides(base, old, rows, failed)
        shutil.rmtree(work.folder)
    return _online_store_at(out)


def _online_store_at(out: Path) -> OnlineStore:
    store = open_store(out)
    if not isinstance(store, OnlineStore):
        raise StoreError(f"{out}: a store of tiles; it is extended without --online")
    return store


class Looking(SlideWork):
    """Looking at slides: what there is to know of each."""

    def __init__(self, out: Path, options: OnlineOptions, *, append: bool = False):
        self.out, self.options, self._append = out, options, append
        self.threads, self.assume_mpp = options.threads, options.assume_mpp
        self.folder = out / ".partial"  # not beside it: that may be another disk

    def claim(self) -> OnlineStore | None:
        """See `SlideWork.claim`; refuses a store or records with other options, too."""
        out, about = self.out, self.options.about
        out.mkdir(parents=True, exist_ok=True)
        base = None
        if (out / "store.json").exists():
            if not self._append:
                raise StoreError(
                    f"{out}: exists already; remove it, choose another --out, or add new slides with --append"
                )
            base, advice = _online_store_at(out), "give the same, or choose another --out"
            stored = {key: base.header[key] for key in about}
            check_same(stored, about, made=f"{out}: built with", advice=advice, error=StoreError)
        else:
            names = sorted(path.name for path in out.iterdir())
            others = [name for name in names if not name.startswith(("index-", ".")) and name not in (FAILED, "logs")]
            if others:
                raise StoreError(f"{out}: holds {others[0]}, no store; choose another --out")
        self.folder.mkdir(exist_ok=True)
        made, advice, damaged = f"{self.folder}: begun with", "give the same, or remove it", f"remove {self.folder}"
        file, about = self.folder / "options.json", {"format": FORMAT, **about}
        claim(file, about, made=made, advice=advice, error=StoreError, damaged=damaged)
        return base

    def old_and_new(self, base: Store | None, slides: pd.DataFrame) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
        """See `SlideWork.old_and_new`."""
        paths = [path if is_remote(path) else str(Path(path).absolute()) for path in slides["path"]]
        return super().old_and_new(base, slides.assign(path=paths))

    def record(self, row: Row) -> Path:
        """Return the file of what was seen in a slide; its name says for which row, and which MPP was assumed."""
        return self.folder / f"{record_stem(row, (row['path'], mpp_to_go_by(row, self.assume_mpp)))}.npz"

    def read(self, row: Row, pool: Executor) -> None:
        """See `SlideWork.read`."""
        stream = io.BytesIO()
        np.savez(stream, **look_at(row, self.options, pool))
        write_atomic(self.record(row), stream.getvalue())

    def facts(self, record: Path) -> dict[str, Any]:
        """See `SlideWork.facts`."""
        with np.load(record) as content:
            return json.loads(str(content["facts"])) | {"num_tiles": 1}

    def write(self, base: Store | None, slides: pd.DataFrame, records: Sequence[Path]) -> None:
        """See `SlideWork.write`."""
        work, header = self.folder / "index", {"index": next_index(base), **self.options.about}
        target = Target(out=self.out, kind=OnlineStore, slides=slides, base=base, work=work, header=header)
        Build(target, _LookedAt(target, records, self.options)).run()


class _LookedAt(SlideSource):
    """Slides that were looked at."""

    def __init__(self, target: Target, records: Sequence[Path], options: OnlineOptions):
        """`records` are those of the slides that the store lacks."""
        self.root, self.keys = target.out, target.slides["path"].tolist()
        self.about = {"format": FORMAT, "base": target.base and target.base.digest, **options.about}
        self._records = dict(enumerate(records, len(self.keys) - len(records)))

    def look(self, number: int) -> SlideEntry:
        """See `SlideSource.look`."""
        with np.load(self._records[number]) as content:
            arrays = {name: content[name] for name in ("corners.npy", "run_starts.npy", "run_ends.npy")}
            arrays["areas.npy"] = np.cumsum(content["num_runs"])
        return SlideEntry(count=len(arrays["corners.npy"]) // 2, arrays=arrays)


def look_at(row: Row, options: OnlineOptions, pool: Executor) -> dict[str, Any]:
    """Return what the store holds of a slide: facts, corners of the grid, run lengths of tissue and corners.

    SlideError where it cannot be read, its MPP is not known, or it has no tile.
    """
    with reading(row["path"]):
        slide = open_slide(row["path"])
        slide_mpp = mpp_of(slide, row, options.assume_mpp)
        if slide_mpp > COARSER * max(options.mpps):
            raise SlideError(f"{slide.path}: {slide_mpp:g} microns per pixel, coarser than any MPP of --mpp")
        foreground = find_foreground(slide, slide_mpp=slide_mpp, each=pool.map)
        size = Ranges.open(row["path"]).size
    samplings = [sample(slide, slide_mpp=slide_mpp, mpp=mpp, tile_px=options.tile_px) for mpp in options.mpps]
    corners = grid(slide, foreground, samplings[0], options.min_tissue)
    areas = [
        _corner_cells(slide, foreground, sampling.side, options) & (slide_mpp <= COARSER * mpp)
        for sampling, mpp in zip(samplings, options.mpps, strict=True)
    ]
    if not len(corners) or not (options.of_grid or any(area.any() for area in areas)):
        raise SlideError(
            f"{slide.path}: no tile of which {100 * options.min_tissue:g} % is tissue"
            f" ({foreground.tissue_mm2:.3f} mm² of tissue in it)"
        )
    runs = [runs_of(area) for area in (foreground.tissue, *areas)]
    facts = {
        "mpp": slide_mpp,
        "tissue_mm2": round(foreground.tissue_mm2, 4),
        "scanner": slide.about.scanner,
        "reader": slide.reader,
        "mpp_from": mpp_from(slide, row),
        "bytes": size,
        "mask_columns": foreground.tissue.shape[1],
        "mask_cell": foreground.cell,
    }
    return {
        "facts": np.array(json.dumps(facts)),
        "corners.npy": corners.astype(np.uint32).ravel(),
        "run_starts.npy": np.concatenate([r.starts for r in runs]),
        "run_ends.npy": np.concatenate([r.ends for r in runs]),
        "num_runs": np.array([len(r.starts) for r in runs], np.uint64),
    }


def _corner_cells(slide: Slide, foreground: Foreground, side: float, options: OnlineOptions) -> Cells:
    """Return where a tile's corner may lie: where there is enough tissue, and as little pen as in the grid."""
    where = (foreground.cell, (slide.width, slide.height), side)
    enough = corner_cells(foreground.tissue, *where, options.min_tissue)
    return enough & corner_cells(~foreground.pen, *where, 1 - MOST_PEN)
