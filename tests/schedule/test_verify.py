"""`verify_schedule` against every kind of damage, with and without checksums made to match it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hpcssl.core.atomic import digest_file
from hpcssl.core.errors import ScheduleError
from hpcssl.schedule.build import build_schedule
from hpcssl.schedule.file import header_text
from hpcssl.schedule.spec import ScheduleSpec
from hpcssl.schedule.verify import verify_schedule
from hpcssl.slides.slide_table import digest_slides

FILES = [f"pseudo_epoch_000{n}.npy" for n in range(4)]
SMALL = ScheduleSpec(num_pseudo_epochs=4, num_groups=2, positions_per_pseudo_epoch=60, max_repeats=30)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A schedule of 12 slides of two organs, four pseudo-epochs of 60; slide s12 is held out."""
    folder = tmp_path_factory.mktemp("verify")
    slides = pd.DataFrame({"slide_id": [f"s{i}" for i in range(13)], "organ": [*["a", "b", "a"] * 4, "b"]})
    slides["patient_id"] = [f"p{i // 2}" for i in range(13)]
    (folder / "test.csv").write_text("slide_id\ns12\n")
    spec = replace(SMALL, hold_out=str(folder / "test.csv"))
    build_schedule(spec, slides.assign(num_tiles=[*[3, 5, 7] * 4, 4]), folder / "sched")
    return folder / "sched"


@pytest.fixture
def sched(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "sched"))


def file_of(sched: Path, number: int) -> Path:
    return sched / f"pseudo_epoch_{number:04d}.npy"


