"""What a user gives `hpcssl demo`, and what follows from it: the label, tiles of whole slides, a schedule that fits."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from hpcssl.schedule.spec import ScheduleSpec


def check_label(label: str | None, slides: Path | None, tiles: Path | None) -> None:
    """Refuse a label that is no column, before anything is done; `label` is one of the tiles that are drawn."""
    from hpcssl.core.errors import SlideError
    from hpcssl.slides.slide_list import slides_to_read
    from hpcssl.stores.tile_files import slides_below

    if label is None:
        return
    columns = ["label"]
    if slides:
        columns = slides_to_read(slides).columns.tolist()
    elif tiles:
        columns = slides_below(tiles, None)[0].columns.tolist()
    if label not in columns:
        raise SlideError(f"--label {label}: no such column in the slide table; it has {', '.join(columns)}")


def cut_tiles(table: Path, out: Path, assume_mpp: float | None, *, threads: int, fixed: bool) -> str | None:
    """Cut tiles from whole slides, unless those in `out` are `fixed`; returns what to tell of slides left out.

    Raises
    ------
    SlideError
        If no slide can be used.
    """
    from hpcssl.cli.progress import progress
    from hpcssl.core.errors import SlideError
    from hpcssl.slides.cutting import CutOptions
    from hpcssl.slides.slide_list import FAILED, slides_to_read
    from hpcssl.slides.slide_table import read_table
    from hpcssl.stores.tiling import TilingOptions, tile_slides

    slides = slides_to_read(table)
    if not fixed:
        options = TilingOptions(cut=CutOptions(assume_mpp=assume_mpp), threads=threads)
        with progress("cutting", total=len(slides), unit="slides") as advance:
            store, failed = tile_slides(slides, out, options, on_progress=advance)
        if store is None:
            raise SlideError(f"{table}: none of {len(slides)} slides can be used; first: {failed[0]['reason']}")
    left_out = read_table(out / FAILED)
    if left_out.empty:
        return None
    why = " for good, as the schedule is made" if fixed else ""
    told = f"{out / FAILED}; first: {left_out['reason'][0]}"
    return f"{len(left_out)} of {len(slides)} slides are left out{why}, see {told}"


def demo_spec(name: str, slides: pd.DataFrame, seed: int, batch: int) -> ScheduleSpec:
    """Return a schedule spec by its name, widened where a user's tiles would not fit it."""
    from dataclasses import replace

    from hpcssl.core.errors import ScheduleError
    from hpcssl.schedule.builder import Builder
    from hpcssl.schedule.spec import load_spec

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
