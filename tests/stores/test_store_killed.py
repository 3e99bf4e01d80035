"""A build that is killed at any moment: the same command ends with the bytes of an undisturbed one."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from hpcssl.core.errors import StoreError
from hpcssl.stores import scan
from hpcssl.stores.kinds import open_store
from hpcssl.stores.scan import BuildOptions, build_store
from hpcssl.stores.tar import ShardWriter, shard_name

Interrupt = Callable[..., None]
KINDS = {
    "loose": BuildOptions(commit_s=0, threads=2),
    "packed": BuildOptions(pack=True, shard_gb=5e-6, commit_s=0, threads=2),  # a shard a slide
}
STEPS = ("fsync", "replace", "truncate")  # where a kill is tried: before and after each of these calls


@pytest.fixture(scope="module")
def tiles(small: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = small.make_tiles(tmp_path_factory.mktemp("killed") / "tiles", slides=2, tiles=3)
    return folder


@pytest.fixture(scope="module")
def more_tiles(small: ModuleType, tiles: Path) -> Path:
    """The same tiles and two slides that come before and behind them."""
    folder: Path = shutil.copytree(tiles, tiles.with_name("more"))
    for slide in ("aaa/a1", "zzz/z1"):
        (folder / slide).mkdir(parents=True)
        (folder / slide / "a.jpg").write_bytes(small.jpeg(77))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def killed_at(number: int, work: Callable[[], object]) -> Callable[[], None]:
    """Return `work`, killed before or after its sync, rename or truncation number `number // 2`."""

    def run() -> None:
        count = 0
        reals = {name: getattr(os, name) for name in STEPS}
        for name in STEPS:

            def stepped(*args: object, real: Callable[..., object] = reals[name]) -> object:
                nonlocal count
                count += 2
                if number == count - 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = real(*args)
                if number == count - 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            setattr(os, name, stepped)
        work()

    return run


def build_again(tiles: Path, out: Path, options: BuildOptions) -> None:
    """Give the command again that was killed: it may have been done."""
    if not out.exists():
        build_store(tiles, out, options=options)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_the_steps_of_a_build(small: ModuleType, kind: str, tiles: Path, tmp_path: Path) -> None:
    options = KINDS[kind]
    whole = files(build_store(tiles, tmp_path / "whole", options=options).path)
    for number in range(10_000):
        out = tmp_path / f"store-{number}"
        code = small.in_a_fork(killed_at(number, lambda out=out: build_store(tiles, out, options=options)))
        build_again(tiles, out, options)
        assert files(out) == whole, f"killed at step {number}"
        open_store(out).verify()
        shutil.rmtree(out)
        if code == 0:
            break
    assert number > 20, "it was killed often"
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_the_steps_of_an_extension(
    small: ModuleType, kind: str, tiles: Path, more_tiles: Path, tmp_path: Path
) -> None:
    options = KINDS[kind]
    table = tmp_path / "first.csv"
    table.write_text("slide_id,organ,num_tiles\nbreast-0,breast,3\nlung-1,lung,4\n")
    first = build_store(more_tiles, tmp_path / "first", table=table, options=options).path
    whole = build_store(more_tiles, shutil.copytree(first, tmp_path / "whole"), options=options, append=True)
    content = [whole.fetch(0, t) for t in range(whole.num_tiles)]
    for number in range(10_000):
        out = shutil.copytree(first, tmp_path / f"store-{number}")
        extend = partial(build_store, more_tiles, out, options=options, append=True)
        code = small.in_a_fork(killed_at(number, extend))
        between = open_store(out)  # what is there is whole, before or after
        between.verify()
        assert [between.fetch(0, t) for t in range(between.num_tiles)] == content[: between.num_tiles]
        build_store(more_tiles, out, options=options, append=True)
        assert files(out) == files(whole.path), f"killed at step {number}"
        shutil.rmtree(out)
        if code == 0:
            break
    assert number > 20, "it was killed often"


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments_again_and_again(small: ModuleType, kind: str, tiles: Path, tmp_path: Path) -> None:
    options = KINDS[kind]
    whole = files(build_store(tiles, tmp_path / "whole", options=options).path)
    random = np.random.default_rng(7)
    kills = 0
    for trial in range(6):
        out = tmp_path / f"store-{trial}"
        for delay in random.uniform(0.001, 0.02, 6):
            kills += small.in_a_fork(lambda out=out: build_again(tiles, out, options), kill_after=delay) != 0
        build_again(tiles, out, options)
        assert files(out) == whole
    assert kills > 3, "it was killed"


def begin_at_the_end(shards: ShardWriter) -> None:
    """Stand for `ShardWriter.begin`, but leave what a killed build had written beyond its last commit."""
    file = shards._folder / shard_name(shards.number)
    if shards._end or file.exists():
        shards._file = file.open("ab")
        shards._end = shards._file.tell()


def test_without_cutting_off_what_follows_the_commit_the_bytes_differ(
    small: ModuleType, tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The breakage that the tests above must notice."""
    options = BuildOptions(pack=True, commit_s=0, threads=2)  # all slides in one shard
    whole = files(build_store(tiles, tmp_path / "whole", options=options).path)
    differing = 0
    for number in range(20):
        out = tmp_path / f"store-{number}"
        small.in_a_fork(killed_at(number, lambda out=out: build_store(tiles, out, options=options)))
        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "begin", begin_at_the_end)
            try:
                differing += files(build_store(tiles, out, options=options).path) != whole
            except (StoreError, ValueError):
                differing += 1
    assert differing


