import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from hpcssl.evaluate.metrics import auc


def test_auc_equals_scikit_learns_with_ties_and_as_macro_one_against_the_rest():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    positive = rng.integers(0, 8, 60) / 8
    scores = np.stack([1 - positive, positive], axis=1)
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, positive))
    labels = rng.integers(0, 4, 90)
    scores = rng.dirichlet(np.ones(4), 90)
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores, multi_class="ovr", average="macro"))
