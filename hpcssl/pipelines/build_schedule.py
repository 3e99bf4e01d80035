"""Spec and slides → schedule: what `hpcssl.schedule.build` writes the schedule from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from hpcssl.schedule.eligible import HoldOut
from hpcssl.schedule.spec import ScheduleSpec, load_spec
from hpcssl.slides.slide_table import read_slides
from hpcssl.stores.kinds import open_store


def plan_schedule(
    spec: str, overrides: Sequence[str] = (), *, source: Path, is_store: bool
) -> tuple[ScheduleSpec, pd.DataFrame, str]:
    """Return the spec, the slides to draw from, and how much of the hold-out list is among them ("" without one).

    `spec` is a name that ships or a YAML file, changed by the `overrides` (key=value); `source` a tile store or a slide
    table. UserError for a spec, store, table or list that cannot be used.
    """
    resolved = load_spec(spec, overrides)
    if is_store:
        slides = open_store(source).drawn_by(resolved.seed, resolved.mpp_weights).slides
    else:
        slides = read_slides(source)
    return resolved, slides, HoldOut.read(Path(resolved.hold_out)).describe(slides) if resolved.hold_out else ""
