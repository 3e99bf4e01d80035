"""k nearest neighbours among tiles, over the same splits as the heads: what features are worth without any training.

Every tile has its slide's class. A validation tile is told by its k nearest training tiles, by cosine similarity; with
weights exp(similarity / 0.07), as DINO's evaluation does (Caron et al., ICCV 2021), or each neighbour alike. A slide is
told by the mean over its tiles.

Shapes: T tiles, S slides, K classes, D feature size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpcssl.core.errors import ConfigError, SplitError
from hpcssl.evaluate.metrics import auc
from hpcssl.evaluate.mil.benchmark import (
    COLUMNS,
    Part,
    check_tasks,
    collect,
    file_name,
    part_done,
    sides_of,
    targets_of,
    write_part,
)
from hpcssl.evaluate.splits import CLASSES
from hpcssl.features.feature_folder import FeatureSet

TEMPERATURE = 0.07
_FROM_PART = (
    "target",
    "table_digest",
    "slides",
    "train",
    "splits_digest",
    "features_digest",
    "features_written",
)  # of its record
_ROWS = 512  # tiles whose similarities to all others are in memory at a time


def knn_parts(
    parts: Sequence[Part],
    *,
    k: int = 20,
    weighted: bool = True,
    tiles_per_slide: int = 100,
    out: Path | None = None,
    on_progress: Callable[[int], None] = lambda n: None,
) -> pd.DataFrame:
    """Return the long results table of all parts; with `out`, as further parts of a folder of results.

    Epoch is 0 and replica 1: nothing is trained and nothing is drawn. The encoder's name gets `, k-NN`. Metrics:
    tile_auc and tile_accuracy over the validation tiles, auc and accuracy over the validation slides.

    Parameters
    ----------
    k : neighbours
    tiles_per_slide : of a slide with more, so many are taken at even distances
    on_progress : counts parts

    Raises
    ------
    ConfigError, FeatureError, SplitError
        For settings, features or splits that cannot be used, or a part in `out` made with something else, or one of
        the same task from other splits.
    """
    if k < 1 or tiles_per_slide < 1:
        raise ConfigError(f"k = {k}, {tiles_per_slide} tiles a slide: expected at least 1 of each")
    for part in parts:
        if part.kind != CLASSES:
            raise SplitError(
                f"task {part.task}: a target of values; k-NN tells classes only (--kind classes, if the numbers are)"
            )
    if out is not None:
        check_tasks(out / "parts", parts)
    tables = []
    for part in parts:
        encoder = f"{part.features.encoder}, k-NN"
        about = {"task": part.task, "encoder": encoder, "checkpoint": part.features.checkpoint}
        record = {"k": k, "weighted": weighted, "tiles_per_slide": tiles_per_slide, **about}
        record |= {key: part.record[key] for key in _FROM_PART}
        name = "__".join(file_name(text) for text in about.values())
        if out is not None and part_done(out / "parts", name, record):
            on_progress(1)
            continue
        rows = _splits(part, k, weighted, tiles_per_slide)
        table = pd.DataFrame(rows, columns=["split", "metric", "value"]).assign(**about, replica=1, epoch=0)[[*COLUMNS]]
        if out is not None:
            (out / "parts").mkdir(parents=True, exist_ok=True)
            write_part(out / "parts", name, record, table)
        tables.append(table)
        on_progress(1)
    return pd.concat(tables, ignore_index=True) if out is None else collect(out)


def neighbours_vote(
    similarity_VT: Tensor, labels_T: Tensor, num_classes: int, k: int, weighted: bool
) -> NDArray[np.float64]:
    """Return the share of the votes that each class gets of the k most similar, [V, K].

    >>> similarity = torch.tensor([[0.9, 0.8, 0.1]])
    >>> neighbours_vote(similarity, torch.tensor([0, 1, 1]), 2, 3, False).round(3).tolist()
    [[0.333, 0.667]]
    """
    best = similarity_VT.topk(min(k, similarity_VT.shape[1]), dim=1)
    weight_Vk = ((best.values - best.values[:, :1]) / TEMPERATURE).exp() if weighted else torch.ones_like(best.values)
    votes_VK = torch.zeros(len(similarity_VT), num_classes, dtype=torch.float64)
    votes_VK.scatter_add_(1, labels_T[best.indices], weight_Vk.double())
    return (votes_VK / votes_VK.sum(dim=1, keepdim=True)).numpy()


def _splits(part: Part, k: int, weighted: bool, tiles_per_slide: int) -> list[tuple[int, str, float]]:
    """Return (split, metric, value) of one task with one feature set."""
    features_TD, slide_T = _tiles(part.features, part.table["slide"].tolist(), tiles_per_slide)
    labels_S = targets_of(part.table, part.kind)
    labels_T = torch.from_numpy(labels_S[slide_T])
    num_classes = int(labels_S.max()) + 1
    numbers = sorted({split for split, _ in part.runs})
    trains = {split: torch.from_numpy(np.isin(slide_T, sides_of(part.table, split)[0])) for split in numbers}
    votes = {split: np.full((len(slide_T), num_classes), np.nan) for split in numbers}
    for first in range(0, len(slide_T), _ROWS):
        rows = slice(first, first + _ROWS)
        similarity = features_TD[rows] @ features_TD.T  # once for all splits
        for split, train_T in trains.items():
            val = ~train_T[rows]
            if val.any():
                votes[split][rows][val.numpy()] = neighbours_vote(
                    similarity[val][:, train_T], labels_T[train_T], num_classes, k, weighted
                )
    return [row for split in numbers for row in _measured(split, votes[split], slide_T, labels_S)]


def _tiles(features: FeatureSet, slides: Sequence[str], most: int) -> tuple[Tensor, NDArray[np.int64]]:
    """Return tiles of length one [T, D] and their slides [T]."""
    kept, counts = [], []
    for slide in slides:
        tiles = features.load(slide)
        if len(tiles) > most:
            tiles = tiles[np.linspace(0, len(tiles) - 1, most).round().astype(int)]
        kept.append(torch.nn.functional.normalize(torch.from_numpy(tiles), dim=1))
        counts.append(len(tiles))
    return torch.cat(kept), np.repeat(np.arange(len(slides)), counts)


def _measured(
    split: int, votes_TK: NDArray[np.float64], slide_T: NDArray[np.int64], labels_S: NDArray[Any]
) -> list[tuple[int, str, float]]:
    val = ~np.isnan(votes_TK[:, 0])
    tiles_VK, of_V = votes_TK[val], slide_T[val]
    slides, place = np.unique(of_V, return_inverse=True)
    sums_WK = np.zeros((len(slides), votes_TK.shape[1]))
    np.add.at(sums_WK, place, tiles_VK)
    means_WK = sums_WK / np.bincount(place)[:, None]
    found = []
    for name, scores, labels in (("tile_", tiles_VK, labels_S[of_V]), ("", means_WK, labels_S[slides])):
        found.append((split, f"{name}auc", auc(labels, scores)))
        found.append((split, f"{name}accuracy", float((scores.argmax(axis=1) == labels).mean())))
    return found
