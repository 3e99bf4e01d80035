from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hpcssl.report.results import Arm, ReportError, checked, read_results, replicas_with_value, split_matrices

HEADER = "task,encoder,checkpoint,split,replica,epoch,metric,value\n"
ROW = "lung,vit,0,1,1,1,auc,0.8\n"


def written(folder: Path, text: str | bytes) -> Path:
    (folder / "results.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        (HEADER, "no rows"),
        ("task,encoder,split,replica,epoch,metric\nlung,vit,1,1,1,auc\n", "no column checkpoint, value"),
        (HEADER + ROW + "lung,vit,0,1,1,2,auc,high\n", "value: 'high' in row 2"),
        (HEADER + "lung,vit,0,1,1,1.5,auc,0.8\n", "whole number"),
        (HEADER + ROW + ROW, "comes twice"),
        (b"\xff\xfe\x00\x81", "not a CSV"),
        (HEADER + ROW + "lung,vit,0,1,1,1,auc,0.8,extra,extra\n", "not a CSV"),
    ],
)
def test_bad_results_are_told_in_one_line(tmp_path: Path, text: str | bytes, expected: str) -> None:
    with pytest.raises(ReportError) as caught:
        read_results(written(tmp_path, text))
    assert expected in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_no_results_file(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"no results\.csv"):
        read_results(tmp_path)


def test_missing_values_are_kept_as_nan(tmp_path: Path) -> None:
    rows = "".join(f"lung,vit,0,{split},1,1,auc,{v}\n" for split, v in enumerate(["", "nan", "NaN", "inf", "0.5"]))
    values = read_results(written(tmp_path, HEADER + rows))["value"]
    assert values.isna().tolist() == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pd.Series([0, 100]), ["0", "100"]),
        (pd.Series([np.nan, 100.0]), ["", "100"]),
        (pd.Series(["", "000100"]), ["", "100"]),
        (pd.Series(["0", "final"]), ["0", "final"]),
    ],
)
def test_checkpoints_are_names_whatever_pandas_made_of_them(column: pd.Series, expected: list[str]) -> None:
    rest = {"task": "t", "encoder": "e", "split": 1, "replica": 1, "epoch": 1, "metric": "auc", "value": 0.5}
    assert checked(pd.DataFrame({**rest, "checkpoint": column}))["checkpoint"].tolist() == expected


def test_arms_come_in_the_order_of_their_steps(make_results) -> None:
    names = ["1000", "200", "0", "final"]
    results = checked(make_results({("t", "e", name): 0.7 for name in names} | {("t", "a", ""): 0.6}, splits=2))
    assert [arm.checkpoint for arm in split_matrices(results, "auc")] == ["", "0", "200", "1000", "final"]


def test_replicas_are_averaged_within_their_split_first() -> None:
    rows = [("t", "e", "0", 1, r, 1, "auc", v) for r, v in enumerate((0.9, 0.9, 0.9))] + [
        ("t", "e", "0", 2, 1, 1, "auc", 0.5)
    ]
    results = checked(pd.DataFrame(rows, columns=HEADER.strip().split(",")))
    matrix = split_matrices(results, "auc")[Arm("t", "e", "0")]
    assert matrix[1].tolist() == pytest.approx([0.9, 0.5])
    assert replicas_with_value(results).tolist() == [3, 1]
