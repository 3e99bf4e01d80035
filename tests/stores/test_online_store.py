"""Stores of slides: what they hold, where their tiles are, and what happens where a slide is not what it was."""

from __future__ import annotations

import pickle
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hpcssl.core.errors import BadTileError, StoreError
from hpcssl.slides import opening
from hpcssl.slides.opening import OpenSlides, open_slide
from hpcssl.stores import online as online_module
from hpcssl.stores import online_build
from hpcssl.stores.kinds import open_store
from hpcssl.stores.online import OnlineStore


@pytest.fixture(scope="module")
def slides(online_slides) -> pd.DataFrame:
    return online_slides


@pytest.fixture(scope="module")
def store(online, slides, tmp_path_factory) -> OnlineStore:
    return online.build(tmp_path_factory.mktemp("store") / "store", slides)


@pytest.fixture(scope="module")
def drawn(store) -> OnlineStore:
    return store.drawn_by(3, {})


def is_tissue(tile: np.ndarray) -> np.ndarray:
    """Return which pixels of a test slide are tissue; glass is 244 ± 3."""
    return tile.min(axis=-1) < 225


def test_an_opened_store_is_what_was_built(store, slides) -> None:
    again = open_store(store.path)
    assert isinstance(again, OnlineStore)
    assert again.slides["slide_id"].tolist() == slides["slide_id"].tolist()
    assert again.num_tiles == again.slides["num_tiles"].sum() > 200
    assert (again.mpps, again.tile_px, again.drawn) == ([0.5, 1.0], 64, False)
    drawn = pickle.loads(pickle.dumps(again.drawn_by(3, {1.0: 1})))
    assert drawn.place_of(5, 6) == store.drawn_by(3, {1.0: 1}).place_of(5, 6), "pickled, too"
    again.verify(deep=True)


def test_tissue_is_told_in_square_millimetres(store) -> None:
    """Against the slides' own pixels, counted at half a micron."""
    for slide, row in enumerate(store.slides.itertuples()):
        opened = open_slide(store.file_of(store.tiles_of_slide(slide)[0]))
        found = is_tissue(opened.read(0, 0, 0, opened.width, opened.height))
        assert row.tissue_mm2 == pytest.approx(found.sum() * 0.25e-6, rel=0.1)


def test_tiles_of_the_grid_are_those_of_the_slide(store) -> None:
    for tile in range(0, store.num_tiles, 37):
        x, y = store.coordinates_of(tile)
        wanted = open_slide(store.file_of(tile)).read(x, y, 0, 64, 64)
        np.testing.assert_array_equal(store.fetch(tile, tile), wanted)
        np.testing.assert_array_equal(store.fetch(0, tile), wanted, "whatever the position")


def test_a_drawn_place_is_of_the_position_and_on_the_slide_of_its_tile(drawn) -> None:
    places = [drawn.place_of(position, 0) for position in range(200)]
    assert places == [open_store(drawn.path).drawn_by(3, {}).place_of(position, 0) for position in range(200)]
    assert len({(p.x, p.y, p.mpp) for p in places}) == 200
    assert {p.slide for p in places} == {0}
    assert all(drawn.place_of(position, drawn.num_tiles - 1).slide == 3 for position in range(20))
    assert all(a != drawn.place_of(p, 1) for p, a in enumerate(places)), "a substitute of the same slide is elsewhere"
    assert all(a != drawn.drawn_by(4, {}).place_of(p, 0) for p, a in enumerate(places)), "another seed"


def test_pixels_are_those_of_the_drawn_place(drawn) -> None:
    seen = Counter()
    for position in range(40):
        tile = drawn.tiles_of_slide(position % 4)[0]
        place = drawn.place_of(position, tile)
        slide, factor = open_slide(drawn.file_of(tile)), round(place.mpp / 0.5)
        wanted = slide.read(round(place.x / factor), round(place.y / factor), factor - 1, 64, 64)
        np.testing.assert_array_equal(drawn.fetch(position, tile), wanted)
        seen[place.mpp] += 1
    assert min(seen[0.5], seen[1.0]) > 10


def test_drawn_tiles_hold_at_least_the_min_tissue(drawn) -> None:
    """By their own pixels; cells of 8 microns at the tissue's edge are worth a few per cent of a tile."""
    shares = [is_tissue(drawn.fetch(position, position * 7 % drawn.num_tiles)).mean() for position in range(400)]
    assert min(shares) > 0.4 - 0.06
    assert np.mean(shares) > 0.85, "most lie inside"
    assert min(shares) < 0.6, "but they reach the edges"


