"""Area under the ROC curve."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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
