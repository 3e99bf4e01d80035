"""`hpcssl schedule`: building in parts, looking, comparing, exporting, and what it refuses, each in one line."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from hpcssl.cli.main import main
from hpcssl.schedule.file import Schedule

pytestmark = pytest.mark.timeout(120)

SPEC = """
seed: 5
num_pseudo_epochs: 6
positions_per_pseudo_epoch: 40
num_groups: 3
max_repeats: 40
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """24 slides of 12 patients: 18 of breast and 6 of lung, of two stains."""
    slides = pd.DataFrame({"slide_id": [f"s{i}" for i in range(24)], "num_tiles": range(3, 27)})
    slides["organ"] = ["lung" if i % 4 == 0 else "breast" for i in range(24)]
    slides["patient_id"] = [f"p{i // 2}" for i in range(24)]
    slides["stain"] = ["IHC" if i in (5, 6) else "H&E" for i in range(24)]
    slides.to_csv(tmp_path / "slides.csv", index=False)
    (tmp_path / "spec.yaml").write_text(SPEC)
    return tmp_path / "slides.csv"


def building(table: Path, name: str, *more: str) -> list[str]:
    source = ["--slides", str(table), "--spec", str(table.parent / "spec.yaml")]
    return ["schedule", "build", *source, "--out", str(table.parent / name), *more]


def build(table: Path, name: str, *more: str) -> int:
    return main(building(table, name, *more))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_parts_in_any_order_are_the_whole(table: Path, capsys, refused) -> None:
    assert build(table, "whole", "--jobs", "2") == 0
    assert build(table, "parts", "--only", "4,1-2") == 0
    out = capsys.readouterr().out
    assert "6 pseudo-epochs of 40 positions" in out
    assert "3 of 6 pseudo-epochs are written" in out
    parts = table.parent / "parts"
    assert "unfinished" in refused("schedule", "verify", parts)
    assert build(table, "parts", "--only", "0,3,5", "--jobs", "1") == 0
    assert contents(parts) == contents(table.parent / "whole")
    assert main(["schedule", "verify", str(parts)]) == 0
    assert build(table, "parts") == 0, "a finished one is left as it is"


@pytest.mark.parametrize(
    ("only", "told"),
    [("3-1", "ends before it begins"), ("a", "such as 3,7-9"), ("1,,2", "such as 3,7-9"), ("6", "has only 0 to 5")],
)
def test_only_is_checked(table: Path, only: str, told: str, refused) -> None:
    assert told in refused(*building(table, "s", "--only", only))
    assert not (table.parent / "s").exists()


def test_another_schedule_is_not_overwritten(table: Path, refused) -> None:
    assert build(table, "s", "--only", "0") == 0
    before = contents(table.parent / "s")
    assert "spec.seed = 5, where now 6 is asked for" in refused(*building(table, "s", "--set", "seed=6"))
    (table.parent / "other").mkdir()
    (table.parent / "other" / "thesis.tex").write_text("x")
    assert "holds thesis.tex, no schedule" in refused(*building(table, "other"))
    assert contents(table.parent / "s") == before


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["include.organ=[brest]"], "did you mean breast?"),
        (["exclude.stian=[IHC]"], "did you mean stain?"),
        (["exclude.organ=breast"], "exclude.organ"),
        (["exclude.organ=[breast, lung]"], "leave none of the 24 slides"),
        (["organ_weights.skin=2"], "known: breast, lung"),
        (["organ_weights.lung=0"], "expected 0.000001 to 1000000"),
        (["organ_size=mm"], "organ_size"),
        (["slide_power=-1"], "slide_power"),
        (["max_repeat=3"], "did you mean max_repeats?"),
        (["max_repeats=1", "positions_per_pseudo_epoch=100"], "breast, its largest organ"),
        (["organ_weights.lung=0.001"], "the 2 slides of lung"),
        (["hold_out=nothing.csv"], "no such file"),
    ],
)
def test_a_spec_that_does_not_fit_is_one_line(table: Path, settings: list[str], told: str, refused) -> None:
    assert told in refused(*building(table, "s", *(f"--set={setting}" for setting in settings)))
    assert not (table.parent / "s").exists()


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("slide_id", "s1", "slide id s1 stands in it more than once"),
        ("num_tiles", "0", "expected a positive integer"),
        ("num_tiles", "-3", "expected a positive integer"),
        ("num_tiles", "", "expected a positive integer"),
        ("num_tiles", "2.5", "expected a positive integer"),
        ("organ", " ", "has no organ"),
    ],
)
def test_a_bad_slide_table_is_one_line(table: Path, column: str, value: str, told: str, refused) -> None:
    frame = pd.read_csv(table, dtype=str)
    frame.loc[7, column] = value
    frame.to_csv(table, index=False)
    assert told in refused(*building(table, "s"))


