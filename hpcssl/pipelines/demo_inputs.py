"""What a user gives `hpcssl demo`, and what follows from it: the label, tiles of whole slides, a schedule that fits."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pandas as pd

from hpcssl.core.errors import ScheduleError, SlideError
from hpcssl.pipelines.display import Progress
from hpcssl.schedule.builder import Builder
from hpcssl.schedule.spec import ScheduleSpec, load_spec
from hpcssl.slides.slide_list import FAILED, slides_to_read
from hpcssl.slides.slide_table import read_table
from hpcssl.stores.tile_files import slides_below
from hpcssl.stores.tiling import TilingOptions, tile_slides


def check_label(label: str | None, slides: Path | None, tiles: Path | None) -> None:
    """Refuse a label that is no column, before anything is done; `label` is one of the tiles that are drawn."""
    if label is None:
        return
    columns = ["label"]
    if slides:
        columns = slides_to_read(slides).columns.tolist()
    elif tiles:
        columns = slides_below(tiles, None)[0].columns.tolist()
    if label not in columns:
        raise SlideError(f"--label {label}: no such column in the slide table; it has {', '.join(columns)}")


def cut_tiles(table: Path, out: Path, options: TilingOptions, *, fixed: bool, progress: Progress) -> str | None:
    """Cut tiles from whole slides, unless those in `out` are `fixed`; returns what there is to say of slides left out.

    SlideError if no slide can be used.
    """
    slides = slides_to_read(table)
    if not fixed:
        with progress("cutting", len(slides), "slides") as advance:
            store, failed = tile_slides(slides, out, options, on_progress=advance)
        if store is None:
            raise SlideError(f"{table}: none of {len(slides)} slides can be used; first: {failed[0]['reason']}")
    left_out = read_table(out / FAILED)
    if left_out.empty:
        return None
    why = " for good, as the schedule is made" if fixed else ""
    first = left_out["reason"][0]
    return f"{len(left_out)} of {len(slides)} slides are left out{why}, see {out / FAILED}; first: {first}"


def demo_spec(name: str, slides: pd.DataFrame, seed: int, batch: int) -> ScheduleSpec:
    """Return a schedule spec by its name, widened where a user's tiles would not fit it."""
    spec = load_spec(name, [f"seed={seed}"])
    per_organ = slides["organ"].value_counts()
    groups = min(spec.num_groups, int(per_organ.max()))
    # every slide of a group gets a position, and a pseudo-epoch whole batches
    slides_in_group = int((-(-per_organ // groups)).sum())
    positions = max(spec.positions_per_pseudo_epoch, -(-slides_in_group // batch) * batch)
    fewest_tiles = int(slides["num_tiles"].min()) * max(1, len(slides) // groups - len(per_organ))
    repeats = max(spec.max_repeats, -(-positions // fewest_tiles))
    spec = replace(spec, num_groups=groups, positions_per_pseudo_epoch=positions, max_repeats=repeats)
    with contextlib.suppress(ScheduleError):
        Builder(spec, slides).check()
        return spec
    # organs of so many slides that an equal share is less than a position a slide: shares by slides always fit
    return replace(spec, organ_power=1.0, organ_size="slides")
