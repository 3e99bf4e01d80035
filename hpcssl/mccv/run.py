"""The benchmark: every feature set on every task, in parts that a restart does not compute again.

RESULTS/parts/<task>__<encoder>__<checkpoint>.csv holds one part and the .json beside it what it was made with;
RESULTS/results.csv holds all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hpcssl.core.atomic import atomic_file, digest_bytes, write_atomic
from hpcssl.core.config import first_difference, to_mapping
from hpcssl.core.errors import ConfigError
from hpcssl.features.folder import FeatureSet
from hpcssl.mccv.bags import Bags
from hpcssl.mccv.fit import Run, fit
from hpcssl.mccv.presets import MccvPreset
from hpcssl.mccv.splits import TRAIN, read_splits, split_columns, split_number, without_missing

COLUMNS = ("task", "encoder", "checkpoint", "split", "replica", "epoch", "metric", "value")
_KEY = list(COLUMNS[:-1])
_LONGEST_NAME = 60
_ONLY = "__split="  # in the file name of a part that holds one run


@dataclass(frozen=True, kw_only=True)
class Part:
    """One task with one feature set: what is to be fitted, and with what."""

    task: str
    features: FeatureSet
    table: pd.DataFrame
    """Checked splits of the slides that have features."""
    runs: tuple[tuple[int, int], ...]
    """(split, replica), both from 1."""
    name: str
    """File name in RESULTS/parts, without suffix."""
    record: dict[str, Any]
    """All that the part's numbers depend on."""


def plan_parts(
    features: Sequence[Path],
    splits: Sequence[Path],
    preset: MccvPreset,
    *,
    replicas: int = 2,
    only: tuple[int, int] | None = None,
    allow_missing: bool = False,
    seed: int = 0,
) -> list[Part]:
    """Check all inputs without reading features, and return the parts in order of task and feature set.

    Raises
    ------
    ConfigError, FeatureError, SplitError
        Naming the file that cannot be used, a run `only` that does not exist, or two inputs of the same name.
    """
    if replicas < 1:
        raise ConfigError(f"{replicas} replicas: expected at least 1")
    sets = [FeatureSet.open(folder) for folder in features]
    parts: dict[str, Part] = {}
    for path in splits:
        table = read_splits(path)
        for found in sets:
            part = _part(path, table, found, preset, replicas, only, allow_missing, seed)
            if part.name in parts:
                raise ConfigError(
                    f"{found.folder}: task {part.task} with encoder {found.encoder!r}, checkpoint {found.checkpoint!r}"
                    " is given twice; rename the splits file, or change the encoder's name in features.json"
                )
            parts[part.name] = part
    return list(parts.values())


def run_parts(
    parts: Sequence[Part],
    preset: MccvPreset,
    out: Path,
    *,
    seed: int = 0,
    threads: int = 1,
    on_progress: Callable[[int], None] = lambda n: None,
) -> pd.DataFrame:
    """Fit the parts that are not yet in `out` and return the whole results table, which is also written to results.csv.

    `on_progress` counts epochs of runs: `epochs · len(part.runs)` for every part, also for one that was there.

    Raises
    ------
    ConfigError
        If a part in `out` was made with something else; the message names the setting and both values.
    """
    folder = out / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    _check_folder(folder, preset, seed)
    done = {part.name: _is_done(folder, part) for part in parts}
    for part in parts:
        if done[part.name]:
            on_progress(preset.epochs * len(part.runs))
            continue
        table = _fit_part(part, preset, seed, threads, on_progress)
        write_atomic(folder / f"{part.name}.json", json.dumps(part.record, indent=2) + "\n")
        _write_table(folder / f"{part.name}.csv", table)
    return _collect(folder, out / "results.csv")


def read_results(path: Path) -> pd.DataFrame:
    """Read a results table; `task`, `encoder`, `checkpoint` and `metric` stay text, blank = ""."""
    text = dict.fromkeys(("task", "encoder", "checkpoint", "metric"), str)
    return pd.read_csv(path, dtype=text, keep_default_na=False)[list(COLUMNS)]