def change_header(sched: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = sched / "schedule.json"
    header = json.loads(path.read_text())
    header.pop("checksum")
    change(header)
    path.write_text(header_text(header), encoding="utf-8")


def match_checksums(sched: Path) -> None:
    """Make every checksum true again, so that only the guarantees can tell."""

    def rewrite(header: dict[str, Any]) -> None:
        for record in header["pseudo_epochs"]:
            record["sha256"] = digest_file(sched / record["file"])
            record["bytes"] = (sched / record["file"]).stat().st_size
        header["slides_file_sha256"] = digest_file(sched / "slides.parquet")
        header["slides_file_bytes"] = (sched / "slides.parquet").stat().st_size
        header["slides_digest"] = digest_slides(pd.read_parquet(sched / "slides.parquet"))
        if header["hold_out_sha256"]:
            header["hold_out_bytes"] = (sched / "hold_out.csv").stat().st_size
            header["hold_out_sha256"] = digest_file(sched / "hold_out.csv")

    change_header(sched, rewrite)


def change_tiles(sched: Path, number: int, change: Callable[[np.ndarray], object]) -> None:
    tiles = np.load(file_of(sched, number))
    change(tiles)
    np.save(file_of(sched, number), tiles)


def change_slides(sched: Path, **columns: Any) -> None:
    frame = pd.read_parquet(sched / "slides.parquet").assign(**columns)
    frame.to_parquet(sched / "slides.parquet", index=False)


def verdict(sched: Path) -> str:
    """Return what verify says; fails where it passes or lets anything but a ScheduleError out."""
    told = []
    for jobs in (1, 2):
        with pytest.raises(ScheduleError) as caught:
            verify_schedule(sched, jobs=jobs)
        told.append(str(caught.value))
    assert "\n" not in told[0]
    assert told[0] == told[1], "the first violation, with any number of threads"
    return told[0]


def test_a_whole_schedule_passes_and_every_position_is_looked_at(sched, built):
    seen: list[int] = []
    verify_schedule(sched, on_progress=seen.append)
    assert sum(seen) == 240
    verify_schedule(built)
    seen.clear()
    verify_schedule(built, jobs=2, on_progress=seen.append)
    assert sum(seen) == 30_000
    match_checksums(sched)
    verify_schedule(sched)  # the tests' own rewriting breaks nothing


@pytest.mark.parametrize("name", [*FILES, "slides.parquet", "hold_out.csv"])
def test_any_flipped_byte_is_found(sched, name):
    path = sched / name
    whole = path.read_bytes()
    for place in sorted({0, len(whole) - 1, *range(0, len(whole), max(1, len(whole) // 12))}):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x04]) + whole[place + 1 :])
        assert name in verdict(sched)
    path.write_bytes(whole)
    verify_schedule(sched)


@pytest.mark.parametrize("kept", [0.0, 0.5, None])
@pytest.mark.parametrize("name", ["slides.parquet", "hold_out.csv", "schedule.json", FILES[3]])
def test_a_file_that_cannot_be_read_or_is_missing_is_told(sched, name, kept):
    path = sched / name
    if kept is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    assert name in verdict(sched)


@pytest.mark.parametrize("kept", [0, 1, 100, 128, 300])
@pytest.mark.parametrize("rewritten", [False, True])
def test_a_truncated_file_is_found(sched, kept, rewritten):
    path = file_of(sched, 2)
    path.write_bytes(path.read_bytes()[:kept])
    if rewritten:
        match_checksums(sched)
    assert "pseudo_epoch_0002.npy" in verdict(sched)


@pytest.mark.parametrize(("a", "b"), [(0, 1), (0, 2), (2, 3)])
@pytest.mark.parametrize("rewritten", [False, True])
def test_two_files_swapped_are_found(sched, a, b, rewritten):
    first, second = file_of(sched, a).read_bytes(), file_of(sched, b).read_bytes()
    file_of(sched, a).write_bytes(second)
    file_of(sched, b).write_bytes(first)
    if rewritten:
        match_checksums(sched)
    said = verdict(sched)
    assert f"pseudo_epoch_000{a}.npy" in said
    assert ("guarantee" in said) == rewritten


def entries_of_one_slide(tiles: np.ndarray) -> tuple[int, int]:
    """Return two places that hold different tiles of slide s2 (tiles 8 to 14) or of s11 (53 to 59)."""
    for low, high in ((8, 15), (53, 60), (0, 3), (3, 8)):
        places = np.flatnonzero((tiles >= low) & (tiles < high))
        others = places[tiles[places] != tiles[places[0]]] if len(places) else places
        if len(others):
            return int(places[0]), int(others[0])
    raise AssertionError("no such slide in this pseudo-epoch")


def replace_within_slide(tiles: np.ndarray) -> None:
    a, b = entries_of_one_slide(tiles)
    tiles[a] = tiles[b]


def replace_by_another_slide(tiles: np.ndarray) -> None:
    slides = np.searchsorted(np.cumsum([3, 5, 7] * 4), tiles, side="right")
    tiles[0] = tiles[np.flatnonzero(slides != slides[0])[0]]


def swap_two_places(tiles: np.ndarray) -> None:
    a, b = entries_of_one_slide(tiles)
    tiles[a], tiles[b] = tiles[b], tiles[a]


BREAKAGES: dict[str, tuple[Callable[[np.ndarray], object], str]] = {
    "a tile of the same slide instead": (replace_within_slide, "guarantee 3"),
    "a tile of another slide instead": (replace_by_another_slide, "guarantee 2"),
    "two places swapped": (swap_two_places, "guarantee 4"),
    "no shuffle": (np.ndarray.sort, "guarantee 4"),
    "another shuffle": (np.random.default_rng(0).shuffle, "guarantee 4"),
    "reversed": (lambda tiles: np.copyto(tiles, tiles[::-1].copy()), "guarantee 4"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
@pytest.mark.parametrize("number", [0, 3])
def test_a_broken_guarantee_is_named_although_checksums_match(sched, breakage, number):
    change, told = BREAKAGES[breakage]
    change_tiles(sched, number, change)
    match_checksums(sched)
    said = verdict(sched)
    assert f"pseudo_epoch_000{number}.npy" in said
    assert told in said


def test_a_tile_beyond_the_last_is_told(sched):
    number = next(n for n in range(4) if np.load(file_of(sched, n)).max() >= 53)
    change_tiles(sched, number, lambda tiles: np.put(tiles, tiles.argmax(), 64))
    match_checksums(sched)
    assert f"pseudo_epoch_000{number}.npy" in verdict(sched)


@pytest.mark.parametrize(
    "columns",
    [
        {"num_tiles": [*[3, 5, 7] * 3, 3, 5, 8, 4]},
        {"num_tiles": [7, 5, 3, *[3, 5, 7] * 3, 4]},
        {"organ": [*["b", "a", "a"] * 4, "b"]},
    ],
)
def test_another_slide_table_is_found_although_checksums_match(sched, columns):
    change_slides(sched, **columns)
    assert re.search(r"slides\.parquet: (not what was written \(checksum differs|\d+ bytes, expected)", verdict(sched))
    match_checksums(sched)
    assert re.search(r"slides\.parquet make it|slides\.parquet: first_tile is|guarantee [12]", verdict(sched))


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("first_tile", 0, "slides.parquet: first_tile is not what spec and slides make it"),
        ("eligible", True, "slides.parquet: eligible is not what spec and slides make it"),
        ("eligible", False, "slides.parquet: eligible is not what spec and slides make it"),
        ("patient_id", "p", "both sides of the hold-out"),
    ],
)
def test_a_column_that_the_rest_does_not_make_is_found(sched, column, value, told):
    change_slides(sched, **{column: value})
    match_checksums(sched)
    assert told in verdict(sched)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("slide_id,patient_id\ns11,\ns12,\n", "both sides"),
        ("slide_id,patient_id\n,p6\n", "tells hold_out"),
        ("slide_id,patient_id\ns10,\ns11,\ns12,\n", "tells eligible"),
        ("slide_id,patient_id\ns10,\ns11,\n", "tells eligible"),
        ("slide_id,patient_id\nnobody,\n", "none of its slides"),
        ("slide_id,patient_id\n", "names no slide"),
        ("", "not a CSV file"),
    ],
)
def test_another_hold_out_list_is_found(sched, text, told):
    (sched / "hold_out.csv").write_text(text)
    assert re.search(r"hold_out\.csv: (not what was written \(checksum differs|\d+ bytes, expected)", verdict(sched))
    match_checksums(sched)
    if told.startswith("tells hold_out"):  # it holds the same slides by another name
        verify_schedule(sched)
    else:
        assert re.search(told, verdict(sched))


def test_a_hold_out_list_that_was_dropped_is_found(sched):
    (sched / "hold_out.csv").unlink()
    change_header(sched, lambda h: (h["spec"].update(hold_out=""), h.update(hold_out_sha256="")))
    assert "tells eligible" in verdict(sched)


def test_a_tile_of_a_held_out_slide_is_found(sched):
    change_tiles(sched, 1, lambda tiles: np.put(tiles, 17, 62))
    match_checksums(sched)
    assert "slide s12 is drawn, but filtered or held out; first at place 17" in verdict(sched)


def test_another_slide_id_is_found_by_the_digest(sched):
    change_slides(sched, slide_id=[*(f"t{i}" for i in range(12)), "s12"])
    digest, size = digest_file(sched / "slides.parquet"), (sched / "slides.parquet").stat().st_size
    change_header(sched, lambda h: h.update(slides_file_sha256=digest, slides_file_bytes=size))
    assert re.search(r"tells slides_digest = .* but its spec and slides\.parquet make it", verdict(sched))


def test_a_changed_quota_in_the_header_is_named(sched):
    change_header(sched, lambda header: header["pseudo_epochs"][1]["organs"]["a"].update(achieved=29))
    assert "what it tells of pseudo-epoch 1" in verdict(sched)


SPECS: dict[str, Any] = {"seed": 1, "num_groups": 1, "organ_power": 1.0, "max_repeats": 1, "slide_power": 0.0}
SPECS |= {"organ_weights": {"a": 1.2}, "num_pseudo_epochs": 3, "exclude": {"slide_id": ["s0"]}}
HEADERS: dict[str, Any] = {"num_tiles": 1, "num_slides": 1, "dtype": "uint64", "slides_digest": "0" * 64}
RECORDS: dict[str, Any] = {"slides_used": 99, "number": 3, "file": FILES[3], "sha256": "0" * 64, "bytes": 1}
RECORDS["organs"] = {"c": {"wanted": 1, "achieved": 1}}
CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    **{f"spec.{key}": lambda h, key=key, v=v: h["spec"].update({key: v}) for key, v in SPECS.items()},
    **{key: lambda h, key=key, v=v: h.update({key: v}) for key, v in HEADERS.items()},
    **{f"record.{key}": lambda h, key=key, v=v: h["pseudo_epochs"][2].update({key: v}) for key, v in RECORDS.items()},
    "wanted": lambda h: h["pseudo_epochs"][0]["organs"]["a"].update(wanted=99),
    "eligible": lambda h: h["eligible"].update(slides=13),
    "who is eligible": lambda h: h["eligible"].update(sha256="0" * 64),
    "last record dropped": lambda h: h["pseudo_epochs"].pop(),
    "records swapped": lambda h: h["pseudo_epochs"].insert(0, h["pseudo_epochs"].pop(1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_field_of_the_header_is_checked(sched, change):
    change_header(sched, CHANGES[change])
    verdict(sched)


ARRAYS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "shorter": lambda tiles: tiles[:-1],
    "signed": lambda tiles: tiles.astype(np.int32),
    "big-endian": lambda tiles: tiles.astype(">u4"),
    "two axes": lambda tiles: tiles.reshape(6, 10),
    "longer": lambda tiles: np.append(tiles, tiles[:1]).astype(np.uint32),
    "longer and wider": lambda tiles: np.append(tiles, tiles[:1]).astype(np.uint64),
}


@pytest.mark.parametrize("change", ARRAYS)
def test_another_array_is_found_although_checksums_match(sched, change):
    np.save(file_of(sched, 1), ARRAYS[change](np.load(file_of(sched, 1))))
    match_checksums(sched)
    said = verdict(sched)
    assert "pseudo_epoch_0001.npy" in said
    assert change.startswith("longer") or "not an array of 60 uint32 tile numbers" in said


def test_the_first_violation_is_named(sched):
    for number in (1, 3):
        change_tiles(sched, number, np.ndarray.sort)
    assert "pseudo_epoch_0001.npy" in verdict(sched)
