"""`hpcssl store`: packing, extending, checking and describing from the command line."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from hpcssl.cli.main import main
from hpcssl.stores.kinds import open_store


@pytest.fixture
def tiles(tmp_path: Path, small: ModuleType) -> Path:
    folder: Path = small.make_tiles(tmp_path / "tiles", slides=2, tiles=3)
    return folder


@pytest.fixture
def store(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `hpcssl store …`; returns (exit code, output, last line of the errors)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["store", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out.strip(), err.strip().splitlines()[-1] if err.strip() else ""

    return run


def test_pack_verify_stats(store: Callable, tiles: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    code, said, shown = store("build", tiles, "--out", out, "--pack", "--shard-gb", "0.00001", "--threads", 2)
    assert (code, said) == (0, f"{out}: 4 slides, 14 tiles in 2 shards")
    assert shown.startswith("indexing: 4 slides")
    code, said, _ = store("verify", out)
    assert (code, said) == (0, f"{out}: index whole, all 2 shards of 14 tiles there with their sizes")
    code, said, _ = store("verify", out, "--deep", "--threads", 2)
    assert (code, said.endswith("with their sizes, every tile decodes")) == (0, True)
    code, said, _ = store("stats", out)
    sizes = sorted(p.stat().st_size for p in tiles.rglob("*.jpg"))
    lines = said.splitlines()
    assert code == 0
    assert lines[0].split() == ["organ", "slides", "tiles", "bytes"]
    breast = sum(p.stat().st_size for p in (tiles / "breast").rglob("*.jpg"))
    assert lines[1].split() == ["breast", "2", "7", f"{breast:,}"]
    assert lines[3] == f"bytes of a tile: smallest {sizes[0]:,}, median {sizes[6]:,}, largest {sizes[-1]:,}"


@pytest.mark.parametrize("pack", [[], ["--pack"]])
def test_append(store: Callable, tiles: Path, tmp_path: Path, small: ModuleType, pack: list[str]) -> None:
    out = tmp_path / "store"
    assert store("build", tiles, "--out", out, "--append", *pack)[0] == 0
    (tiles / "lung" / "new").mkdir()
    (tiles / "lung" / "new" / "a.jpg").write_bytes(small.jpeg(5))
    code, said, _ = store("build", tiles, "--out", out, "--append")
    shards = " in 2 shards" if pack else ""
    assert (code, said) == (0, f"{out}: 5 slides, 15 tiles{shards} (1 slides new)")
    assert open_store(out).kind == ("packed" if pack else "loose")
    assert store("verify", out, "--deep")[0] == 0
    (tiles / "lung" / "lung-0" / "tile_x0_y0.jpg").unlink()
    code, _, error = store("build", tiles, "--out", out, "--append")
    assert code == 2
    assert "slide lung-0 is not what it was" in error
    code, _, error = store("verify", out)
    assert code == 0 if pack else (code == 2 and "tile_x0_y0.jpg is missing" in error)


REFUSED = {
    "--shard-gb without --pack": (["--shard-gb", "4"], "give --pack, too"),
    "no shard size": (["--pack", "--shard-gb", "0"], ""),
    "no threads": (["--threads", "0"], ""),
    "--pack of a loose store": (["--pack", "--append"], "it cannot be extended with --pack"),
    "exists": ([], "exists already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(store: Callable, refused, tiles: Path, tmp_path: Path, case: str) -> None:
    out, (more, told) = tmp_path / "store", REFUSED[case]
    assert store("build", tiles, "--out", out)[0] == 0
    before = {p: p.read_bytes() for p in out.iterdir()}
    assert told in refused("store", "build", tiles, "--out", out, *more)
    assert {p: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store", "tiles"]


def test_no_check_takes_what_the_check_refuses(store: Callable, tiles: Path, tmp_path: Path) -> None:
    (tiles / "lung" / "lung-0" / "text.jpg").write_text("no JPEG")
    assert store("build", tiles, "--out", tmp_path / "a")[0] == 2
    assert store("build", tiles, "--out", tmp_path / "b", "--no-check")[0] == 0
    assert store("verify", tmp_path / "b")[0] == 0
    code, _, error = store("verify", tmp_path / "b", "--deep")
    assert code == 2
    assert "1 of 15 tiles cannot be decoded; first: " in error
    assert "lung-0/text.jpg (not a JPEG)" in error


def test_a_schedule_of_the_loose_store_is_exported_with_the_places_in_the_shards(
    data: object, small: ModuleType, tmp_path: Path, store: Callable
) -> None:
    assert store("build", data.tiles, "--out", tmp_path / "packed", "--pack")[0] == 0
    assert open_store(tmp_path / "packed").digest == data.store.digest
    export = ["schedule", "export", "--csv", str(data.schedule_path), "--store", str(tmp_path / "packed")]
    assert main([*export, "--only", "0", "--out", str(tmp_path / "csv")]) == 0
    listed = next((tmp_path / "csv").glob("*.csv")).read_text()
    assert listed.count(f"{tmp_path / 'packed' / 'tiles-000000.tar'}:") == len(data.schedule.pseudo_epoch(0))


def test_ctrl_c_and_the_same_command_goes_on(small: ModuleType, tmp_path: Path) -> None:
    tiles = tmp_path / "tiles"
    for slide in range(400):
        (tiles / "o" / f"s{slide}").mkdir(parents=True)
        (tiles / "o" / f"s{slide}" / "a.jpg").write_bytes(small.jpeg(0))
    slow = (
        "import sys, time; from hpcssl.stores import scan; from hpcssl.cli.main import main; real = scan.check_tiles\n"
        "scan.check_tiles = lambda *a: (time.sleep(0.05), real(*a))[1]\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", slow, "store", "build", str(tiles), "--out", str(tmp_path / "store")]
    running = subprocess.Popen(command, env=small.environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / ".store.partial" / "done.bin").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert err.strip().splitlines()[-1] == "hpcssl: stopped; the same command goes on where it was"
    assert (tmp_path / ".store.partial" / "done.bin").exists()
    assert main(["store", "build", str(tiles), "--out", str(tmp_path / "store")]) == 0
    assert not (tmp_path / ".store.partial").exists()
    open_store(tmp_path / "store").verify()
