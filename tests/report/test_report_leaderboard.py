import numpy as np
import pandas as pd
import pytest

from hpcssl.report.formats import latex, markdown
from hpcssl.report.leaderboard import (
    cells,
    leaderboard,
    pair_verdicts,
    pairs,
    representatives,
    saturation,
    saturation_text,
)
from hpcssl.report.page import Inputs, write_report
from hpcssl.report.summary import summarise

LEVELS = {("lung", "vit_s", "0"): 0.60, ("lung", "vit_s", "100"): 0.80, ("lung", "resnet50", ""): 0.70}
LEVELS |= {("breast", "vit_s", "0"): 0.60, ("breast", "vit_s", "100"): 0.65, ("breast", "resnet50", ""): 0.65}
LEVELS |= {("skin", "vit_s", "100"): 0.60, ("skin", "resnet50", ""): 0.62}


@pytest.fixture
def results(make_results) -> pd.DataFrame:
    return make_results(LEVELS, noise=0.002)


def test_encoders_stand_by_their_last_checkpoint_the_best_first(results) -> None:
    summary = summarise(results)
    assert representatives(summary) == [("vit_s", "100"), ("resnet50", "")]
    table = leaderboard(summary)
    assert list(table.columns) == ["encoder", "checkpoint", "breast", "lung", "skin", "mean"]
    expected = summary[(summary["encoder"] == "vit_s") & (summary["checkpoint"] == "100")]["score"].mean()
    assert table.loc[0, "mean"] == pytest.approx(expected)
    assert table.loc[0, "lung"].startswith("0.8")


def test_pairs_are_compared_on_the_tasks_that_both_have_the_winner_first(results, make_results) -> None:
    table = pairs(results, summarise(results)).set_index("task")
    assert table["outcome"].to_dict() == {"breast": "unclear", "lung": "better", "skin": "worse"}
    assert table.loc["lung", "difference"] == pytest.approx(0.1, abs=0.005)
    assert pair_verdicts(table.reset_index()) == [
        "vit_s beats resnet50 on 1 of 3 tasks (1 the other way round, undecided on 1)."
    ]
    levels = {("a", "x", ""): 0.9, ("b", "x", ""): 0.4, ("c", "x", ""): 0.6}
    levels |= {("a", "y", ""): 0.5, ("b", "y", ""): 0.5, ("c", "y", ""): 0.7}
    results = make_results(levels, noise=0.001)
    assert pair_verdicts(pairs(results, summarise(results))) == ["y beats x on 2 of 3 tasks (1 the other way round)."]


def test_the_correction_takes_the_tasks_own_ratio(results) -> None:
    summary = summarise(results)
    narrow = pairs(results, summary).set_index("task").loc["lung"]
    results.attrs["val_per_train"] = {"lung": 1.0}
    wide = pairs(results, summary).set_index("task").loc["lung"]
    assert wide["high"] - wide["low"] == pytest.approx((narrow["high"] - narrow["low"]) * np.sqrt(1.05 / 0.30))


def test_saturation_is_the_first_checkpoint_not_worse_than_the_best(make_results) -> None:
    levels = {("lung", "vit", str(step)): auc for step, auc in ((0, 0.5), (100, 0.7), (200, 0.8), (400, 0.8015))}
    row = saturation(make_results(levels)).iloc[0]
    assert (row["first"], row["last"]) == ("200", "400")
    assert row["share_after"] == pytest.approx(0.5)
    assert np.isnan(row["gpu_hours_after"])
    times = pd.DataFrame({"step": [100, 200, 300, 400], "process_hours": [1.0, 2.0, 3.0, 4.5]})
    found = saturation(make_results(levels), {"vit": times}).iloc[0]
    assert found["gpu_hours_after"] == pytest.approx(2.5)
    assert "step 200 is the first that is not worse than the best" in saturation_text(found.to_dict())
    assert "50% of the training came after it, up to step 400, 2.5 GPU-hours." in saturation_text(found.to_dict())
    levels = {("lung", "vit", str(step)): auc for step, auc in ((100, 0.7), (200, 0.8), (300, 0.9))}
    row = saturation(make_results(levels)).iloc[0]
    assert (row["first"], row["best"], row["share_after"]) == ("300", "300", 0)
    assert "no early saturation" in saturation_text(row.to_dict())
    assert saturation(make_results({("lung", "vit", "0"): 0.9, ("lung", "vit", "100"): 0.8})).empty, "one is trained"


