"""Building and extending stores of slides: the same in parts, after kills and anywhere; slides that fail are told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from hpcssl.core.errors import StoreError, UserError
from hpcssl.stores import online_build, store_build
from hpcssl.stores.kinds import open_store
from hpcssl.stores.online import OnlineStore


@pytest.fixture(scope="module")
def slides(online_slides) -> pd.DataFrame:
    return online_slides


@pytest.fixture(scope="module")
def store(online, slides, tmp_path_factory) -> OnlineStore:
    return online.build(tmp_path_factory.mktemp("store") / "store", slides)


def test_a_slide_counts_for_its_tiles_at_the_first_mpp_also_where_it_is_coarser(
    online, slides, store, tmp_path
) -> None:
    """So a slide's share follows from its tissue, not from its scanner; its places are drawn at the others."""
    fine = online.build(tmp_path / "store", slides, 0.25, 0.5, 1.0)
    assert (fine.slides["num_tiles"] / store.slides["num_tiles"]).between(3.6, 4.4).all()
    drawn = fine.drawn_by(0, {})
    assert {drawn.place_of(position, position * 13 % fine.num_tiles).mpp for position in range(100)} == {0.5, 1.0}
    with pytest.raises(StoreError, match=r"coarser than any MPP of --mpp"):
        online.build(tmp_path / "other", slides, 0.25)


def test_the_same_slides_give_the_same_store_wherever_it_is(online, slides, store, tmp_path) -> None:
    again = online.build(tmp_path / "again", slides)
    for name in OnlineStore.layout.files:
        assert (again.index / name).read_bytes() == (store.index / name).read_bytes(), name
    assert again.digest == store.digest
    other = online.build(tmp_path / "other", slides, min_tissue=0.6)
    assert other.digest != store.digest


