"""A schedule as CSV files, read again with pandas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hpcssl.schedule import csv_export as export_module
from hpcssl.schedule.build import build_schedule
from hpcssl.schedule.csv_export import export_csv
from hpcssl.schedule.file import Schedule
from hpcssl.schedule.spec import ScheduleSpec

NAMES = ["plain", "a, b", 'the "best"', '",', "ß é 病", " spaced ", "line\nbreak", "007", "NA", "'", ";", "-1", "=1+1"]


@pytest.fixture(scope="module")
def schedule(tmp_path_factory: pytest.TempPathFactory) -> Schedule:
    """Three pseudo-epochs of 13 slides with names that a CSV file must quote."""
    slides = pd.DataFrame({"slide_id": NAMES, "organ": "x", "num_tiles": range(1, 14)})
    spec = ScheduleSpec(num_pseudo_epochs=3, num_groups=1, positions_per_pseudo_epoch=200)
    out = tmp_path_factory.mktemp("export") / "sched"
    build_schedule(spec, slides, out)
    return Schedule.open(out)


def reread(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype={"slide_id": str, "imgpath": str}, keep_default_na=False)


def check_export(schedule: Schedule, out: Path) -> None:
    """Every file, read again, is the pseudo-epoch."""
    first = schedule.slides().set_index("slide_id")["first_tile"]
    whole = [reread(out / f"slide_schedule_{number}.csv") for number in range(schedule.num_pseudo_epochs)]
    frame = pd.concat(whole, ignore_index=True)
    assert frame.columns.tolist() == ["slide_id", "index"]
    assert len(frame) == schedule.num_positions
    tiles = first[frame["slide_id"]].to_numpy() + frame["index"].to_numpy()
    assert (tiles == schedule.tiles_at(0, schedule.num_positions)).all()


@pytest.mark.parametrize("piece", [1 << 17, 1, 7, 200])
def test_slides_and_places(schedule, tmp_path, monkeypatch, piece):
    monkeypatch.setattr(export_module, "_PIECE", piece)
    progress: list[int] = []
    export_csv(schedule, tmp_path / "csv", paths_of=None, on_progress=progress.append)
    assert sorted(p.name for p in (tmp_path / "csv").iterdir()) == [f"slide_schedule_{n}.csv" for n in range(3)]
    assert sum(progress) == 600
    check_export(schedule, tmp_path / "csv")
    lines = (tmp_path / "csv/slide_schedule_0.csv").read_bytes().split(b"\n")
    assert (lines[0], lines[-1]) == (b"slide_id,index", b"")
    assert {b"plain,0", b'"a, b",0'} <= {*lines}, "quoted only where that is needed"


def test_paths_of_files(schedule, tmp_path):
    asked: list[np.ndarray] = []

    def paths_of(tiles: np.ndarray) -> list[str]:
        asked.append(tiles)
        return [f'/data/{NAMES[t % 13]}/"tile", {t}.jpg' for t in tiles.tolist()]

    export_csv(schedule, tmp_path, paths_of=paths_of)
    whole = pd.concat([reread(tmp_path / f"slide_schedule_{n}.csv") for n in range(3)])
    assert whole.columns.tolist() == ["imgpath"]
    tiles = schedule.tiles_at(0, 600)
    assert whole["imgpath"].tolist() == paths_of(tiles)
    assert (np.concatenate(asked[:-1]) == tiles).all()
    assert asked[0].dtype == np.int64


def test_some_pseudo_epochs_and_again(schedule, tmp_path):
    export_csv(schedule, tmp_path, paths_of=None, numbers=[2, 0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["slide_schedule_0.csv", "slide_schedule_2.csv"]
    before = (tmp_path / "slide_schedule_2.csv").read_bytes()
    (tmp_path / "slide_schedule_2.csv").write_text("older")
    export_csv(schedule, tmp_path, paths_of=None)
    assert (tmp_path / "slide_schedule_2.csv").read_bytes() == before
    check_export(schedule, tmp_path)


def test_an_export_that_fails_leaves_no_half_a_file(schedule, tmp_path):
    def fails(tiles: np.ndarray) -> list[str]:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        export_csv(schedule, tmp_path / "csv", paths_of=fails)
    assert list((tmp_path / "csv").iterdir()) == []


def test_the_check_catches_another_order_and_places_that_count_from_one(schedule, tmp_path):
    export_csv(schedule, tmp_path, paths_of=None)
    file = tmp_path / "slide_schedule_1.csv"
    right = reread(file)
    for broken in (right.sort_values("slide_id"), right.assign(index=right["index"] + 1), right[:-1]):
        broken.to_csv(file, index=False)
        with pytest.raises(AssertionError):
            check_export(schedule, tmp_path)
    right.to_csv(file, index=False)
    check_export(schedule, tmp_path)
