"""What a schedule does: shares of organs, repeats of tiles, slides of passes, coverage; computed, no file is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from hpcssl.schedule.builder import Builder
from hpcssl.schedule.file import Schedule
from hpcssl.schedule.verify import builder_of


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Tables about a schedule."""

    organs: pd.DataFrame  # see `organ_shares`
    repeats: pd.DataFrame  # draws, tiles: how many tiles of slides that may enter are drawn so often over the schedule
    passes: pd.DataFrame  # pass, pseudo_epoch, slides: how many slides each pseudo-epoch of each pass uses
    coverage: pd.DataFrame  # pseudo_epoch, samples_seen (at its end), {slides, tiles}_seen, {slides, tiles}_share


def inspect_schedule(path: Path) -> Inspection:
    """Return the tables of a schedule; ScheduleError where it cannot be opened."""
    builder = builder_of(Schedule.open(path))
    coverage, drawn = _coverage(builder)
    numbers = np.arange(builder.spec.num_pseudo_epochs)
    slides = [len(quotas.slides) for quotas in builder.quotas]
    passes = pd.DataFrame({"pass": numbers // builder.spec.num_groups, "pseudo_epoch": numbers, "slides": slides})
    return Inspection(organs=organ_shares(path), repeats=_repeats(builder, drawn), passes=passes, coverage=coverage)


def organ_shares(path: Path) -> pd.DataFrame:
    """Return for every organ its share of the tiles and of the schedule's positions, the most tiles first.

    The columns are organ, num_tiles, natural_share, positions, scheduled_share. Slides that filters or the hold-out
    list keep out count for neither.
    """
    schedule = Schedule.open(path)
    slides = schedule.slides()
    tiles = slides[slides["eligible"]].groupby("organ")["num_tiles"].sum()
    positions = pd.Series(0, index=tiles.index)
    for record in schedule.header["pseudo_epochs"]:
        for organ, quota in record["organs"].items():
            positions[organ] += quota["achieved"]
    shares = {"num_tiles": tiles, "natural_share": tiles / tiles.sum()}
    shares |= {"positions": positions, "scheduled_share": positions / positions.sum()}
    frame = pd.DataFrame(shares).reset_index(names="organ")
    return frame.sort_values(["num_tiles", "organ"], ascending=[False, True], ignore_index=True)


def _repeats(builder: Builder, drawn: np.ndarray) -> pd.DataFrame:
    """Count tiles by their draws: of D draws of n tiles, D mod n tiles have ⌊D/n⌋ + 1 and the others ⌊D/n⌋."""
    n = builder.num_tiles[builder.eligible]
    whole, rest = np.divmod(drawn[builder.eligible], n)
    draws = np.concatenate([whole, whole + 1])
    tiles = pd.Series(np.concatenate([n - rest, rest])).groupby(draws).sum()
    tiles = tiles[tiles > 0]
    return pd.DataFrame({"draws": tiles.index.to_numpy(), "tiles": tiles.to_numpy()})


def _coverage(builder: Builder) -> tuple[pd.DataFrame, np.ndarray]:
    """Return the coverage after every pseudo-epoch, and the draws of every slide at the end."""
    drawn = np.zeros(len(builder.num_tiles), np.int64)
    rows = []
    for number, quotas in enumerate(builder.quotas):
        drawn[quotas.slides] += quotas.draws
        seen = int((drawn > 0).sum()), int(np.minimum(drawn, builder.num_tiles).sum())
        rows.append((number, (number + 1) * builder.spec.positions_per_pseudo_epoch, *seen))
    frame = pd.DataFrame(rows, columns=["pseudo_epoch", "samples_seen", "slides_seen", "tiles_seen"])
    frame["slides_share"] = frame["slides_seen"] / int(builder.eligible.sum())
    frame["tiles_share"] = frame["tiles_seen"] / int(builder.num_tiles[builder.eligible].sum())
    return frame, drawn
