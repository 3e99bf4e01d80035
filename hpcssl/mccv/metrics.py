"""Area under the ROC curve, and the closing summary of a results table."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hpcssl.core.rng import key_of

BOOTSTRAPS = 1000  # the paper's


def auc(labels_V: NDArray[np.integer], scores_VK: NDArray[np.floating]) -> float:
    """Return the AUC of class 1 for two classes, else the unweighted mean of each class against the rest.

    A tie counts one half. Every class must occur.

    >>> auc(np.array([0, 0, 1, 1]), np.array([[0.9, 0.1], [0.6, 0.4], [0.65, 0.35], [0.2, 0.8]]))
    0.75
    """
    num_classes = scores_VK.shape[1]
    classes = [1] if num_classes == 2 else range(num_classes)
    return float(np.mean([_binary_auc(labels_V == k, scores_VK[:, k]) for k in classes]))


def _binary_auc(positive_V: NDArray[np.bool_], score_V: NDArray[np.floating]) -> float:
    negatives = np.sort(score_V[~positive_V])
    positives = score_V[positive_V]
    assert len(negatives), "one class only"
    assert len(positives), "a class does not occur"
    below, below_or_tied = (np.searchsorted(negatives, positives, side=side) for side in ("left", "right"))
    return float((below + below_or_tied).mean() / (2 * len(negatives)))


def summary(results: pd.DataFrame) -> pd.DataFrame:
    """Return, per task, encoder and checkpoint, the mean AUC of the last epoch and its 95 % interval.

    Replicas of a split are averaged first; the interval is of 1,000 bootstraps over the splits.
    """
    rows = []
    aucs = results[results["metric"] == "auc"]
    for (task, encoder, checkpoint), part in aucs.groupby(["task", "encoder", "checkpoint"], sort=True):
        last = part[part["epoch"] == part["epoch"].max()].groupby("split")["value"].mean().to_numpy()
        draws = np.random.default_rng(key_of(0, "mccv/summary")).integers(len(last), size=(BOOTSTRAPS, len(last)))
        low, high = np.quantile(last[draws].mean(axis=1), [0.025, 0.975])
        rows.append((task, encoder, checkpoint, len(last), last.mean(), low, high))
    return pd.DataFrame(rows, columns=["task", "encoder", "checkpoint", "splits", "auc", "low", "high"])
