"""What inspect tells of a schedule, against counts from its files; and what compare tells of two."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hpcssl.core.errors import ScheduleError
from hpcssl.schedule.build import build_schedule
from hpcssl.schedule.file import Schedule
from hpcssl.schedule.inspect import Inspection, inspect_schedule, organ_shares
from hpcssl.schedule.schedule_diff import compare_schedules
from hpcssl.schedule.spec import ScheduleSpec


@pytest.fixture(scope="module")
def filtered(
    tmp_path_factory: pytest.TempPathFactory, spec: ScheduleSpec, slides: pd.DataFrame, built: Path
) -> dict[str, Path]:
    """The schedule of all, one with filters and a hold-out list, and one so short that tiles are left."""
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "test.csv").write_text("slide_id\n" + "".join(f"{name}\n" for name in slides["slide_id"][:40]))
    filters = {"hold_out": str(folder / "test.csv"), "exclude": {"organ": ["lung"]}}
    build_schedule(replace(spec, max_repeats=20, slide_power=0.5, **filters), slides, folder / "held")
    build_schedule(replace(spec, num_pseudo_epochs=2, positions_per_pseudo_epoch=700), slides, folder / "short")
    return {"all": built, "held out": folder / "held", "short": folder / "short"}


class Counted:
    """Counts from a schedule's files."""

    def __init__(self, path: Path):
        self.slides = pd.read_parquet(path / "slides.parquet")
        self.files = [np.load(file).astype(np.int64) for file in sorted(path.glob("pseudo_epoch_*.npy"))]
        self.slide_of = np.repeat(np.arange(len(self.slides)), self.slides["num_tiles"])
        enters = self.slides["eligible"].to_numpy()
        self.num_slides, self.num_tiles = int(enters.sum()), int(self.slides["num_tiles"][enters].sum())
        self.tile_enters = enters[self.slide_of]


def check_organs(counted: Counted, organs: pd.DataFrame) -> None:
    assert organs.columns.tolist() == ["organ", "num_tiles", "natural_share", "positions", "scheduled_share"]
    drawn = counted.slides["organ"].to_numpy()[counted.slide_of[np.concatenate(counted.files)]]
    tiles = counted.slides[counted.slides["eligible"]].groupby("organ")["num_tiles"].sum()
    assert set(organs["organ"]) == set(tiles.index)
    order = [(-row["num_tiles"], row["organ"]) for _, row in organs.iterrows()]
    assert order == sorted(order)
    for _, row in organs.iterrows():
        assert row["num_tiles"] == tiles[row["organ"]]
        assert row["natural_share"] == pytest.approx(tiles[row["organ"]] / tiles.sum())
        assert row["positions"] == (drawn == row["organ"]).sum()
        assert row["scheduled_share"] == pytest.approx((drawn == row["organ"]).mean())


def check_repeats(counted: Counted, repeats: pd.DataFrame) -> None:
    draws = np.bincount(np.concatenate(counted.files), minlength=len(counted.slide_of))[counted.tile_enters]
    numbers, tiles = np.unique(draws, return_counts=True)
    assert repeats.columns.tolist() == ["draws", "tiles"]
    assert repeats["draws"].tolist() == numbers.tolist()
    assert repeats["tiles"].tolist() == tiles.tolist()