def test_the_check_catches_places_without_regard_to_tissue(online, slides, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(online_build, "_corner_cells", lambda slide, found, *rest: np.ones_like(found.tissue))
    drawn = online.build(tmp_path / "store", slides).drawn_by(3, {})
    with pytest.raises(AssertionError):
        test_drawn_tiles_hold_at_least_the_min_tissue(drawn)


def test_mpps_are_mixed_as_the_spec_says(store) -> None:
    for weights, share in (({}, 0.5), ({0.5: 1, 1.0: 3}, 0.25), ({0.5: 1}, 1.0), ({1.0: 2}, 0.0)):
        drawn = store.drawn_by(0, weights)
        fine = np.mean([drawn.place_of(position, position % store.num_tiles).mpp == 0.5 for position in range(2000)])
        assert abs(fine - share) < 0.04


def test_a_slide_that_lacks_an_mpp_gives_the_others(online, slides, tmp_path) -> None:
    """0.25 is finer than any of these slides."""
    store = online.build(tmp_path / "store", slides, 0.5, 0.25, 1.0)
    drawn = store.drawn_by(0, {0.25: 2, 0.5: 1, 1.0: 1})
    counts = Counter(drawn.place_of(position, 0).mpp for position in range(1000))
    assert set(counts) == {0.5, 1.0}
    assert abs(counts[0.5] - 500) < 60
    with pytest.raises(StoreError, match=r"slide s0 has no place for a tile at MPP 0.25 \(4 such slides\)"):
        store.drawn_by(0, {0.25: 1})


def test_weights_that_cannot_be_met_are_refused(store, data) -> None:
    with pytest.raises(StoreError, match=r"names MPP 2.0; this store has places at 0.5, 1.0"):
        store.drawn_by(0, {2.0: 1})
    with pytest.raises(StoreError, match="mpp_weights is for stores of slides"):
        data.store.drawn_by(0, {0.5: 1})
    assert data.store.drawn_by(0, {}).digest == data.store.digest


def test_a_store_of_the_grid_draws_nothing(online, slides, tmp_path) -> None:
    store = online.build(tmp_path / "store", slides, 0.5, of_grid=True)
    bound = store.drawn_by(3, {})
    assert not bound.drawn
    np.testing.assert_array_equal(bound.fetch(17, 5), store.fetch(0, 5))
    with pytest.raises(StoreError, match=r"names MPP 1.0; this store has places at 0.5"):
        store.drawn_by(3, {1.0: 1})


def test_verify_finds_a_slide_that_is_not_what_it_was_and_a_changed_index(online, tmp_path) -> None:
    slides = online.draw_slides(tmp_path / "slides", count=2)
    store = online.build(tmp_path / "store", slides)
    file, index = Path(slides["path"][1]), store.index / "corners.npy"
    data = file.read_bytes()
    for changed in (data + b"x", data[:-1000], None):
        file.unlink() if changed is None else file.write_bytes(changed)
        with pytest.raises(StoreError, match=r"1 of 2 slides changed since it was built; first: .*s1.tif"):
            store.verify()
    index.write_bytes(index.read_bytes()[:-1] + b"\xff")
    with pytest.raises(StoreError, match=r"corners.npy: not what was written"):
        open_store(store.path).verify()


def test_a_damaged_block_is_a_bad_tile_and_a_missing_folder_is_not(online, tmp_path) -> None:
    slides = online.draw_slides(tmp_path / "slides", count=2)
    store = online.build(tmp_path / "store", slides)
    file = Path(slides["path"][0])
    data = bytearray(file.read_bytes())
    x, y = store.coordinates_of(0)
    level = open_slide(file)._levels[0]
    block = y // 256 * level.columns + x // 256
    data[level.offsets[block] : level.offsets[block] + level.sizes[block]] = bytes(int(level.sizes[block]))
    file.write_bytes(data)
    with pytest.raises(
        BadTileError, match=rf"s0.tif: block {block} of level 0 cannot be decoded .*x {x}, y {y}, MPP 0.5"
    ):
        open_store(store.path).fetch(0, 0)
    (tmp_path / "slides").rename(tmp_path / "unmounted")
    with pytest.raises(StoreError, match="is its file system mounted") as caught:
        open_store(store.path).fetch(0, 0)
    assert not isinstance(caught.value, BadTileError)


class _Counted:
    """Stands for an opened slide."""

    opened: Counter = Counter()
    held_bytes = 40

    def __init__(self, path: str):
        self.opened[path] += 1


@pytest.fixture
def counted(monkeypatch) -> Counter:
    monkeypatch.setattr(_Counted, "opened", Counter())
    monkeypatch.setattr(opening, "open_slide", _Counted)
    return _Counted.opened


@pytest.mark.parametrize(
    ("most", "most_bytes", "paths", "times_opened", "still_open"),
    [
        (2, 1000, "abacab", {"a": 1, "b": 2, "c": 1}, ["a", "b"]),
        (10, 100, "abacab", {"a": 1, "b": 2, "c": 1}, ["a", "b"]),
        (10, 30, "aabb", {"a": 1, "b": 1}, ["b"]),
    ],
    ids=["number", "memory of their tables", "one that is larger stays until there is another"],
)
def test_so_many_slides_stay_open_those_used_last(counted, most, most_bytes, paths, times_opened, still_open) -> None:
    slides = OpenSlides(most, most_bytes)
    for path in paths:
        slides.get(path)
    assert counted == times_opened
    assert list(slides._slides) == still_open


def test_threads_wait_for_one_opening_and_share_its_failure(small, monkeypatch) -> None:
    begun, go, opened = threading.Event(), threading.Event(), []

    def slow(path: str) -> None:
        opened.append(path)
        begun.set()
        go.wait(10)
        raise TimeoutError("does not answer")

    monkeypatch.setattr(opening, "open_slide", slow)
    slides = OpenSlides(2, 1000)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(slides.get, "a")
        begun.wait(10)
        gets = [first, *(pool.submit(slides.get, "a") for _ in range(3))]
        small.wait_until(lambda: len(slides._slides["a"]._condition._waiters) == 3, 10, "the others wait")
        go.set()
    assert [str(get.exception()) for get in gets] == ["does not answer"] * 4
    assert opened == ["a"]
    assert not slides._slides, "a failure is not kept: the next one tries again"


def test_handles_are_bound_and_let_go(store, monkeypatch) -> None:
    """Eight threads over four slides with room for one: files are open only while somebody reads."""
    monkeypatch.setattr(online_module, "_MOST_OPEN", 1)
    fresh = open_store(store.path)

    def open_files() -> int:
        names = [p.resolve().name for p in Path("/proc/self/fd").iterdir() if p.exists()]
        return sum(name.endswith(".tif") for name in names)

    def read(start: int) -> None:
        for step in range(20):
            fresh.fetch(0, (start * 31 + step * 97) % fresh.num_tiles)

    before = open_files()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    assert open_files() - before <= 1