def test_hold_out_and_filters_reach_the_files(table: Path, capsys) -> None:
    folder = table.parent
    (folder / "test_set.csv").write_text("slide_id,patient_id\ns2,p9\ns3,\n")
    (folder / "spec.yaml").write_text(SPEC + "hold_out: test_set.csv\nexclude:\n  stain: [IHC]\n")
    assert build(table, "s") == 0
    assert main(["schedule", "verify", str(folder / "s")]) == 0
    schedule = Schedule.open(folder / "s")
    slides = schedule.slides()
    tiles = schedule.tiles_at(0, schedule.num_positions)
    drawn = set(slides["slide_id"].iloc[slides["first_tile"].searchsorted(tiles, side="right") - 1])
    assert drawn == {f"s{i}" for i in range(24)} - {"s2", "s3", "s18", "s19", "s5", "s6"}
    (folder / "test_set.csv").write_text("slide_id\ns2\n")
    assert build(table, "torn") == 2
    assert "patient p1 is on both sides of the hold-out" in capsys.readouterr().err


def test_inspect_writes_text_and_figures(table: Path, capsys) -> None:
    assert build(table, "s") == 0
    capsys.readouterr()
    assert main(["schedule", "inspect", str(table.parent / "s"), "--out", str(table.parent / "figures")]) == 0
    out = capsys.readouterr().out
    for told in ("breast", "100.0% of the slides", "24 in 2 passes", "draws of a tile"):
        assert told in out
    for name in ("organ_shares", "repeats", "slides_per_pass", "coverage"):
        assert (table.parent / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert len(pd.read_csv(table.parent / "figures" / f"{name}.csv")) > 0


def test_diff_says_where_two_schedules_part(table: Path, capsys, refused) -> None:
    folder = table.parent
    for name, setting in (("a", "seed=5"), ("b", "seed=5"), ("c", "seed=6"), ("longer", "num_pseudo_epochs=7")):
        assert build(table, name, "--set", setting) == 0
    capsys.readouterr()
    assert main(["schedule", "diff", str(folder / "a"), str(folder / "b")]) == 0
    assert "are the same schedule" in capsys.readouterr().out
    assert main(["schedule", "diff", str(folder / "a"), str(folder / "c")]) == 1
    out = capsys.readouterr().out
    assert "spec: seed is 5 in A and 6 in B" in out
    assert "positions: another order from the first on: A has tile" in out
    assert main(["schedule", "diff", str(folder / "a"), str(folder / "longer")]) == 1
    assert "the same up to 240, where A ends" in capsys.readouterr().out
    assert "no schedule" in refused("schedule", "diff", folder / "a", folder / "none")


def test_export_writes_the_order(table: Path, data, tmp_path: Path, refused) -> None:
    folder = table.parent
    assert build(table, "s") == 0
    assert main(["schedule", "export", "--csv", str(folder / "s"), "--only", "0,5"]) == 0
    written = sorted(path.name for path in (folder / "s-csv").iterdir())
    assert written == ["slide_schedule_0.csv", "slide_schedule_5.csv"]
    assert len(pd.read_csv(folder / "s-csv" / "slide_schedule_5.csv")) == 40
    assert "ends at pseudo-epoch 5" in refused("schedule", "export", "--csv", folder / "s", "--only", "6")
    assert "was built for other slides" in refused(
        *["schedule", "export", "--csv", str(folder / "s"), "--store", str(data.store_path)]
    )
    out = tmp_path / "paths"
    source = [str(data.schedule_path), "--store", str(data.store_path)]
    assert main(["schedule", "export", "--csv", *source, "--out", str(out)]) == 0
    paths = pd.read_csv(out / "slide_schedule_0.csv")["imgpath"]
    assert len(paths) == Schedule.open(data.schedule_path).positions_per_pseudo_epoch
    assert all(Path(path).is_file() for path in paths)
