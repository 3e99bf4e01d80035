"""Checking a schedule's files against the four guarantees; the first violation is named.

Every pseudo-epoch is computed anew from spec and slide table and compared with its file, number by number, while its
checksum is taken; memory does not grow with the number of pseudo-epochs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from hpcssl.core.atomic import digest_file
from hpcssl.core.claim import check_same
from hpcssl.core.config import build
from hpcssl.core.errors import ScheduleError
from hpcssl.schedule.build import schedule_identity
from hpcssl.schedule.builder import Builder
from hpcssl.schedule.eligible import HoldOut
from hpcssl.schedule.file import HEADER, HOLD_OUT, SLIDES, Schedule, anew
from hpcssl.schedule.spec import ScheduleSpec
from hpcssl.slides.slide_table import slide_of

_PIECE = 1 << 22


def verify_schedule(path: Path, *, jobs: int = 1, on_progress: Callable[[int], None] = lambda n: None) -> None:
    """Check checksums, groups, quotas, draw counts, order and hold-out list of a schedule.

    ScheduleError names the first file (in the order of the pseudo-epochs) that is damaged, or the guarantee that it
    breaks. `jobs` and `on_progress` are as in `build_schedule`.
    """
    schedule = Schedule.open(path)
    builder = builder_of(schedule)
    _check_header(schedule, builder)
    _check_groups(schedule, builder)
    _check_hold_out(schedule, builder)
    with ThreadPoolExecutor(jobs) as pool:
        numbers = range(schedule.num_pseudo_epochs)
        tasks = [pool.submit(_check_file, schedule, builder, number, on_progress) for number in numbers]
        try:
            for task in tasks:
                task.result()
        finally:
            pool.shutdown(cancel_futures=True)


def builder_of(schedule: Schedule) -> Builder:
    """Return what makes the schedule anew, from its own copies of spec, slide table and hold-out list."""
    header, path = schedule.header, schedule.path
    checksums = {SLIDES: header["slides_file_sha256"], HOLD_OUT: header["hold_out_sha256"]}
    for name, checksum in checksums.items():
        if checksum and digest_file(path / name) != checksum:
            raise ScheduleError(f"{path / name}: not what was written (checksum differs); {anew(path)}")
    spec = build(ScheduleSpec, header["spec"], where=str(path / HEADER))
    return Builder(spec, schedule.slides(), HoldOut.read(path / HOLD_OUT) if spec.hold_out else None)


def _check_header(schedule: Schedule, builder: Builder) -> None:
    """Compare what `schedule.json` tells with what spec and slides make it."""
    header, file, identity = schedule.header, schedule.path / HEADER, schedule_identity(builder)
    stored = {key: header.get(key) for key in identity}
    now = f"but its spec and {SLIDES} make it"
    check_same(stored, identity, made=f"{file}: tells", now=now, advice="", error=ScheduleError, show=repr)
    for column, values in (("first_tile", builder.first_tiles), ("eligible", builder.eligible)):
        if (builder.slides[column] != values).any():
            raise ScheduleError(f"{schedule.path / SLIDES}: {column} is not what spec and slides make it")
    listed, expected = len(header["pseudo_epochs"]), builder.spec.num_pseudo_epochs
    if listed != expected:
        raise ScheduleError(f"{file}: lists {listed} pseudo-epochs, its spec has {expected}")
    for number, record in enumerate(header["pseudo_epochs"]):
        if {key: value for key, value in record.items() if key not in ("bytes", "sha256")} != builder.record(number):
            what = f"what it tells of pseudo-epoch {number}"
            raise ScheduleError(f"{file}: {what} is not what its spec makes (guarantee 2)")


def _check_groups(schedule: Schedule, builder: Builder) -> None:
    spec = builder.spec
    for first in range(0, spec.num_pseudo_epochs - spec.num_groups + 1, spec.num_groups):
        uses = np.zeros(len(builder.slides), np.int64)
        for quotas in builder.quotas[first : first + spec.num_groups]:
            uses[quotas.slides] += 1
        wrong = np.flatnonzero(uses != builder.eligible)
        if len(wrong):
            slide = builder.slides["slide_id"].iloc[wrong[0]]
            raise ScheduleError(f"{schedule.path}: slide {slide} is not used exactly once in its pass (guarantee 1)")


def _check_hold_out(schedule: Schedule, builder: Builder) -> None:
    slides, patients = set(builder.hold_out.slides), set(builder.hold_out.patients)
    drawn = builder.slides[builder.drawn_before(builder.spec.num_pseudo_epochs) > 0]
    for slide, patient in zip(drawn["slide_id"], drawn["patient_id"], strict=True):
        if slide.strip() in slides or patient.strip() in patients:
            raise ScheduleError(f"{schedule.path}: slide {slide} of patient {patient!r} is drawn, but held out")


def _check_file(schedule: Schedule, builder: Builder, number: int, on_progress: Callable[[int], None]) -> None:
    record = schedule.header["pseudo_epochs"][number]
    file, digest = schedule.path / record["file"], hashlib.sha256()
    wrong: int | None = None  # first place that holds another tile
    done = 0
    with file.open("rb") as stream:
        start = stream.read(len(builder.file_header))
        digest.update(start)
        for chunk in builder.chunks(number):
            data = stream.read(chunk.nbytes)
            digest.update(data)
            if wrong is None and data != chunk.data.cast("B"):
                stored = np.frombuffer(data.ljust(chunk.nbytes, b"\0"), builder.dtype)
                wrong = done + int(np.argmax(stored != chunk))
            done += len(chunk)
            on_progress(len(chunk))
        rest = stream.read(1)
    if digest.hexdigest() != record["sha256"]:
        where = "" if wrong is None else f", first at place {wrong}"
        raise ScheduleError(f"{file}: not what was written (checksum differs{where}); {anew(schedule.path)}")
    if start != builder.file_header or rest or len(data) != chunk.nbytes:
        shape = f"{builder.spec.positions_per_pseudo_epoch} {builder.dtype.name}"
        raise ScheduleError(f"{file}: not an array of {shape} tile numbers")
    if wrong is not None:
        raise ScheduleError(f"{file}: {_broken_guarantee(file, builder, number)}; first at place {wrong}")


def _broken_guarantee(file: Path, builder: Builder, number: int) -> str:
    """Say which guarantee a file breaks that is not what spec and slides make it."""
    tiles = np.load(file)
    if int(tiles.max()) >= int(builder.num_tiles.sum()):
        return f"tile {tiles.max()} is none of the {builder.num_tiles.sum()} tiles of the slide table"
    counts = np.zeros(len(builder.slides), np.int64)
    for start in range(0, len(tiles), _PIECE):
        piece = tiles[start : start + _PIECE].astype(np.int64)
        counts += np.bincount(slide_of(piece, builder.first_tiles), minlength=len(counts))
    quotas = builder.quotas[number]
    expected = np.zeros_like(counts)
    expected[quotas.slides] = quotas.draws
    for slides, message in (
        (np.flatnonzero((counts > 0) & ~builder.eligible), "slide {} is drawn, but filtered or held out"),
        (np.flatnonzero((counts > 0) & (expected == 0)), "slide {} is drawn outside its group (guarantee 1)"),
        (np.flatnonzero(counts != expected), "slide {} is drawn {} times, not its quota of {} (guarantee 2)"),
    ):
        if len(slides):
            first = slides[0]
            return message.format(builder.slides["slide_id"].iloc[first], counts[first], expected[first])
    tiles.sort()
    drawn = builder.draws(number)
    drawn.sort()
    differs = np.flatnonzero(tiles != drawn)
    if len(differs):
        slide = int(slide_of(drawn[differs[0]], builder.first_tiles))
        name = builder.slides["slide_id"].iloc[slide]
        return f"the draws of slide {name} do not go through its tiles in turn (guarantee 3)"
    return "not the keyed order of its draws (guarantee 4)"
