"""What a schedule does to the organs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from hpcssl.schedule.file import Schedule


def organ_shares(path: Path) -> pd.DataFrame:
    """Return, for every organ, its share of the tiles and its share of the schedule's positions.

    Returns
    -------
    DataFrame with columns organ, num_tiles, natural_share, positions, scheduled_share; the most tiles first.
    """
    schedule = Schedule.open(path)
    tiles = schedule.slides().groupby("organ")["num_tiles"].sum()
    positions = pd.Series(0, index=tiles.index)
    for record in schedule.header["pseudo_epochs"]:
        for organ, quota in record["organs"].items():
            positions[organ] += quota["achieved"]
    frame = pd.DataFrame(
        {
            "organ": tiles.index,
            "num_tiles": tiles.to_numpy(),
            "natural_share": (tiles / tiles.sum()).to_numpy(),
            "positions": positions.to_numpy(),
            "scheduled_share": (positions / positions.sum()).to_numpy(),
        }
    )
    return frame.sort_values(["num_tiles", "organ"], ascending=[False, True]).reset_index(drop=True)
