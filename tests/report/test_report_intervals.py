"""Intervals over splits: the bootstrap of a mean, and the corrected test of paired differences on known truth."""

import numpy as np
import pytest
from scipy import stats

from hpcssl.evaluate.metrics import auc
from hpcssl.report.intervals import corrected, mean_interval

NUM_TABLES, SPLITS, SLIDES, TRAIN = 500, 20, 60, 48


def test_the_bootstrap_agrees_with_the_standard_error_and_columns_share_their_resamples() -> None:
    values = np.random.default_rng(0).normal(0.8, 0.05, 200)
    mean, low, high = mean_interval(np.stack([values, values + 1, -values], axis=1), "task")
    half = 1.96 * values.std() / np.sqrt(200)
    assert mean[0] == pytest.approx(values.mean())
    assert ((mean - low)[0], (high - mean)[0]) == (pytest.approx(half, rel=0.12), pytest.approx(half, rel=0.12))
    assert low[1] - low[0] == pytest.approx(1)
    assert low[2] == pytest.approx(-high[0])


def test_resamples_are_a_function_of_the_purpose_and_splits_without_a_value_are_left_out() -> None:
    values = np.random.default_rng(0).normal(size=(20, 1))
    with_gap = np.concatenate([values[:4], [[np.nan]], values[4:]])
    np.testing.assert_array_equal(mean_interval(with_gap, "lung"), mean_interval(values, "lung"))
    assert mean_interval(values, "lung")[1] != mean_interval(values, "breast")[1]


def test_no_interval_from_one_split() -> None:
    assert [np.isnan(v[0]) for v in mean_interval([[0.7]], "x")] == [False, True, True]
    mean, low, high = mean_interval([[0.7, 0.1], [np.nan, 0.2]], "x")
    assert np.isnan(low).tolist() == np.isnan(high).tolist() == [True, False]
    assert np.isnan(mean_interval([[np.nan]], "x")[0][0])


def simulated(seed: int, gain: float = 0.0) -> np.ndarray:
    """Differences of AUC between two encoders over Monte-Carlo splits of one drawn task.

    Each encoder sees the label through four features of its own with equal noise (the first `gain` more of it); a
    nearest-mean rule is fitted on each split's training slides. Splits overlap as they really do.
    """
    random = np.random.default_rng(seed)
    labels = np.arange(SLIDES) % 2
    seen = [random.normal(size=(SLIDES, 4)) + (0.35 + g) * (2 * labels[:, None] - 1) for g in (gain, 0.0)]
    found = []
    for _ in range(SPLITS):
        sides = [random.permutation(np.flatnonzero(labels == k)) for k in (0, 1)]
        train, val = (np.concatenate(part) for part in zip(*((s[: TRAIN // 2], s[TRAIN // 2 :]) for s in sides)))
        aucs = []
        for x in seen:
            axis = x[train][labels[train] == 1].mean(axis=0) - x[train][labels[train] == 0].mean(axis=0)
            score = x[val] @ axis
            aucs.append(auc(labels[val], np.stack([-score, score], axis=1)))
        found.append(aucs[0] - aucs[1])
    return np.array(found)


def test_the_false_positive_rate_is_near_its_level_and_without_the_correction_it_is_not() -> None:
    ratio = (SLIDES - TRAIN) / TRAIN
    tables = [simulated(seed) for seed in range(NUM_TABLES)]
    rate = np.mean([corrected(table, ratio).outcome != "unclear" for table in tables])
    plain = np.mean([stats.ttest_1samp(table, 0).pvalue < 0.05 for table in tables])
    assert 0.02 < rate < 0.10
    assert plain > 0.3


def test_a_real_difference_is_found() -> None:
    found = [corrected(simulated(seed, gain=0.6)).outcome for seed in range(40)]
    assert found.count("better") > 30
    assert "worse" not in found


def test_it_is_the_t_test_with_a_wider_variance() -> None:
    values = [0.01, 0.03, 0.02, 0.05]
    plain = stats.ttest_1samp(values, 0)
    found = corrected(values, 0.0)
    assert found.p == pytest.approx(plain.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(plain.confidence_interval()))
    wider = corrected(values, 0.25)
    assert wider.high - wider.mean == pytest.approx((found.high - found.mean) * np.sqrt(0.5 / 0.25))


def test_few_missing_and_equal_values() -> None:
    assert corrected([]).outcome == corrected([0.3]).outcome == corrected([0.3, np.nan]).outcome == "unknown"
    assert corrected([0.1, np.nan, 0.1]) == (pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1), 0.0, 2)
    assert corrected([0.0, 0.0]).outcome == "unclear"
    assert corrected([-0.1, -0.1]).outcome == "worse"
