import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from hpcssl.cli.main import main
from hpcssl.cli.report_command import format_table
from hpcssl.pipelines.report import sort_inputs
from hpcssl.report.summary import summarise


def test_the_command_tells_folders_apart_in_any_order(tmp_path: Path, capsys, inputs, make_run) -> None:
    (run,), other, out = inputs.runs, make_run("other"), tmp_path / "out"
    folders = [other, inputs.schedule, inputs.results, run, other]
    assert sort_inputs(folders) == replace(inputs, runs=(other, run))
    assert main(["report", *map(str, folders), "--out", str(out), "--title", "Mine"]) == 0
    printed = capsys.readouterr().out
    assert "on 1 of 2 tasks" in printed
    assert "untrained" in printed
    assert str(out / "report.html") in printed
    assert "<title>Mine</title>" in (out / "report.html").read_text(encoding="utf-8")


def refused(capsys, *arguments: str | Path) -> str:
    assert main(["report", *map(str, arguments)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "Traceback" not in told
    return told


def test_bad_input_is_told_in_one_line(tmp_path: Path, capsys, make_results, write_results, demo_levels) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert "neither results" in refused(capsys, tmp_path / "empty", "--out", out)
    assert "no such folder" in refused(capsys, tmp_path / "nowhere", "--out", out)
    frame = make_results(demo_levels, splits=2)
    good, twin = write_results(frame), write_results(frame, "twin")
    assert "a file" in refused(capsys, good / "results.csv", "--out", out)
    assert "both hold results.csv" in refused(capsys, good, twin, "--out", out)
    lacking = write_results(frame.drop(columns="split"), "lacking")
    assert "no column split" in refused(capsys, lacking, "--out", out)
    (good / "results.csv").write_text("")
    assert "is empty" in refused(capsys, good, "--out", out)
    (good / "results.csv").unlink()
    (good / "parts").mkdir()
    assert "not finished" in refused(capsys, good, "--out", out)
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    assert "no steps" in refused(capsys, tmp_path / "empty", "--out", out)
    assert not out.exists()


def printed_table(frame, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(format_table(summarise(frame)))
    return console.export_text()


@pytest.mark.parametrize("name", ["vit", "[red]vit[/red]"])
def test_the_closing_table_shows_every_row(make_results, name: str) -> None:
    levels = {(task, name, step): 0.7 for task in ("breast", "lung") for step in ("0", "1500")}
    text = printed_table(make_results(levels), 80)
    assert text.count(name) == 1
    assert text.count("1,500") == 2
    assert text.count("20 × 2") == 4
    text = printed_table(make_results(levels | {("lung", "resnet50", ""): 0.6}), 140)
    assert text.count(name) == 4


def test_no_number_is_cut_off_on_a_narrow_terminal(make_results, demo_levels) -> None:
    long = {("lung", "an-encoder-with-a-rather-long-name", step): 0.7 for step in ("0", "100")}
    for levels in (demo_levels, demo_levels | long):
        summary = summarise(make_results(levels))
        text = printed_table(make_results(levels), 80)
        assert "…" not in text
        assert text.count("20 × 2") == len(summary)
        for value in summary[["score", "score_low", "score_high", "difference_high"]].stack().dropna():
            assert f"{value:.3f}" in text
