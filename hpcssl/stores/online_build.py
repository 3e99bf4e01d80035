"""Building an online store: every slide is looked at once, for its tissue, its grid and where tiles may lie.

A build works in `STORE/.partial`, a file a slide; the same command after a kill goes on there. A slide
that cannot be used is left out and told with its reason.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hpcssl.core.atomic import alone, digest_bytes, read_json, write_atomic
from hpcssl.core.config import first_difference
from hpcssl.core.errors import SlideError, StoreError
from hpcssl.core.ordered import in_order
from hpcssl.slides.cutting import COARSER, CutOptions, reading
from hpcssl.slides.foreground import Foreground, find_foreground
from hpcssl.slides.grid import MOST_PEN, grid
from hpcssl.slides.opening import open_slide
from hpcssl.slides.ranges import Ranges, is_remote
from hpcssl.slides.sampling import sample
from hpcssl.slides.slide import Slide
from hpcssl.slides.slide_list import FAILED, mpp_from, mpp_of, told_mpp, write_failed
from hpcssl.stores.extend import relabelled
from hpcssl.stores.online import OnlineStore
from hpcssl.stores.online_places import Cells, corner_cells, runs_of
from hpcssl.stores.online_write import write_online
from hpcssl.stores.store import FORMAT, Store

_SLIDES_AT_A_TIME = 4  # their reading is shared out to the threads


@dataclass(frozen=True, kw_only=True)
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
    threads: int = 4

    def __post_init__(self) -> None:
        for mpp in self.mpps:
            CutOptions(mpp=mpp, tile_px=self.tile_px, min_tissue=self.min_tissue, assume_mpp=self.assume_mpp)  # checks
        if len(set(self.mpps)) != len(self.mpps):
            raise StoreError(f"--mpp {','.join(map(str, self.mpps))}; expected each MPP once")
        if self.of_grid and len(self.mpps) > 1:
            raise StoreError(f"--grid: tiles of the grid are of one MPP, not of {len(self.mpps)}")
        if self.threads < 1:
            raise StoreError(f"--threads {self.threads}; expected at least 1")

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
    share: tuple[int, int] | None = None,
    on_progress: Callable[[int], None] = lambda n: None,
) -> OnlineStore | None:
    """Look at every slide, and write the store; the same call after a kill goes on.

    Parameters
    ----------
    slides : slide_id, organ, path (or URL), and mpp, blank where the file says it; other columns are carried along
    out : folder of the store; must hold nothing else, and a store only for `append`
    append : keep the slides of the store at `out`, and add those that it lacks at its end
    share : (k, n): look only at every n-th slide from the k-th on, from 0, and leave the store to a later call; several
        nodes may do so at the same time
    on_progress : called with 1 after every slide

    Returns
    -------
    The store, None for a share; slides that cannot be used are not in it, but in its `failed_slides.csv` with their
    reasons.

    Raises
    ------
    StoreError
        If no slide can be used, or the store at `out` is another one.
    """
    if share and not 0 <= share[0] < share[1]:
        raise StoreError(f"--share {share[0] + 1}/{share[1]}; expected K/N with K from 1 to N")
    out.mkdir(parents=True, exist_ok=True)
    work_in = out / ".partial"  # not beside it: that may be another disk
    with alone(out / ("store.json" if share is None else f"share-{share[0]}")):
        base = _base(out, options, append=append)
        _claim(work_in, options)
        slides = slides.assign(path=[p if is_remote(p) else str(Path(p).absolute()) for p in slides["path"]])
        held = slides[:0] if base is None else relabelled(base, slides, options.assume_mpp)
        slides = slides[~slides["slide_id"].isin(held["slide_id"])]
        rows = _rows(slides)[slice(None) if share is None else slice(share[0], None, share[1])]
        failed: list[dict[str, Any]] = []
        with ThreadPoolExecutor(_SLIDES_AT_A_TIME) as slides_pool, ThreadPoolExecutor(options.threads) as pool:
            look = partial(_looked_at, work_in=work_in, options=options, pool=pool)
            for row, fault in in_order(slides_pool, look, rows, window=2 * _SLIDES_AT_A_TIME):
                failed += [{**row, "reason": fault}] if fault else []
                on_progress(1)
        if share is not None:
            return None
        used = slides[~slides["slide_id"].isin({row["slide_id"] for row in failed})]
        if used.empty and base is None:
            raise StoreError(f"{out}: none of {len(rows)} slides can be used; first: {failed[0]['reason']}")
        write_failed(out, failed)
        if base is None or not (used.empty and held.equals(base.slides.drop(columns="first_tile"))):
            found = [_found_file(work_in, row, options) for row in _rows(used)]
            write_online(out, used, found, options.about, base=base, held=held, work_in=work_in)
        shutil.rmtree(work_in)
    store = Store.open(out)
    assert isinstance(store, OnlineStore), store
    return store


def _base(out: Path, options: OnlineOptions, *, append: bool) -> OnlineStore | None:
    """Return the store that is extended, None where there is none yet."""
    if not (out / "store.json").exists():
        names = sorted(path.name for path in out.iterdir())
        others = [name for name in names if not name.startswith(("index-", ".")) and name != FAILED]
        if others:
            raise StoreError(f"{out}: holds {others[0]}, no store; choose another --out")
        return None
    if not append:
        raise StoreError(f"{out}: exists already; remove it, choose another --out, or add new slides with --append")
    base = Store.open(out)
    if not isinstance(base, OnlineStore):
        raise StoreError(f"{out}: a store of tiles; it is extended without --online")
    difference = first_difference({key: base.header[key] for key in options.about}, options.about)
    if difference:
        key, before, now = difference
        raise StoreError(f"{out}: built with {key} = {before}, now {now}; give the same, or choose another --out")
    return base


def _claim(work_in: Path, options: OnlineOptions) -> None:
    """Make the folder to work in, or go on in the one that a killed build with the same options left."""
    about = {"format": FORMAT, **options.about}
    work_in.mkdir(exist_ok=True)
    file = work_in / "options.json"
    if not file.exists():
        write_atomic(file, json.dumps(about))
    difference = first_difference(read_json(file, StoreError(f"{file}: damaged; remove {work_in}")), about)
    if difference:
        key, before, now = difference
        raise StoreError(f"{work_in}: begun with {key} = {before}, now {now}; give the same, or remove it")


def _rows(slides: pd.DataFrame) -> list[dict[str, Any]]:
    return [dict(zip(slides.columns, values)) for values in slides.itertuples(index=False, name=None)]


def _found_file(work_in: Path, row: Mapping[str, Any], options: OnlineOptions) -> Path:
    """Return the file of what was found in a slide; its name says for which row, and which MPP was to be assumed."""
    found_for = repr((row["path"], told_mpp(row, options.assume_mpp)))
    return work_in / f"{row['slide_id']}-{digest_bytes(found_for.encode())[:16]}.npz"


def _looked_at(row: Mapping[str, Any], work_in: Path, options: OnlineOptions, pool: Executor) -> str | None:
    """Write what there is to know of a slide, unless it was written; returns why that cannot be done."""
    file = _found_file(work_in, row, options)
    if file.exists():
        return None
    try:
        found = look_at(row, options, pool)
    except SlideError as error:
        return " ".join(str(error).split())
    stream = io.BytesIO()
    np.savez(stream, **found)
    write_atomic(file, stream.getvalue())
    return None


def look_at(row: Mapping[str, Any], options: OnlineOptions, pool: Executor) -> dict[str, Any]:
    """Return what the store holds of a slide: facts, corners of the grid, run lengths of tissue and corners.

    Raises
    ------
    SlideError
        If it cannot be read, its MPP is not known, or it has no tile.
    """
    with reading(row["path"]):
        slide = open_slide(row["path"])
        slide_mpp = mpp_of(slide, row, options.assume_mpp)
        if slide_mpp > COARSER * max(options.mpps):
            raise SlideError(f"{slide.path}: {slide_mpp:g} microns per pixel, coarser than any MPP of --mpp")
        found = find_foreground(slide, slide_mpp=slide_mpp, each=pool.map)
        size = Ranges.open(row["path"]).size
    samplings = [sample(slide, slide_mpp=slide_mpp, mpp=mpp, tile_px=options.tile_px) for mpp in options.mpps]
    corners = grid(slide, found, samplings[0], options.min_tissue)
    areas = [
        _corner_cells(slide, found, sampling.side, options) & (slide_mpp <= COARSER * mpp)
        for sampling, mpp in zip(samplings, options.mpps, strict=True)
    ]
    if not len(corners) or not (options.of_grid or any(area.any() for area in areas)):
        raise SlideError(
            f"{slide.path}: no tile of which {100 * options.min_tissue:g} % is tissue"
            f" ({found.tissue_mm2:.3f} mm² of tissue in it)"
        )
    runs = [runs_of(area) for area in (found.tissue, *areas)]
    facts = {"mpp": slide_mpp, "tissue_mm2": round(found.tissue_mm2, 4), "scanner": slide.about.scanner}
    facts |= {
        "reader": slide.reader,
        "mpp_from": mpp_from(slide, row),
        "bytes": size,
        "mask_columns": found.tissue.shape[1],
        "mask_cell": found.cell,
    }
    return {
        "facts": np.array(json.dumps(facts)),
        "corners.npy": corners.astype(np.uint32).ravel(),
        "run_starts.npy": np.concatenate([r.starts for r in runs]),
        "run_ends.npy": np.concatenate([r.ends for r in runs]),
        "num_runs": np.array([len(r.starts) for r in runs], np.uint64),
    }


def _corner_cells(slide: Slide, found: Foreground, side: float, options: OnlineOptions) -> Cells:
    """Return where a tile's corner may lie: where there is enough tissue, and as little pen as in the grid."""
    where = (found.cell, (slide.width, slide.height), side)
    return corner_cells(found.tissue, *where, options.min_tissue) & corner_cells(~found.pen, *where, 1 - MOST_PEN)