def check_passes(counted: Counted, passes: pd.DataFrame) -> None:
    used = [len(np.unique(counted.slide_of[file])) for file in counted.files]
    expected = [[number // 5, number, slides] for number, slides in enumerate(used)]
    assert passes.columns.tolist() == ["pass", "pseudo_epoch", "slides"]
    assert passes.to_numpy().tolist() == expected


def check_coverage(counted: Counted, coverage: pd.DataFrame) -> None:
    seen = np.zeros(len(counted.slide_of), bool)
    samples = 0
    assert coverage["pseudo_epoch"].tolist() == list(range(len(counted.files)))
    for file, (_, row) in zip(counted.files, coverage.iterrows()):
        seen[file] = True
        samples += len(file)
        slides = len(np.unique(counted.slide_of[seen]))
        assert (row["samples_seen"], row["slides_seen"], row["tiles_seen"]) == (samples, slides, seen.sum())
        assert row["slides_share"] == pytest.approx(slides / counted.num_slides)
        assert row["tiles_share"] == pytest.approx(seen.sum() / counted.num_tiles)


CHECKS: dict[str, Callable[[Counted, pd.DataFrame], None]] = {"organs": check_organs, "repeats": check_repeats}
CHECKS |= {"passes": check_passes, "coverage": check_coverage}


@pytest.mark.parametrize("name", ["all", "held out", "short"])
@pytest.mark.parametrize("table", CHECKS)
def test_the_tables_are_those_of_the_files(filtered, name, table):
    found: Inspection = inspect_schedule(filtered[name])
    CHECKS[table](Counted(filtered[name]), getattr(found, table))


def test_the_schedules_have_what_the_tables_tell(filtered):
    everything, held, short = (inspect_schedule(path) for path in filtered.values())
    assert everything.coverage["tiles_share"].iloc[-1] == 1
    assert everything.coverage["slides_share"].iloc[4] == 1, "a pass uses every slide"
    assert everything.passes.groupby("pass")["slides"].sum().tolist()[:2] == [300, 300]
    assert "lung" not in set(held.organs["organ"])
    assert short.repeats["draws"].iloc[0] == 0
    assert 0.05 < short.coverage["tiles_share"].iloc[-1] < 0.95
    shares = everything.organs
    assert shares["scheduled_share"].std() < 0.6 * shares["natural_share"].std(), "the balance does something"
    pd.testing.assert_frame_equal(organ_shares(filtered["all"]), shares)


def test_the_checks_catch_tables_of_another_schedule(filtered):
    counted, other = Counted(filtered["all"]), inspect_schedule(filtered["held out"])
    moved = counted.files[3].copy()
    moved[0] = counted.files[4][0]
    for name, check in CHECKS.items():
        with pytest.raises(AssertionError):
            check(counted, getattr(other, name))
    counted.files[3] = moved
    found = inspect_schedule(filtered["all"])
    for name in ("repeats", "passes"):
        with pytest.raises(AssertionError):
            CHECKS[name](counted, getattr(found, name))


def test_inspect_opens_no_file_of_tiles(filtered, tmp_path):
    sched = Path(shutil.copytree(filtered["short"], tmp_path / "sched"))
    for file in sched.glob("*.npy"):
        file.write_bytes(bytes(file.stat().st_size))
    check_repeats(Counted(filtered["short"]), inspect_schedule(sched).repeats)
    (sched / "slides.parquet").write_bytes(b"other")
    with pytest.raises(ScheduleError, match=r"slides\.parquet: (not what was written|\d+ bytes)"):
        inspect_schedule(sched)


@pytest.fixture
def other(spec: ScheduleSpec, slides: pd.DataFrame, tmp_path: Path) -> Callable[..., Path]:
    """Build a schedule that differs from `built` in what is given."""

    def make(table: pd.DataFrame = slides, **change: Any) -> Path:
        build_schedule(replace(spec, **change), table, tmp_path / "other")
        return tmp_path / "other"

    return make


def first_position(a: Path, b: Path) -> int:
    """The first position that holds another tile, by looking at all."""
    one, two = (Schedule.open(path) for path in (a, b))
    end = min(one.num_positions, two.num_positions)
    return next(p for p, (x, y) in enumerate(zip(one.tiles_at(0, end), two.tiles_at(0, end))) if x != y)


def test_the_same_schedule_twice(built, other):
    assert compare_schedules(built, other()) == []
    assert compare_schedules(built, built) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 2}, ["spec: seed is 1 in A and 2 in B"]),
        (
            {"seed": 2, "slide_power": 0.5, "organ_weights": {"colon": 1.5}},
            [
                "spec: seed is 1 in A and 2 in B",
                "spec: organ_weights.colon is None in A and 1.5 in B",
                "spec: slide_power is 1.0 in A and 0.5 in B",
            ],
        ),
        ({"positions_per_pseudo_epoch": 2400}, ["spec: positions_per_pseudo_epoch is 2500 in A and 2400 in B"]),
    ],
    ids=str,
)
def test_other_specs(built, other, change, told):
    path = other(**change)
    lines = compare_schedules(built, path)
    assert lines[:-1] == told
    position = first_position(built, path)
    table = pd.read_parquet(path / "slides.parquet")
    texts = []
    for schedule in (built, path):
        tile = int(Schedule.open(schedule).tiles_at(position, position + 1)[0])
        row = table[table["first_tile"] <= tile].iloc[-1]
        texts.append(f"tile {tile} (slide {row['slide_id']}, {row['organ']})")
    same = f"the same up to {position:,}, where" if position else "another order from the first on:"
    assert lines[-1] == f"positions: {same} A has {texts[0]} and B {texts[1]}"


