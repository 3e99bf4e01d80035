"""Tiling whole slides as a job array on a real SLURM: the store of one process; a bad slide is listed."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from hpcssl.slides.cutting import CutOptions
from hpcssl.slides.slide_list import slides_to_read
from hpcssl.stores.store import Store
from hpcssl.stores.tiling import TilingOptions, tile_slides
from hpcssl.synthetic.drawn_slides import draw_slide

PROFILE = "gpus_per_node: 0\ncpus_per_gpu: 1\ntimeout_min: 60\nenvironment: {OMP_NUM_THREADS: '1'}\n"
JOBS_S = 200  # for the array and the job after it, on a busy machine

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_an_array_tiles_slides_as_one_process_does(hpcssl_in: Callable, slurm: dict[str, str], tmp_path: Path) -> None:
    slides = tmp_path / "slides" / "skin"
    slides.mkdir(parents=True)
    for seed in range(4):
        draw_slide(slides / f"s{seed}.tif", seed=seed, width=800, height=700)
    (slides / "bad.tif").write_bytes(b"no slide")
    (tmp_path / "profile.yaml").write_text(PROFILE)
    array = ("--cluster", "slurm", "--array", "2", "--profile", "profile.yaml")
    done = hpcssl_in(tmp_path, "tile", "slides", "--out", "tiles", "--tile-px", 64, "--pack", *array)
    assert done.returncode == 0, done.stderr
    assert "2 tasks cut the slides that are missing" in done.stdout
    assert len(set(re.findall(r"^job (\d+)", done.stdout, re.MULTILINE))) == 2
    until = time.monotonic() + JOBS_S
    while subprocess.run(["squeue", "--noheader"], env=slurm, check=True, capture_output=True, text=True).stdout:
        assert time.monotonic() < until
        time.sleep(0.5)
    store = Store.open(tmp_path / "tiles")
    store.verify(deep=True)
    assert pd.read_csv(tmp_path / "tiles" / "failed_slides.csv")["slide_id"].tolist() == ["bad"]
    options = TilingOptions(cut=CutOptions(tile_px=64), pack=True, threads=2)
    alone, _ = tile_slides(slides_to_read(tmp_path / "slides"), tmp_path / "alone", options)
    assert alone is not None
    assert store.digest == alone.digest
    assert store.header["shards"] == alone.header["shards"]
