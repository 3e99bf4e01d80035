"""Whether two schedules are the same, and where they part."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hpcssl.core.config import first_difference
from hpcssl.schedule.file import Schedule
from hpcssl.slides.slide_table import slide_of

_PIECE = 1 << 22


def compare_schedules(first: Path, second: Path) -> list[str]:
    """Return in what two schedules differ, a line each: spec, slides, lengths, the first position; [] if in nothing.

    Pseudo-epochs are compared by the checksums that were taken when they were built; only where these differ are the
    files read, up to the first difference. ScheduleError where one of them cannot be opened.
    """
    a, b = Schedule.open(first), Schedule.open(second)
    lines = []
    spec_a, spec_b = a.header["spec"], b.header["spec"]
    for key in {**spec_a, **spec_b}:
        differs = first_difference({key: spec_a.get(key)}, {key: spec_b.get(key)})
        if differs:
            lines.append(f"spec: {differs[0]} is {differs[1]!r} in A and {differs[2]!r} in B")
    labels = {"slides_digest": "slide tables", "eligible": "slides that enter", "hold_out_sha256": "hold-out lists"}
    for key, what in labels.items():
        if a.header[key] != b.header[key]:
            lines.append(f"{what}: {_slides_text(a, key)} in A, {_slides_text(b, key)} in B; not the same")
    part = _first_position(a, b)
    if part is None:
        shorter = min(a.num_positions, b.num_positions)
        if a.num_positions != b.num_positions:
            ends = "A" if a.num_positions == shorter else "B"
            lines.append(f"positions: the same up to {shorter:,}, where {ends} ends")
        elif lines:
            lines.append(f"positions: all {shorter:,} the same")
        return lines
    same = f"the same up to {part:,}, where" if part else "another order from the first on:"
    lines.append(f"positions: {same} A has {_tile_text(a, part)} and B {_tile_text(b, part)}")
    return lines


def _slides_text(schedule: Schedule, key: str) -> str:
    header = schedule.header
    if key == "hold_out_sha256":
        return header[key][:12] or "none"
    counts = header["eligible"] if key == "eligible" else {name: header[f"num_{name}"] for name in ("slides", "tiles")}
    return f"{counts['slides']:,} slides, {counts['tiles']:,} tiles"


def _first_position(a: Schedule, b: Schedule) -> int | None:
    """Return the first position that holds another tile number, among those that both have."""
    size = a.positions_per_pseudo_epoch
    end = min(a.num_positions, b.num_positions)
    start = 0
    if b.positions_per_pseudo_epoch == size:  # file by file
        pairs = zip(a.header["pseudo_epochs"], b.header["pseudo_epochs"])
        same = [x["sha256"] == y["sha256"] for x, y in pairs]
        if all(same):
            return None
        start = same.index(False) * size
    for at in range(start, end, _PIECE):
        stop = min(at + _PIECE, end)
        differs = a.tiles_at(at, stop) != b.tiles_at(at, stop)
        if differs.any():
            return at + int(np.argmax(differs))
    return None


def _tile_text(schedule: Schedule, position: int) -> str:
    tile = int(schedule.tiles_at(position, position + 1)[0])
    slides = schedule.slides()
    row = slides.iloc[int(slide_of(tile, slides["first_tile"]))]
    return f"tile {tile} (slide {row['slide_id']}, {row['organ']})"
