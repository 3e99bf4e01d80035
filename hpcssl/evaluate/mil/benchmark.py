"""The benchmark: every feature set on every task, in parts that a restart does not compute again.

RESULTS/parts/<task>__<encoder>__<checkpoint>.csv holds one part and the .json beside it what it was made with;
RESULTS/results.csv holds all, and tasks.csv how many slides train and validate in each task. Another head than gated
attention is part of the encoder's name there: `uni, mean`. RESULTS/attention/<part>/<slide>.csv holds the attention to
the tiles of a slide that was asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hpcssl.core.atomic import atomic_file, digest_bytes, write_atomic
from hpcssl.core.config import first_difference, nearest, to_mapping
from hpcssl.core.errors import ConfigError, FeatureError
from hpcssl.evaluate.mil.bags import MEMORY_GIB, Bags
from hpcssl.evaluate.mil.fits import Run, fit
from hpcssl.evaluate.mil.presets import HEAD_SETTINGS, HEADS, MccvPreset
from hpcssl.evaluate.splits import (
    CLASSES,
    TRAIN,
    read_splits,
    split_columns,
    split_number,
    target_kind,
    without_missing,
)
from hpcssl.features.feature_files import read_coords
from hpcssl.features.feature_folder import FeatureSet

COLUMNS = ("task", "encoder", "checkpoint", "split", "replica", "epoch", "metric", "value")
_KEY = list(COLUMNS[:-1])
_LATER = ("table_digest", "target", "features_written")  # of a part's record, what the first ones do not have
_LONGEST_NAME = 60
_ONLY = "__split="  # in the file name of a part that holds one run


@dataclass(frozen=True, kw_only=True)
class Part:
    """One task with one feature set: what is to be fitted, and with what."""

    task: str
    splits: Path
    """The task's split file."""
    encoder: str
    """Its name in the results."""
    features: FeatureSet
    preset: MccvPreset
    table: pd.DataFrame
    """Checked splits of the slides that have features, with missing ones allowed in every feature set of the call."""
    kind: str
    """Of the target: classes or values."""
    left_out: tuple[str, ...]
    """Slides without features, here or in another set of the call, and with features but not in the splits."""
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
    heads: Sequence[str] = ("gma",),
    replicas: int = 2,
    only: tuple[int, int] | None = None,
    allow_missing: bool = False,
    allow_extra: bool = True,
    kind: str | None = None,
    seed: int = 0,
) -> list[Part]:
    """Check all inputs without reading features, and return the parts in order of task, feature set and head.

    Raises
    ------
    ConfigError, FeatureError, SplitError
        Naming the file that cannot be used, a run `only` that does not exist, or two inputs of the same name.
    """
    if replicas < 1:
        raise ConfigError(f"{replicas} replicas: expected at least 1")
    presets = [_with_head(preset, head) for head in dict.fromkeys(heads)]
    sets = [FeatureSet.open(folder) for folder in features]
    parts: dict[str, Part] = {}
    for path in splits:
        table = read_splits(path, kind=kind)
        kind_of_all = target_kind(table["target"], kind, where=str(path))  # a feature set may lack what tells it
        keep = partial(without_missing, table, allow_missing=allow_missing, allow_extra=allow_extra, kind=kind_of_all)
        shared = table["slide"]
        if allow_missing:  # sets are compared on the same slides
            shared = shared[shared.isin(set.intersection(*(set(found.slides) for found in sets)))]
        for found in sets:
            kept = keep(found.slides, where=f"{path} with {found.folder}")
            if len(kept) > len(shared):
                kept = keep(shared.tolist(), where=f"{path}, slides that all --features have")
            for one in presets:
                part = _part(path, kept, table, found, one, replicas, only, kind_of_all, seed)
                if part.name in parts:
                    raise ConfigError(
                        f"{found.folder}: task {part.task} with encoder {found.encoder!r}, checkpoint"
                        f" {found.checkpoint!r} is given twice; rename the splits file, or change the encoder's name in"
                        " features.json"
                    )
                parts[part.name] = part
    return list(parts.values())