def file_name(text: str) -> str:
    """Return text that is safe in a file name; a long one is cut and keeps a digest.

    >>> file_name("hf-hub:timm/vit_small patch16")
    'hf-hub-timm-vit_small-patch16'
    """
    safe = re.sub(r"[^A-Za-z0-9._+=-]+", "-", text).lstrip(".")
    return safe if len(safe) <= _LONGEST_NAME else f"{safe[:_LONGEST_NAME]}-{digest_bytes(text.encode())[:8]}"


def _part(
    path: Path,
    table: pd.DataFrame,
    features: FeatureSet,
    preset: MccvPreset,
    replicas: int,
    only: tuple[int, int] | None,
    allow_missing: bool,
    seed: int,
) -> Part:
    kept = without_missing(table, features.slides, where=f"{path} with {features.folder}", allow_missing=allow_missing)
    runs = tuple((split_number(c), replica) for c in split_columns(kept) for replica in range(1, replicas + 1))
    name = "__".join(file_name(text) for text in (path.stem, features.encoder, features.checkpoint))
    if only is not None:
        if only not in runs:
            raise ConfigError(
                f"{path}: no split {only[0]}, replica {only[1]}; it has splits 1 to {runs[-1][0]}, {replicas} replicas"
            )
        runs = (only,)
        name += f"{_ONLY}{only[0]}_replica={only[1]}"
    record = {
        "task": path.stem,
        "encoder": features.encoder,
        "checkpoint": features.checkpoint,
        "preset": to_mapping(preset),
        "seed": seed,
        "replicas": replicas,
        "only": only and list(only),
        "slides": len(kept),
        "splits_digest": digest_bytes(kept.to_csv(index=False).encode()),
        "features_digest": features.digest(),
    }
    return Part(task=path.stem, features=features, table=kept, runs=runs, name=name, record=record)


def _fit_part(
    part: Part, preset: MccvPreset, seed: int, threads: int, on_progress: Callable[[int], None]
) -> pd.DataFrame:
    bags = Bags.load(part.features, part.table["slide"].tolist())
    classes = sorted(part.table["target"].unique())
    labels_S = part.table["target"].map(classes.index).to_numpy(np.int64)
    runs = []
    for split, replica in part.runs:
        in_train = (part.table[f"mccv{split}"] == TRAIN).to_numpy()
        train, val = np.flatnonzero(in_train), np.flatnonzero(~in_train)
        runs.append(Run(split=split, replica=replica, train=train, val=val))
    table = fit(bags, labels_S, runs, preset, seed=seed, threads=threads, on_progress=on_progress)
    about = {"task": part.task, "encoder": part.features.encoder, "checkpoint": part.features.checkpoint}
    return table.assign(**about)[list(COLUMNS)]


def _check_folder(folder: Path, preset: MccvPreset, seed: int) -> None:
    """Refuse a folder of results made with another preset or seed: results.csv would mix them."""
    for path in sorted(folder.glob("*.csv")):
        record = _read_record(path)
        wanted = {"preset": to_mapping(preset), "seed": seed}
        _refuse_difference(path, {key: record.get(key) for key in wanted}, wanted)


def _is_done(folder: Path, part: Part) -> bool:
    path = folder / f"{part.name}.csv"
    if not path.exists():
        return False
    _refuse_difference(path, _read_record(path), part.record)
    return True


def _read_record(path: Path) -> dict[str, Any]:
    beside = path.with_name(path.name[: -len(".csv")] + ".json")
    try:
        return json.loads(beside.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        raise ConfigError(
            f"{path}: no readable {beside.name} beside it says what it was made with; delete it"
        ) from None


def _refuse_difference(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    difference = first_difference(old, new)
    if difference:
        key, was, now = difference
        raise ConfigError(
            f"{path}: made with {key} = {was!r}, now {now!r}; delete it to compute it again, or choose another --out"
        )


def _write_table(path: Path, table: pd.DataFrame) -> None:
    with atomic_file(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.7g")


def _collect(folder: Path, path: Path) -> pd.DataFrame:
    """Join all parts; a run that a part of its own and a full part both hold stands in the table once."""
    files = sorted(folder.glob("*.csv"), key=lambda file: (_ONLY in file.name, file.name))
    table = pd.concat([read_results(file) for file in files], ignore_index=True)
    table = table.drop_duplicates(_KEY, keep="first").sort_values(_KEY, ignore_index=True)
    _write_table(path, table)
    return table
