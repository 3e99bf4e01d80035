import numpy as np
import pandas as pd
import pytest

from hpcssl.evaluate.results import COLUMNS, check_rows
from hpcssl.report.arms import Arm, ReportError, replicas_with_value, split_matrices
from hpcssl.report.summary import summarise, verdict, verdict_text


def test_the_last_epoch_counts_never_the_best_nor_an_earlier_one_in_its_place(make_results) -> None:
    results = make_results({("lung", "vit", "0"): 0.7}, epochs=3)
    auc = results["metric"] == "auc"
    results.loc[auc, "value"] = results.loc[auc, "epoch"].map({1: 0.6, 2: 0.9, 3: 0.7})
    row = summarise(results).iloc[0]
    assert row["score"] == pytest.approx(0.7)
    assert (row["last_epoch"], row["splits"], row["replicas"]) == (3, 20, 2)
    last = auc & (results["epoch"] == 3)
    results.loc[last & (results["split"] == 1), "value"] = np.nan
    assert summarise(results).iloc[0]["splits"] == 19
    results.loc[last, "value"] = np.nan
    row = summarise(results).iloc[0]
    assert np.isnan(row["score"])
    assert row["splits"] == row["replicas"] == 0


def test_differences_are_paired_over_the_splits(make_results, demo_levels) -> None:
    summary = summarise(make_results(demo_levels)).set_index(["task", "checkpoint"])
    row = summary.loc[("lung", "200")]
    assert row["difference"] == pytest.approx(0.1, abs=0.005)
    assert row["difference"] == pytest.approx(row["score"] - summary.loc[("lung", "0"), "score"])
    # splits move the AUC by 0.03, both arms alike: the paired interval, though corrected, is narrower than the AUC's
    assert row["difference_high"] - row["difference_low"] < 0.5 * (row["score_high"] - row["score_low"])
    assert np.isnan(summary.loc[("lung", "0"), "difference"])
    results = make_results(demo_levels)
    dropped = (results["task"] == "lung") & (results["checkpoint"] == "200") & (results["split"] > 15)
    row = summarise(results[~dropped]).set_index(["task", "checkpoint"]).loc[("lung", "200")]
    assert row["paired_splits"] == 15
    assert row["difference"] == pytest.approx(0.1, abs=0.005)


def test_the_order_of_the_rows_is_nothing_and_results_without_an_auc_are_refused(make_results, demo_levels) -> None:
    results = make_results(demo_levels)
    shuffled = results.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(summarise(results), summarise(shuffled))
    with pytest.raises(ReportError, match="auc"):
        summarise(results[results["metric"] != "auc"])


def test_the_verdict_is_about_the_last_checkpoint_against_untrained_weights(make_results) -> None:
    levels = {("lung", "vit", "0"): 0.7, ("lung", "vit", "900"): 0.9, ("lung", "vit", "1000"): 0.6}
    summary = summarise(make_results(levels | {("lung", "resnet50", ""): 0.6}))
    assert summary.loc[summary["encoder"] == "resnet50", "difference"].isna().all()
    (_,) = verdict(summary)
    text = verdict_text(summary)
    assert "on 0 of 1 task; on 1 it fell behind them" in text
    assert "after step 1,000" in text
    assert "worse than untrained" in text
    assert "nothing to compare" in verdict_text(summary[summary["checkpoint"] != "0"])


def test_the_verdict_tells_a_gain_from_none_and_one_split_decides_nothing(make_results, demo_levels) -> None:
    [(overall, tasks)] = verdict(summarise(make_results(demo_levels)))
    assert "beat the untrained weights on 1 of 2 tasks; on 1 the interval of the difference includes zero" in overall
    assert tasks[0].startswith("breast:")
    assert "includes zero" in tasks[0]
    assert "after step 200" in tasks[1]
    assert tasks[1].endswith("better than untrained.")
    text = verdict_text(summarise(make_results(demo_levels, splits=1)))
    assert "on 0 of 2 tasks; on 2 there are too few values to say" in text
    assert "better" not in text


def test_arms_come_in_the_order_of_their_steps(make_results) -> None:
    names = ["1000", "200", "0", "final"]
    results = check_rows(make_results({("t", "e", name): 0.7 for name in names} | {("t", "a", ""): 0.6}, splits=2))
    assert [arm.checkpoint for arm in split_matrices(results, "auc")] == ["", "0", "200", "1000", "final"]


def test_replicas_are_averaged_within_their_split_first() -> None:
    rows = [("t", "e", "0", 1, r, 1, "auc", 0.9) for r in range(3)] + [("t", "e", "0", 2, 1, 1, "auc", 0.5)]
    results = check_rows(pd.DataFrame(rows, columns=list(COLUMNS)))
    matrix = split_matrices(results, "auc")[Arm("t", "e", "0")]
    assert matrix[1].tolist() == pytest.approx([0.9, 0.5])
    assert replicas_with_value(results).tolist() == [3, 1]
