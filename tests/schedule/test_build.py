"""Builds in parts, resumed, by several threads or nodes: always the bytes of an undisturbed build."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hpcssl.core.atomic import digest_file
from hpcssl.core.errors import ScheduleError
from hpcssl.schedule import build as build_module
from hpcssl.schedule.build import build_schedule
from hpcssl.schedule.file import Schedule
from hpcssl.schedule.spec import ScheduleSpec
from hpcssl.schedule.verify import verify_schedule

Build = Callable[..., list[int]]


def part(folder: Path, number: int) -> Path:
    return folder / f"pseudo_epoch_{number:04d}.npy"


def checksum(folder: Path, number: int) -> Path:
    return part(folder, number).with_suffix(".sha256")


@pytest.fixture(scope="module")
def few(spec: ScheduleSpec) -> ScheduleSpec:
    """Four pseudo-epochs."""
    return replace(spec, num_pseudo_epochs=4)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, contents, few, slides) -> dict[str, bytes]:
    """The files of a build that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "sched"
    assert build_schedule(few, slides, out) == []
    files = contents(out)
    assert sorted(files) == [*(part(out, n).name for n in range(4)), "schedule.json", "slides.parquet"]
    return files


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "sched"


@pytest.fixture
def build(few: ScheduleSpec, slides: pd.DataFrame, out: Path) -> Build:
    """Builds the four pseudo-epochs in `out`, with another table or settings changed."""

    def run(table: pd.DataFrame = slides, *, change: dict[str, Any] | None = None, **how: Any) -> list[int]:
        return build_schedule(replace(few, **(change or {})), table, out, **how)

    return run


@pytest.mark.parametrize("jobs", [2, 3, 20])
def test_the_number_of_threads_changes_no_byte(build, out, undisturbed, jobs, contents):
    progress: list[int] = []
    assert build(jobs=jobs, on_progress=progress.append) == []
    assert contents(out) == undisturbed
    assert sum(progress) == 10_000


def test_parts_out_of_order_are_the_same(build, out, undisturbed, contents):
    for only, missing in (([2], [0, 1, 3]), ([3, 0, 3], [1]), ([2, 3], [1]), ((), [1])):
        progress: list[int] = []
        assert build(only=only, jobs=2, on_progress=progress.append) == missing
        assert sum(progress) == 2500 * len(set(only))
        with pytest.raises(ScheduleError, match="the schedule is unfinished; run the same"):
            Schedule.open(out)
    assert build(only=[1]) == []
    assert contents(out) == undisturbed
    verify_schedule(out)


@pytest.mark.parametrize("only", [[4], [-1], [0, 99]])
def test_pseudo_epochs_that_there_are_not(build, tmp_path, only):
    with pytest.raises(ScheduleError, match="the spec has only 0 to 3"):
        build(only=only)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_schedule_is_left_alone(build, out):
    build()
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    progress: list[int] = []
    assert build(on_progress=progress.append) == []
    assert build(only=[1]) == []
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    assert sum(progress) == 10_000
    part(out, 1).unlink()
    with pytest.raises(ScheduleError, match=r"pseudo_epoch_0001\.npy is missing; remove .* and build the schedule"):
        build()


def leave_half_written(out: Path) -> None:
    part(out, 0).with_name(".pseudo_epoch_0000.npy.0a1b2c3d.tmp").write_bytes(part(out, 0).read_bytes()[:999])
    (out / ".unfinished.json.0a1b2c3d.tmp").write_bytes(b"{")
    (out / ".schedule.json.0a1b2c3d.tmp").write_bytes(b"")


RESUMED: dict[str, Callable[[Path], object]] = {
    "nothing": lambda out: None,
    "a part deleted": lambda out: part(out, 0).unlink(),
    "a checksum deleted": lambda out: checksum(out, 2).unlink(),
    "a part without its checksum, damaged": lambda out: (checksum(out, 2).unlink(), part(out, 2).write_bytes(b"half")),
    "a part and its checksum deleted": lambda out: (part(out, 2).unlink(), checksum(out, 2).unlink()),
    "half-written files": leave_half_written,
    "a part cut short": lambda out: part(out, 0).write_bytes(part(out, 0).read_bytes()[:-100]),
}


@pytest.mark.parametrize("change", RESUMED)
def test_a_build_that_is_resumed(build, out, undisturbed, change, contents):
    build(only=[0, 2])
    RESUMED[change](out)
    assert build() == []
    assert contents(out) == undisturbed


def test_a_damaged_checksum_or_mark_is_told(build, out):
    build(only=[0, 2])
    assert checksum(out, 0).read_text().split() == [digest_file(part(out, 0)), "pseudo_epoch_0000.npy"]
    checksum(out, 0).write_text("")
    with pytest.raises(ScheduleError, match=r"pseudo_epoch_0000\.sha256: damaged; remove it and build again"):
        build()
    assert not (out / "schedule.json").exists()
    checksum(out, 0).unlink()
    (out / "unfinished.json").write_text("{")
    with pytest.raises(ScheduleError, match=r"unfinished\.json: damaged; remove .*sched and build anew"):
        build()


