"""Extending a store: tile numbers stay, new slides come behind, changed old ones are refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from hpcssl.core.errors import StoreError
from hpcssl.stores.scan import BuildOptions, build_store
from hpcssl.stores.store import Store

KINDS = {"loose": BuildOptions(), "packed": BuildOptions(pack=True, shard_gb=10e-6)}


@pytest.fixture(params=KINDS)
def options(request: pytest.FixtureRequest) -> BuildOptions:
    return KINDS[request.param]


@pytest.fixture
def tiles(tmp_path: Path, small: ModuleType) -> Path:
    folder: Path = small.make_tiles(tmp_path / "tiles", slides=2, tiles=3)
    return folder


@pytest.fixture
def store(tiles: Path, tmp_path: Path, options: BuildOptions) -> Store:
    return build_store(tiles, tmp_path / "store", options=options)


def add_slide(tiles: Path, slide: str, jpegs: list[bytes]) -> None:
    (tiles / slide).mkdir(parents=True)
    for number, jpeg in enumerate(jpegs):
        (tiles / slide / f"new-{number}.jpg").write_bytes(jpeg)


def content(store: Store, count: int | None = None) -> list[tuple[str, bytes]]:
    tiles = range(store.num_tiles if count is None else count)
    return [(str(store.file_of(t)), store.fetch(t, t)) for t in tiles]


def extend(store: Store, tiles: Path, table: Path | None = None) -> Store:
    return build_store(tiles, store.path, table=table, append=True, options=BuildOptions(shard_gb=10e-6))


def test_new_slides_come_behind_and_tile_numbers_stay(store: Store, tiles: Path, small: ModuleType) -> None:
    before = content(store)
    new = [small.jpeg(i) for i in (500, 501)]
    add_slide(tiles, "aaa/a1", new)  # sorts before what is there
    add_slide(tiles, "lung/lung-9", new[:1])
    told: list[int] = []
    extended = build_store(tiles, store.path, append=True, on_total=told.append, on_progress=told.append)
    assert told == [6, *[1] * 6]
    assert extended.kind == store.kind
    assert extended.slides["slide_id"].tolist() == ["breast-0", "breast-1", "lung-0", "lung-1", "a1", "lung-9"]
    assert extended.slides["first_tile"].tolist() == [0, 3, 7, 10, 14, 16]
    assert content(extended, len(before)) == before
    assert [extended.fetch(0, t) for t in range(14, 17)] == [*new, new[0]]
    assert extended.digest != store.digest
    extended.verify(deep=True)
    assert content(store) == before, "who has it open reads on"


def test_again_and_again_it_has_the_identity_of_one_build(
    store: Store, tiles: Path, small: ModuleType, options: BuildOptions
) -> None:
    for number in range(4):
        add_slide(tiles, f"more/m{number}", [small.jpeg(600 + number)])
        grown = extend(store, tiles)
        grown.verify()
        assert grown.digest == build_store(tiles, tiles.with_name(f"once-{number}"), options=options).digest
        assert grown.num_slides == 5 + number
        assert grown.fetch(0, grown.num_tiles - 1) == small.jpeg(600 + number)
    folders = sorted(p.name for p in store.path.iterdir() if p.is_dir())
    assert folders == ["index-000003", "index-000004"], "the index before stays for those who have it open"
    assert not (store.path / "names.bin").exists()


def test_nothing_new_changes_nothing(store: Store, tiles: Path) -> None:
    before = {p: p.read_bytes() for p in store.path.iterdir()}
    assert extend(store, tiles).digest == store.digest
    assert {p: p.read_bytes() for p in store.path.iterdir()} == before


def test_what_a_killed_extension_left_goes_with_the_next(store: Store, tiles: Path, small: ModuleType) -> None:
    before = {p: p.read_bytes() for p in store.path.iterdir()}
    add_slide(tiles, "aaa/new", [small.jpeg(3)])

    def stop(_: int) -> None:
        if (store.path / ".partial").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_store(tiles, store.path, append=True, on_progress=stop)
    assert (store.path / ".partial").exists()
    shutil.rmtree(tiles / "aaa")
    extend(store, tiles)
    assert {p: p.read_bytes() for p in store.path.iterdir()} == before
    assert not (store.path / ".partial").exists()


def test_a_store_that_is_not_there_is_built(tiles: Path, tmp_path: Path, options: BuildOptions) -> None:
    store = build_store(tiles, tmp_path / "new", append=True, options=options)
    assert store.digest == build_store(tiles, tmp_path / "other", options=options).digest


def test_a_table_may_list_new_slides_alone_and_bring_labels(store: Store, tiles: Path, small: ModuleType) -> None:
    add_slide(tiles, "lung/n1", [small.jpeg(1)])
    add_slide(tiles, "lung/n2", [small.jpeg(2)])
    table = tiles.with_name("new.csv")
    table.write_text("slide_id,organ,num_tiles,label\nn2,lung,1,yes\nlung-0,lung,3,no\n")
    extended = extend(store, tiles, table)
    assert extended.slides["slide_id"].tolist() == ["breast-0", "breast-1", "lung-0", "lung-1", "n2"]
    assert extended.slides["label"].tolist() == ["", "", "no", "", "yes"]
    assert extended.slides["num_tiles"].tolist() == [3, 4, 3, 4, 1]
    table.write_text("slide_id,organ,num_tiles,label\nlung-1,lung,4,maybe\n")
    assert extend(store, tiles, table).slides["label"].tolist() == ["", "", "no", "maybe", "yes"]


def write_table(text: str) -> Callable[[Path], object]:
    return lambda tiles: (tiles / "slides.csv").write_text("slide_id,organ,num_tiles\n" + text)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tile gone": (lambda t: (t / "lung/lung-0/tile_x0_y0.jpg").unlink(), "slide lung-0 is not what it was"),
    "a tile more": (
        lambda t: shutil.copy(t / "breast/breast-1/tile-0.jpg", t / "breast/breast-1/tile-7.jpg"),
        "slide breast-1 is not what it was when the store was built (0 tiles gone, 1 new; first: tile-7.jpg)",
    ),
    "a tile renamed": (
        lambda t: (t / "breast/breast-1/tile-0.jpg").rename(t / "breast/breast-1/x.jpg"),
        "(1 tile gone, 1 new; first: tile-0.jpg)",
    ),
    "a tile longer": (
        lambda t: (t / "breast/breast-1/tile-0.jpg").open("ab").write(b"\0"),
        "slide breast-1 is not what it was when the store was built (tile-0.jpg has",
    ),
    "a tile emptied": (lambda t: (t / "breast/breast-1/tile-0.jpg").write_bytes(b""), "tile-0.jpg: zero bytes"),
    "another organ": (write_table("lung-0,breast,3\n"), "slide lung-0 has organ lung in it, but breast in the table"),
    "another count": (write_table("lung-0,lung,4\n"), "slide lung-0 has num_tiles 3 in it, but 4 in the table"),
    "a bad new tile": (lambda t: add_slide(t, "lung/n", [b"text"]), "1 of 15 tile files are no whole JPEG"),
    "an empty new slide": (lambda t: add_slide(t, "lung/n", []), "slide n has no tiles"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_be_extended_is_told_and_stays(store: Store, tiles: Path, change: str, small: ModuleType) -> None:
    make, told = CHANGES[change]
    before = {p: p.read_bytes() for p in store.path.iterdir()}
    add_slide(tiles, "aaa/good", [small.jpeg(3)] * 3)
    if "new" in change:
        shutil.rmtree(tiles / "aaa")
    make(tiles)
    with pytest.raises(StoreError) as caught:
        extend(store, tiles)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in store.path.iterdir()} == before
    listed = ["store.bad_tiles.csv"] if change == "a bad new tile" else []
    assert sorted(p.name for p in store.path.parent.iterdir()) == ["store", *listed, "tiles"]


def test_the_tiles_of_a_packed_store_may_be_gone_and_those_of_a_loose_one_not(
    store: Store, tiles: Path, small: ModuleType
) -> None:
    before = [store.fetch(t, t) for t in range(7)] if store.kind == "packed" else []
    shutil.rmtree(tiles / "breast")
    add_slide(tiles, "zzz/z1", [small.jpeg(3)])
    if store.kind == "loose":
        with pytest.raises(StoreError, match=r"slide breast-0 is not what it was .*its folder is gone"):
            extend(store, tiles)
        return
    extended = extend(store, tiles)
    assert [extended.fetch(t, t) for t in range(7)] == before
    assert extended.fetch(0, extended.num_tiles - 1) == small.jpeg(3)


def test_tiles_elsewhere_extend_a_packed_store_alone(store: Store, tmp_path: Path, small: ModuleType) -> None:
    add_slide(tmp_path / "elsewhere", "lung/n", [small.jpeg(4)])
    if store.kind == "packed":
        assert extend(store, tmp_path / "elsewhere").fetch(0, 14) == small.jpeg(4)
    else:
        with pytest.raises(StoreError, match=r"its tiles are below .*tiles; extend it with tiles below that"):
            extend(store, tmp_path / "elsewhere")