def task_name(splits: Path) -> str:
    """Return the task of a split file: its name, or its folder's where every task's file is called slide_data.csv."""
    return splits.resolve().parent.name if splits.name == "slide_data.csv" else splits.stem


def run_parts(
    parts: Sequence[Part],
    preset: MccvPreset,
    out: Path,
    *,
    seed: int = 0,
    threads: int = 1,
    memory_gib: float = MEMORY_GIB,
    device: str = "cpu",
    attention: Sequence[str] = (),
    on_progress: Callable[[int], None] = lambda n: None,
) -> pd.DataFrame:
    """Fit the parts that are not yet in `out` and return the whole results table, which is also written to results.csv.

    Of the slides `attention` (those that a part has), the attention to every tile is written with its coordinates: the
    mean over the fitted heads that had the slide in validation. A part without these files is fitted again.
    Features beyond `memory_gib` stand in a scratch file in `out` while they are used. `on_progress` counts epochs of
    runs: `epochs · len(part.runs)` for every part, also for one that was there.

    Raises
    ------
    ConfigError
        If a part in `out` was made with something else; the message names the setting and both values. If a part of
        the same task in `out` was made from another split file. If a slide of `attention` is in validation nowhere.
    """
    folder = out / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    _check_folder(folder, preset, seed)
    check_tasks(folder, parts)
    wanted = {part.name: _attention_files(out, part, attention) for part in parts}
    for slide in attention:
        if not any(slide in files for files in wanted.values()):
            raise ConfigError(
                f"slide {slide}: in validation in no run; attention is told by heads that did not train on it"
            )
    done = {
        part.name: part_done(folder, part.name, part.record) and all(f.exists() for f in wanted[part.name].values())
        for part in parts
    }
    for part in parts:
        coords = {slide: _coords(part.features, slide) for slide in wanted[part.name]}
        if done[part.name]:
            on_progress(part.preset.epochs * len(part.runs))
            continue
        bags = Bags.load(part.features, part.table["slide"].tolist(), memory_gib=memory_gib, scratch=out, device=device)
        table, seen = _fit_part(part, bags, seed, threads, list(coords), on_progress)
        for slide, share_N in seen.items():
            wanted[part.name][slide].parent.mkdir(parents=True, exist_ok=True)
            x, y = coords[slide].T
            write_table(wanted[part.name][slide], pd.DataFrame({"x": x, "y": y, "attention": share_N}))
        write_part(folder, part.name, part.record, table)
    return collect(out)


def write_part(folder: Path, name: str, record: dict[str, Any], table: pd.DataFrame) -> None:
    """Write a part's table with the record of what it was made with beside it, which comes first."""
    write_atomic(folder / f"{name}.json", json.dumps(record, indent=2) + "\n")
    write_table(folder / f"{name}.csv", table)


def read_results(path: Path) -> pd.DataFrame:
    """Read a results table; `task`, `encoder`, `checkpoint` and `metric` stay text; a blank value is NaN."""
    text = dict.fromkeys(("task", "encoder", "checkpoint", "metric"), str)
    table = pd.read_csv(path, dtype=text, keep_default_na=False)[list(COLUMNS)]
    return table.assign(value=pd.to_numeric(table["value"], errors="coerce").astype(float))


def file_name(text: str) -> str:
    """Return text that is safe in a file name; a long one is cut and keeps a digest.

    >>> file_name("hf-hub:timm/vit_small patch16")
    'hf-hub-timm-vit_small-patch16'
    """
    safe = re.sub(r"[^A-Za-z0-9._+=-]+", "-", text).lstrip(".")
    return safe if len(safe) <= _LONGEST_NAME else f"{safe[:_LONGEST_NAME]}-{digest_bytes(text.encode())[:8]}"


def _with_head(preset: MccvPreset, head: str) -> MccvPreset:
    if head not in HEADS:
        raise ConfigError(f"head {head}: no such head; {nearest(head, list(HEADS))}")
    return replace(preset, head=head, **HEADS[head])


