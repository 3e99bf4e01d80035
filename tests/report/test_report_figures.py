import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from hpcssl.evaluate.results import check_rows
from hpcssl.report import checkpoints, curves, schedules, style, training
from hpcssl.report.arms import Arm, ReportError
from hpcssl.report.summary import summarise

SIX = ["BCa detection", "IBD detection", "BCa ER prediction", "lung EGFR", "lung EGFR MSKCC", "immunotherapy outcome"]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures as they were painted, in the order of their painting."""
    seen: list[Figure] = []
    original = style.draw

    def keeping(height, paint):
        def painted(figure):
            paint(figure)
            seen.append(figure)

        return original(height, painted)

    for module in (checkpoints, curves, schedules, training):
        monkeypatch.setattr(module, "draw", keeping)
    return seen


def overlapping(axes) -> int:
    """Count neighbours among the x-axis's upright tick labels that overlap."""
    axes.figure.canvas.draw()
    labels = [label for label in axes.get_xticklabels() if label.get_text()]
    return sum(a.get_window_extent().overlaps(b.get_window_extent()) for a, b in pairwise(labels))


def test_the_three_axes_of_the_training_curve_agree(figures, make_run) -> None:
    loss, settings = training.training_charts([make_run(steps=60, batch=64, per_pseudo_epoch=1920)])
    second = {child.get_xlabel(): child for child in figures[0].axes[0].child_axes}
    figures[0].canvas.draw()
    left, right = figures[0].axes[0].get_xlim()
    per_pseudo_epoch = {"steps": 30, "ImageNet epochs": 1920 / 1_281_167}
    assert set(second) == set(per_pseudo_epoch)
    for label, factor in per_pseudo_epoch.items():
        assert second[label].get_xlim() == pytest.approx((left * factor, right * factor))
        box = second[label].get_tightbbox()
        assert box.y0 > 0, "the axis lies outside the picture"
    assert loss.table["imagenet_epoch"].iloc[-1] == pytest.approx(60 * 64 / 1_281_167)
    assert {"lr", "weight_decay", "momentum"} <= set(settings.table)


def test_a_long_run_is_thinned_and_keeps_its_last_step(monkeypatch, tmp_path) -> None:
    steps = np.arange(1, 100_001)
    columns = {"step": steps, "samples_seen": steps * 1080, "pseudo_epoch": steps / 60_185, "loss": 1.0 / steps}
    frame = pd.DataFrame(columns)
    monkeypatch.setattr(training, "read_metrics", lambda run: frame)
    table = training.training_charts([tmp_path])[0].table
    assert len(table) <= 4000
    assert table["step"].iloc[-1] == 100_000


def test_runs_of_one_name_of_one_step_and_without_momentum_or_loss(make_run) -> None:
    runs = [make_run("a/run", steps=1, drop=["momentum"]), make_run("b/run", drop=["momentum"])]
    loss, settings = training.training_charts(runs)
    assert list(loss.table["run"].unique()) == ["a/run", "b/run"]
    assert "momentum" not in settings.table
    with pytest.raises(ReportError, match="lack loss"):
        training.training_charts([make_run(drop=["loss"])])


def test_organ_shares(figures, schedule: Path) -> None:
    part = schedules.organ_shares_chart(schedule)
    widths = [[bar.get_width() for bar in bars] for bars in figures[0].axes[0].containers]
    np.testing.assert_allclose(widths, [[90, 10], [60, 40]])
    assert "90.0%" in part.alt
    assert "60.0%" in part.alt


def test_the_curves_show_mean_and_interval_and_say_what_is_missing(figures, make_results, demo_levels) -> None:
    results = check_rows(make_results(demo_levels))
    breast, lung = curves.curve_charts(results)
    assert (breast.name, lung.name) == ("curves_breast", "curves_lung")
    rows = lung.table.query("metric == 'auc' and checkpoint == '200'")
    same = results.query("task == 'lung' and metric == 'auc' and checkpoint == '200'")
    np.testing.assert_allclose(rows["mean"], same.groupby("epoch")["value"].mean())
    assert ((rows["low"] < rows["mean"]) & (rows["mean"] < rows["high"])).all()
    auc = next(axes for axes in figures[1].axes if axes.get_title() == "validation AUC")
    np.testing.assert_allclose(auc.lines[2].get_ydata(), rows["mean"])
    assert len(auc.collections) == 3
    assert "narrower than the uncertainty of the AUC" in lung.caption
    results.loc[(results["metric"] == "auc") & (results["split"] == "4"), "value"] = np.nan
    assert "19 of 20" in curves.curve_charts(results)[0].caption


