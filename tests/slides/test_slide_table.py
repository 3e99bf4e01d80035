"""The slide table: what is accepted, what is refused and how it is told, groups and the digest."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from hpcssl.core.errors import SlideError
from hpcssl.slides.slide_table import check_slides, digest_slides, group_keys, read_slides

HEADER = "slide_id,organ,num_tiles,patient_id,label\n"
ROWS = "001,lung,5,p1,NA\n1e3,breast,007,,null\nTCGA-ü 1,lung,12,p1,\n"


def table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "slides.csv"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(SlideError) as caught:
        read_slides(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message


def as_parquet(csv: Path) -> Path:
    path = csv.with_suffix(".parquet")
    frame = pd.read_csv(csv, dtype=str, keep_default_na=False)
    frame.assign(num_tiles=frame["num_tiles"].astype(int)).to_parquet(path, index=False)
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_ids_stay_text_and_every_column_is_carried(tmp_path, kind):
    path = table(tmp_path, HEADER + ROWS)
    frame = read_slides(path if kind == "csv" else as_parquet(path))
    assert frame.columns.tolist() == ["slide_id", "organ", "num_tiles", "patient_id", "label"]
    assert frame["slide_id"].tolist() == ["001", "1e3", "TCGA-ü 1"]
    assert frame["num_tiles"].tolist() == [5, 7, 12]
    assert frame["num_tiles"].dtype == "int64"
    assert frame["patient_id"].tolist() == ["p1", "", "p1"]
    assert frame["label"].tolist() == ["NA", "null", ""], "words that pandas takes for missing are labels here"
    assert frame.index.tolist() == [0, 1, 2]


def test_parquet_with_missing_values_and_numbers(tmp_path):
    path = tmp_path / "slides.parquet"
    columns = {"slide_id": [7, 8], "organ": ["lung", "lung"], "num_tiles": [3.0, 4.0], "patient_id": ["p", None]}
    pd.DataFrame(columns | {"age": [61.0, None]}).to_parquet(path)
    frame = read_slides(path)
    assert frame["slide_id"].tolist() == ["7", "8"]
    assert frame["num_tiles"].tolist() == [3, 4]
    assert frame["patient_id"].tolist() == ["p", ""]
    assert frame["age"].tolist() == ["61", ""]


@pytest.mark.parametrize("column", ["slide_id", "organ", "num_tiles"])
def test_a_missing_column_is_named(tmp_path, column):
    csv = table(tmp_path, (HEADER + ROWS).replace(column, "other", 1))
    assert f"no column {column}; " in refusal(csv)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("a,lung,5,,\nb,lung,5,,\na,colon,6,,\n", "slide id a stands in it more than once"),
        ("a,lung,5,,\n,lung,5,,\n", "row 2 has no slide_id"),
        ("a,lung,5,,\n  ,lung,5,,\n", "row 2 has no slide_id"),
        ("a,,5,,\n", "row 1 has no organ"),
        ("", "no slides"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, told):
    assert told in refusal(table(tmp_path, HEADER + rows))


@pytest.mark.parametrize("count", ["0", "-3", "2.5", "", "many", "inf", "nan", "0x10", "5 6", "1e-3", "True", "1e30"])
def test_a_count_that_is_no_positive_integer_is_refused(tmp_path, count):
    message = refusal(table(tmp_path, f"{HEADER}a,lung,5,,\nb,lung,{count},,\nc,lung,{count},,\n"))
    assert f"slide b has num_tiles {count!r}; expected a positive integer below 2^31 (2 such rows)" in message


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x01", b'"a,b\n', b"PK\x03\x04 not text"])
@pytest.mark.parametrize("name", ["slides.csv", "slides.parquet"])
def test_what_is_no_table_is_told_in_one_line(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    refusal(path)


def test_no_file_is_told(tmp_path):
    assert "no such slide table" in refusal(tmp_path / "absent.csv")
    assert "no such slide table" in refusal(tmp_path / "absent.parquet")


def test_a_byte_order_mark_and_quotes_are_read(tmp_path):
    text = '\ufeffslide_id,organ,num_tiles\r\n"a, b","lung ""x""",5\r\n'
    frame = read_slides(table(tmp_path, text))
    assert frame.loc[0].tolist() == ["a, b", 'lung "x"', 5]


def test_a_short_row_has_blanks(tmp_path):
    frame = read_slides(table(tmp_path, HEADER + "a,lung,5\nb,lung,6\n"))
    assert frame["patient_id"].tolist() == ["", ""]
    assert group_keys(frame, "patient_id").nunique() == 2


def test_rows_longer_than_the_header_are_refused(tmp_path):
    path = table(tmp_path, "slide_id,organ,num_tiles\na,1,5,7\nb,2,5,8\n")
    assert "its rows have more fields than its header" in refusal(path)


def test_a_blank_patient_is_a_group_of_its_own():
    frame = pd.DataFrame({"slide_id": list("abcde"), "patient_id": ["p", "", "p", "", "a"]})
    keys = group_keys(frame, "patient_id")
    assert keys[0] == keys[2]
    assert keys.nunique() == 4, "p, slide b, slide d, and patient a, who is not slide a"
    with pytest.raises(SlideError, match="no column case_id; it has slide_id, patient_id"):
        group_keys(frame, "case_id")


@pytest.mark.parametrize("patients", [[" ", " "], ["", "slide b"]])
def test_a_patient_of_spaces_or_named_as_a_blank_slides_group_is_none_of_it(patients):
    frame = pd.DataFrame({"slide_id": ["b", "a"], "patient_id": patients})
    assert group_keys(frame, "patient_id").nunique() == 2


def test_the_digest_is_of_the_three_columns_in_order(tmp_path):
    frame = read_slides(table(tmp_path, HEADER + ROWS))
    digest = digest_slides(frame)
    assert digest == digest_slides(frame.assign(label="other", age="3"))
    assert digest == digest_slides(frame[["num_tiles", "slide_id", "organ"]])
    assert digest == digest_slides(read_slides(as_parquet(tmp_path / "slides.csv"))), "CSV or Parquet"
    for changed in (
        frame.iloc[::-1],
        frame.iloc[:-1],
        frame.assign(num_tiles=[5, 7, 13]),
        frame.assign(organ=["lung", "lung", "breast"]),
        frame.assign(slide_id=["1", "1e3", "TCGA-ü 1"]),
    ):
        assert digest_slides(changed) != digest
    golden = "2726883b156998e50047148b270364f711dd3de38d93be52a1e0c8a3bebfbc2f"
    assert digest == golden, "stores in use depend on it"


def test_checked_tables_are_checked_again_without_change(tmp_path):
    frame = read_slides(table(tmp_path, HEADER + ROWS))
    pd.testing.assert_frame_equal(check_slides(frame, where="again"), frame)
