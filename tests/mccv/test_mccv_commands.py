import re

import numpy as np
import pandas as pd
import pytest

from hpcssl.cli.main import main
from hpcssl.features.files import write_slide


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    slides = [f"s{i:02d}" for i in range(20)]
    (tmp_path / "uni").mkdir()
    for slide in slides:
        write_slide(tmp_path / "uni" / f"{slide}.h5", rng.normal(size=(3, 4)), np.zeros((3, 2)))
    frame = pd.DataFrame({"slide_id": slides, "organ": ["breast"] * 16 + ["lung"] * 4, "num_tiles": 3})
    frame.assign(label=["a", "b"] * 10, patient_id="").to_csv(tmp_path / "slides.csv", index=False)
    return tmp_path


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_splits_then_benchmark(table, capsys):
    drawn = ("splits", "--slides", table / "slides.csv", "--target", "label", "--organ", "breast", "--num", "2")
    assert run(*drawn, "--out", table / "breast.csv") == 0
    assert "2 splits of 16 slides (a 8, b 8), 12 in train" in capsys.readouterr().out
    assert run("splits", "check", table / "breast.csv", "--features", table / "uni") == 0
    assert "no patient_id on both sides" in capsys.readouterr().out
    bench = ("mccv", "--features", table / "uni", "--splits", table / "breast.csv", "--out", table / "out")
    assert run(*bench) == 2
    assert "features of s16, s17, s18, s19 without a row in the splits (4 of 20 slides)" in capsys.readouterr().err
    bench += ("--allow-missing",)
    assert run(*bench, "--preset", "mccv-demo", "--epochs", "1", "--threads", "1") == 0
    assert re.search(r"breast\W+0\.\d{3} \(0\.\d{3}–0\.\d{3}\)\W+–\W+2 × 2", capsys.readouterr().out)
    assert len(pd.read_csv(table / "out" / "results.csv")) == 2 * 2 * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["splits", "--target", "label"], "--slides is missing"),
        (["splits", "--slides", "slides.csv", "--target", "grade", "--out", "x.csv"], "no column grade"),
        (
            ["splits", "--slides", "slides.csv", "--target", "label", "--organ", "skin", "--out", "x.csv"],
            "of organ skin",
        ),
        (["splits", "check"], "no FILE"),
        (["splits", "check", "gone.csv"], "no such split file"),
        (["mccv", "--features", "gone", "--splits", "x.csv", "--out", "o"], "gone: no such folder"),
        (["mccv", "--features", "uni", "--splits", "x.csv", "--out", "o", "--only", "7"], "expected split=K,replica=R"),
        (["mccv", "--features", "uni", "--splits", "x.csv", "--out", "o", "--preset", "gma"], "preset gma"),
    ],
)
def test_a_users_error_is_one_line(table, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(table)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_named_group_column_must_be_there(table, capsys):
    drawn = ("splits", "--slides", table / "slides.csv", "--target", "label", "--out", table / "all.csv")
    assert run(*drawn, "--group", "typo") == 2
    assert "no column typo (--group)" in capsys.readouterr().err
    assert not (table / "all.csv").exists()
    assert run(*drawn) == 0
    assert run("splits", "check", table / "all.csv", "--group", "typo") == 2
    assert "no column typo" in capsys.readouterr().err
    pd.read_csv(table / "all.csv").drop(columns="patient_id").to_csv(table / "bare.csv", index=False)
    assert run("splits", "check", table / "bare.csv", "--group", "patient_id") == 2
    assert "no column patient_id (--group)" in capsys.readouterr().err
    assert run("splits", "check", table / "bare.csv") == 0
