"""The mean over splits and its bootstrap interval (Campanella et al. 2023, Figure 2: 1,000 resamples, 95 %)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hpcssl.core.rng import below, uniforms

RESAMPLES = 1000
_SEED = 0
_PERCENTILES = (2.5, 97.5)

Floats = NDArray[np.float64]


def mean_interval(values: ArrayLike, purpose: str) -> tuple[Floats, Floats, Floats]:
    """Return the mean over the first axis and the ends of its 95 % interval.

    Splits are resampled as wholes, the same ones in every column of `values` (splits, columns) and for every table of
    the same purpose and number of splits. NaN marks a split without a value: it is left out. With fewer than two splits
    there is no interval, and its ends are NaN.

    >>> [round(float(v[0]), 3) for v in mean_interval([[0.7], [0.8], [0.9]], "example")]
    [0.8, 0.7, 0.9]
    """
    table = np.asarray(values, dtype=np.float64)
    table = table[np.isfinite(table).any(axis=1)]
    known = np.isfinite(table)
    count = known.sum(axis=0)
    filled = np.where(known, table, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = filled.sum(axis=0) / count
        if len(table) < 2:
            return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
        draws = _resamples(purpose, len(table))
        means = (draws @ filled) / (draws @ known.astype(np.float64))
    low, high = np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    able = count >= 2
    if able.any():
        low[able], high[able] = np.nanpercentile(means[:, able], _PERCENTILES, axis=0)
    return mean, low, high


@lru_cache(maxsize=256)
def _resamples(purpose: str, num_splits: int) -> Floats:
    """Return (RESAMPLES, num_splits): how often each split was drawn in each resample."""
    positions = np.arange(RESAMPLES)[:, None]
    words = uniforms(_SEED, f"report/bootstrap/{purpose}", positions, view=np.arange(num_splits)[None, :])[..., 0]
    drawn = below(words, num_splits)
    counts = np.zeros((RESAMPLES, num_splits))
    np.add.at(counts, (np.broadcast_to(positions, drawn.shape), drawn), 1.0)
    return counts
