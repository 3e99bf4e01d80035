"""A schedule as CSV files of image paths, the layout that the paper's authors train from.

One `slide_schedule_<number>.csv` per pseudo-epoch, counted from 0, one row a position, in order.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpcssl.core.atomic import atomic_file
from hpcssl.schedule.file import Schedule
from hpcssl.slides.slide_table import slide_of

_PIECE = 1 << 17


def export_csv(
    schedule: Schedule,
    out: Path,
    *,
    paths_of: Callable[[NDArray[np.int64]], Sequence[str]] | None,
    numbers: Sequence[int] | None = None,
    on_progress: Callable[[int], None] = lambda n: None,
) -> None:
    """Write the pseudo-epochs `numbers` (None: all) into the folder `out`, streamed; a file that is there is replaced.

    With `paths_of` (tile numbers → paths of their files) the column is `imgpath`; without, the columns are `slide_id`
    and `index`, the tile's place within its slide.
    """
    out.mkdir(parents=True, exist_ok=True)
    slides = schedule.slides()
    first_tiles, slide_ids = slides["first_tile"].to_numpy(), slides["slide_id"].to_numpy(object)
    for number in range(schedule.num_pseudo_epochs) if numbers is None else numbers:
        begin = number * schedule.positions_per_pseudo_epoch
        end = begin + schedule.positions_per_pseudo_epoch
        with (
            atomic_file(out / f"slide_schedule_{number}.csv") as temporary,
            temporary.open("w", newline="", encoding="utf-8") as stream,
        ):
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["imgpath"] if paths_of else ["slide_id", "index"])
            for start in range(begin, end, _PIECE):
                tiles = schedule.tiles_at(start, min(start + _PIECE, end))
                if paths_of:
                    writer.writerows(zip(paths_of(tiles)))
                else:
                    slide = slide_of(tiles, first_tiles)
                    writer.writerows(zip(slide_ids[slide].tolist(), (tiles - first_tiles[slide]).tolist()))
                on_progress(len(tiles))
