"""Builds in parts, resumed, by several threads or nodes, and killed: always the bytes of an undisturbed build."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hpcssl.core.errors import ConfigError, ScheduleError
from hpcssl.schedule import build as build_module
from hpcssl.schedule.build import build_schedule
from hpcssl.schedule.file import Schedule
from hpcssl.schedule.spec import ScheduleSpec
from hpcssl.schedule.verify import verify_schedule

KILLED = 9


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def part(folder: Path, number: int) -> Path:
    return folder / f"pseudo_epoch_{number:04d}.npy"


@pytest.fixture(scope="module")
def few(spec: ScheduleSpec) -> ScheduleSpec:
    """Four pseudo-epochs."""
    return replace(spec, num_pseudo_epochs=4)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, few: ScheduleSpec, slides: pd.DataFrame) -> dict[str, bytes]:
    """The files of a build that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "sched"
    assert build_schedule(few, slides, out) == []
    files = contents(out)
    assert sorted(files) == [*(part(out, n).name for n in range(4)), "schedule.json", "slides.parquet"]
    return files


# parts


@pytest.mark.parametrize("jobs", [2, 3, 20])
def test_the_number_of_threads_changes_no_byte(
    few: ScheduleSpec, slides: pd.DataFrame, undisturbed: dict[str, bytes], tmp_path: Path, jobs: int
) -> None:
    progress: list[int] = []
    assert build_schedule(few, slides, tmp_path / "sched", jobs=jobs, on_progress=progress.append) == []
    assert contents(tmp_path / "sched") == undisturbed
    assert sum(progress) == 10_000


