"""A folder of results: the one definition of its rows, its files and their records. Nothing here needs torch.

RESULTS/parts/<task>__<encoder>__<checkpoint>.csv  the rows of one measurement; the .json beside it is its record: all
                                                   that its numbers depend on
RESULTS/results.csv                                the rows of all parts, each once
RESULTS/tasks.csv                                  how many slides of each task train and validate
RESULTS/attention/<part>/<slide>.csv               the attention to the tiles of a slide

A head other than gated attention is part of the encoder's name: `uni, mean`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hpcssl.core.atomic import atomic_file, digest_bytes, read_json, write_atomic
from hpcssl.core.claim import check_same
from hpcssl.core.errors import ConfigError, UserError
from hpcssl.slides.slide_table import MISSING

COLUMNS = ("task", "encoder", "checkpoint", "split", "replica", "epoch", "metric", "value")
KEY = COLUMNS[:-1]  # names a row
RESULTS_NAME, TASKS_NAME = "results.csv", "tasks.csv"
ATTENTION, ATTENTION_COLUMNS = "attention", ("x", "y", "attention")
_TEXTS = ("task", "encoder", "checkpoint", "metric")
_LATER = ("table_digest", "target", "features_written")  # fields of a record added after the first release
_LONGEST_NAME = 60
_ONLY = "__split="  # in the file name of a part that holds one fit


class ResultsError(UserError):
    """A results table that cannot be used."""


Record = dict[str, Any]


@dataclass(frozen=True)
class ResultsFolder:
    """A folder of results that is filled part by part, by several commands at a time if need be."""

    path: Path

    @property
    def parts(self) -> Path:
        """The folder of the parts."""
        return self.path / "parts"

    def records(self) -> list[tuple[Path, Record]]:
        """Return the file and the record of every part; ConfigError for a part without one."""
        return [(file, _read_record(file)) for file in self._part_files()]

    def check_tasks(self, planned: Iterable[tuple[Path, Record]]) -> None:
        """Refuse (ConfigError) a task whose stored part is from another split table, or of another kind of target.

        `planned` are the split file and the record of every part to be written.
        """
        of_task = {record["task"]: (splits, record) for splits, record in planned}
        for file, stored in self.records():
            if stored.get("task") not in of_task:
                continue
            splits, record = of_task[stored["task"]]
            for key, other in (("table_digest", "another split table"), ("target", "another kind of target")):
                if stored.get(key, record[key]) != record[key]:
                    raise ConfigError(
                        f"{splits}: {file} has the same task {record['task']} from {other} ({stored[key][:12]}, now"
                        f" {record[key][:12]}); rename the splits file (its name is the task), choose another --out, or"
                        " delete the old parts of the task"
                    )

    def has(self, name: str, record: Record) -> bool:
        """Return whether a part is there; ConfigError if it was made with something else."""
        file = self._part(name)
        if not file.exists():
            return False
        stored = _read_record(file)
        later = {key: record[key] for key in _LATER if key in record and key not in stored}
        check_made_with(file, stored | later, record)
        return True

    def write(self, name: str, record: Record, table: pd.DataFrame) -> None:
        """Write a part's record, then its table."""
        file = self._part(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
        write_table(file, table)

    def collect(self) -> pd.DataFrame:
        """Join all parts, also those that another command adds meanwhile, in results.csv and tasks.csv.

        Returns the rows; a fit that has a part of its own and stands in a full part, too, is taken once.
        """
        joined, files = None, self._part_files()
        while joined != files:
            joined = files
            table = pd.concat([read_rows(file) for file in files], ignore_index=True)
            table = table.drop_duplicates(KEY, keep="first").sort_values(list(KEY), ignore_index=True)
            write_table(self.path / RESULTS_NAME, table)
            records = [record for file in files if "train" in (record := _read_record(file))]
            sizes = {r["task"]: (r["task"], r["train"], r["slides"] - r["train"]) for r in records}
            write_table(self.path / TASKS_NAME, pd.DataFrame(sorted(sizes.values()), columns=["task", "train", "val"]))
            files = self._part_files()
        return table

    def attention_file(self, part: str, slide: str) -> Path:
        """Return the file of the attention to the tiles of a slide."""
        return self.path / ATTENTION / part / f"{file_name(slide)}.csv"

    def _part(self, name: str) -> Path:
        return self.parts / f"{name}.csv"

    def _part_files(self) -> list[Path]:
        """Return the tables of all parts, those of single fits last."""
        return sorted(self.parts.glob("[!.]*.csv"), key=lambda file: (_ONLY in file.name, file.name))


def part_name(task: str, encoder: str, checkpoint: str, only: tuple[int, int] | None = None) -> str:
    """Return the file name of a part, without suffix; `only`: split and replica of the sole fit in it."""
    name = "__".join(file_name(text) for text in (task, encoder, checkpoint))
    return name if only is None else f"{name}{_ONLY}{only[0]}_replica={only[1]}"


def task_name(splits: Path) -> str:
    """Return the task of a split file: its name, or its folder's where every task's file is called slide_data.csv."""
    return splits.resolve().parent.name if splits.name == "slide_data.csv" else splits.stem


def file_name(text: str) -> str:
    """Return text that is safe in a file name; a long one is cut and keeps a digest.

    >>> file_name("hf-hub:timm/vit_small patch16")
    'hf-hub-timm-vit_small-patch16'
    """
    safe = re.sub(r"[^A-Za-z0-9._+=-]+", "-", text).lstrip(".")
    return safe if len(safe) <= _LONGEST_NAME else f"{safe[:_LONGEST_NAME]}-{digest_bytes(text.encode())[:8]}"


def check_made_with(file: Path, stored: Record, requested: Record) -> None:
    """Refuse a part that was made with other settings (ConfigError names the first, and both values)."""
    made, advice = f"{file}: made with", "delete it to compute it again, or choose another --out"
    check_same(stored, requested, made=made, advice=advice, error=ConfigError, show=repr)


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV, whole or not at all."""
    with atomic_file(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.7g")


def read_rows(path: Path) -> pd.DataFrame:
    """Read a table that `write_table` wrote: names are text, a blank value is NaN."""
    table = pd.read_csv(path, dtype=dict.fromkeys(_TEXTS, str), keep_default_na=False)[list(COLUMNS)]
    return table.assign(value=pd.to_numeric(table["value"], errors="coerce").astype(float))


def read_results(folder: Path) -> pd.DataFrame:
    """Read the results.csv of a folder, perhaps written elsewhere, and check it as `check_rows` does.

    Its `attrs` hold `val_per_train`: of every task in tasks.csv, validation slides for one training slide.
    """
    path = folder / RESULTS_NAME
    if not path.is_file():
        raise ResultsError(f"{folder}: no {path.name}; expected the folder that `hpcssl mccv --out` wrote to the end")
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError:
        raise ResultsError(f"{path}: the file is empty; run `hpcssl mccv` again") from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path}: not a CSV table ({error}); expected {', '.join(COLUMNS)}") from None
    frame.attrs["val_per_train"] = _val_per_train(folder / TASKS_NAME)
    return check_rows(frame, where=str(path))


def check_rows(frame: pd.DataFrame, *, where: str = "results") -> pd.DataFrame:
    """Return a results table in its canonical types: names as text, epoch int64, value float64 (not finite = NaN).

    ResultsError if columns are missing, there are no rows, a number is none, or a row comes twice.
    """
    lacking = [name for name in COLUMNS if name not in frame.columns]
    if lacking:
        raise ResultsError(f"{where}: no column {', '.join(lacking)}; expected {', '.join(COLUMNS)}")
    if frame.empty:
        raise ResultsError(f"{where}: no rows; run `hpcssl mccv` again")
    rows = pd.DataFrame({name: _texts(frame[name]) for name in KEY})
    rows["checkpoint"] = rows["checkpoint"].map({c: _step_text(c) for c in rows["checkpoint"].unique()})
    epoch = _numbers(frame["epoch"], f"{where}: epoch")
    if not (np.isfinite(epoch) & (epoch == np.floor(epoch))).all():
        raise ResultsError(f"{where}: an epoch is not a whole number; expected 1, 2, 3 …")
    rows["epoch"] = epoch.astype("int64")
    rows["value"] = _numbers(frame["value"], f"{where}: value")
    rows.attrs = dict(frame.attrs)
    twice = rows.duplicated(list(KEY))
    if twice.any():
        row = rows[twice].iloc[0]
        raise ResultsError(
            f"{where}: task {row.task}, encoder {row.encoder}, checkpoint {row.checkpoint or '(none)'}, "
            f"split {row.split}, replica {row.replica}, epoch {row.epoch}, {row.metric} comes twice; expected it once"
        )
    return rows


def _read_record(file: Path) -> Record:
    beside = file.with_suffix(".json")
    damaged = ConfigError(f"{file}: no readable {beside.name} beside it says what it was made with; delete it")
    if not beside.is_file():
        raise damaged
    record = read_json(beside, damaged)
    if "preset" in record:  # nearest neighbours have none
        record["preset"].setdefault("precision", "fp32")  # added after the first release
    return record


def _val_per_train(path: Path) -> dict[str, float]:
    """Return the ratio of every task; none where the results come from elsewhere."""
    if not path.is_file():
        return {}
    try:
        table = pd.read_csv(path, dtype={"task": str})
        return dict(zip(table["task"], (table["val"] / table["train"]).astype(float)))
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ResultsError(f"{path}: not the table that `hpcssl mccv` writes ({error}); run it again") from None


def _texts(column: pd.Series) -> pd.Series:
    return column.astype(object).where(column.notna(), "").map(str).str.strip()


def _step_text(text: str) -> str:
    """Return a step as a plain integer, also where a table with blanks had made it a float (`20.0`)."""
    match = re.fullmatch(r"([0-9]+)(\.0*)?", text)
    return str(int(match[1])) if match else ("" if text.lower() in MISSING else text)


def _numbers(column: pd.Series, where: str) -> pd.Series:
    numbers = pd.to_numeric(column, errors="coerce").astype("float64")
    if not pd.api.types.is_numeric_dtype(column):
        bad = numbers.isna() & ~_texts(column).str.lower().isin(MISSING)
        if bad.any():
            raise ResultsError(f"{where}: {column[bad].iloc[0]!r} in row {int(np.argmax(bad)) + 1} is not a number")
    return numbers.where(np.isfinite(numbers))
