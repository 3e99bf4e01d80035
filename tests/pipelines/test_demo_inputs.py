"""Bad inputs to the demo: one clear line, exit code 2, and nothing that the next run trips on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpcssl.cli.main import main

Refuse = Callable[..., str]
WIDE = ("--set", "max_repeats=100000")


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    """Two organs of six slides with four tiles each, and their table."""
    random = np.random.default_rng(0)
    folder = tmp_path / "my tiles"
    rows = ["slide_id,organ,label,num_tiles"]
    for number in range(12):
        organ = "lung" if number % 2 else "breast"
        slide = folder / organ / f"s{number:02d}"
        slide.mkdir(parents=True)
        for tile in range(4):
            Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(slide / f"{tile}.jpg")
        rows.append(f"s{number:02d},{organ},{'ab'[number // 2 % 2]},4")
    (folder / "slides.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run the demo, which must fail, and return its one line."""

    def run(tiles: Path, out: Path = tmp_path / "out") -> str:
        assert main(["demo", "--tiles", str(tiles), "--out", str(out)]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(errors) == 1, errors
        return errors[0]

    return run


def test_no_folder(tmp_path: Path, refuse: Refuse) -> None:
    assert "no such folder of tiles" in refuse(tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("content", "fault"), [(b"", "zero bytes"), (b"hello\n", "not a JPEG"), (None, "truncated")])
def test_a_refused_demo_leaves_nothing_in_the_way(
    tiles: Path, tmp_path: Path, refuse: Refuse, content: bytes | None, fault: str
) -> None:
    (tmp_path / "empty").mkdir()
    assert "no tiles below it; expected <organ>/<slide_id>/<name>.jpg" in refuse(tmp_path / "empty")
    bad = tiles / "lung" / "s01" / "2.jpg"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2] if content is None else content)
    line = refuse(tiles)  # another folder of tiles, the same out
    assert all(words in line for words in (str(bad), fault, "1 of 48"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"demo.json", "store.bad_tiles.csv"}


@pytest.mark.parametrize("source", ["tiles with a table", "tiles alone", "drawn"])
def test_a_label_that_is_no_column_is_refused_before_anything_is_done(
    tiles: Path, tmp_path: Path, capsys, source: str
) -> None:
    if source == "tiles alone":
        (tiles / "slides.csv").unlink()
    given = [] if source == "drawn" else ["--tiles", str(tiles)]
    assert main(["demo", *given, "--out", str(tmp_path / "out"), "--label", "lable"]) == 2
    assert "--label lable: no such column in the slide table; it has" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            '{"tiles": "other", "label": "label", "seed": 0}',
            "out: a demo with tiles = other, asked for is {tiles}; choose",
        ),
        *((content, "demo.json: damaged") for content in ("", "[1]", '{"tiles"')),
    ],
)
def test_a_demo_of_other_tiles_and_a_damaged_one(tiles: Path, tmp_path: Path, refuse: Refuse, content, told) -> None:
    (tmp_path / "out" / "store").mkdir(parents=True)
    (tmp_path / "out" / "demo.json").write_text(content, encoding="utf-8")
    assert told.format(tiles=tiles) in refuse(tiles)


def test_a_folder_of_something_else(tiles: Path, tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious", encoding="utf-8")
    assert "not empty and no demo" in refuse(tiles)
    assert (tmp_path / "out" / "thesis.tex").read_text(encoding="utf-8") == "precious"


def test_a_folder_without_read_permission(tiles: Path, tmp_path: Path) -> None:
    locked = tiles / "lung" / "s03"
    locked.chmod(0)
    command = [sys.executable, "-m", "hpcssl.cli.main", "demo", "--tiles", str(tiles), "--out", str(tmp_path / "out")]
    if os.geteuid() == 0:  # root reads everything; without these two capabilities it is like everybody else
        if not shutil.which("setpriv"):
            pytest.skip("root reads everything, and there is no setpriv to give that up")
        dropped = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--bounding-set={dropped}", f"--inh-caps={dropped}", *command]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    finally:
        locked.chmod(0o755)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"hpcssl: error: {locked}: permission denied")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("small_disk", ["64k"], indirect=True)
def test_a_disk_too_small_for_the_schedule(tiles: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is written stays for the next try; nothing of it looks finished."""
    out = small_disk / "schedule"
    build = ["schedule", "build", "--slides", str(tiles / "slides.csv"), "--spec", "demo", "--out", str(out)]
    assert main([*build, "--set", "num_groups=2", "--set", "positions_per_pseudo_epoch=20000", *WIDE]) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert {path.suffix for path in out.iterdir()} <= {".json", ".npy", ".sha256"}
    assert not (out / "schedule.json").exists()


@pytest.mark.parametrize("small_disk", ["16k", "200k", "2000k"], indirect=True)
def test_a_full_disk(tiles: Path, small_disk: Path, refuse: Refuse) -> None:
    """In the store, at the start of the run, and in the first checkpoint; the next start, with room, does not trip."""
    out = small_disk / "out"
    assert "the disk is full" in refuse(tiles, out)
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    command = [Path(sys.executable).with_name("hpcssl"), "demo", "--tiles", tiles, "--out", out]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            assert "error" not in line
            if "[4/7]" in line:
                break
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
