"""Slides behind HTTP and S3: the same pixels, few bytes, and never a hang."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hpcssl.cli.main import main
from hpcssl.core.errors import BadTileError, SlideError, StoreError, UnreachableTileError
from hpcssl.loader.stream import LoaderConfig, TileStream
from hpcssl.slides import ranges
from hpcssl.slides.opening import open_slide
from hpcssl.slides.ranges import Ranges
from hpcssl.stores.kinds import open_store
from hpcssl.stores.online import OnlineStore
from hpcssl.stores.store import Store

TIMEOUT_S = 0.3
PATIENT_S = 1.0  # where some requests are to succeed, on a busy machine, too


@pytest.fixture(scope="module")
def folder(online_slides) -> Path:
    return Path(online_slides["path"][0]).parent


@pytest.fixture(scope="module")
def local(online, folder, tmp_path_factory) -> OnlineStore:
    return online.build(tmp_path_factory.mktemp("local") / "store", table_of(str(folder)))


@pytest.fixture
def server(online, folder) -> Any:
    pytest.importorskip("aiohttp")
    with online.serving(folder) as server:
        yield server


@pytest.fixture
def quick(monkeypatch) -> None:
    """Bounds of a second instead of a minute."""
    monkeypatch.setattr(ranges, "TIMEOUT_S", TIMEOUT_S)
    monkeypatch.setattr(ranges, "_PAUSE_S", 0.01)


def table_of(root: str) -> pd.DataFrame:
    rows = [{"slide_id": f"s{n}", "organ": "lung", "path": f"{root}/s{n}.tif", "mpp": ""} for n in range(2)]
    return pd.DataFrame(rows)


def check_same_tiles(remote: Store, local: Store) -> None:
    """Places and pixels are those of the local slides."""
    assert remote.digest == local.digest, "where slides lie is no part of a store"
    a, b = remote.drawn_by(5, {}), local.drawn_by(5, {})
    for position in range(30):
        tile = position * 11 % local.num_tiles
        assert a.place_of(position, tile) == b.place_of(position, tile)
        assert (a.fetch(position, tile) == b.fetch(position, tile)).all()


def test_tiles_by_http_are_the_local_ones_and_only_their_blocks_are_read(
    online, server, local, folder, tmp_path
) -> None:
    remote = online.build(tmp_path / "store", table_of(server.url))
    check_same_tiles(remote, local)
    fresh, size = open_store(remote.path), (folder / "s0.tif").stat().st_size
    fresh.fetch(0, 0)
    server.sent_bytes = 0
    for tile in range(10):
        fresh.fetch(0, tile)
    assert server.sent_bytes < 10 * 4 * size / 35, "at most four blocks a tile, of about 40 in the slide"
    remote.verify(deep=True)


def test_tiles_by_s3_are_the_local_ones(online, local, folder, tmp_path, monkeypatch) -> None:
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    import fsspec
    import s3fs

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        access = {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": f"http://{host}:{port}"}}
        access["client_kwargs"]["region_name"] = "us-east-1"
        monkeypatch.setitem(fsspec.config.conf, "s3", access)
        files = s3fs.S3FileSystem(skip_instance_cache=True)
        files.call_s3("create_bucket", Bucket="slides")
        for name in ("s0.tif", "s1.tif"):
            files.put(str(folder / name), f"slides/{name}")
        remote = online.build(tmp_path / "store", table_of("s3://slides"))
        check_same_tiles(remote, local)
        files.rm("slides/s0.tif")
        with pytest.raises(BadTileError, match=r"s3://slides/s0.tif"):
            open_store(remote.path).fetch(0, 0)
    finally:
        server.stop()


def build_by_command(server: Any, folder: Path) -> int:
    table_of(server.url).to_csv(folder / "slides.csv", index=False)
    arguments = ["store", "build", str(folder / "slides.csv"), "--out", str(folder / "store"), "--online"]
    return main([*arguments, "--mpp", "0.5,1.0", "--tile-px", "64"])


def test_the_command_takes_a_table_of_urls(server, local, tmp_path) -> None:
    assert build_by_command(server, tmp_path) == 0
    assert open_store(tmp_path / "store").digest == local.digest


@pytest.fixture
def remote(online, server, tmp_path) -> OnlineStore:
    return online.build(tmp_path / "store", table_of(server.url))


@pytest.fixture(params=[True, False], ids=["opened", "unopened"])
def store(remote, request) -> Store:
    """The store, with its first slide opened or not."""
    store = open_store(remote.path)
    if request.param:
        store.fetch(0, 0)
    return store


@pytest.mark.parametrize("fault", ["stall", "cut", "refuse"])
def test_a_server_that_fails_for_a_while_is_asked_again(store, local, server, quick, fault, monkeypatch) -> None:
    monkeypatch.setattr(ranges, "TIMEOUT_S", PATIENT_S)
    server.requests = 0
    server.fault_of = lambda number: fault if number < 2 else None
    assert (store.fetch(0, 0) == local.fetch(0, 0)).all()
    assert server.requests >= 3


@pytest.mark.parametrize("fault", ["stall", "cut", "refuse"])
def test_a_server_that_goes_on_failing_gives_a_bad_tile_within_the_bound(small, store, server, quick, fault) -> None:
    server.fault_of = lambda number: fault
    bound = ranges.TRIES * TIMEOUT_S + 10  # of a busy machine; the server stalls for 60
    with small.within(bound), pytest.raises(UnreachableTileError, match=r"does not answer after 3 tries"):
        store.fetch(0, 0)


@pytest.mark.parametrize("fault", ["stall", "cut", "refuse", "nobody"])
def test_a_slide_that_cannot_be_opened_now_is_not_told_as_missing(server, quick, fault) -> None:
    server.fault_of = lambda number: fault
    root = "http://127.0.0.1:1" if fault == "nobody" else server.url
    with pytest.raises(OSError, match=r"does not answer after 3 tries") as told:
        Ranges.open(f"{root}/s0.tif")
    assert told.value.filename == f"{root}/s0.tif"
    assert server.requests >= (0 if fault == "nobody" else ranges.TRIES)


def test_without_the_bound_a_stalled_server_would_hang(remote, server, quick, monkeypatch) -> None:
    """It is the bound that ends the read: with a longer one it takes longer."""
    monkeypatch.setattr(ranges, "TIMEOUT_S", 1.1)
    server.fault_of = lambda number: "stall"
    begun = time.monotonic()
    with pytest.raises(BadTileError):
        open_store(remote.path).fetch(0, 0)
    assert time.monotonic() - begun > 3


def test_a_slide_that_the_server_does_not_have_is_a_bad_tile_at_once(remote, server, folder, small) -> None:
    store = open_store(remote.path)
    server.folder = folder / "elsewhere"
    with small.within(10), pytest.raises(BadTileError, match="no such slide"):
        store.fetch(0, 0)


def test_a_slide_that_may_not_be_read_is_told_so_at_once(store, server) -> None:
    """As one that cannot be reached: where a password has run out, a run ends and does not replace all its tiles."""
    server.requests = 0
    server.fault_of = lambda number: "forbid"
    with pytest.raises(UnreachableTileError, match=r"s0.tif: its server refuses to give it \(403 Forbidden\); check"):
        store.fetch(0, 0)
    assert server.requests <= 4, "a tile has at most four blocks"


def test_what_a_file_system_forbids_is_told_alike(monkeypatch) -> None:
    """As s3fs does."""
    from fsspec.implementations.memory import MemoryFileSystem

    def forbidden(*args: object, **options: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "info", forbidden)
    with pytest.raises(PermissionError, match=r"its server refuses to give it \(Access Denied\)"):
        Ranges.open("memory://a.tif")


@pytest.mark.parametrize("deep", [True, False])
def test_verify_does_not_take_a_server_that_fails_for_changed_slides(remote, server, quick, deep) -> None:
    seen = Counter()

    def fault_of_file(name: str) -> str | None:
        seen[name] += 1
        return "refuse" if name == "s1.tif" and seen[name] > (8 if deep else 0) else None

    server.fault_of_file = fault_of_file
    with pytest.raises((OSError, UnreachableTileError), match="does not answer after 3 tries"):
        open_store(remote.path).verify(deep=deep)


def test_a_server_that_gives_no_parts_of_files_is_told_so_and_not_asked_for_them(online, tmp_path) -> None:
    pytest.importorskip("aiohttp")
    (tmp_path / "a.tif").touch()
    os.truncate(tmp_path / "a.tif", 1 << 26)
    with online.serving(tmp_path) as server:
        server.fault_of = lambda number: "whole"
        with pytest.raises(SlideError, match=r"a.tif: its server gives no parts of files; use another, or copy it"):
            open_slide(f"{server.url}/a.tif")
        assert server.requests == 1
        assert server.sent_bytes < 1 << 24, "what lay in buffers of the connection"


def test_a_file_that_became_shorter_is_told_as_truncated(online, server, folder, tmp_path) -> None:
    (tmp_path / "s0.tif").write_bytes((folder / "s0.tif").read_bytes())
    (tmp_path / "empty.tif").touch()
    server.folder = tmp_path
    opened = Ranges.open(f"{server.url}/s0.tif")
    os.truncate(tmp_path / "s0.tif", 1000)
    with pytest.raises(SlideError, match=r"s0.tif: ends before byte 1,010 \(truncated\)"):
        opened.read_many([(1000, 10)])
    with pytest.raises(SlideError, match=r"empty.tif: ends before byte 1 \(truncated\)"):
        Ranges.open(f"{server.url}/empty.tif")
    (tmp_path / "s0.tif").unlink()
    with pytest.raises(SlideError, match=r"s0.tif: no such slide"):
        opened.read_many([(0, 10)])


@pytest.mark.parametrize(
    ("fault", "told"),
    [("forbid", "its server refuses to give it (403 Forbidden)"), ("refuse", "does not answer after 3 tries (503")],
)
def test_the_command_tells_what_a_server_says(server, quick, tmp_path, capsys, fault, told) -> None:
    server.fault_of = lambda number: fault
    assert build_by_command(server, tmp_path) == 2
    assert f"{server.url}/s0.tif: {told}" in capsys.readouterr().err


def stream_of(small: Any, store: Store, schedule: Any, **more: Any) -> TileStream:
    """Return a stream of two steps."""
    config = LoaderConfig(max_bad_tiles=1.0, reads_in_flight=8, threads=2)
    return TileStream(store, schedule, small.request_of("mae", stop=2, global_batch=6), config=config, **more)


@pytest.fixture
def schedule(online, remote, tmp_path) -> Any:
    return online.build_schedule_of(remote, tmp_path / "schedule", num_groups=1)


def test_a_run_stops_where_no_server_answers(small, remote, schedule, server, quick) -> None:
    server.fault_of = lambda number: "stall"
    stream = stream_of(small, open_store(remote.path), schedule)
    with small.within(40), pytest.raises(StoreError, match=r"neither its tile nor 2 substitutes can be reached; last:"):
        list(stream)


def test_a_run_goes_on_where_one_slide_cannot_be_read(
    small, remote, schedule, server, quick, tmp_path, monkeypatch
) -> None:
    """Tiles of the stalled slide are replaced by others of the schedule, and recorded."""
    server.fault_of_file = lambda name: "stall" if name == "s1.tif" else None
    stream = stream_of(small, open_store(remote.path), schedule, bad_tiles=tmp_path / "bad_tiles.csv")
    monkeypatch.setattr(ranges, "TRIES", 1)
    monkeypatch.setattr(ranges, "TIMEOUT_S", PATIENT_S)
    with small.within(30):
        assert len(list(stream)) == 2
    first, count = remote.tiles_of_slide(1)
    bad = pd.read_csv(tmp_path / "bad_tiles.csv")["tile"]
    assert len(bad)
    assert bad.between(first, first + count - 1).all()
