from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hpcssl.evaluate.results import ResultsError, check_rows, file_name, read_results, read_rows

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
    with pytest.raises(ResultsError, match=r"no results\.csv"):
        read_results(tmp_path)
    with pytest.raises(ResultsError) as caught:
        read_results(written(tmp_path, text))
    assert expected in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_missing_values_are_kept_as_nan(tmp_path: Path) -> None:
    rows = "".join(f"lung,vit,0,{split},1,1,auc,{v}\n" for split, v in enumerate(["", "nan", "NaN", "inf", "0.5"]))
    values = read_results(written(tmp_path, HEADER + rows))["value"]
    assert values.isna().tolist() == [True, True, True, True, False]
    (tmp_path / "part.csv").write_text(HEADER + "breast,uni,,1,1,1,auc,\nbreast,uni,,1,1,1,accuracy,0.5\n")
    table = read_rows(tmp_path / "part.csv")
    assert table["value"].dtype == float
    assert table["value"].isna().tolist() == [True, False]


def test_file_names_are_safe() -> None:
    assert file_name("../../etc") == "-..-etc"
    assert file_name("x" * 300) != file_name("x" * 299 + "y")
    assert len(file_name("x" * 300)) < 80


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
    assert check_rows(pd.DataFrame({**rest, "checkpoint": column}))["checkpoint"].tolist() == expected
