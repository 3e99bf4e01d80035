"""Features and labels brought together: every feature set on the slides of every task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hpcssl.core.atomic import digest_bytes
from hpcssl.core.errors import ConfigError
from hpcssl.evaluate.results import Record, part_name, task_name
from hpcssl.evaluate.splits import CLASSES, TRAIN, read_splits, split_numbers, target_kind, without_missing
from hpcssl.features.feature_folder import FeatureSet


@dataclass(frozen=True, kw_only=True)
class LabelledFeatures:
    """One feature set on the slides of one task."""

    task: str
    splits: Path
    """The task's split file."""
    features: FeatureSet
    table: pd.DataFrame
    """Checked splits of the slides that have features, with missing ones allowed in every feature set of the call."""
    kind: str
    """Of the target: classes or values."""
    left_out: tuple[str, ...]
    """Slides without features, here or in another set of the call, and with features but not in the splits."""
    table_digest: str
    """Of the whole split table."""

    @property
    def name(self) -> str:
        """Of task, encoder and checkpoint, safe in a file name."""
        return part_name(**self.about())

    @property
    def split_numbers(self) -> list[int]:
        """The k of every column mccvk, in order."""
        return split_numbers(self.table)

    @property
    def targets(self) -> NDArray[np.int64] | NDArray[np.float64]:
        """Class numbers, classes in the order of their names, or values; of every slide of the table."""
        if self.kind == CLASSES:
            return np.unique(self.table["target"].to_numpy(str), return_inverse=True)[1].astype(np.int64)
        return self.table["target"].to_numpy(np.float64)

    def sides(self, split: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows of the table that train in a split, and those that validate."""
        in_train = (self.table[f"mccv{split}"] == TRAIN).to_numpy()
        return np.flatnonzero(in_train), np.flatnonzero(~in_train)

    def about(self, head: str = "") -> dict[str, Any]:
        """Return what stands in every row of results; a head other than gated attention joins the encoder's name."""
        encoder = f"{self.features.encoder}, {head}" if head else self.features.encoder
        return {"task": self.task, "encoder": encoder, "checkpoint": self.features.checkpoint}

    def record(self, splits: Iterable[int]) -> Record:
        """Return what numbers measured over some splits depend on, as far as it lies in features and labels."""
        return {
            "target": self.kind,
            "table_digest": self.table_digest,
            "slides": len(self.table),
            "train": float(np.mean([len(self.sides(split)[0]) for split in splits])),
            "splits_digest": digest_bytes(self.table.to_csv(index=False).encode()),
            "features_digest": self.features.digest(),
            "features_written": self.features.written(),
        }


def label_features(
    features: Sequence[Path],
    splits: Sequence[Path],
    *,
    kind: str | None = None,
    allow_missing: bool = False,
    allow_extra: bool = True,
) -> list[LabelledFeatures]:
    """Check features and splits, without reading features, and return every pair, task after task.

    Parameters
    ----------
    kind : of the target; None = read from the column
    allow_missing : leave out slides that one of the feature sets lacks: all sets are compared on the same slides
    allow_extra : allow features of slides that the splits do not name

    FeatureError and SplitError name the file that cannot be used.
    """
    sets = [FeatureSet.open(folder) for folder in features]
    pairs = []
    for path in splits:
        table = read_splits(path, kind=kind)
        whole_kind = target_kind(table["target"], kind, where=str(path))  # a feature set may lack what tells it
        keep = partial(without_missing, table, allow_missing=allow_missing, allow_extra=allow_extra, kind=whole_kind)
        shared = table["slide"]
        if allow_missing:
            shared = shared[shared.isin(set.intersection(*(set(one.slides) for one in sets)))]
        of_task: dict[str, Any] = {"task": task_name(path), "splits": path, "kind": whole_kind}
        of_task["table_digest"] = digest_bytes(table.to_csv(index=False).encode())
        for one in sets:
            kept = keep(one.slides, where=f"{path} with {one.folder}")
            if len(kept) > len(shared):
                kept = keep(shared.tolist(), where=f"{path}, slides that all --features have")
            left_out = tuple(sorted({*table["slide"], *one.slides} - {*kept["slide"]}))
            pairs.append(LabelledFeatures(**of_task, features=one, table=kept, left_out=left_out))
    return pairs


def refuse_twins(parts: Iterable[tuple[str, LabelledFeatures]]) -> None:
    """Refuse (ConfigError) two parts of one name, which would overwrite each other."""
    names = set()
    for name, data in parts:
        features = data.features
        if name in names:
            raise ConfigError(
                f"{features.folder}: task {data.task} with encoder {features.encoder!r}, checkpoint"
                f" {features.checkpoint!r} is given twice; rename the splits file, or change the encoder's name in"
                " features.json"
            )
        names.add(name)