def test_an_error_in_a_thread_is_told_and_the_build_goes_on_later(build, out, undisturbed, monkeypatch, contents):
    def fails(stream: Any, data: Any, digest: Any) -> None:
        if "_0002" in stream.name and len(data) > 1000:
            raise OSError(28, "No space left on device")
        put(stream, data, digest)

    put = build_module._put
    monkeypatch.setattr(build_module, "_put", fails)
    for jobs in (1, 2):
        with pytest.raises(OSError, match="No space left"):
            build(jobs=jobs)
        assert not [p for p in out.iterdir() if p.suffix == ".tmp" or "0002" in p.name]
    monkeypatch.undo()
    assert build() == []
    assert contents(out) == undisturbed


def test_two_builds_at_the_same_time(build, out, undisturbed, contents):
    left: list[list[int]] = []
    nodes = [threading.Thread(target=lambda o=only: left.append(build(only=o))) for only in ([0, 2], [1, 3])]
    for node in nodes:
        node.start()
    for node in nodes:
        node.join()
    assert len(left) == 2, "neither raised"
    assert build() == []
    assert contents(out) == undisturbed


def test_another_node_that_finishes_first(build, out, undisturbed, monkeypatch, contents):
    def both_finish(*arguments: Any) -> None:
        finish(*arguments)
        finish(*arguments)

    finish = build_module._finish
    monkeypatch.setattr(build_module, "_finish", both_finish)
    assert build() == []
    assert contents(out) == undisturbed


@pytest.mark.parametrize("only", [None, [0]])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 2}, "spec.seed = 1, where now 2 is asked for; remove it or choose another --out"),
        ({"num_pseudo_epochs": 5}, "spec.num_pseudo_epochs = 4, where now 5"),
        ({"slide_power": 0.5}, "spec.slide_power = 1.0, where now 0.5"),
        ({"organ_weights": {"colon": 2.0}}, "spec.organ_weights.colon = None, where now 2.0"),
        ({"exclude": {"organ": ["skin"]}}, r"spec.exclude.organ = None, where now \['skin'\]"),
    ],
    ids=str,
)
def test_another_spec_is_refused(build, out, only, change, told, contents):
    build(only=only)
    before = contents(out)
    state = "is a schedule with" if only is None else "holds parts of a schedule with"
    with pytest.raises(ScheduleError, match=f"{state} {told}"):
        build(change=change)
    assert contents(out) == before


@pytest.mark.parametrize("only", [None, [0]])
def test_other_slides_are_refused(build, slides, tmp_path, out, only, contents):
    build(only=only)
    before = contents(out)
    with pytest.raises(ScheduleError, match="with slides_digest = "):
        build(slides.assign(num_tiles=slides["num_tiles"][::-1].to_numpy()))
    (tmp_path / "test.csv").write_text(f"slide_id\n{slides['slide_id'][0]}\n")
    with pytest.raises(ScheduleError, match=r"with spec\.hold_out = '', where now 'hold_out\.csv' is asked for"):
        build(change={"hold_out": str(tmp_path / "test.csv")})
    assert contents(out) == before


def test_another_hold_out_list_is_refused(build, slides, tmp_path):
    table = tmp_path / "test.csv"
    table.write_text(f"slide_id\n{slides['slide_id'][0]}\n")
    build(change={"hold_out": str(table)}, only=[0])
    table.rename(tmp_path / "moved.csv")
    moved = {"hold_out": str(tmp_path / "moved.csv")}
    assert build(change=moved, only=[1]) == [2, 3], "the place of the list is no matter"
    table.write_text(f"slide_id\n{slides['slide_id'][1]}\n")
    with pytest.raises(ScheduleError, match=r"with eligible\.tiles = \d+, where now \d+|with eligible\.sha256 = "):
        build(change={"hold_out": str(table)})


def test_a_folder_of_something_else_is_refused(build, out, contents):
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ScheduleError, match=r"holds notes\.txt, no schedule; choose another --out"):
        build()
    assert contents(out) == {"notes.txt": b"mine"}
    (out / "notes.txt").unlink()
    assert build() == [], "an empty folder is taken"


def test_a_file_of_another_byte_order_is_not_read(built, out):
    shutil.copytree(built, out)
    part(out, 0).write_bytes(part(out, 0).read_bytes().replace(b"<u4", b">u4", 1))
    with pytest.raises(ScheduleError, match=r"pseudo_epoch_0000\.npy: .* expected .* of <u4"):
        Schedule.open(out).tiles_at(0, 5)
