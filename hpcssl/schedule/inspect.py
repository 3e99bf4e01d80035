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
    """Tables about a schedule.

    Attributes
    ----------
    organs : organ, num_tiles, natural_share, positions, scheduled_share; the most tiles first
    repeats : draws, tiles: how many tiles of slides that may enter are drawn so often over the schedule
    passes : pass, pseudo_epoch, slides: how many slides each pseudo-epoch of each pass uses
    coverage : pseudo_epoch, samples_seen (at its end), slides_seen, tiles_seen, slides_share, tiles_share
    """

    organs: pd.DataFrame
    repeats: pd.DataFrame
    passes: pd.DataFrame
    coverage: pd.DataFrame


def inspect_schedule(path: Path) -> Inspection:
    """Return the tables of a schedule; ScheduleError where it cannot be opened."""
    schedule = Schedule.open(path)
    builder = builder_of(schedule)
    coverage, drawn = _coverage(builder)
    return Inspection(
        organs=organ_shares(path), repeats=_repeats(builder, drawn), passes=_passes(builder), coverage=coverage
    )


def organ_shares(path: Path) -> pd.DataFrame:
    """Return, for every organ, its share of the tiles and its share of the schedule's positions.

    Slides that filters or the hold-out list keep out count for neither.

    Returns
    -------
    DataFrame with columns organ, num_tiles, natural_share, positions, scheduled_share; the most tiles first.
    """
    schedule = Schedule.open(path)
    slides = schedule.slides()
    tiles = slides[slides["eligible"]].groupby("organ")["num_tiles"].sum()
    positions = pd.Series(0, index=tiles.index)
    for record in schedule.header["pseudo_epochs"]:
        for organ, quota in record["organs"].items():
            positions[organ] += quota["achieved"]
    frame = pd.DataFrame({"organ": tiles.index, "num_tiles": tiles.to_numpy()})
    frame["natural_share"] = (tiles / tiles.sum()).to_numpy()
    frame["positions"] = positions.to_numpy()
    frame["scheduled_share"] = (positions / positions.sum()).to_numpy()
    return frame.sort_values(["num_tiles", "organ"], ascending=[False, True]).reset_index(drop=True)


def _repeats(builder: Builder, drawn: np.ndarray) -> pd.DataFrame:
    """Count tiles by their draws: of D draws of n tiles, D mod n tiles have ⌊D/n⌋ + 1 and the others ⌊D/n⌋."""
    n = builder.num_tiles[builder.eligible]
    whole, rest = np.divmod(drawn[builder.eligible], n)
    draws = np.concatenate([whole, whole + 1])
    tiles = pd.Series(np.concatenate([n - rest, rest])).groupby(draws).sum()
    tiles = tiles[tiles > 0]
    return pd.DataFrame({"draws": tiles.index.to_numpy(), "tiles": tiles.to_numpy()})


def _passes(builder: Builder) -> pd.DataFrame:
    numbers = np.arange(builder.spec.num_pseudo_epochs)
    slides = [len(quotas.slides) for quotas in builder.quotas]
    return pd.DataFrame({"pass": numbers // builder.spec.num_groups, "pseudo_epoch": numbers, "slides": slides})


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
