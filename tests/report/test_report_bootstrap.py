import numpy as np
import pytest

from hpcssl.report.bootstrap import mean_interval


def test_interval_agrees_with_the_standard_error() -> None:
    values = np.random.default_rng(0).normal(0.8, 0.05, (200, 1))
    mean, low, high = mean_interval(values, "task")
    half = 1.96 * values.std() / np.sqrt(200)
    assert mean[0] == pytest.approx(values.mean())
    assert (mean - low)[0] == pytest.approx(half, rel=0.12)
    assert (high - mean)[0] == pytest.approx(half, rel=0.12)


def test_it_is_a_function_of_the_purpose() -> None:
    values = np.random.default_rng(0).normal(size=(20, 1))
    assert mean_interval(values, "lung")[1] == mean_interval(values.copy(), "lung")[1]
    assert mean_interval(values, "lung")[1] != mean_interval(values, "breast")[1]


def test_all_columns_share_their_resamples() -> None:
    column = np.random.default_rng(0).normal(size=20)
    _, low, high = mean_interval(np.stack([column, column + 1, -column], axis=1), "x")
    assert low[1] - low[0] == pytest.approx(1)
    assert low[2] == pytest.approx(-high[0])


def test_splits_without_a_value_are_left_out() -> None:
    values = np.random.default_rng(0).normal(size=(10, 1))
    with_gap = np.concatenate([values[:4], [[np.nan]], values[4:]])
    np.testing.assert_array_equal(mean_interval(with_gap, "x"), mean_interval(values, "x"))


def test_no_interval_from_one_split() -> None:
    assert [np.isnan(v[0]) for v in mean_interval([[0.7]], "x")] == [False, True, True]
    mean, low, high = mean_interval([[0.7, 0.1], [np.nan, 0.2]], "x")
    assert np.isnan(low).tolist() == np.isnan(high).tolist() == [True, False]
    assert np.isnan(mean_interval([[np.nan]], "x")[0][0])
