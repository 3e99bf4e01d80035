"""95 % intervals over Monte-Carlo splits: of a mean by the bootstrap, of a paired difference by a corrected t-test.

The bootstrap resamples splits 1,000 times (Campanella et al. 2023, Figure 2).

Splits share slides, so their AUCs are not independent and a plain t-test finds differences everywhere. Nadeau and
Bengio, "Inference for the generalization error" (Machine Learning 52, 2003), widen the variance of the mean from s²/J
to (1/J + validation slides / training slides) s², with J - 1 degrees of freedom.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from hpcssl.core.rng import below, uniforms
from hpcssl.report.arms import VAL_PER_TRAIN

RESAMPLES = 1000
_SEED, _LEVEL, _PERCENTILES = 0, 0.95, (2.5, 97.5)

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


class Difference(NamedTuple):
    """A mean difference over splits, its 95 % interval and its two-sided p-value; NaN where there are too few."""

    mean: float
    low: float
    high: float
    p: float
    splits: int

    @property
    def outcome(self) -> str:
        """`better` or `worse` if the interval excludes zero, else `unclear`; `unknown` without an interval."""
        if np.isnan(self.low):
            return "unknown"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "unclear"


def corrected(differences: ArrayLike, val_per_train: float = VAL_PER_TRAIN) -> Difference:
    """Return the corrected difference of paired values, one a split; NaN marks a split that has none.

    >>> [round(float(v), 3) for v in corrected([0.01, 0.02, 0.03])]
    [0.02, -0.013, 0.053, 0.12, 3.0]
    """
    values = np.asarray(differences, dtype=np.float64)
    values = values[np.isfinite(values)]
    count = len(values)
    mean = float(values.mean()) if count else np.nan
    if count < 2:
        return Difference(mean, np.nan, np.nan, np.nan, count)
    error = float(np.sqrt((1 / count + val_per_train) * values.var(ddof=1)))
    if error < 1e-12:  # equal in every split
        return Difference(mean, mean, mean, float(abs(mean) < 1e-12), count)
    half = float(stats.t.ppf((1 + _LEVEL) / 2, count - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, count - 1))
    return Difference(mean, mean - half, mean + half, p, count)