def test_parts_out_of_order_are_the_same(
    few: ScheduleSpec, slides: pd.DataFrame, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "a new folder" / "sched"
    for only, missing in (([2], [0, 1, 3]), ([3, 0, 3], [1]), ([2, 3], [1]), ((), [1])):
        progress: list[int] = []
        assert build_schedule(few, slides, out, only=only, jobs=2, on_progress=progress.append) == missing
        assert sum(progress) == 2500 * len(set(only))
        assert not (out / "schedule.json").exists()
        with pytest.raises(ScheduleError, match="the schedule is unfinished; run the same"):
            Schedule.open(out)
    assert build_schedule(few, slides, out, only=[1]) == []
    assert contents(out) == undisturbed
    verify_schedule(out)


@pytest.mark.parametrize("only", [[4], [-1], [0, 99]])
def test_pseudo_epochs_that_there_are_not(few: ScheduleSpec, slides: pd.DataFrame, tmp_path: Path, only: Any) -> None:
    with pytest.raises(ScheduleError, match="the spec has only 0 to 3"):
        build_schedule(few, slides, tmp_path / "sched", only=only)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_schedule_is_left_alone(
    few: ScheduleSpec, slides: pd.DataFrame, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "sched"
    build_schedule(few, slides, out)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    progress: list[int] = []
    assert build_schedule(few, slides, out, on_progress=progress.append) == []
    assert build_schedule(few, slides, out, only=[1]) == []
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    assert sum(progress) == 10_000
    part(out, 1).unlink()
    with pytest.raises(
        ScheduleError, match=r"pseudo_epoch_0001\.npy is missing; remove .* and build the schedule anew"
    ):
        build_schedule(few, slides, out)


def leave_half_written(out: Path) -> None:
    part(out, 0).with_name(".pseudo_epoch_0000.npy.0a1b2c3d.tmp").write_bytes(part(out, 0).read_bytes()[:999])
    (out / ".unfinished.json.0a1b2c3d.tmp").write_bytes(b"{")
    (out / ".schedule.json.0a1b2c3d.tmp").write_bytes(b"")


def cut(out: Path) -> None:
    part(out, 0).write_bytes(part(out, 0).read_bytes()[:-100])


RESUMED: dict[str, Callable[[Path], object]] = {
    "nothing": lambda out: None,
    "a part deleted": lambda out: part(out, 0).unlink(),
    "a checksum deleted": lambda out: part(out, 2).with_suffix(".sha256").unlink(),
    "a part without its checksum, damaged": lambda out: (
        part(out, 2).with_suffix(".sha256").unlink(),
        part(out, 2).write_bytes(b"half"),
    ),
    "a part and its checksum deleted": lambda out: (
        part(out, 2).unlink(),
        part(out, 2).with_suffix(".sha256").unlink(),
    ),
    "half-written files": leave_half_written,
    "a part cut short": cut,
}


@pytest.mark.parametrize("change", RESUMED)
def test_a_build_that_is_resumed(
    few: ScheduleSpec, slides: pd.DataFrame, undisturbed: dict[str, bytes], tmp_path: Path, change: str
) -> None:
    out = tmp_path / "sched"
    build_schedule(few, slides, out, only=[0, 2])
    RESUMED[change](out)
    assert build_schedule(few, slides, out) == []
    assert contents(out) == undisturbed


def test_a_damaged_checksum_or_mark_is_told(few: ScheduleSpec, slides: pd.DataFrame, tmp_path: Path) -> None:
    out = tmp_path / "sched"
    build_schedule(few, slides, out, only=[0, 2])
    checksum = part(out, 0).with_suffix(".sha256")
    assert checksum.read_text().split() == [build_module.digest_file(part(out, 0)), "pseudo_epoch_0000.npy"]
    checksum.write_text("")
    with pytest.raises(ScheduleError, match=r"pseudo_epoch_0000\.sha256: damaged; remove it and build again"):
        build_schedule(few, slides, out)
    assert not (out / "schedule.json").exists()
    checksum.unlink()
    (out / "unfinished.json").write_text("{")
    with pytest.raises(ScheduleError, match=r"unfinished\.json: damaged; remove .*sched and build anew"):
        build_schedule(few, slides, out)


def test_an_error_in_a_thread_is_told_and_the_build_goes_on_later(
    few: ScheduleSpec,
    slides: pd.DataFrame,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(stream: Any, data: Any, digest: Any) -> None:
        if "_0002" in stream.name and len(data) > 1000:
            raise OSError(28, "No space left on device")
        put(stream, data, digest)

    put = build_module._put
    monkeypatch.setattr(build_module, "_put", fails)
    for jobs in (1, 2):
        with pytest.raises(OSError, match="No space left"):
            build_schedule(few, slides, tmp_path / "sched", jobs=jobs)
        assert not [p for p in (tmp_path / "sched").iterdir() if p.suffix == ".tmp" or "0002" in p.name]
    monkeypatch.undo()
    assert build_schedule(few, slides, tmp_path / "sched") == []
    assert contents(tmp_path / "sched") == undisturbed


# several nodes


def test_two_builds_at_the_same_time(
    few: ScheduleSpec, slides: pd.DataFrame, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    left: list[list[int]] = []
    nodes = [
        threading.Thread(
            target=lambda only=only: left.append(build_schedule(few, slides, tmp_path / "sched", only=only))
        )
        for only in ([0, 2], [1, 3])
    ]
    for node in nodes:
        node.start()
    for node in nodes:
        node.join()
    assert len(left) == 2, "neither raised"
    assert build_schedule(few, slides, tmp_path / "sched") == []
    assert contents(tmp_path / "sched") == undisturbed


def test_another_node_that_finishes_first(
    few: ScheduleSpec,
    slides: pd.DataFrame,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def both_finish(*arguments: Any) -> None:
        finish(*arguments)
        finish(*arguments)

    finish = build_module._finish
    monkeypatch.setattr(build_module, "_finish", both_finish)
    assert build_schedule(few, slides, tmp_path / "sched") == []
    assert contents(tmp_path / "sched") == undisturbed


# other schedules


@pytest.mark.parametrize("only", [None, [0]])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 2}, "spec.seed = 1, where now 2 is asked for"),
        ({"num_pseudo_epochs": 5}, "spec.num_pseudo_epochs = 4, where now 5"),
        ({"slide_power": 0.5}, "spec.slide_power = 1.0, where now 0.5"),
        ({"organ_weights": {"colon": 2.0}}, "spec.organ_weights.colon = None, where now 2.0"),
        ({"exclude": {"organ": ["skin"]}}, r"spec.exclude.organ = None, where now \['skin'\]"),
    ],
    ids=str,
)
def test_another_spec_is_refused(
    few: ScheduleSpec, slides: pd.DataFrame, tmp_path: Path, only: Any, change: dict[str, Any], told: str
) -> None:
    out = tmp_path / "sched"
    build_schedule(few, slides, out, only=only)
    before = contents(out)
    state = "is a schedule with" if only is None else "holds parts of a schedule with"
    with pytest.raises(ScheduleError, match=f"{state} {told}"):
        build_schedule(replace(few, **change), slides, out)
    assert contents(out) == before


@pytest.mark.parametrize("only", [None, [0]])
def test_other_slides_are_refused(few: ScheduleSpec, slides: pd.DataFrame, tmp_path: Path, only: Any) -> None:
    out = tmp_path / "sched"
    build_schedule(few, slides, out, only=only)
    before = contents(out)
    with pytest.raises(ScheduleError, match="with slides_digest = "):
        build_schedule(few, slides.assign(num_tiles=slides["num_tiles"][::-1].to_numpy()), out)
    (tmp_path / "test.csv").write_text(f"slide_id\n{slides['slide_id'][0]}\n")
    with pytest.raises(ScheduleError, match=r"with spec\.hold_out = '', where now 'hold_out\.csv' is asked for"):
        build_schedule(replace(few, hold_out=str(tmp_path / "test.csv")), slides, out)
    assert contents(out) == before


def test_another_hold_out_list_is_refused(few: ScheduleSpec, slides: pd.DataFrame, tmp_path: Path) -> None:
    table = tmp_path / "test.csv"
    table.write_text(f"slide_id\n{slides['slide_id'][0]}\n")
    held = replace(few, hold_out=str(table))
    build_schedule(held, slides, tmp_path / "sched", only=[0])
    table.rename(tmp_path / "moved.csv")
    moved = replace(few, hold_out=str(tmp_path / "moved.csv"))
    assert build_schedule(moved, slides, tmp_path / "sched", only=[1]) == [2, 3], "the place of the list is no matter"
    table.write_text(f"slide_id\n{slides['slide_id'][1]}\n")
    with pytest.raises(ScheduleError, match=r"with eligible\.tiles = \d+, where now \d+|with eligible\.sha256 = "):
        build_schedule(held, slides, tmp_path / "sched")


def test_a_folder_of_something_else_is_refused(few: ScheduleSpec, slides: pd.DataFrame, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ScheduleError, match=r"holds notes\.txt, no schedule; choose another --out"):
        build_schedule(few, slides, tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}
    build_schedule(few, slides, tmp_path / "an empty folder")


def test_the_largest_counts_do_not_overflow(tmp_path: Path) -> None:
    slides = pd.DataFrame({"slide_id": list("abc"), "organ": "x", "num_tiles": 2**31 - 1})
    spec = ScheduleSpec(num_pseudo_epochs=1, num_groups=1, positions_per_pseudo_epoch=30, max_repeats=2**31 - 1)
    assert build_schedule(spec, slides, tmp_path / "sched") == []
    with pytest.raises(ConfigError, match="below"):
        ScheduleSpec(num_groups=10**20)


def test_a_file_of_another_byte_order_is_not_read(built: Path, tmp_path: Path) -> None:
    sched = Path(shutil.copytree(built, tmp_path / "sched"))
    file = sched / "pseudo_epoch_0000.npy"
    file.write_bytes(file.read_bytes().replace(b"<u4", b">u4", 1))
    with pytest.raises(ScheduleError, match=r"pseudo_epoch_0000\.npy: .* expected .* of <u4"):
        Schedule.open(sched).tiles_at(0, 5)
