"""Reading a schedule: position → tile number, by memory-mapped files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hpcssl.core.arrays import map_array
from hpcssl.core.atomic import digest_bytes
from hpcssl.core.errors import ScheduleError

FORMAT = 2
HEADER = "schedule.json"
SLIDES = "slides.parquet"
HOLD_OUT = "hold_out.csv"
UNFINISHED = "unfinished.json"
_CHECKSUM = ',\n "checksum": '


def header_text(header: Mapping[str, Any]) -> str:
    """Return `schedule.json`: an entry a line, a pseudo-epoch a line, and last the SHA-256 of all that is before it.

    >>> print(header_text({"format": 2, "pseudo_epochs": [{"number": 0}]}), end="")
    {
     "format": 2,
     "pseudo_epochs": [
      {"number": 0}
     ],
     "checksum": "a4710663d50a494ad05e14611504aa01b4a5a8e6ac90419afadd270ea96b6b0e"
    }
    """
    entries = []
    for key, value in header.items():
        if key == "pseudo_epochs":
            lines = ",\n".join(f"  {json.dumps(record, ensure_ascii=False)}" for record in value)
            entries.append(f' "{key}": [\n{lines}\n ]')
        else:
            entries.append(f' "{key}": {json.dumps(value, ensure_ascii=False)}')
    body = "{\n" + ",\n".join(entries)
    return f'{body}{_CHECKSUM}"{digest_bytes(body.encode())}"\n}}\n'


def pseudo_epoch_file(number: int) -> str:
    """Return the file name of a pseudo-epoch; the one place that says it.

    >>> pseudo_epoch_file(3)
    'pseudo_epoch_0003.npy'
    """
    return f"pseudo_epoch_{number:04d}.npy"


def anew(path: Path) -> str:
    """Say what to do about a schedule that is not whole."""
    return f"remove {path} and build the schedule anew"


def read_header(path: Path) -> dict[str, Any]:
    """Read what `header_text` wrote; ScheduleError for a missing, damaged or other one."""
    file = path / HEADER
    try:
        text = file.read_bytes().decode()  # not as text: that would forgive changed line ends
    except (FileNotFoundError, NotADirectoryError):
        unfinished = (path / UNFINISHED).exists()
        raise ScheduleError(
            f"{path}: the schedule is unfinished; run the same hpcssl schedule build again"
            if unfinished
            else f"{path}: no schedule (no {HEADER}); make one with hpcssl schedule build"
        ) from None
    except UnicodeDecodeError:
        raise ScheduleError(f"{file}: damaged; {anew(path)}") from None
    body, sign, end = text.rpartition(_CHECKSUM)
    try:
        header = json.loads(text)
        version = header["format"]
    except (ValueError, KeyError, TypeError):
        raise ScheduleError(f"{file}: damaged; {anew(path)}") from None
    if version != FORMAT:
        raise ScheduleError(f"{file}: schedule format {version}; this version reads {FORMAT}; {anew(path)}")
    if not sign or end != f'"{digest_bytes(body.encode())}"\n}}\n':
        raise ScheduleError(f"{file}: not what was written (checksum differs); {anew(path)}")
    return header


class Schedule:
    """An opened schedule.

    Attributes
    ----------
    header : content of `schedule.json`
    seed : of all its draws
    mpp_weights : MPP → share of the positions, for stores of slides; empty for all alike
    num_positions : int, over all pseudo-epochs
    positions_per_pseudo_epoch, num_pseudo_epochs : int
    pseudo_epoch : of a number, the mapped tile numbers
    """

    def __init__(self, path: Path, header: dict[str, Any]):
        self.path, self.header, spec = path, header, header["spec"]
        self.seed: int = spec["seed"]
        self.mpp_weights = {float(mpp): weight for mpp, weight in spec.get("mpp_weights", {}).items()}
        self.positions_per_pseudo_epoch: int = spec["positions_per_pseudo_epoch"]
        self.num_pseudo_epochs: int = spec["num_pseudo_epochs"]
        self.num_positions = self.positions_per_pseudo_epoch * self.num_pseudo_epochs
        self.pseudo_epoch = lru_cache(maxsize=None)(self._map)

    @classmethod
    def open(cls, path: Path) -> Schedule:
        """Open a schedule; ScheduleError for a missing, unfinished or damaged one, or a file of another size."""
        header = read_header(path)
        sizes = {record["file"]: record["bytes"] for record in header["pseudo_epochs"]}
        sizes[SLIDES] = header["slides_file_bytes"]
        if header["spec"]["hold_out"]:
            sizes[HOLD_OUT] = header["hold_out_bytes"]
        for name, expected in sizes.items():
            try:
                size = (path / name).stat().st_size
            except FileNotFoundError:
                raise ScheduleError(f"{path / name} is missing; {anew(path)}") from None
            if size != expected:
                raise ScheduleError(f"{path / name}: {size} bytes, expected {expected}; {anew(path)}")
        return cls(path, header)

    @cached_property
    def digest(self) -> str:
        """Identity of the schedule: spec, slides, hold-out list, checksums of all pseudo-epochs."""
        # the bytes of slides.parquet depend on the library's version; slides_digest covers its rows
        others = ("slides_file_sha256", "slides_file_bytes", "checksum")
        identity = {key: value for key, value in self.header.items() if key not in others}
        return digest_bytes(json.dumps(identity, sort_keys=True).encode())

    def slides(self) -> pd.DataFrame:
        """Return the slide table (slide_id, organ, num_tiles, patient_id, first_tile, eligible, columns of filters)."""
        try:
            return pd.read_parquet(self.path / SLIDES)
        except (ValueError, OSError) as error:  # pyarrow's errors of a damaged file are ValueErrors
            reason = " ".join(str(error).split())
            raise ScheduleError(f"{self.path / SLIDES}: damaged ({reason}); {anew(self.path)}") from None

    def tiles_at(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the tile numbers at the positions [start, stop), across pseudo-epochs, (stop - start,).

        ScheduleError where the positions are not all in the schedule.
        """
        if not 0 <= start <= stop <= self.num_positions:
            where = f"positions {start}:{stop} are not within its {self.num_positions} positions"
            raise ScheduleError(f"{self.path}: {where}")
        parts = []
        while start < stop:
            number, offset = divmod(start, self.positions_per_pseudo_epoch)
            end = min(stop - start + offset, self.positions_per_pseudo_epoch)
            parts.append(self.pseudo_epoch(number)[offset:end].astype(np.int64))
            start += end - offset
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _map(self, number: int) -> NDArray[np.unsignedinteger]:
        """Return the mapped tile numbers of one pseudo-epoch, (positions_per_pseudo_epoch,)."""
        path = self.path / self.header["pseudo_epochs"][number]["file"]
        try:
            mapped = map_array(path)
        except ValueError as error:
            raise ScheduleError(f"{path}: damaged ({error}); {anew(self.path)}") from None
        expected = (np.dtype(self.header["dtype"]).newbyteorder("<"), (self.positions_per_pseudo_epoch,))
        if (mapped.dtype, mapped.shape) != expected:
            shape, dtype = mapped.shape, mapped.dtype.str
            raise ScheduleError(f"{path}: {shape} of {dtype}, expected {expected[1]} of {expected[0].str}")
        return mapped


def check_matches(schedule: Schedule, slides: pd.DataFrame, *, store: Path) -> None:
    """Refuse a store whose first slides are not the schedule's; slides that a store has beyond them do no harm."""
    ours = schedule.slides()[["slide_id", "organ", "num_tiles"]]
    theirs = slides[["slide_id", "organ", "num_tiles"]].head(len(ours))
    if len(theirs) < len(ours) or (ours.to_numpy(object) != theirs.to_numpy(object)).any():
        raise ScheduleError(
            f"{schedule.path} was built for other slides than {store} holds; build it anew with --store {store}"
        )
