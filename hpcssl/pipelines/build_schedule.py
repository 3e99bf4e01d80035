"""Spec and slides → schedule: what is missing of it is written; `hpcssl.schedule.verify` checks the result."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from hpcssl.schedule.build import build_schedule
from hpcssl.schedule.eligible import HoldOut
from hpcssl.schedule.spec import ScheduleSpec, load_spec
from hpcssl.slides.slide_table import read_slides
from hpcssl.stores.kinds import open_store


@dataclass(frozen=True, kw_only=True)
class SchedulePlan:
    """A schedule that is to be built.

    Attributes
    ----------
    slides : the slide table that it draws from
    hold_out : how much of the hold-out list is in that table; empty without a list
    only : pseudo-epochs to write; None for all
    """

    spec: ScheduleSpec
    slides: pd.DataFrame
    hold_out: str
    only: Collection[int] | None

    @property
    def num_positions(self) -> int:
        """Positions of the pseudo-epochs to write, those that are there already included."""
        count = self.spec.num_pseudo_epochs if self.only is None else len(self.only)
        return count * self.spec.positions_per_pseudo_epoch

    def write(self, out: Path, *, jobs: int = 1, on_progress: Callable[[int], None] = lambda n: None) -> list[int]:
        """Write what `out` lacks of the schedule; returns the pseudo-epochs still missing. See `build_schedule`."""
        return build_schedule(self.spec, self.slides, out, only=self.only, jobs=jobs, on_progress=on_progress)


def plan_schedule(
    spec: str, overrides: Sequence[str] = (), *, source: Path, is_store: bool, only: Collection[int] | None = None
) -> SchedulePlan:
    """Read spec, slides and hold-out list.

    Parameters
    ----------
    spec : a name that ships or a YAML file, changed by the `overrides` (key=value)
    source : a tile store, or a slide table

    Raises
    ------
    UserError
        For a spec, store, table or list that cannot be used.
    """
    resolved = load_spec(spec, overrides)
    if is_store:
        slides = open_store(source).drawn_by(resolved.seed, resolved.mpp_weights).slides
    else:
        slides = read_slides(source)
    hold_out = HoldOut.read(Path(resolved.hold_out)).describe(slides) if resolved.hold_out else ""
    return SchedulePlan(spec=resolved, slides=slides, hold_out=hold_out, only=only)