@pytest.mark.parametrize("kind", KINDS)
def test_slides_that_were_done_are_not_read_again(
    interrupt: Interrupt, kind: str, tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(tiles, tmp_path / "store", KINDS[kind], after=3)
    looked_at: list[str] = []
    name = "list_names" if KINDS[kind].pack else "check_tiles"
    real = getattr(scan, name)
    monkeypatch.setattr(scan, name, lambda root, folder: looked_at.append(folder) or real(root, folder))
    told: list[int] = []
    build_store(tiles, tmp_path / "store", options=KINDS[kind], on_progress=told.append)
    assert looked_at == ["lung/lung-1"]
    assert told == [1] * 4


@pytest.mark.parametrize(
    "change", ["options", "lost bytes", "torn marks", "foreign marks", "lung-0,lung,3", "breast-1,breast,4"]
)
def test_what_belongs_to_another_build_is_not_gone_on_with(
    interrupt: Interrupt, change: str, tiles: Path, tmp_path: Path
) -> None:
    """Other options, bytes that were lost, damaged marks, other slides first, the same slides in another order."""
    interrupt(tiles, tmp_path / "store", KINDS["packed"], after=1)
    options, table = KINDS["packed"], None
    if change == "options":
        options = BuildOptions(pack=True, commit_s=0)
    elif change == "lost bytes":
        os.truncate(tmp_path / ".store.partial" / "tiles-000000.tar", 100)
    elif change.endswith("marks"):
        marks = tmp_path / ".store.partial" / "done.bin"
        data = marks.read_bytes()
        assert len(data) >= 16
        marks.write_bytes(data[:-7] if change == "torn marks" else bytes(16) + data[16:])
    else:
        table = tmp_path / "slides.csv"
        table.write_text(f"slide_id,organ,num_tiles\n{change}\nbreast-0,breast,3\n")
    store = build_store(tiles, tmp_path / "store", table=table, options=options)
    undisturbed = build_store(tiles, tmp_path / "whole", table=table, options=options)
    assert files(store.path) == files(undisturbed.path)


def test_a_full_disk_keeps_what_was_done(tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, 0

    def full(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise OSError(28, "No space left on device")
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            build_store(tiles, tmp_path / "store", options=KINDS["packed"])
    read: list[str] = []
    real_list = scan.list_names
    monkeypatch.setattr(scan, "list_names", lambda root, key: read.append(key) or real_list(root, key))
    build_store(tiles, tmp_path / "store", options=KINDS["packed"])
    assert 0 < len(read) < 4, "it went on"
    assert files(tmp_path / "store") == files(build_store(tiles, tmp_path / "whole", options=KINDS["packed"]).path)


def test_a_second_build_at_the_same_time_is_refused(tiles: Path, tmp_path: Path) -> None:
    def other(_: int) -> None:
        with pytest.raises(Exception, match="another process is making it"):
            build_store(tiles, tmp_path / "store")

    build_store(tiles, tmp_path / "store", on_progress=other)