def test_a_killed_build_goes_on(online, slides, store, tmp_path, monkeypatch) -> None:
    looked_at = []
    look_at = online_build.look_at

    def killed_at_the_third(row, *rest):
        looked_at.append(row["slide_id"])
        if len(looked_at) == 3:
            raise KeyboardInterrupt
        return look_at(row, *rest)

    monkeypatch.setattr(online_build, "look_at", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        online.build(tmp_path / "store", slides)
    assert not (tmp_path / "store" / "store.json").exists()
    done = len(list((tmp_path / "store" / ".partial").glob("*.npz")))
    again = online.build(tmp_path / "store", slides)
    assert len(looked_at) <= 3 + 4 - done + 1
    assert (again.path / "store.json").read_bytes() == (store.path / "store.json").read_bytes()
    assert sorted(p.name for p in again.path.iterdir()) == ["failed_slides.csv", "index-000001", "store.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_what_was_begun_otherwise_is_told(online, slides, tmp_path) -> None:
    online_build.Looking(tmp_path / "store", online.options_of()).claim()
    with pytest.raises(StoreError, match=r"begun with min_tissue = 0.4, now 0.6; give the same, or remove it"):
        online.build(tmp_path / "store", slides, min_tissue=0.6)


def test_what_the_refusal_of_a_slide_without_mpp_advises_goes_on_in_the_same_folder(online, slides, tmp_path) -> None:
    untold = online.draw_slide(tmp_path / "u.tif", seed=5, mpp=30.0)  # which no slide has
    row = {"slide_id": "u", "organ": "lung", "path": str(untold), "mpp": ""}
    with pytest.raises(StoreError, match="or say --assume-mpp"):
        online.build(tmp_path / "store", pd.DataFrame([row]))
    for assumed in (0.6, 0.5):
        work = online_build.Looking(tmp_path / "store", online.options_of(assume_mpp=assumed))
        work.read_some(pd.DataFrame([row]), ["u"])
    assert online.build(tmp_path / "store", pd.DataFrame([row]), assume_mpp=0.5).slides["mpp"].tolist() == [0.5]


def test_a_store_is_built_and_extended_on_a_disk_of_its_own(online, slides, small_disk) -> None:
    """The disk's own folder, and a link to one on it: what is renamed may not come from beside it."""
    link = small_disk.with_name("link")
    (small_disk / "folder").mkdir()
    link.symlink_to(small_disk / "folder")
    online.build(link, slides.iloc[:1])
    assert online.build(link, slides.iloc[:2], append=True).num_slides == 2
    shutil.rmtree(small_disk / "folder")
    assert online.build(small_disk, slides.iloc[:1]).num_slides == 1


def test_slides_are_added_behind_those_that_are_there(online, slides, store, tmp_path) -> None:
    """Those that failed before, too; what is there keeps its numbers and places, also for who has it open."""
    gone, back = Path(slides["path"][1]), tmp_path / "s1.tif"
    table = slides.assign(path=[str(back) if path == str(gone) else path for path in slides["path"]])
    first = online.build(tmp_path / "store", table.iloc[:3])
    assert pd.read_csv(first.path / "failed_slides.csv")["slide_id"].tolist() == ["s1"]
    places = [first.drawn_by(0, {}).place_of(p, p * 7 % first.num_tiles) for p in range(50)]
    back.write_bytes(gone.read_bytes())
    for _ in range(2):  # the second time nothing is new
        grown = online.build(tmp_path / "store", table, append=True)
        assert grown.slides["slide_id"].tolist() == ["s0", "s2", "s1", "s3"]
    assert pd.read_csv(first.path / "failed_slides.csv").empty
    assert [grown.drawn_by(0, {}).place_of(p, p * 7 % first.num_tiles) for p in range(50)] == places
    assert (first.fetch(0, 3) == grown.fetch(0, 3)).all()
    grown.verify()
    at_once = online.build(tmp_path / "at-once", table.iloc[[0, 2, 1, 3]])
    assert at_once.digest == grown.digest != first.digest
    assert at_once.slides.drop(columns="path").equals(grown.slides.drop(columns="path"))


def test_an_extension_refuses_corrected_rows_and_takes_other_columns(online, slides, tmp_path) -> None:
    first = online.build(tmp_path / "store", slides.iloc[:2])
    corrected = pd.concat([slides.iloc[:1].assign(mpp="0.7"), slides.iloc[1:]], ignore_index=True)
    with pytest.raises(StoreError, match=r"slide s0 has mpp 0.5 in it, asked for is 0.7"):
        online.build(tmp_path / "store", corrected, append=True)
    for table, grades in ((slides.iloc[1:2], ["", "3"]), (slides.iloc[:3], ["3", "3", "3"])):
        grown = online.build(tmp_path / "store", table.assign(grade="3"), append=True)
        assert grown.slides["grade"].tolist() == grades
        assert grown.slides.dtypes.drop("grade").equals(first.slides.dtypes)
        grown.verify()
    assert (grown.fetch(0, 3) == first.fetch(0, 3)).all()


def test_what_cannot_be_extended_is_told(online, slides, data, tmp_path) -> None:
    online.build(tmp_path / "store", slides.iloc[:1])
    for told, change in (
        ("exists already; remove it", {}),
        (r"built with min_tissue = 0.4, now 0.6", {"append": True, "min_tissue": 0.6}),
    ):
        with pytest.raises(StoreError, match=told):
            online.build(tmp_path / "store", slides, **change)
    with pytest.raises(StoreError, match="a store of tiles; it is extended without --online"):
        online.build(data.store_path, slides, append=True)
    with pytest.raises(StoreError, match=r"holds breast, no store"):
        online.build(data.tiles, slides)


@pytest.mark.parametrize("killed_at", ["move_synced", "write_header"])
def test_an_extension_killed_at_its_end_leaves_the_store_and_goes_on(
    online, slides, store, tmp_path, monkeypatch, killed_at
) -> None:
    first = online.build(tmp_path / "store", slides.iloc[:2])

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_build, killed_at, killed)
        with pytest.raises(KeyboardInterrupt):
            online.build(tmp_path / "store", slides, append=True)
    assert open_store(first.path).digest == first.digest
    assert online.build(tmp_path / "store", slides, append=True).digest == store.digest


def test_slides_that_cannot_be_used_are_told_and_do_not_stop_the_others(online, slides, tmp_path) -> None:
    cut = tmp_path / "cut.tif"
    cut.write_bytes(Path(slides["path"][0]).read_bytes()[:200_000])
    blank = online.draw_slide(tmp_path / "blank.tif", seed=0, mpp=30.0)
    files = {"cut": cut, "gone": tmp_path / "gone.tif", "no-mpp": blank}
    more = pd.DataFrame({"slide_id": files.keys(), "organ": "lung", "path": map(str, files.values()), "mpp": ""})
    store = online.build(tmp_path / "store", pd.concat([slides, more], ignore_index=True))
    assert store.slides["slide_id"].tolist() == slides["slide_id"].tolist()
    failed = pd.read_csv(store.path / "failed_slides.csv")
    assert failed["slide_id"].tolist() == ["cut", "gone", "no-mpp"]
    assert [word in reason for word, reason in zip(("truncated", "no such", "mpp"), failed["reason"].str.lower())]
    with pytest.raises(StoreError, match="none of 3 slides can be used; first:"):
        online.build(tmp_path / "other", more)


def test_options_that_cannot_be_used_are_refused() -> None:
    for options, told in (  # those of `hpcssl tile` are checked as there
        ({"mpps": (0.5, 0.5)}, "expected each MPP once"),
        ({"mpps": (0.5, 0.0)}, "--mpp 0; expected 0.05 to 100"),
        ({"mpps": (0.5, 1.0), "of_grid": True}, "--grid: tiles of the grid are of one MPP, not of 2"),
        ({"mpps": (0.5,), "tile_px": 0}, "--tile-px 0"),
    ):
        with pytest.raises(UserError, match=told):
            online_build.OnlineOptions(**options)


def test_the_header_says_what_it_is(store) -> None:
    header = json.loads((store.path / "store.json").read_text())
    keys = ("kind", "mpps", "tile_px", "of_grid", "min_tissue", "num_slides")
    assert [header[key] for key in keys] == ["slides", [0.5, 1.0], 64, False, 0.4, 4]
