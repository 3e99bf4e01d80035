"""Whole slides on a real SLURM, as tiles or read online: the store of one process; a bad slide is listed."""

from __future__ import annotations

import re
import subprocess
import time

import pandas as pd
import pytest

from hpcssl.cli.main import main
from hpcssl.stores.kinds import open_store
from hpcssl.synthetic.drawn_slides import draw_slide

PROFILE = "gpus_per_node: 0\ncpus_per_gpu: 1\ntimeout_min: 60\nenvironment: {OMP_NUM_THREADS: '1'}\n"
JOBS_S = 200  # for the array and the job after it, on a busy machine

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("command", "options", "does"),
    [(("tile",), ("--pack",), "cut the slides that are missing"), (("store", "build"), ("--online",), "look at the")],
    ids=["tile", "online"],
)
def test_an_array_over_slides_makes_the_store_of_one_process(hpcssl_in, slurm, tmp_path, command, options, does):
    slides = tmp_path / "slides" / "skin"
    slides.mkdir(parents=True)
    for seed in range(4):
        draw_slide(slides / f"s{seed}.tif", seed=seed, width=800, height=700)
    (slides / "bad.tif").write_bytes(b"no slide")
    (tmp_path / "profile.yaml").write_text(PROFILE)
    array = ("--cluster", "slurm", "--array", "2", "--profile", "profile.yaml")
    done = hpcssl_in(tmp_path, *command, "slides", "--out", "tiles", "--tile-px", 64, *options, *array)
    assert done.returncode == 0, done.stderr
    assert f"2 tasks {does}" in done.stdout
    assert len(set(re.findall(r"^job (\d+)", done.stdout, re.MULTILINE))) == 2
    until = time.monotonic() + JOBS_S
    while subprocess.run(["squeue", "--noheader"], env=slurm, check=True, capture_output=True, text=True).stdout:
        assert time.monotonic() < until
        time.sleep(0.5)
    store = open_store(tmp_path / "tiles")
    store.verify(deep=True)
    assert pd.read_csv(tmp_path / "tiles" / "failed_slides.csv")["slide_id"].tolist() == ["bad"]
    alone = tmp_path / "alone"
    assert main([*command, str(tmp_path / "slides"), "--out", str(alone), "--tile-px", "64", *options]) == 2
    assert store.digest == open_store(alone).digest
    assert store.header.get("shards") == open_store(alone).header.get("shards")