def _part(
    path: Path,
    kept: pd.DataFrame,
    table: pd.DataFrame,
    features: FeatureSet,
    preset: MccvPreset,
    replicas: int,
    only: tuple[int, int] | None,
    kind: str,
    seed: int,
) -> Part:
    task = task_name(path)
    encoder = features.encoder if preset.head == "gma" else f"{features.encoder}, {preset.head}"
    runs = tuple((split_number(c), replica) for c in split_columns(kept) for replica in range(1, replicas + 1))
    name = "__".join(file_name(text) for text in (task, encoder, features.checkpoint))
    if only is not None:
        if only not in runs:
            raise ConfigError(
                f"{path}: no split {only[0]}, replica {only[1]}; it has splits 1 to {runs[-1][0]}, {replicas} replicas"
            )
        runs = (only,)
        name += f"{_ONLY}{only[0]}_replica={only[1]}"
    record = {
        "task": task,
        "encoder": encoder,
        "checkpoint": features.checkpoint,
        "preset": to_mapping(preset),
        "seed": seed,
        "replicas": replicas,
        "only": only and list(only),
        "target": kind,
        "table_digest": digest_bytes(table.to_csv(index=False).encode()),
        "slides": len(kept),
        "train": float(np.mean([len(sides_of(kept, split)[0]) for split, _ in runs])),
        "splits_digest": digest_bytes(kept.to_csv(index=False).encode()),
        "features_digest": features.digest(),
        "features_written": features.written(),
    }
    return Part(
        task=task,
        splits=path,
        encoder=encoder,
        features=features,
        preset=preset,
        table=kept,
        kind=kind,
        left_out=tuple(sorted({*table["slide"], *features.slides} - {*kept["slide"]})),
        runs=runs,
        name=name,
        record=record,
    )


def targets_of(table: pd.DataFrame, kind: str) -> NDArray[np.int64] | NDArray[np.float64]:
    """Return the targets of a split table: class numbers, classes in the order of their names, or values."""
    if kind == CLASSES:
        return np.unique(table["target"].to_numpy(str), return_inverse=True)[1].astype(np.int64)
    return table["target"].to_numpy(np.float64)


