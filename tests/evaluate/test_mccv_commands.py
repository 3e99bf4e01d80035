import re

import numpy as np
import pandas as pd
import pytest

from hpcssl.cli.main import main


@pytest.fixture
def table(tmp_path, write_features):
    rng = np.random.default_rng(0)
    slides = [f"s{i:02d}" for i in range(20)]
    write_features("uni", slides, lambda i: rng.normal(size=(3, 4)))
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
    rounded = (*bench[:-2], table / "rounded", "--allow-missing", "--precision", "bf16")
    assert run(*rounded, "--preset", "mccv-demo", "--epochs", "1", "--threads", "1") == 0
    losses = pd.read_csv(table / "rounded" / "results.csv").query("metric == 'val_loss'")["value"]
    assert run(*bench, "--preset", "mccv-demo", "--epochs", "1", "--threads", "1") == 0
    exact = pd.read_csv(table / "out" / "results.csv").query("metric == 'val_loss'")["value"]
    assert 0 < np.abs(losses - exact).max() < 0.02
    assert re.search(r"breast\W+0\.\d{3} \(0\.\d{3}–0\.\d{3}\)\W+–\W+2 × 2", capsys.readouterr().out)
    assert len(pd.read_csv(table / "out" / "results.csv")) == 2 * 2 * 4


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("splits --target label", "--slides is missing"),
        ("splits --slides slides.csv --target grade --out x.csv", "no column grade"),
        ("splits --slides slides.csv --target label --organ skin --out x.csv", "of organ skin"),
        ("splits check", "no FILE"),
        ("splits check gone.csv", "no such split file"),
        ("mccv --features gone --splits x.csv --out o", "gone: no such folder"),
        ("mccv --features uni --splits x.csv --out o --only 7", "expected split=K,replica=R"),
        ("mccv --features uni --splits x.csv --out o --preset gma", "preset gma"),
    ],
)
def test_a_users_error_is_one_line(table, capsys, monkeypatch, command, message):
    monkeypatch.chdir(table)
    assert run(*command.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_without_patients_the_user_is_told_what_that_means(table, capsys):
    frame = pd.read_csv(table / "slides.csv", dtype=str)
    patients = [f"p{i}" for i in range(20)]
    told = "of 20 slides have no patient_id, so each is a group of its own; where several slides show one patient"
    for column, alone in ((None, 20), ([""] * 20, 20), (["", *patients[1:]], 1), (patients, 0)):
        given = frame.drop(columns="patient_id") if column is None else frame.assign(patient_id=column)
        given.to_csv(table / "given.csv", index=False)
        drawn = ("--slides", table / "given.csv", "--target", "label", "--num", "2", "--out", table / "x.csv")
        for command in (("splits", *drawn), ("splits", "check", table / "x.csv")):
            assert run(*command) == 0
            error = capsys.readouterr().err
            assert error.startswith(f"{table / 'x.csv'}: {alone} {told}") if alone else error == ""


def test_splits_are_checked_against_the_slide_table(table, capsys):
    patients = [f"p{i // 2}" for i in range(20)]
    frame = pd.read_csv(table / "slides.csv").assign(patient_id=patients, label=["a", "a", "b", "b"] * 5)
    frame.to_csv(table / "slides.csv", index=False)
    drawn = ("splits", "--slides", table / "slides.csv", "--target", "label", "--num", "2")
    assert run(*drawn, "--out", table / "all.csv") == 0
    check = ("splits", "check", table / "all.csv", "--slides", table / "slides.csv", "--target", "label")
    assert run(*check) == 0
    assert "no patient_id on both sides" in capsys.readouterr().out
    good = pd.read_csv(table / "all.csv", dtype=str)

    def refused(changed, *more):
        changed.to_csv(table / "all.csv", index=False)
        assert run(*check, *more) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        return told

    always_train = good[(good[["mccv1", "mccv2"]] == "train").all(axis=1)]["slide"].iloc[:2]
    lacking = refused(good[~good["slide"].isin(always_train)])
    assert f"the splits lack {', '.join(always_train)}, which have a label (2 slides)" in lacking
    assert "the slide table lacks s99 (1 of 20 slides)" in refused(good.replace({"slide": {"s05": "s99"}}))
    one = good["slide"] == always_train.iloc[0]
    was = good["target"][one].iloc[0]
    now = {"a": "b", "b": "a"}[was]
    told = refused(good.assign(target=good["target"].mask(one, now)))
    assert f"has target {now} in the splits, target {was} in the slide table (1 such slides)" in told
    elsewhere = good.assign(patient_id=["", "q", *good["patient_id"][2:]])  # a blank says nothing else
    assert "slide s01 has patient_id q in the splits, patient_id p0 in the slide table" in refused(elsewhere)
    leaking = good.assign(mccv1=good["mccv1"].mask(one, "val")).drop(columns="patient_id")
    assert f"patient_id {good['patient_id'][one].iloc[0]} is on both sides of mccv1" in refused(leaking)
    assert "no column site (--group)" in refused(good, "--group", "site")
    good.to_csv(table / "all.csv", index=False)
    assert run("splits", "check", table / "all.csv", "--slides", table / "slides.csv") == 0
    assert run(*drawn, "--out", table / "new.csv", "--group", "typo") == 2
    assert "no column typo (--group)" in capsys.readouterr().err
    assert not (table / "new.csv").exists()
    good.drop(columns="patient_id").to_csv(table / "bare.csv", index=False)
    for file, group in (("all.csv", "typo"), ("bare.csv", "patient_id")):
        assert run("splits", "check", table / file, "--group", group) == 2
        assert f"no column {group}" in capsys.readouterr().err
    assert run("splits", "check", table / "bare.csv") == 0
