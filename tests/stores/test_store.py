"""Loose tile stores: building from good and bad folders, fetching, and verify against every kind of damage."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import hpcssl
from hpcssl.core.atomic import digest_bytes
from hpcssl.core.errors import BadTileError, SlideError, StoreError, UserError
from hpcssl.stores.kinds import open_store
from hpcssl.stores.loose import LooseStore
from hpcssl.stores.scan import BuildOptions, build_store
from hpcssl.stores.store import Store

SLIDES = {"breast/B 1": 3, "breast/b2": 1, "lung/ü—1": 4, "lung/001": 2}


def jpeg(number: int) -> bytes:
    """A small JPEG that differs from every other."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (8, 8 + number % 3, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def make_tiles(root: Path) -> dict[str, bytes]:
    """Write the tiles and return their content by path below the root."""
    content: dict[str, bytes] = {}
    for slide, count in SLIDES.items():
        for i in range(count):
            name = f"{slide}/tile {i}é_x{i * 224}_y{448}.{'JPEG' if i == 1 else 'jpg'}"
            content[name] = jpeg(len(content))
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content[name])
    return content


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    make_tiles(tmp_path / "tiles")
    return tmp_path / "tiles"


@pytest.fixture
def store(tmp_path: Path, tiles: Path) -> Store:
    return build_store(tiles, tmp_path / "store")


def write_table(path: Path, rows: dict[str, int]) -> Path:
    lines = [f"{slide.split('/')[1]},{slide.split('/')[0]},{n},label of {slide}\n" for slide, n in rows.items()]
    path.write_text("slide_id,organ,num_tiles,label\n" + "".join(lines), encoding="utf-8")
    return path


def refusal(build: Callable[[], object], kind: type[UserError] = StoreError) -> str:
    with pytest.raises(kind) as caught:
        build()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_fetch(store: Store, root: Path, slides: list[str]) -> None:
    """Tile numbers run slide after slide, names sorted, and fetch gives the file's bytes."""
    paths = [path for slide in slides for path in sorted((root / slide).iterdir(), key=lambda p: p.name)]
    assert store.num_tiles == len(paths)
    for tile, path in enumerate(paths):
        assert store.file_of(tile) == path, f"tile {tile}"
        assert store.fetch(0, tile) == path.read_bytes(), f"tile {tile}"


# building and fetching


def test_without_a_table_every_folder_is_a_slide(tmp_path: Path, tiles: Path) -> None:
    seen: list[int] = []
    store = build_store(tiles, tmp_path / "store", on_progress=seen.append)
    assert seen == [1] * 4
    assert store.slides["slide_id"].tolist() == ["B 1", "b2", "001", "ü—1"]
    assert store.slides["organ"].tolist() == ["breast", "breast", "lung", "lung"]
    assert store.slides["num_tiles"].tolist() == [3, 1, 2, 4]
    assert store.slides["first_tile"].tolist() == [0, 3, 4, 6]
    assert (store.num_slides, store.num_tiles) == (4, 10)
    for again in (store, open_store(store.path)):
        check_fetch(again, tiles, ["breast/B 1", "breast/b2", "lung/001", "lung/ü—1"])


def test_a_table_selects_orders_and_adds_columns(tmp_path: Path, tiles: Path) -> None:
    table = write_table(tmp_path / "some.csv", {"lung/ü—1": 4, "breast/B 1": 3})
    store = build_store(tiles, tmp_path / "store", table=table)
    assert store.slides["slide_id"].tolist() == ["ü—1", "B 1"]
    assert store.slides["label"].tolist() == ["label of lung/ü—1", "label of breast/B 1"]
    check_fetch(store, tiles, ["lung/ü—1", "breast/B 1"])


