"""What predictions on validation slides are worth.

Shapes: V validation slides, K classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata


def class_metrics(labels_V: NDArray[np.integer], logits_VK: NDArray[np.floating]) -> dict[str, float]:
    """Return val_loss (cross-entropy), auc and accuracy; every class must occur.

    >>> metrics = class_metrics(np.array([0, 1]), np.array([[1.0, 0.0], [0.0, 1.0]]))
    >>> {name: round(value, 3) for name, value in metrics.items()}
    {'val_loss': 0.313, 'auc': 1.0, 'accuracy': 1.0}
    """
    shifted = logits_VK - logits_VK.max(axis=1, keepdims=True)
    logp = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return {
        "val_loss": float(-logp[np.arange(len(labels_V)), labels_V].mean()),
        "auc": auc(labels_V, np.exp(logp)),
        "accuracy": float((logits_VK.argmax(axis=1) == labels_V).mean()),
    }


def value_metrics(targets_V: NDArray[np.floating], predicted_V: NDArray[np.floating]) -> dict[str, float]:
    """Return r2 (NaN for equal targets), mae and spearman (NaN where one side is constant), in the target's units.

    >>> value_metrics(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 4.0]))
    {'r2': 0.5, 'mae': 0.3333333333333333, 'spearman': 1.0}
    """
    error = targets_V - predicted_V
    total = float(((targets_V - targets_V.mean()) ** 2).sum())
    ranks = rankdata(targets_V), rankdata(predicted_V)
    varied = all(rank.std() > 0 for rank in ranks)
    return {
        "r2": 1 - float((error**2).sum()) / total if total else float("nan"),
        "mae": float(np.abs(error).mean()),
        "spearman": float(np.corrcoef(*ranks)[0, 1]) if varied else float("nan"),
    }


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
