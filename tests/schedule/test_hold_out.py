"""Which slides enter: hold-out lists, filters and weights; and that no tile of any other slide is ever drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hpcssl.core.errors import ScheduleError
from hpcssl.schedule.build import build_schedule
from hpcssl.schedule.builder import Builder
from hpcssl.schedule.eligible import HoldOut
from hpcssl.schedule.file import Schedule
from hpcssl.schedule.spec import ScheduleSpec, load_spec
from hpcssl.schedule.verify import verify_schedule
from hpcssl.slides.slide_table import read_slides

SMALL = ScheduleSpec(num_pseudo_epochs=4, num_groups=2, positions_per_pseudo_epoch=120, max_repeats=60)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """24 slides of two organs, three scanners and 9 patients with 2 or 3 slides each; three have no patient."""
    table = pd.DataFrame({"slide_id": [f"s{i}" for i in range(24)], "organ": ["breast", "lung"] * 12})
    table = table.assign(num_tiles=[3, 5, 7, 4] * 6, scanner=["AT2", "GT450", "P1000"] * 8)
    patients = [f"p{i % 9}" if i < 21 else "" for i in range(24)]
    return table.assign(patient_id=patients, stain=["H&E"] * 23 + ["IHC"])


@pytest.fixture
def build(tmp_path: Path, table: pd.DataFrame) -> Callable[..., Schedule]:
    """Build with a hold-out list of this text; returns the schedule, which has been verified."""

    def built(text: str = "", slides: pd.DataFrame = table, **change: Any) -> Schedule:
        if text:
            (tmp_path / "test set.csv").write_text(text, encoding="utf-8")
            change["hold_out"] = str(tmp_path / "test set.csv")
        build_schedule(replace(SMALL, **change), slides, tmp_path / "sched")
        verify_schedule(tmp_path / "sched")
        return Schedule.open(tmp_path / "sched")

    return built


def drawn(schedule: Schedule) -> set[str]:
    """Slides of which a tile is drawn, from the files alone."""
    slides = pd.read_parquet(schedule.path / "slides.parquet")
    of_tile = np.repeat(slides["slide_id"].to_numpy(object), slides["num_tiles"])
    return set(of_tile[np.concatenate([np.load(file) for file in sorted(schedule.path.glob("*.npy"))])])


def all_but(table: pd.DataFrame, *ids: str) -> set[str]:
    return set(table["slide_id"]) - set(ids)


def test_without_a_list_every_slide_is_drawn(build, table):
    schedule = build()
    assert drawn(schedule) == set(table["slide_id"])
    assert schedule.header["hold_out_sha256"] == ""
    assert not (schedule.path / "hold_out.csv").exists()


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("slide_id\ns21\ns22\n", ["s21", "s22"]),
        ("slide_id\ns0\ns9\ns18\n", ["s0", "s9", "s18"]),  # all of p0
        ("patient_id\np0\n", ["s0", "s9", "s18"]),
        ("patient_id\np8\np7\n", ["s7", "s8", "s16", "s17"]),
        ("slide_id,patient_id\ns23,p8\n", ["s8", "s17", "s23"]),
        ("slide_id,patient_id,label\ns23,,x\n,p8,y\n,,\n", ["s8", "s17", "s23"]),
        ("slide_id,patient_id\ns8,p8\ns17,p8\n", ["s8", "s17"]),
        ("slide_id\n s21 \nfrom elsewhere\n", ["s21"]),
        ("patient_id\n p8\nnobody\n", ["s8", "s17"]),
        ("\ufeffslide_id\ns21\n", ["s21"]),
    ],
)
def test_held_out_slides_are_never_drawn(build, table, text, gone):
    schedule = build(text)
    assert drawn(schedule) == all_but(table, *gone)
    slides = schedule.slides()
    assert set(slides["slide_id"][~slides["eligible"]]) == set(gone)
    assert schedule.header["spec"]["hold_out"] == "hold_out.csv", "no path of a machine"
    assert schedule.header["eligible"]["slides"] == 24 - len(gone)
    assert schedule.header["eligible"]["tiles"] == slides["num_tiles"][slides["eligible"]].sum()


def test_the_schedule_keeps_its_own_list(build, tmp_path):
    schedule = build("patient_id,slide_id,x\np8,s22,1\n,s21,2\n,s21,3\n , ,4\n")
    text = (schedule.path / "hold_out.csv").read_text()
    assert text == "slide_id,patient_id\ns21,p8\ns22,\n"
    assert HoldOut.read(schedule.path / "hold_out.csv") == HoldOut(("s21", "s22"), ("p8",))
    (tmp_path / "test set.csv").unlink()
    verify_schedule(schedule.path)


def test_the_order_of_the_list_is_no_matter(build):
    one = build("slide_id\ns22\ns21\n")
    before = {p.name: p.read_bytes() for p in one.path.iterdir()}
    two = build("patient_id,slide_id\n,s21\n,s22\n,s22\n")  # a finished schedule: accepted as the same
    assert {p.name: p.read_bytes() for p in two.path.iterdir()} == before


@pytest.mark.parametrize("text", ["slide_id\n007\n1e3\n", "slide_id\nNA\n", 'slide_id\n"a, b"\n'])
def test_names_that_look_like_something_else(tmp_path, text):
    names = ["7", "007", "1000", "1e3", "NA", "", "nan", "a, b"]
    slides = pd.DataFrame({"slide_id": names})
    (tmp_path / "test.csv").write_text(text)
    held = HoldOut.read(tmp_path / "test.csv")
    expected = {"007", "1e3"} if "007" in text else {"NA"} if "NA" in text else {"a, b"}
    assert {name for name, is_held in zip(names, held.mask(slides)) if is_held} == expected


def test_names_with_spaces_around_them_are_held_out_too(build, table):
    spaced = table.assign(
        slide_id=[f"{name} " if name == "s21" else name for name in table["slide_id"]],
        patient_id=[f" {name}" if name == "p8" else name for name in table["patient_id"]],
    )
    assert not {"s21 ", "s8", "s17"} & drawn(build("slide_id,patient_id\ns21 , p8\ns22,\n", spaced))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("slide_id\n" + "".join(f"s{i}\n" for i in range(24)), "filters and hold-out leave none of the 24 slides"),
        (
            "slide_id\ns0\n",
            "patient p0 is on both sides of the hold-out: slide s0 is held out, slide s9 is not (2 such",
        ),
        ("slide_id\ns9\ns18\n", "slide s9 is held out, slide s0 is not (1 such slides)"),
        ("slide_id,patient_id\ns1,p0\n", "patient p1 is on both sides"),
        ("slide_id\nelsewhere\nx\n", "none of its slides and patients is in the slide table (first: elsewhere)"),
        ("patient_id\nnobody\n", "none of its slides and patients is in the slide table (first: nobody)"),
        ("slide_id\nS0\n", "none of its slides"),
        ("slide_id,patient_id\n,\n ,\n", "test set.csv: names no slide and no patient"),
        ("slide_id\n", "names no slide and no patient"),
        ("slide,label\ns0,1\n", "expected a column slide_id or patient_id, found 'slide', 'label'"),
        ("slide_id\ns0,1\n", "not a CSV file"),
        ('slide_id\n"s0\n', "not a CSV file"),
    ],
)
def test_a_list_that_cannot_be_is_refused(build, tmp_path, text, told):
    with pytest.raises(ScheduleError) as caught:
        build(text)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sched").exists()


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ScheduleError, match=r"hold_out .*none\.csv: no such file"):
        HoldOut.read(tmp_path / "none.csv")
    for content in ("slide_id\nMünchen\n".encode("latin-1"), b""):
        (tmp_path / "list.csv").write_bytes(content)
        with pytest.raises(ScheduleError, match="not a CSV file"):
            HoldOut.read(tmp_path / "list.csv")


def test_a_table_without_patients(build, table, tmp_path):
    bare = table[["slide_id", "organ", "num_tiles"]]
    with pytest.raises(ScheduleError, match="hold_out names patients, but the slide table has no column patient_id"):
        build("slide_id,patient_id\ns0,p0\n", bare)
    assert drawn(build("slide_id\ns0\n", bare)) == all_but(table, "s0")


@pytest.mark.parametrize("blank", ["", " "])
def test_slides_without_a_patient_are_no_group(build, table, blank):
    slides = table.assign(patient_id=table["patient_id"].replace("", blank))
    assert drawn(build("slide_id,patient_id\ns21, \n", slides)) == all_but(table, "s21")


@pytest.mark.parametrize(
    ("change", "query"),
    [
        ({"include": {"organ": ["lung"]}}, "organ == 'lung'"),
        ({"exclude": {"organ": ["lung"]}}, "organ != 'lung'"),
        ({"include": {"scanner": ["AT2", "P1000"]}}, "scanner != 'GT450'"),
        ({"include": {"scanner": ["AT2"], "organ": ["lung"]}}, "scanner == 'AT2' and organ == 'lung'"),
        ({"exclude": {"scanner": ["AT2"], "stain": ["IHC"]}}, "scanner != 'AT2' and stain != 'IHC'"),
        (
            {"include": {"scanner": ["AT2", "GT450"]}, "exclude": {"scanner": ["GT450"], "slide_id": ["s0", "s3"]}},
            "scanner == 'AT2' and slide_id not in ('s0', 's3')",
        ),
        ({"include": {"num_tiles": ["3", "5"]}}, "num_tiles in (3, 5)"),
        ({"exclude": {"patient_id": [""]}}, "patient_id != ''"),
        (
            {"text": "patient_id\np0\n", "include": {"scanner": ["AT2", "GT450"]}, "exclude": {"organ": ["lung"]}},
            "scanner != 'P1000' and organ != 'lung' and patient_id != 'p0'",
        ),
    ],
    ids=str,
)
def test_filters_with_or_without_a_hold_out_list(build, table, change, query):
    schedule = build(**change)
    assert drawn(schedule) == set(table.query(query)["slide_id"])
    columns = {*change.get("include", ()), *change.get("exclude", ())}
    assert columns <= set(schedule.slides().columns), "verify needs them"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"include": {"scaner": ["AT2"]}}, "include.scaner: no such column in the slide table; did you mean scanner?"),
        ({"exclude": {"zzz": ["AT2"]}}, "exclude.zzz: no such column in the slide table; known: slide_id, organ"),
        ({"include": {"scanner": ["GT45"]}}, "include.scanner: no slide has scanner 'GT45'; did you mean GT450?"),
        ({"exclude": {"organ": ["lung", "Breast"]}}, "no slide has organ 'Breast'; did you mean breast?"),
        ({"exclude": {"organ": ["lung", "breast"]}}, "filters and hold-out leave none of the 24 slides"),
        ({"include": {"organ": []}}, "filters and hold-out leave none of the 24 slides"),
        ({"organ_weights": {"longue": 2}}, "organ_weights.longue: no slide of that organ enters; did you mean lung?"),
        ({"organ_weights": {"lung": 2}, "exclude": {"organ": ["lung"]}}, "organ_weights.lung: no slide of that organ"),
    ],
    ids=str,
)
def test_filters_and_weights_that_fit_nothing_are_refused(build, tmp_path, change, told):
    with pytest.raises(ScheduleError) as caught:
        build(**change)
    assert told in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_hold_out_list_counts_from_the_specs_folder(tmp_path, table, monkeypatch):
    (tmp_path / "specs" / "lists").mkdir(parents=True)
    spec_file = tmp_path / "specs" / "mine.yaml"
    spec_file.write_text(
        "num_pseudo_epochs: 2\nnum_groups: 2\npositions_per_pseudo_epoch: 120\nmax_repeats: 60\n"
        "hold_out: lists/test.csv\nexclude: {scanner: [P1000]}\norgan_weights: {lung: 2}\n"
    )
    (tmp_path / "specs/lists/test.csv").write_text("slide_id\ns21\n")
    (tmp_path / "here.csv").write_text("slide_id\ns22\n")
    monkeypatch.chdir(tmp_path)
    for given, overrides, gone in (
        ("specs/mine.yaml", [], "s21"),
        (str(spec_file), [], "s21"),
        ("specs/mine.yaml", ["hold_out=here.csv"], "s22"),
        ("specs/mine.yaml", [f"hold_out={tmp_path / 'here.csv'}"], "s22"),
        ("specs/mine.yaml", ["hold_out=''"], None),
    ):
        out = tmp_path / "out" / f"{len(list(tmp_path.glob('out/*')))}"
        build_schedule(load_spec(given, overrides), table, out)
        kept = table["slide_id"][(table["scanner"] != "P1000") & (table["slide_id"] != gone)]
        assert drawn(Schedule.open(out)) == set(kept), (given, overrides)
    spec_file.write_text(spec_file.read_text().replace("lists/test.csv", str(tmp_path / "here.csv")))
    assert load_spec(str(spec_file)).hold_out == str(tmp_path / "here.csv")
    spec_file.write_text("hold_out: here.csv\n")
    with pytest.raises(ScheduleError, match=r"specs/here\.csv: no such file"):
        build_schedule(load_spec("specs/mine.yaml"), table, tmp_path / "no")


def test_numbers_of_a_parquet_table_are_held_out_and_filtered_as_written(tmp_path):
    """A column of integers with a blank is read by pandas as floats: patient 9 must not become 9.0."""
    frame = pd.DataFrame({"slide_id": list("abcdef"), "organ": "lung", "num_tiles": 9})
    frame["patient_id"] = pd.array([7, 9, 9, None, 8, 8], dtype="Int64")
    frame["power"] = [20.0, 40.0, 20.0, 20.0, None, 20.0]
    frame.to_parquet(tmp_path / "slides.parquet")
    (tmp_path / "held.csv").write_text("slide_id,patient_id\na,\n,9\n")
    spec = ScheduleSpec(num_pseudo_epochs=1, num_groups=1, positions_per_pseudo_epoch=9)
    spec = replace(spec, hold_out=str(tmp_path / "held.csv"), include={"power": [20]})
    build_schedule(spec, read_slides(tmp_path / "slides.parquet"), tmp_path / "sched")
    slides = Schedule.open(tmp_path / "sched").slides()
    assert slides["slide_id"][slides["eligible"]].tolist() == ["d", "f"]
    verify_schedule(tmp_path / "sched")


@pytest.mark.parametrize("column", ["eligible", "first_tile"])
def test_a_filter_on_a_column_of_the_schedules_own_is_refused(tmp_path, column):
    slides = pd.DataFrame({"slide_id": list("ab"), "organ": "lung", "num_tiles": 9, column: "1"})
    with pytest.raises(ScheduleError, match="rename yours"):
        Builder(ScheduleSpec(include={column: ["1"]}), slides)
