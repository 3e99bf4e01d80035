"""Checking a schedule's files against the four guarantees; the first violation is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from hpcssl.core.atomic import digest_file
from hpcssl.core.config import build
from hpcssl.core.errors import ScheduleError
from hpcssl.schedule.build import Builder
from hpcssl.schedule.file import Schedule
from hpcssl.schedule.spec import ScheduleSpec
from hpcssl.tiles.slides import digest_slides


def verify_schedule(path: Path, *, on_progress: Callable[[int], None] = lambda n: None) -> None:
    """Check checksums, groups, quotas, draw counts and order of a schedule.

    Raises
    ------
    ScheduleError
        Naming the file and the guarantee that is broken.
    """
    schedule = Schedule.open(path)
    if digest_file(path / "slides.parquet") != schedule.header["slides_file_sha256"]:
        raise ScheduleError(f"{path / 'slides.parquet'}: not what was written (checksum differs)")
    slides = schedule.slides()
    builder = Builder(build(ScheduleSpec, schedule.header["spec"], where=str(path / "schedule.json")), slides)
    _check_header(schedule, builder)
    _check_groups(schedule, builder)
    drawn = np.zeros(int(builder.num_tiles.sum()), np.int64)
    for record in schedule.header["pseudo_epochs"]:
        number, file = record["number"], path / record["file"]
        if digest_file(file) != record["sha256"]:
            raise ScheduleError(f"{file}: not what was written (checksum differs)")
        tiles = schedule.pseudo_epoch(number).astype(np.int64)
        if int(tiles.max()) >= len(drawn):
            raise ScheduleError(f"{file}: tile {tiles.max()} is none of the {len(drawn)} tiles of the slide table")
        _check_quotas(file, tiles, builder, number)
        drawn += np.bincount(tiles, minlength=len(drawn))
        _check_even(file, drawn, builder)
        for place, tile in builder.chunks(number):
            if (tiles[place] != tile).any():
                raise ScheduleError(f"{file}: not the keyed order of its draws (guarantee 4)")
            on_progress(len(place))


def _check_header(schedule: Schedule, builder: Builder) -> None:
    """Compare what `schedule.json` tells with what spec and slides make it."""
    header, file = schedule.header, schedule.path / "schedule.json"
    told = {key: header[key] for key in ("slides_digest", "num_slides", "num_tiles")}
    true = {
        "slides_digest": digest_slides(builder.slides),
        "num_slides": len(builder.slides),
        "num_tiles": int(builder.num_tiles.sum()),
    }
    if told != true:
        raise ScheduleError(f"{file}: tells {told}, but slides.parquet holds {true}")
    if len(header["pseudo_epochs"]) != builder.spec.num_pseudo_epochs:
        raise ScheduleError(
            f"{file}: lists {len(header['pseudo_epochs'])} pseudo-epochs, its spec has {builder.spec.num_pseudo_epochs}"
        )
    for number, record in enumerate(header["pseudo_epochs"]):
        if {key: value for key, value in record.items() if key != "sha256"} != builder.record(number):
            raise ScheduleError(
                f"{file}: what it tells of pseudo-epoch {number} is not what its spec makes (guarantee 2)"
            )


def _check_groups(schedule: Schedule, builder: Builder) -> None:
    spec = builder.spec
    for first in range(0, spec.num_pseudo_epochs - spec.num_groups + 1, spec.num_groups):
        uses = sum((builder.all_quotas[n].draws > 0).astype(int) for n in range(first, first + spec.num_groups))
        if (np.asarray(uses) != 1).any():
            slide = builder.slides["slide_id"].iloc[int(np.argmax(np.asarray(uses) != 1))]
            raise ScheduleError(f"{schedule.path}: slide {slide} is not used exactly once in its pass (guarantee 1)")


def _check_quotas(file: Path, tiles: np.ndarray, builder: Builder, number: int) -> None:
    slide = np.searchsorted(builder.first_tiles, tiles, side="right") - 1
    draws = np.bincount(slide, minlength=len(builder.num_tiles))
    differs = np.flatnonzero(draws != builder.all_quotas[number].draws)
    if len(differs):
        slide_id = builder.slides["slide_id"].iloc[differs[0]]
        raise ScheduleError(f"{file}: slide {slide_id} is drawn {draws[differs[0]]} times, not its quota (guarantee 2)")


def _check_even(file: Path, drawn: np.ndarray, builder: Builder) -> None:
    most = np.maximum.reduceat(drawn, builder.first_tiles)
    least = np.minimum.reduceat(drawn, builder.first_tiles)
    uneven = np.flatnonzero(most - least > 1)
    if len(uneven):
        slide_id = builder.slides["slide_id"].iloc[uneven[0]]
        raise ScheduleError(
            f"{file}: the draw counts of slide {slide_id}'s tiles differ by more than one (guarantee 3)"
        )