def test_a_longer_schedule_goes_on_from_a_shorter(built, other):
    path = other(num_pseudo_epochs=7)
    spec_line = "spec: num_pseudo_epochs is {} in A and {} in B"
    positions = "positions: the same up to 17,500, where {} ends"
    assert compare_schedules(built, path) == [spec_line.format(12, 7), positions.format("B")]
    assert compare_schedules(path, built) == [spec_line.format(7, 12), positions.format("A")]


def test_another_spec_with_the_same_positions(built, other):
    path = other(organ_weights={"breast": 1.0})
    spec_line = "spec: organ_weights.breast is None in A and 1.0 in B"
    assert compare_schedules(built, path) == [spec_line, "positions: all 30,000 the same"]


def test_the_same_tiles_cut_at_other_places(built, tmp_path):
    slides = pd.DataFrame({"slide_id": ["a"], "organ": ["x"], "num_tiles": [1]})
    spec = ScheduleSpec(num_pseudo_epochs=3, positions_per_pseudo_epoch=10, num_groups=1)
    build_schedule(spec, slides, tmp_path / "a")
    build_schedule(replace(spec, num_pseudo_epochs=4, positions_per_pseudo_epoch=6), slides, tmp_path / "b")
    assert compare_schedules(tmp_path / "a", tmp_path / "b")[-1] == "positions: the same up to 24, where B ends"


def test_other_slides(built, other, slides, tmp_path):
    more = pd.concat([slides, slides.iloc[:1].assign(slide_id="new", num_tiles=5)], ignore_index=True)
    lines = compare_schedules(built, other(more))
    tiles = slides["num_tiles"].sum()
    told = f"300 slides, {tiles:,} tiles in A, 301 slides, {tiles + 5:,} tiles in B; not the same"
    assert lines[0] == f"slide tables: {told}"
    assert lines[1].startswith("slides that enter: 300 slides")
    position = first_position(built, tmp_path / "other")
    same = f"the same up to {position:,}, where" if position else "another order from the first on:"
    assert lines[2].startswith(f"positions: {same} A has")


def test_other_hold_out_lists(built, other, slides, tmp_path):
    (tmp_path / "test.csv").write_text(f"slide_id\n{slides['slide_id'][0]}\n")
    path = other(hold_out=str(tmp_path / "test.csv"))
    digest = Schedule.open(path).header["hold_out_sha256"]
    lines = compare_schedules(built, path)
    assert lines[0] == "spec: hold_out is '' in A and 'hold_out.csv' in B"
    assert lines[1].startswith("slides that enter: 300 slides")
    assert lines[2] == f"hold-out lists: none in A, {digest[:12]} in B; not the same"
    assert lines[3].startswith("positions: ")
    assert len(lines) == 4
