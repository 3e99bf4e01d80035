"""Which slides enter a schedule: filters by column, and a hold-out list that keeps test data out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hpcssl.core.config import nearest
from hpcssl.core.errors import ScheduleError
from hpcssl.schedule.spec import ScheduleSpec
from hpcssl.slides.slide_table import read_csv

RESERVED = ("first_tile", "eligible")  # columns that a schedule adds to its copy of the slide table


@dataclass(frozen=True)
class HoldOut:
    """Slides and patients that never enter a schedule (downstream test data); sorted, without repeats."""

    slides: tuple[str, ...] = ()
    patients: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> HoldOut:
        """Read a CSV file with columns slide_id and/or patient_id; blank cells say nothing.

        ScheduleError where there is no such file, it has neither column, or it names nothing.
        """
        try:
            frame = read_csv(path)
        except FileNotFoundError:
            raise ScheduleError(f"hold_out {path}: no such file") from None
        except ValueError as error:
            raise ScheduleError(f"hold_out {path}: not a CSV file ({' '.join(str(error).split())})") from None
        names = ("slide_id", "patient_id")
        if not any(name in frame for name in names):
            columns = ", ".join(map(repr, frame.columns))
            raise ScheduleError(f"hold_out {path}: expected a column slide_id or patient_id, found {columns}")
        slides, patients = (tuple(sorted({text.strip() for text in frame.get(name, [])} - {""})) for name in names)
        if not slides and not patients:
            raise ScheduleError(f"hold_out {path}: names no slide and no patient")
        return cls(slides, patients)

    def to_csv(self) -> str:
        """Return the text of the file that `read` reads, the same for the same list."""
        rows = itertools.zip_longest(self.slides, self.patients, fillvalue="")
        return pd.DataFrame(rows, columns=["slide_id", "patient_id"]).to_csv(index=False, lineterminator="\n")

    def describe(self, slides: pd.DataFrame) -> str:
        """Say how much of the list is in a slide table."""
        counts = []
        for names, column in ((self.slides, "slide_id"), (self.patients, "patient_id")):
            if names:
                present = set(slides[column].str.strip()) if column in slides else set()
                counts.append(f"{len(present.intersection(names))} of {len(names)} {column}s")
        return f"hold-out: {' and '.join(counts)} of the list are in the slide table"

    def mask(self, slides: pd.DataFrame) -> NDArray[np.bool_]:
        """Return which slides are held out, by their own name or their patient's, (num_slides,).

        ScheduleError where a patient is on both sides, patients are named and the table has no patient_id, or nothing
        that is named stands in the table.
        """
        by_name = slides["slide_id"].str.strip().isin(self.slides).to_numpy()
        if "patient_id" not in slides:
            if self.patients:
                raise ScheduleError("hold_out names patients, but the slide table has no column patient_id")
            mask = by_name
        else:
            patient = slides["patient_id"].str.strip()
            mask = by_name | patient.isin(self.patients).to_numpy()
            torn = ~mask & patient.isin(set(patient[mask]) - {""}).to_numpy()
            if torn.any():
                inside = int(np.argmax(torn))
                name = patient.iloc[inside]
                outside = slides["slide_id"][mask & (patient == name).to_numpy()].iloc[0]
                raise ScheduleError(
                    f"patient {name} is on both sides of the hold-out: slide {outside} is held out, slide"
                    f" {slides['slide_id'].iloc[inside]} is not ({int(torn.sum())} such slides);"
                    " name the patient in the hold-out, or all slides of it"
                )
        if (self.slides or self.patients) and not mask.any():
            first = (*self.slides, *self.patients)[0]
            raise ScheduleError(f"hold_out: none of its slides and patients is in the slide table (first: {first})")
        return mask


def eligible_slides(spec: ScheduleSpec, slides: pd.DataFrame, hold_out: HoldOut) -> NDArray[np.bool_]:
    """Return which slides of the table enter the schedule, (num_slides,).

    ScheduleError where a filter names a column or a value that no slide has, a patient is on both sides of the
    hold-out, or no slide is left.
    """
    enters = ~hold_out.mask(slides)
    for column, values in spec.include.items():
        enters &= _has(slides, "include", column, values)
    for column, values in spec.exclude.items():
        enters &= ~_has(slides, "exclude", column, values)
    if not enters.any():
        raise ScheduleError(f"filters and hold-out leave none of the {len(slides)} slides")
    return enters


def _has(slides: pd.DataFrame, name: str, column: str, values: Sequence[str | int | float]) -> NDArray[np.bool_]:
    if column in RESERVED:
        raise ScheduleError(f"{name}.{column}: the schedule's own table has a column of that name; rename yours")
    if column not in slides:
        hint = nearest(column, [str(known) for known in slides.columns])
        raise ScheduleError(f"{name}.{column}: no such column in the slide table; {hint}")
    texts = slides[column].astype(str)
    known = sorted(set(texts))
    requested = [str(value) for value in values]
    for value in requested:
        if value not in known:
            raise ScheduleError(f"{name}.{column}: no slide has {column} {value!r}; {nearest(value, known)}")
    return texts.isin(requested).to_numpy()
