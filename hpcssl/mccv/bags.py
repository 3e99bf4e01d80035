"""The slides of a task in memory: one ragged array.

Shapes: S slides, T tiles of all slides, N tiles of one slide (padded), D feature size, R runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hpcssl.features.folder import FeatureSet


@dataclass(frozen=True, kw_only=True)
class Bags:
    """Features of S slides, slide after slide."""

    features: torch.Tensor
    """[T, D]."""
    starts: NDArray[np.int64]
    """First tile of every slide, [S]."""
    counts: NDArray[np.int64]
    """Tiles of every slide, [S]."""

    @classmethod
    def of(cls, slides: Sequence[NDArray[np.float32]]) -> Bags:
        """Lay arrays (N, D) one after the other."""
        counts = np.array([len(slide) for slide in slides], dtype=np.int64)
        features = torch.from_numpy(np.concatenate(slides))
        return cls(features=features, starts=np.cumsum(counts) - counts, counts=counts)

    @classmethod
    def load(cls, features: FeatureSet, slides: Sequence[str]) -> Bags:
        """Read slides, in the order given; FeatureError names the file that cannot be used."""
        return cls.of([features.load(slide) for slide in slides])

    def gather(self, slides_R: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.int64]]:
        """Return padded bags [R, N, D], which tiles are there [R, N], and their counts [R]."""
        counts_R = self.counts[slides_R]
        tile_N = np.arange(counts_R.max())
        valid_RN = tile_N < counts_R[:, None]
        index_RN = np.where(valid_RN, self.starts[slides_R][:, None] + tile_N, 0)
        x_RND = self.features[torch.from_numpy(index_RN)]
        return x_RND, torch.from_numpy(valid_RN), counts_R