def sides_of(table: pd.DataFrame, split: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows of a split table that train, and those that validate."""
    in_train = (table[f"mccv{split}"] == TRAIN).to_numpy()
    return np.flatnonzero(in_train), np.flatnonzero(~in_train)


def _attention_files(out: Path, part: Part, slides: Sequence[str]) -> dict[str, Path]:
    """Return the files of the slides that some run of a part has in validation."""
    held = {split: set(part.table["slide"].iloc[sides_of(part.table, split)[1]]) for split, _ in part.runs}
    validated = set().union(*held.values())
    return {s: out / "attention" / part.name / f"{file_name(s)}.csv" for s in slides if s in validated}


def _coords(features: FeatureSet, slide: str) -> NDArray[np.int64]:
    coords_N2 = read_coords(features.paths[slide])
    if (coords_N2 < 0).any():
        raise FeatureError(f"{features.paths[slide]}: the places of its tiles are unknown; no map can be drawn of it")
    return coords_N2


def _fit_part(
    part: Part, bags: Bags, seed: int, threads: int, attention: Sequence[str], on_progress: Callable[[int], None]
) -> tuple[pd.DataFrame, dict[str, NDArray[np.float64]]]:
    """Return a part's results, and the mean attention to the tiles of some slides."""
    runs = []
    for split, replica in part.runs:
        train, val = sides_of(part.table, split)
        runs.append(Run(split=split, replica=replica, train=train, val=val))
    slides = part.table["slide"].tolist()
    seen: dict[str, list[NDArray[np.float64]]] = {slide: [] for slide in attention}

    def look(run: Run, attention_to: Callable[[int], NDArray[np.float64]]) -> None:
        for slide, found in seen.items():
            index = slides.index(slide)
            if index in run.val:
                found.append(attention_to(index))

    targets_S = targets_of(part.table, part.kind)
    table = fit(
        bags,
        targets_S,
        runs,
        part.preset,
        seed=seed,
        threads=threads,
        on_fitted=look if seen else None,
        on_progress=on_progress,
    )
    about = {"task": part.task, "encoder": part.encoder, "checkpoint": part.features.checkpoint}
    return table.assign(**about)[list(COLUMNS)], {slide: np.mean(found, axis=0) for slide, found in seen.items()}


def _check_folder(folder: Path, preset: MccvPreset, seed: int) -> None:
    """Refuse a folder of results made with another training or seed: results.csv would mix them."""
    wanted = {"preset": _training(to_mapping(preset)), "seed": seed}
    for path in sorted(folder.glob("*.csv")):
        record = _read_record(path)
        if "preset" in record:  # k-NN has none
            found = {"preset": _training(record["preset"]), "seed": record.get("seed")}
            _refuse_difference(path, found, wanted)


def check_tasks(folder: Path, parts: Sequence[Part]) -> None:
    """Refuse (ConfigError) a task of which `folder` holds a part from another split table or kind of target."""
    of_task = {part.task: part for part in parts}
    for path in sorted(folder.glob("[!.]*.csv")):
        record = _read_record(path)
        part = of_task.get(record.get("task", ""))
        for key, told in (("table_digest", "another split table"), ("target", "another kind of target")):
            if part is not None and record.get(key, part.record[key]) != part.record[key]:
                was, now = (str(r[key])[:12] for r in (record, part.record))
                raise ConfigError(
                    f"{part.splits}: {path} has the same task {part.task} from {told} ({was}, now {now}); rename the"
                    f" splits file (its name is the task), choose another --out, or delete the old parts of the task"
                )


def _training(preset: dict[str, Any]) -> dict[str, Any]:
    """Return a preset without its head."""
    return {key: value for key, value in preset.items() if key not in HEAD_SETTINGS}


def part_done(folder: Path, name: str, record: dict[str, Any]) -> bool:
    """Return whether a part is there; ConfigError if it was made with something else."""
    path = folder / f"{name}.csv"
    if not path.exists():
        return False
    _refuse_difference(path, _read_record(path), record)
    return True


def _read_record(path: Path) -> dict[str, Any]:
    beside = path.with_name(path.name[: -len(".csv")] + ".json")
    try:
        record = json.loads(beside.read_text(encoding="utf-8"))
        if "preset" in record:  # the first ones do not have it
            record["preset"].setdefault("precision", "fp32")
        return record
    except (FileNotFoundError, ValueError):
        raise ConfigError(
            f"{path}: no readable {beside.name} beside it says what it was made with; delete it"
        ) from None


def _refuse_difference(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    old = old | {key: new[key] for key in _LATER if key in new and key not in old}
    difference = first_difference(old, new)
    if difference:
        key, was, now = difference
        raise ConfigError(
            f"{path}: made with {key} = {was!r}, now {now!r}; delete it to compute it again, or choose another --out"
        )


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV, whole or not at all."""
    with atomic_file(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.7g")


def collect(out: Path) -> pd.DataFrame:
    """Join all parts in results.csv; a run that a part of its own and a full part both hold stands there once.

    Several commands may fill one folder at a time: what was added meanwhile is joined, too.
    """
    joined, files = None, _part_files(out)
    while joined != files:
        joined = files
        table = pd.concat([read_results(file) for file in files], ignore_index=True)
        table = table.drop_duplicates(_KEY, keep="first").sort_values(_KEY, ignore_index=True)
        write_table(out / "results.csv", table)
        records = [_read_record(file) for file in files]
        held = {r["task"]: {"train": r["train"], "val": r["slides"] - r["train"]} for r in records if "train" in r}
        write_table(out / "tasks.csv", pd.DataFrame([{"task": task, **row} for task, row in sorted(held.items())]))
        files = _part_files(out)
    return table


def _part_files(out: Path) -> list[Path]:
    return sorted((out / "parts").glob("[!.]*.csv"), key=lambda file: (_ONLY in file.name, file.name))