def test_twelve_checkpoints_on_six_tasks_stay_readable(figures, make_results) -> None:
    steps = [str(60_185 * k) for k in range(12)]
    levels = {(task, "vits16-dino", step): 0.7 + 0.01 * k for task in SIX for k, step in enumerate(steps)}
    results = check_rows(make_results(levels, replicas=1, epochs=2))
    part = checkpoints.checkpoints_chart(results, summarise(results))
    assert [axes.get_title() for axes in figures[0].axes] == sorted(SIX)
    for axes in figures[0].axes:
        assert len({label.get_text() for label in axes.get_xticklabels()}) == 12
        assert all(label.get_rotation() == 45 for label in axes.get_xticklabels())
    assert len(part.table) == 6 * 12 * 20
    curves.curve_charts(results)
    legend = figures[1].axes[-1].get_legend()
    assert len({text.get_text() for text in legend.get_texts()}) == 12
    figures[1].canvas.draw()
    box, panels = legend.get_window_extent(), [axes.get_tightbbox() for axes in figures[1].axes[:3]]
    assert not any(box.overlaps(panel) for panel in panels)
    assert len({look.colour for look in style.looks([Arm("t", "vits16-dino", s) for s in steps]).values()}) == 12


def test_few_checkpoints_have_upright_labels_that_do_not_touch(figures, make_results, demo_levels) -> None:
    results = check_rows(make_results(demo_levels | {("lung", "resnet50", ""): 0.6}))
    checkpoints.checkpoints_chart(results, summarise(results))
    assert [overlapping(axes) for axes in figures[0].axes] == [0, 0]


def test_the_last_epoch_is_what_is_drawn(figures, make_results, demo_levels) -> None:
    results = check_rows(make_results(demo_levels))
    results.loc[(results["metric"] == "auc") & (results["epoch"] == 3), "value"] = 0.99
    part = checkpoints.checkpoints_chart(results, summarise(results))
    same = results.query("metric == 'auc' and epoch == 5 and task == 'lung' and checkpoint == '200'")
    drawn = part.table.query("task == 'lung' and checkpoint == '200'")["score"].mean()
    assert drawn == pytest.approx(same["value"].mean())
    assert "lung: untrained 0.7" in part.alt


@pytest.mark.parametrize("splits", [1, 2])
def test_few_splits_and_no_values_at_all_are_drawn(make_results, demo_levels, splits: int) -> None:
    results = make_results(demo_levels, splits=splits, epochs=1)
    results.loc[(results["task"] == "lung") & (results["metric"] == "auc"), "value"] = np.nan
    table = check_rows(results)
    assert len(curves.curve_charts(table)) == 2
    part = checkpoints.checkpoints_chart(table, summarise(table))
    assert Image.open(io.BytesIO(part.png)).format == "PNG"
    assert ("no interval" in part.caption) == (splits == 1)


def test_names_that_matplotlib_would_interpret(figures, make_results) -> None:
    levels = {("$t_1$", "_vit", "0"): 0.7, ("$t_1$", "$\\frac$", ""): 0.6}
    curves.curve_charts(check_rows(make_results(levels, splits=3, epochs=2)))
    texts = [text.get_text() for text in figures[0].axes[-1].get_legend().get_texts()]
    assert texts == ["$\\frac$", " _vit, untrained"]


def test_a_split_that_did_not_reach_the_last_epoch_has_no_replicas(make_results) -> None:
    frame = make_results({("t", "e", "0"): 0.7, ("t", "e", "10"): 0.8}, splits=3, epochs=2)
    frame = frame[~((frame["split"] == 2) & (frame["epoch"] == 2) & (frame["checkpoint"] == "10"))]
    results = check_rows(frame)
    table = checkpoints.checkpoints_chart(results, summarise(results)).table.set_index(["checkpoint", "split"])
    assert table["replicas"].tolist() == [2, 2, 2, 2, 0, 2]
    assert table["score"].isna().tolist() == [False] * 4 + [True, False]