def test_the_table_beside_the_tiles_is_taken(tmp_path: Path, tiles: Path) -> None:
    write_table(tiles / "slides.csv", {"lung/001": 2})
    assert build_store(tiles, tmp_path / "store").slides["slide_id"].tolist() == ["001"]
    other = write_table(tmp_path / "other.csv", {"breast/b2": 1})
    assert build_store(tiles, tmp_path / "store2", table=other).slides["slide_id"].tolist() == ["b2"]
    absent = tmp_path / "absent.csv"
    assert "absent.csv" in refusal(lambda: build_store(tiles, tmp_path / "store3", table=absent), SlideError)


def test_the_check_catches_tiles_off_by_one(store: Store, tiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slides = ["breast/B 1", "breast/b2", "lung/001", "lung/ü—1"]
    check_fetch(store, tiles, slides)
    real = LooseStore.file_of
    monkeypatch.setattr(LooseStore, "file_of", lambda self, tile: real(self, (tile + 1) % self.num_tiles))
    with pytest.raises(AssertionError, match="tile 0"):
        check_fetch(store, tiles, slides)


def test_what_is_no_tile_is_passed_over(tmp_path: Path, tiles: Path) -> None:
    for name in ("breast/B 1/.hidden.jpg", "breast/B 1/notes.txt", "breast/.hidden/a.jpg", ".git/x/a.jpg", "readme"):
        (tiles / name).parent.mkdir(parents=True, exist_ok=True)
        (tiles / name).write_text("not a tile")
    assert build_store(tiles, tmp_path / "store").num_tiles == 10


def test_coordinates_come_from_the_name(store: Store, tmp_path: Path) -> None:
    assert [store.coordinates_of(t) for t in range(3)] == [(0, 448), (224, 448), (448, 448)]
    (tmp_path / "t/o/s").mkdir(parents=True)
    (tmp_path / "t/o/s/plain.jpg").write_bytes(jpeg(0))
    assert build_store(tmp_path / "t", tmp_path / "s2").coordinates_of(0) == (-1, -1)


def test_two_builds_give_the_same_files(tmp_path: Path, tiles: Path, store: Store) -> None:
    again = build_store(tiles, tmp_path / "again")
    assert again.digest == store.digest
    for name in (*LooseStore.layout.files, "store.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "store" / name).read_bytes(), name


def test_the_digest_is_the_identity_of_slides_names_and_sizes(tmp_path: Path, tiles: Path, store: Store) -> None:
    shutil.copytree(tiles, tmp_path / "elsewhere")
    assert build_store(tmp_path / "elsewhere", tmp_path / "s0").digest == store.digest, "a copy is the same store"
    first = next(iter(sorted((tmp_path / "elsewhere/breast/B 1").iterdir())))
    first.write_bytes(first.read_bytes() + b"\0\0")
    longer = build_store(tmp_path / "elsewhere", tmp_path / "s1").digest
    first.rename(first.with_name("renamed.jpg"))
    renamed = build_store(tmp_path / "elsewhere", tmp_path / "s2").digest
    table = write_table(tmp_path / "less.csv", {"breast/B 1": 3, "breast/b2": 1, "lung/001": 2})
    fewer = build_store(tiles, tmp_path / "s3", table=table).digest
    assert len({store.digest, longer, renamed, fewer}) == 4


def test_real_tiles(real_data: Path, tmp_path: Path) -> None:
    store = build_store(real_data / "tiles", tmp_path / "store")
    table = pd.read_csv(real_data / "tiles" / "slides.csv", dtype=str)
    assert store.slides["slide_id"].tolist() == table["slide_id"].tolist()
    store.verify()
    ends = store.slides["first_tile"] + store.slides["num_tiles"] - 1
    for tile in [*store.slides["first_tile"], *ends]:
        path = store.file_of(tile)
        slide = store.slides.iloc[int(np.searchsorted(store.first_tiles, tile, side="right")) - 1]
        assert path.parent == real_data.resolve() / "tiles" / slide["organ"] / slide["slide_id"]
        assert store.fetch(0, tile) == path.read_bytes()


# folders and tables that cannot be used


def first_tile(root: Path) -> Path:
    return sorted((root / "lung/001").iterdir())[0]


def broken_tile(content: bytes) -> Callable[[Path], object]:
    return lambda tiles: first_tile(tiles).write_bytes(content)


def replaced_by_link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def emptied(tiles: Path) -> None:
    shutil.rmtree(tiles)
    tiles.mkdir()


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no such folder of tiles"),
    "empty folder": (emptied, "no tiles below it; expected <organ>/<slide_id>/<name>.jpg"),
    "empty slide": (lambda tiles: (tiles / "lung/empty").mkdir(), "slide empty has no tiles (1 such slides)"),
    "slide in two organs": (
        lambda tiles: shutil.copytree(tiles / "lung/001", tiles / "breast/001"),
        "slide id 001 stands in it more than once",
    ),
    "zero bytes": (broken_tile(b""), "1 of 10 tile files are no whole JPEG; first: "),
    "text": (broken_tile(b"this is no picture"), "(not a JPEG)"),
    "PNG": (broken_tile(b"\x89PNG\r\n\x1a\n" + bytes(50)), "(not a JPEG)"),
    "dangling link": (lambda tiles: replaced_by_link(first_tile(tiles), "gone.jpg"), "(dangling link)"),
    "link to itself": (lambda tiles: replaced_by_link(first_tile(tiles), first_tile(tiles).name), "(dangling link)"),
    "truncated by half": (broken_tile(jpeg(4)[: len(jpeg(4)) // 2]), "(truncated)"),
    "truncated by one byte": (broken_tile(jpeg(4)[:-1]), "(truncated)"),
    "name that is no UTF-8": (
        lambda tiles: (tiles / "lung/001" / os.fsdecode(b"\xe9.jpg")).write_bytes(jpeg(0)),
        "1 of 11 tile files are no whole JPEG; first: ",
    ),
    "folder whose name is no UTF-8": (
        lambda tiles: (tiles / "lung/001").rename(tiles / "lung" / os.fsdecode(b"\xe9")),
        "its name is not UTF-8; rename it",
    ),
    "missing slide": (
        lambda tiles: write_table(tiles / "slides.csv", {"lung/001": 2, "lung/gone": 2}),
        "gone: no such folder, but the slide table lists this slide",
    ),
    "wrong count": (
        lambda tiles: write_table(tiles / "slides.csv", {"lung/001": 2, "breast/B 1": 4}),
        "slide B 1 has 3 tiles, but the slide table says 4 (1 such slides)",
    ),
    "duplicate row": (
        lambda tiles: (tiles / "slides.csv").write_text("slide_id,organ,num_tiles\n001,lung,2\n001,lung,2\n"),
        "slide id 001 stands in it more than once",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_in_one_line_and_leaves_nothing_behind(tmp_path: Path, tiles: Path, fault: str) -> None:
    spoil, told = FAULTS[fault]
    spoil(tiles)
    before = sorted(tmp_path.iterdir())
    message = refusal(lambda: build_store(tiles, tmp_path / "store"), UserError)
    assert told in message
    listed = [tmp_path / "store.bad_tiles.csv"] if "no whole JPEG" in message else []
    assert sorted(tmp_path.iterdir()) == sorted([*before, *listed])
    shutil.rmtree(tiles, ignore_errors=True)
    make_tiles(tiles)
    assert build_store(tiles, tmp_path / "store").num_tiles == 10, "a second run does not trip on the first"
    assert not (tmp_path / "store.bad_tiles.csv").exists()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (options, fault)
        for options in ({}, {"check": False}, {"pack": True})
        for fault in ("zero bytes", "dangling link", *(["not a JPEG"] if options.get("check", True) else []))
    ],
    ids=str,
)
def test_all_bad_tiles_are_counted_and_listed(
    tmp_path: Path, tiles: Path, options: dict[str, bool], fault: str
) -> None:
    bad = [sorted((tiles / slide).iterdir())[0] for slide in SLIDES]
    for file in bad:
        if fault == "dangling link":
            replaced_by_link(file, "gone.jpg")
        else:
            file.write_bytes(b"text" if fault == "not a JPEG" else b"")
    message = refusal(lambda: build_store(tiles, tmp_path / "store", options=BuildOptions(**options)))
    assert message.startswith(
        f"{tiles}: 4 of 10 tile files are no whole JPEG; first: {tiles}/breast/B 1/tile 0é_x0_y448"
    )
    listed = tmp_path / "store.bad_tiles.csv"
    assert f"; all are listed in {listed}; mend or remove them" in message
    rows = pd.read_csv(listed).to_numpy().tolist()
    assert rows == sorted([str(file), fault] for file in bad)
    assert not (tmp_path / ".store.partial").exists()


def test_padding_after_the_end_is_no_truncation(tmp_path: Path, tiles: Path) -> None:
    first_tile(tiles).write_bytes(jpeg(4) + bytes(20))
    assert build_store(tiles, tmp_path / "store").num_tiles == 10


def test_an_existing_out_is_not_touched(tmp_path: Path, tiles: Path, store: Store) -> None:
    before = {p.name: p.read_bytes() for p in store.path.iterdir()}
    assert "exists already" in refusal(lambda: build_store(tiles, tmp_path / "store"))
    assert {p.name: p.read_bytes() for p in store.path.iterdir()} == before
    (tmp_path / "file").write_text("a file")
    assert "exists already" in refusal(lambda: build_store(tiles, tmp_path / "file"))


@pytest.mark.parametrize("place", ["store", "lung/store", "../link/lung"])
def test_a_store_among_its_tiles_is_refused(tmp_path: Path, tiles: Path, place: str) -> None:
    """It would be taken for an organ or a slide by the next --append."""
    (tmp_path / "link").symlink_to(tiles)
    before = sorted(tmp_path.rglob("*"))
    told = refusal(lambda: build_store(tiles, tiles / place))
    assert told.startswith(f"{tiles / place}: lies below {tiles}, all folders of which are taken for slides; choose")
    assert sorted(tmp_path.rglob("*")) == before
    table = write_table(tmp_path / "slides.csv", {"lung/001": 2})
    for _ in range(2):
        assert build_store(tiles, tiles / "store", table=table, append=True).num_tiles == 2, "a table names its slides"


# opening and verifying


def test_opening_what_is_no_store(tmp_path: Path, store: Store) -> None:
    assert "make one with hpcssl store build" in refusal(lambda: open_store(tmp_path))
    assert "make one with hpcssl store build" in refusal(lambda: open_store(store.path / "store.json"))
    header = json.loads((store.path / "store.json").read_text())
    (store.path / "store.json").write_text(json.dumps(header | {"format": 99}))
    assert "store format 99; this version reads 1" in refusal(lambda: open_store(store.path))
    (store.path / "store.json").write_text(json.dumps(header | {"kind": "online"}))
    told = refusal(lambda: open_store(store.path))
    assert "a store of kind 'online'; this version reads loose, packed and slides" in told
    (store.path / "store.json").write_text(json.dumps(header)[:-5])
    assert "damaged" in refusal(lambda: open_store(store.path))


@pytest.mark.parametrize("name", LooseStore.layout.files)
def test_a_missing_index_file_is_named(store: Store, name: str) -> None:
    (store.path / name).unlink()
    assert f"{name} is missing" in refusal(lambda: open_store(store.path))


def open_and_verify(path: Path) -> None:
    open_store(path).verify()


def places_in(start: int, end: int) -> set[int]:
    return {start, end - 1, *range(start, end, max(1, (end - start) // 30))} if end > start else set()


@pytest.mark.parametrize("name", LooseStore.layout.files)
def test_any_flipped_byte_of_the_index_is_found(store: Store, name: str) -> None:
    path = store.path / name
    whole = path.read_bytes()
    header = 128 if name.endswith(".npy") else 0
    for place in places_in(0, header) | places_in(header, len(whole)):
        for flip in (0x01, 0x80):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            assert name in refusal(lambda: open_and_verify(store.path)), place
    path.write_bytes(whole)
    open_and_verify(store.path)


@pytest.mark.parametrize("name", LooseStore.layout.files)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_index_file_is_told(store: Store, name: str, kept: float) -> None:
    path = store.path / name
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    assert name in refusal(lambda: open_and_verify(store.path))


@pytest.mark.parametrize("field", ["num_tiles", "num_slides", "digest"])
def test_a_changed_header_is_found(store: Store, field: str) -> None:
    changed = {"num_tiles": 9, "num_slides": 3, "digest": digest_bytes(b"other")}
    (store.path / "store.json").write_text(json.dumps(store.header | {field: changed[field]}))
    refusal(lambda: open_and_verify(store.path))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, not"),
    "emptied": (lambda path: path.write_bytes(b""), "has 0 bytes, not"),
    "behind a dangling link": (lambda path: replaced_by_link(path, "gone.jpg"), "is missing"),
    "grown": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes, not"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_names_a_damaged_tile(store: Store, damage: str) -> None:
    spoil, told = DAMAGE[damage]
    for tile in (0, 9):
        spoil(store.file_of(tile))
    message = refusal(store.verify)
    assert message.startswith(f"{store.path}: 2 of 10 tiles changed since it was built; first: {store.file_of(0)}")
    assert told in message


def test_fetching_a_tile_that_is_gone_names_it(store: Store) -> None:
    store.file_of(6).unlink()
    told = refusal(lambda: store.fetch(0, 6), BadTileError)
    assert told.startswith(f"{store.file_of(6)}: tile 6 is gone; run hpcssl store verify")


# as an unprivileged user

AS_NOBODY = """
import contextlib, io, json, os, sys
from hpcssl.cli.main import main
def run(*argv):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = main([str(a) for a in argv])
    return code, err.getvalue()
tiles, warm_up, cases = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
run("store", "build", tiles, "--out", warm_up)  # imports everything: the interpreter itself may be unreadable below
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
print(json.dumps([run("store", "build", tiles, "--out", out) for tiles, out in cases]))
"""


def test_what_may_not_be_read_or_written_is_one_line_for_an_unprivileged_user() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        denied = {"root": "", "organ": "lung", "slide": "lung/001", "tile": "lung/001/*", "table": "slides.csv"}
        cases = {}
        for case, pattern in denied.items():
            make_tiles(folder / case)
            write_table(folder / case / "slides.csv", SLIDES)
            target = next((folder / case).glob(pattern)) if pattern else folder / case
            target.chmod(0)
            cases[case] = (folder / case, folder / f"store of {case}", target)
        make_tiles(folder / "good")
        (folder / "closed").mkdir(mode=0o555)
        cases["out"] = (folder / "good", folder / "closed" / "store", folder / "closed")
        cases["control"] = (folder / "good", folder / "store of control", folder)
        pairs = json.dumps([[str(tiles), str(out)] for tiles, out, _ in cases.values()])
        env = os.environ | {"PYTHONPATH": str(Path(hpcssl.__file__).parents[1])}
        command = [sys.executable, "-c", AS_NOBODY, str(folder / "good"), str(folder / "warm up"), pairs]
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr
        results = dict(zip(cases, json.loads(done.stdout), strict=True))
        assert results.pop("control")[0] == 0, "the same user builds where all is readable"
        for case, (code, said) in results.items():
            _, out, target = cases[case]
            errors = [line for line in said.splitlines() if line.startswith("hpcssl: error: ")]
            assert code == 2, case
            assert len(errors) == 1, said
            assert said.rstrip().endswith(errors[0]), "nothing after it, no traceback"
            assert f"{target}" in errors[0], errors[0]
            assert "permission denied" in errors[0], errors[0]
            assert not out.exists()
            target.chmod(0o755)
        left = {p.name for p in folder.iterdir()}
        assert left == {*cases, "good", "closed", "warm up", "store of control"} - {"out", "control"}
