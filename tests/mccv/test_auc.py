import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from hpcssl.mccv.metrics import auc, summary


def test_auc_equals_scikit_learns_with_ties():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    positive = rng.integers(0, 8, 60) / 8
    scores = np.stack([1 - positive, positive], axis=1)
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, positive))


def test_auc_of_several_classes_is_macro_one_against_the_rest():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 90)
    scores = rng.dirichlet(np.ones(4), 90)
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores, multi_class="ovr", average="macro"))


def test_summary_takes_the_last_epoch_and_averages_replicas_first():
    rows = [
        ("t", "e", "5", s, r, e, "auc", s / 10 + r / 100 + (e == 1)) for s in (1, 2) for r in (1, 2) for e in (1, 2)
    ]
    columns = ["task", "encoder", "checkpoint", "split", "replica", "epoch", "metric", "value"]
    (row,) = summary(pd.DataFrame(rows, columns=columns)).to_dict("records")
    assert row["auc"] == pytest.approx(0.165)
    assert (row["low"], row["high"], row["splits"]) == (pytest.approx(0.115), pytest.approx(0.215), 2)
