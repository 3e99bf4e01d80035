"""k nearest neighbours among tiles, over the same splits as the heads: what features are worth without any training.

Every tile has its slide's class. A validation tile is told by its k nearest training tiles, by cosine similarity; with
weights exp(similarity / 0.07), as DINO's evaluation does (Caron et al., ICCV 2021), or each neighbour alike. A slide is
told by the mean over its tiles.

Shapes: T tiles, V validation tiles, S slides, W validation slides, K classes, D feature size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpcssl.core.errors import ConfigError, SplitError
from hpcssl.evaluate.labelled import LabelledFeatures
from hpcssl.evaluate.metrics import auc
from hpcssl.evaluate.results import COLUMNS, Record, part_name
from hpcssl.evaluate.splits import CLASSES
from hpcssl.features.feature_folder import FeatureSet

TEMPERATURE = 0.07
_ROWS = 512  # tiles whose similarities to all others are in memory at a time


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """How the k nearest tiles vote."""

    k: int = 20
    weighted: bool = True
    """By similarity, or each neighbour alike."""
    tiles_per_slide: int = 100
    """A slide with more gives so many, at even distances."""

    def __post_init__(self) -> None:
        if self.k < 1 or self.tiles_per_slide < 1:
            raise ConfigError(f"k = {self.k}, {self.tiles_per_slide} tiles a slide: expected at least 1 of each")

    def part(self, data: LabelledFeatures) -> tuple[str, Record]:
        """Return name and record of a measurement's part; SplitError for a target of values."""
        if data.kind != CLASSES:
            raise SplitError(
                f"task {data.task}: a target of values; k-NN tells classes only (--kind classes, if the numbers are)"
            )
        about = data.about("k-NN")
        return part_name(**about), asdict(self) | about | data.record(data.split_numbers)

    def measure(self, data: LabelledFeatures) -> pd.DataFrame:
        """Return the rows of one feature set on one task.

        Epoch is 0 and replica 1: nothing is trained and nothing is drawn. Metrics: tile_auc and tile_accuracy over the
        validation tiles, auc and accuracy over the validation slides.
        """
        features_TD, slide_T = sample_tiles(data.features, data.table["slide"].tolist(), self.tiles_per_slide)
        labels_S: NDArray[Any] = data.targets
        labels_T = torch.from_numpy(labels_S[slide_T])
        num_classes = int(labels_S.max()) + 1
        trains = {s: torch.from_numpy(np.isin(slide_T, data.sides(s)[0])) for s in data.split_numbers}
        votes = {split: np.full((len(slide_T), num_classes), np.nan) for split in trains}
        for first in range(0, len(slide_T), _ROWS):
            rows = slice(first, first + _ROWS)
            similarity = features_TD[rows] @ features_TD.T  # once for all splits
            for split, train_T in trains.items():
                val = ~train_T[rows]
                if val.any():
                    votes[split][rows][val.numpy()] = neighbours_vote(
                        similarity[val][:, train_T], labels_T[train_T], num_classes, self.k, self.weighted
                    )
        rows_of = [(split, *row) for split in trains for row in _metrics(votes[split], slide_T, labels_S).items()]
        table = pd.DataFrame(rows_of, columns=["split", "metric", "value"])
        return table.assign(**data.about("k-NN"), replica=1, epoch=0)[list(COLUMNS)]


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


def sample_tiles(features: FeatureSet, slides: Sequence[str], most: int) -> tuple[Tensor, NDArray[np.int64]]:
    """Return tiles scaled to length one [T, D], at most so many a slide, and the index of their slides [T]."""
    samples, counts = [], []
    for slide in slides:
        tiles = features.load(slide)
        if len(tiles) > most:
            tiles = tiles[np.linspace(0, len(tiles) - 1, most).round().astype(int)]
        samples.append(torch.nn.functional.normalize(torch.from_numpy(tiles), dim=1))
        counts.append(len(tiles))
    return torch.cat(samples), np.repeat(np.arange(len(slides)), counts)


def _metrics(votes_TK: NDArray[np.float64], slide_T: NDArray[np.int64], labels_S: NDArray[Any]) -> dict[str, float]:
    """Return the metrics of one split; tiles that train have no votes (NaN)."""
    val = ~np.isnan(votes_TK[:, 0])
    tiles_VK, slide_V = votes_TK[val], slide_T[val]
    slides_W, place_V = np.unique(slide_V, return_inverse=True)
    sums_WK = np.zeros((len(slides_W), votes_TK.shape[1]))
    np.add.at(sums_WK, place_V, tiles_VK)
    means_WK = sums_WK / np.bincount(place_V)[:, None]
    metrics = {}
    for name, scores, labels in (("tile_", tiles_VK, labels_S[slide_V]), ("", means_WK, labels_S[slides_W])):
        metrics[f"{name}auc"] = auc(labels, scores)
        metrics[f"{name}accuracy"] = float((scores.argmax(axis=1) == labels).mean())
    return metrics
