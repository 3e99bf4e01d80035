"""Building and reading schedules: positions, bytes, specs, stores that match.

test_build.py is about builds in parts, test_inspect.py about tables, test_hold_out.py about filters.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pytest

import hpcssl
from hpcssl.core.errors import ConfigError, ScheduleError
from hpcssl.schedule.build import build_schedule
from hpcssl.schedule.file import Schedule, check_matches, header_text, read_header
from hpcssl.schedule.spec import ScheduleSpec, load_spec


@pytest.fixture
def schedule(built: Path) -> Schedule:
    return Schedule.open(built)


def test_positions_run_on_across_pseudo_epochs(schedule, built):
    whole = np.concatenate([np.load(built / f"pseudo_epoch_{n:04d}.npy") for n in range(12)]).astype(np.int64)
    assert schedule.num_positions == len(whole) == 30_000
    assert (schedule.num_pseudo_epochs, schedule.positions_per_pseudo_epoch) == (12, 2500)
    places = [(0, 30_000), (0, 1), (0, 0), (2500, 2500), (30_000, 30_000), (2499, 2501), (2500, 5000), (2400, 7600)]
    for start, stop in [*places, (29_999, 30_000)]:
        found = schedule.tiles_at(start, stop)
        assert found.dtype == np.int64
        assert (found == whole[start:stop]).all(), (start, stop)
    steps = [schedule.tiles_at(s * 96, (s + 1) * 96) for s in range(30_000 // 96)]  # 96 does not divide 2500
    assert (np.concatenate(steps) == whole[: len(steps) * 96]).all()


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (29_999, 30_001), (30_001, 30_001), (5, 4), (-5, -1)])
def test_positions_outside_are_refused(schedule, start, stop):
    with pytest.raises(ScheduleError, match=f"positions {start}:{stop} are not within its 30000 positions"):
        schedule.tiles_at(start, stop)


def test_tiles_are_global_numbers_of_the_table(schedule, slides):
    table = schedule.slides()
    assert table.columns.tolist() == ["slide_id", "organ", "num_tiles", "patient_id", "first_tile", "eligible"]
    assert table["eligible"].all()
    assert table["slide_id"].tolist() == slides["slide_id"].tolist()
    assert table["first_tile"].tolist() == (slides["num_tiles"].cumsum() - slides["num_tiles"]).tolist()
    assert schedule.pseudo_epoch(3).dtype == np.uint32
    assert isinstance(schedule.pseudo_epoch(3), np.memmap)
    assert schedule.pseudo_epoch(3).max() < slides["num_tiles"].sum()


def test_tile_numbers_beyond_32_bits_take_64(tmp_path):
    slides = pd.DataFrame({"slide_id": ["a", "b", "c"], "organ": ["x", "x", "y"], "num_tiles": [2**31 - 1] * 3})
    spec = ScheduleSpec(num_pseudo_epochs=2, num_groups=1, positions_per_pseudo_epoch=3000, max_repeats=2**31 - 1)
    build_schedule(spec, slides, tmp_path / "sched")
    tiles = Schedule.open(tmp_path / "sched").pseudo_epoch(0)
    assert tiles.dtype == np.uint64
    assert np.bincount((tiles // (2**31 - 1)).astype(np.int64)).tolist() == [750, 750, 1500]
    both = Schedule.open(tmp_path / "sched").tiles_at(0, 6000)
    assert len(np.unique(both)) == 6000, "no tile comes twice before all have come once"
    assert both.max() > 2**32


def test_opening_what_is_no_schedule(tmp_path, built):
    for path in (tmp_path, built / "schedule.json"):
        with pytest.raises(ScheduleError, match="make one with hpcssl schedule build"):
            Schedule.open(path)
    (tmp_path / "unfinished.json").write_text("{}")
    with pytest.raises(ScheduleError, match="unfinished; run the same hpcssl schedule build again"):
        Schedule.open(tmp_path)
    header = (built / "schedule.json").read_text()
    for content, told in (
        (header[:-20], "damaged"),
        ("", "damaged"),
        ("[]", "damaged"),
        ('{"spec": 1}', "damaged"),
        ('{"format": 99}', "schedule format 99; this version reads 2; remove"),
        ('{"format": 1, "spec": {}}', "schedule format 1; this version reads 2; remove"),
        ('{"format": 2, "spec": {}}', "checksum differs"),
    ):
        (tmp_path / "schedule.json").write_text(content)
        with pytest.raises(ScheduleError, match=told):
            Schedule.open(tmp_path)
    (tmp_path / "schedule.json").write_text(header)
    with pytest.raises(ScheduleError, match=r"pseudo_epoch_0000\.npy is missing"):
        Schedule.open(tmp_path)


@pytest.mark.parametrize("name", ["pseudo_epoch_0000.npy", "pseudo_epoch_0011.npy"])
def test_opening_refuses_files_of_another_size(built, tmp_path, name):
    sched = Path(shutil.copytree(built, tmp_path / "sched"))
    whole = (built / name).read_bytes()
    for content in (b"", whole[:-1], whole + b"\0"):
        (sched / name).write_bytes(content)
        with pytest.raises(ScheduleError, match=rf"{name}: {len(content)} bytes, expected {len(whole)}"):
            Schedule.open(sched)
    (sched / name).write_bytes(whole)
    Schedule.open(sched)


def test_opening_refuses_any_changed_byte_of_the_header(built, tmp_path):
    whole = (built / "schedule.json").read_bytes()
    for place in [*range(0, len(whole), 9), whole.index(b"\n"), len(whole) - 1]:
        for flip in (0x01, 0x07, 0x20, 0x80):
            changed = whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :]
            (tmp_path / "schedule.json").write_bytes(changed)
            with pytest.raises(ScheduleError) as caught:
                read_header(tmp_path)
            assert str(tmp_path) in str(caught.value)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [str.strip, lambda text: text + "\n", lambda text: text.replace("\n", "\r\n")])
def test_opening_refuses_a_header_that_an_editor_saved(built, tmp_path, change):
    (tmp_path / "schedule.json").write_text(change((built / "schedule.json").read_text()), newline="")
    with pytest.raises(ScheduleError, match="checksum differs"):
        read_header(tmp_path)


def test_the_header_is_json_an_entry_a_line(built, schedule):
    text = (built / "schedule.json").read_text(encoding="utf-8")
    header = json.loads(text)
    assert schedule.header == header
    assert header["format"] == 2
    body = text.rpartition(',\n "checksum": ')[0]
    assert header["checksum"] == hashlib.sha256(body.encode()).hexdigest(), "as schedules/README.md tells it"
    lines = text.splitlines()
    assert [json.loads(line.strip().rstrip(",")) for line in lines if '"number"' in line] == header["pseudo_epochs"]
    assert "ßtest" in text
    assert header_text({key: value for key, value in header.items() if key != "checksum"}) == text
    for record in header["pseudo_epochs"]:
        content = (built / record["file"]).read_bytes()
        assert (record["bytes"], record["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_two_builds_and_another_process_give_the_same_bytes(built, spec, slides, tmp_path, contents):
    build_schedule(spec, slides, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(built)
    slides.to_csv(tmp_path / "slides.csv", index=False)
    script = (
        "import json, sys; from pathlib import Path; from hpcssl.schedule.build import *;"
        " from hpcssl.slides.slide_table import read_slides;"
        " build_schedule(ScheduleSpec(**json.loads(sys.argv[1])), read_slides(Path('slides.csv')), Path('other'))"
    )
    env = os.environ | {"PYTHONPATH": str(Path(hpcssl.__file__).parents[1]), "PYTHONHASHSEED": "77", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", script, json.dumps(asdict(spec))], cwd=tmp_path, env=env, check=True)
    assert contents(tmp_path / "other") == contents(built)
    assert Schedule.open(tmp_path / "other").digest == Schedule.open(built).digest


def test_the_identity_does_not_depend_on_the_version_of_the_parquet_library(built, tmp_path):
    assert pyarrow.__version__.encode() in (built / "slides.parquet").read_bytes()
    before = Schedule.open(built).digest
    shutil.copytree(built, tmp_path / "elsewhere")
    header = json.loads((built / "schedule.json").read_text())
    header.pop("checksum")
    header["slides_file_sha256"] = "of the bytes that another version writes"
    header["slides_file_bytes"] += 1
    with (tmp_path / "elsewhere" / "slides.parquet").open("ab") as stream:
        stream.write(b"1")
    (tmp_path / "elsewhere" / "schedule.json").write_text(header_text(header))
    assert Schedule.open(tmp_path / "elsewhere").digest == before
    header["slides_digest"] = "of other slides"
    (tmp_path / "elsewhere" / "schedule.json").write_text(header_text(header))
    assert Schedule.open(tmp_path / "elsewhere").digest != before


def test_every_choice_changes_the_positions(built, spec, slides, tmp_path):
    seen = {(built / "pseudo_epoch_0001.npy").read_bytes()}
    changes: list[dict[str, Any]] = [{"seed": 2}, {"num_groups": 4}, {"organ_power": 0.5}, {"max_repeats": 5}]
    changes += [{"organ_size": "slides", "organ_power": 0.5}, {"organ_weights": {"colon": 1.1}}, {"slide_power": 0.5}]
    changes += [{"include": {"organ": ["breast", "lung"]}, "max_repeats": 20}, {"exclude": {"organ": ["skin"]}}]
    for i, change in enumerate(changes):
        build_schedule(replace(spec, num_pseudo_epochs=2, **change), slides, tmp_path / str(i))
        seen.add((tmp_path / str(i) / "pseudo_epoch_0001.npy").read_bytes())
    assert len(seen) == 10


def test_a_longer_schedule_begins_as_the_shorter(built, spec, slides, tmp_path):
    build_schedule(replace(spec, num_pseudo_epochs=3), slides, tmp_path / "short")
    for number in range(3):
        name = f"pseudo_epoch_{number:04d}.npy"
        assert (tmp_path / "short" / name).read_bytes() == (built / name).read_bytes()


def test_other_columns_change_no_position(built, spec, slides, tmp_path):
    labelled = slides.assign(label="x", patient_id=[f"p{i // 2}" for i in range(len(slides))])
    build_schedule(spec, labelled, tmp_path / "sched")
    assert Schedule.open(tmp_path / "sched").header["slides_digest"] == Schedule.open(built).header["slides_digest"]
    assert (tmp_path / "sched/pseudo_epoch_0000.npy").read_bytes() == (built / "pseudo_epoch_0000.npy").read_bytes()
    assert Schedule.open(tmp_path / "sched").slides()["patient_id"].tolist()[:3] == ["p0", "p0", "p1"]


def test_a_golden_schedule(tmp_path):
    slides = pd.DataFrame({"slide_id": list("abcde"), "organ": list("xxxyy"), "num_tiles": [2, 3, 4, 1, 5]})
    spec = ScheduleSpec(seed=0, num_pseudo_epochs=4, num_groups=2, positions_per_pseudo_epoch=10)
    build_schedule(spec, slides, tmp_path / "sched")
    schedule = Schedule.open(tmp_path / "sched")
    assert schedule.tiles_at(0, 40).reshape(4, 10).tolist() == [
        [14, 6, 5, 8, 12, 7, 11, 6, 10, 13],
        [1, 9, 3, 9, 9, 0, 9, 4, 2, 9],
        [9, 9, 9, 2, 4, 3, 9, 9, 4, 3],
        [10, 14, 11, 5, 1, 13, 8, 0, 12, 7],
    ], "positions may never change between versions"
    assert schedule.digest == "f891daa75f85ffc460bcabb3f300c12e4315d4a7de8a0ad0a0f758e5a12421c7", "nor may the identity"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"positions_per_pseudo_epoch": 150},
            "30 slides of breast in its group need a position each, but its quota is 2",
        ),
        ({"max_repeats": 1}, "its largest organ, has only"),
    ],
)
def test_a_spec_that_cannot_be_met_names_the_organ_and_leaves_nothing(spec, slides, tmp_path, change, told):
    with pytest.raises(ScheduleError) as caught:
        build_schedule(replace(spec, **change), slides, tmp_path / "sched")
    assert told in str(caught.value)
    assert "breast" in str(caught.value)
    assert str(caught.value).startswith("pseudo-epoch 0: ")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_fewer_slides_than_groups_are_told(tmp_path):
    slides = pd.DataFrame({"slide_id": list("abc"), "organ": ["x"] * 3, "num_tiles": [10] * 3})
    with pytest.raises(ScheduleError, match="num_groups"):
        build_schedule(ScheduleSpec(num_pseudo_epochs=5, positions_per_pseudo_epoch=10), slides, tmp_path / "sched")


def test_every_spec_that_ships_loads_and_opal_has_the_papers_numbers(repository):
    spec = load_spec("opal-3b")
    assert (spec.num_pseudo_epochs, spec.positions_per_pseudo_epoch, spec.num_groups) == (50, 65_000_000, 5)
    assert spec == ScheduleSpec(), "the defaults are the paper's"
    assert load_spec("demo").num_groups == 5
    names = [path.stem for path in (repository / "schedules").glob("*.yaml")]
    assert {"opal-3b", "imagenet-epochs", "demo"} <= set(names)
    for name in names:
        assert load_spec(name).hold_out == "", "a list is the user's"


def test_a_spec_is_strict(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 3\nnum_pseudo_epochs: 2\norgan_power: 5e-1\n")
    assert load_spec(str(path)) == ScheduleSpec(seed=3, num_pseudo_epochs=2, organ_power=0.5)
    assert load_spec(str(path), ["seed=4", "num_groups=1"]).seed == 4
    path.write_text("sede: 3\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: unknown setting sede; did you mean seed\?"):
        load_spec(str(path))
    with pytest.raises(ConfigError, match=r"unknown setting num_group; did you mean num_groups\?"):
        load_spec("demo", ["num_group=3"])
    with pytest.raises(ConfigError, match=r"did you mean opal-3b\?"):
        load_spec("opal3b")


OUT_OF_RANGE = """
    num_groups=0 max_repeats=-1 organ_power=-0.1 organ_power=5 organ_power=.nan seed=1.5 seed=x slide_power=-1
    slide_power=4.5 organ_size=area positions_per_pseudo_epoch=2147483648 num_groups=100000000000000000000
    organ_weights.lung=0 organ_weights.lung=-1 organ_weights.lung=.inf organ_weights.lung=1e7
    include=breast include.organ=breast exclude.organ=[[1]] hold_out=3
"""


@pytest.mark.parametrize("override", OUT_OF_RANGE.split())
def test_values_out_of_range_are_refused(override):
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        load_spec("demo", [override])


def test_a_store_with_appended_slides_matches(schedule, slides):
    appended = slides.iloc[:3].assign(slide_id=["n1", "n2", "n3"])
    check_matches(schedule, slides, store=Path("store"))
    check_matches(schedule, slides.assign(label="x")[["label", *slides.columns]], store=Path("store"))
    check_matches(schedule, pd.concat([slides, appended], ignore_index=True), store=Path("store"))


def test_a_store_with_other_slides_is_refused(schedule, slides):
    appended = slides.iloc[:1].assign(slide_id="new")
    for other in (
        slides.iloc[:-1],
        slides.iloc[::-1],
        pd.concat([appended, slides], ignore_index=True),
        slides.assign(num_tiles=[*slides["num_tiles"][:-1], 99]),
        slides.assign(organ=["other", *slides["organ"][1:]]),
        slides.assign(slide_id=["other", *slides["slide_id"][1:]]),
    ):
        with pytest.raises(ScheduleError, match="was built for other slides than store holds"):
            check_matches(schedule, other, store=Path("store"))