def test_markdown_and_latex(make_results) -> None:
    summary = summarise(make_results({("lung", "a|b_c", "0"): 0.7, ("lung", "r50", ""): 0.6}, splits=1))
    table = cells(leaderboard(summary))
    assert markdown(table).splitlines()[:2] == ["| encoder | checkpoint | lung | mean |", "| --- | --- | --- | --- |"]
    assert r"a\|b_c | untrained | 0.6" in markdown(table)
    text = latex(table)
    assert r"a|b\_c & untrained" in text
    assert text.splitlines()[0] == r"\begin{tabular}{llrr}"
    assert len({line.count("&") for line in text.splitlines() if "&" in line}) == 1


def test_every_table_of_the_page_is_there_as_csv_markdown_and_latex(results, write_results, tmp_path) -> None:
    out = write_report(tmp_path / "out", Inputs(results=write_results(results)), title="t").page.parent
    page = (out / "report.html").read_text(encoding="utf-8")
    for name in ("summary", "leaderboard", "pairs"):
        numbers = pd.read_csv(out / f"{name}.csv")
        shown = (out / f"{name}.md").read_text(encoding="utf-8").splitlines()
        typeset = (out / f"{name}.tex").read_text(encoding="utf-8").splitlines()
        assert len(shown) == len(numbers) + 2
        assert len(typeset) == len(numbers) + 6
        for ending in ("csv", "md", "tex"):
            assert f'href="{name}.{ending}"' in page
    assert "| lung | vit_s, 100 | resnet50 | +0.1" in (out / "pairs.md").read_text(encoding="utf-8")
    pairs_tex = (out / "pairs.tex").read_text(encoding="utf-8")
    assert r"vit\_s, 100 & resnet50 & $-$0.0" in pairs_tex
    assert r"$<$ 0.001 & first is better" in pairs_tex
    assert r"\begin{tabular}{lllrrl}" in pairs_tex
    assert r"20 $\times$ 2" in (out / "summary.tex").read_text(encoding="utf-8")


def test_values_are_judged_by_r2(make_results, write_results, tmp_path) -> None:
    aged = make_results({("age", "vit", "100"): 0.4, ("age", "r50", ""): 0.2})
    aged["metric"] = aged["metric"].replace("auc", "r2")
    results = pd.concat([aged, make_results({("lung", "vit", "100"): 0.8, ("lung", "r50", ""): 0.8})])
    summary = summarise(results)
    assert summary.set_index("task")["metric"].to_dict() == {"age": "r2", "lung": "auc"}
    table = leaderboard(summary)
    assert list(table.columns) == ["encoder", "checkpoint", "age (R²)", "lung", "mean"]
    assert table["mean"].isna().all(), "AUC and R² have no mean"
    assert table["encoder"].tolist() == ["r50", "vit"]
    out = write_report(tmp_path / "out", Inputs(results=write_results(results)), title="t").page.parent
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "vit beats r50 on 1 of 2 tasks (undecided on 1)." in page
    assert "R² or AUC (95 % interval)" in page
    for name in ("leaderboard.csv", "leaderboard.md", "leaderboard.tex", "pairs.csv", "curves_age.png"):
        assert (out / name).is_file(), name


def test_what_was_not_trained_has_no_curve(make_results, write_results, tmp_path) -> None:
    near = make_results({("lung", "vit, k-NN", "100"): 0.7}, replicas=1, epochs=1).assign(epoch=0)
    results = pd.concat([make_results({("lung", "vit", "100"): 0.8}), near[near["metric"] == "auc"]])
    out = write_report(tmp_path / "out", Inputs(results=write_results(results)), title="t").page.parent
    assert set(pd.read_csv(out / "curves_lung.csv")["encoder"]) == {"vit"}
    assert set(pd.read_csv(out / "leaderboard.csv")["encoder"]) == {"vit", "vit, k-NN"}


def test_the_order_is_that_of_the_shown_mean_and_none_comes_last(make_results) -> None:
    levels = {("lung", "a", ""): 0.95, ("lung", "b", ""): 0.6, ("lung", "c", ""): 0.7}
    levels |= {("skin", "b", ""): 0.6, ("skin", "c", ""): 0.7}
    table = leaderboard(summarise(make_results(levels)))
    assert table["encoder"].tolist() == ["c", "b", "a"]
    assert table["mean"].isna().tolist() == [False, False, True]
    assert table["skin"].iloc[2] == "–"
