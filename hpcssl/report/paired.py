"""Paired differences over Monte-Carlo splits, corrected for the overlap of their training sets.

Splits share slides, so their AUCs are not independent and a plain t-test finds differences everywhere. Nadeau and
Bengio, "Inference for the generalization error" (Machine Learning 52, 2003), widen the variance of the mean from s²/J
to (1/J + validation slides / training slides) s², with J - 1 degrees of freedom.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from hpcssl.report.arms import VAL_PER_TRAIN

_LEVEL = 0.95


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
