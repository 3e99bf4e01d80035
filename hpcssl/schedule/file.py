"""Reading a schedule: position → tile number, by memory-mapped files."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hpcssl.core.atomic import digest_bytes, read_json
from hpcssl.core.errors import ScheduleError
from hpcssl.schedule.build import FORMAT


class Schedule:
    """An opened schedule.

    Attributes
    ----------
    header : content of `schedule.json`
    num_positions : int, over all pseudo-epochs
    positions_per_pseudo_epoch, num_pseudo_epochs : int
    digest : str, identity of the schedule (spec, slides, checksums of all files)
    """

    def __init__(self, path: Path, header: dict[str, Any]):
        self.path = path
        self.header = header
        self.positions_per_pseudo_epoch: int = header["spec"]["positions_per_pseudo_epoch"]
        self.num_pseudo_epochs: int = header["spec"]["num_pseudo_epochs"]
        self.num_positions = self.positions_per_pseudo_epoch * self.num_pseudo_epochs
        # the bytes of slides.parquet depend on the library's version; slides_digest covers its rows
        identity = {key: value for key, value in header.items() if key != "slides_file_sha256"}
        self.digest = digest_bytes(json.dumps(identity, sort_keys=True).encode())
        self._file = lru_cache(maxsize=None)(self._map)

    @classmethod
    def open(cls, path: Path) -> Schedule:
        """Open a schedule; ScheduleError for a missing, damaged or incomplete one."""
        try:
            damaged = ScheduleError(f"{path / 'schedule.json'}: damaged; build the schedule anew")
            header = read_json(path / "schedule.json", damaged)
        except (FileNotFoundError, NotADirectoryError):
            raise ScheduleError(
                f"{path}: no schedule (no schedule.json); make one with hpcssl schedule build"
            ) from None
        if header.get("format") != FORMAT:
            raise ScheduleError(f"{path}: schedule format {header.get('format')}; this version reads {FORMAT}")
        for record in header["pseudo_epochs"]:
            if not (path / record["file"]).is_file():
                raise ScheduleError(f"{path / record['file']} is missing; build the schedule anew")
        return cls(path, header)

    def slides(self) -> pd.DataFrame:
        """Return the slide table (slide_id, organ, num_tiles, patient_id, first_tile)."""
        return pd.read_parquet(self.path / "slides.parquet")

    def pseudo_epoch(self, number: int) -> NDArray[np.unsignedinteger]:
        """Return the mapped tile numbers of one pseudo-epoch, (positions_per_pseudo_epoch,)."""
        return self._file(number)

    def tiles_at(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the tile numbers at the positions [start, stop), across pseudo-epochs, (stop - start,).

        Raises
        ------
        ScheduleError
            If the positions are not all in the schedule.
        """
        if not 0 <= start <= stop <= self.num_positions:
            raise ScheduleError(
                f"{self.path}: positions {start}:{stop} are not within its {self.num_positions} positions"
            )
        parts = []
        while start < stop:
            number, offset = divmod(start, self.positions_per_pseudo_epoch)
            end = min(stop - start + offset, self.positions_per_pseudo_epoch)
            parts.append(self._file(number)[offset:end].astype(np.int64))
            start += end - offset
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _map(self, number: int) -> NDArray[np.unsignedinteger]:
        path = self.path / self.header["pseudo_epochs"][number]["file"]
        try:
            mapped = np.load(path, mmap_mode="r")
        except Exception as error:  # noqa: BLE001 - numpy parses a header with Python's own parser and its many errors
            reason = " ".join(str(error).split())
            raise ScheduleError(f"{path}: damaged ({reason}); build the schedule anew") from None
        if mapped.shape != (self.positions_per_pseudo_epoch,):
            raise ScheduleError(f"{path}: {mapped.shape[0]} positions, expected {self.positions_per_pseudo_epoch}")
        return mapped


def check_matches(schedule: Schedule, slides: pd.DataFrame, *, store: Path) -> None:
    """Refuse a store whose first slides are not the schedule's; slides that a store has beyond them do no harm."""
    ours = schedule.slides()[["slide_id", "organ", "num_tiles"]]
    theirs = slides[["slide_id", "organ", "num_tiles"]].head(len(ours))
    if len(theirs) < len(ours) or (ours.to_numpy(object) != theirs.to_numpy(object)).any():
        raise ScheduleError(
            f"{schedule.path} was built for other slides than {store} holds; build it anew with --store {store}"
        )
