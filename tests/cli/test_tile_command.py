"""`hpcssl tile` at the command line: what is told, and the exit code."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import openslide
import pandas as pd
import pytest
from PIL import Image

from hpcssl.cli.main import main
from hpcssl.stores.kinds import open_store
from hpcssl.synthetic.drawn_slides import draw_slide

SMALL = ("--tile-px", "64", "--threads", "2")


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli-slides") / "skin"
    folder.mkdir()
    draw_slide(folder / "a.svs", seed=1, width=900, height=700, kind="svs")
    draw_slide(folder / "b.tif", seed=2, width=900, height=700, with_mpp=False)
    return folder


def test_all_slides_done_is_exit_0(slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tile", str(slides.parent), "--out", str(tmp_path / "t"), "--assume-mpp", "0.25", *SMALL]
    assert main(command) == 0
    store = open_store(tmp_path / "t")
    assert store.slides["organ"].tolist() == ["skin", "skin"]
    told = capsys.readouterr().out
    assert f"2 slides, {store.num_tiles} tiles of 64 px at 0.5 MPP" in told
    assert main(command) == 0
    assert main(["store", "verify", str(tmp_path / "t")]) == 0


def test_a_slide_that_fails_is_told_after_the_others_are_done(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t"
    assert main(["tile", str(slides), "--out", str(out), *SMALL, "--pack"]) == 2
    told = capsys.readouterr()
    assert "1 slide, " in told.out
    (line,) = [line for line in told.err.splitlines() if line.startswith("hpcssl: error: ")]
    assert "1 of 2 slides failed" in line
    assert "b.tif: no MPP in its metadata" in line
    assert "--assume-mpp" in line
    assert pd.read_csv(out / "failed_slides.csv")["slide_id"].tolist() == ["b"]
    assert open_store(out).slides["slide_id"].tolist() == ["a"]


def test_real_slides(real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "t"
    assert main(["tile", str(real_data / "wsi"), "--out", str(out), "--assume-mpp", "0.5"]) == 2
    assert "1 of 4 slides failed" in capsys.readouterr().err
    failed = pd.read_csv(out / "failed_slides.csv")
    assert failed["slide_id"].tolist() == ["TCGA-XK-AAJU-01A-01-TS1_columnmajor"]
    table = open_store(out).slides.set_index("slide_id")
    assert table["mpp"].tolist() == [0.499, 0.5, 0.5]
    counts = table["num_tiles"].tolist()
    for found, expected in zip(counts, (47, 197, 50), strict=True):  # as looked at in the pictures
        assert abs(found - expected) <= 3
    store = open_store(out)
    for number, name in enumerate(table.index):
        through = openslide.OpenSlide(table["path"].iloc[number])
        first, count = store.tiles_of_slide(number)
        for tile in range(first, first + count, 3):
            written = np.asarray(Image.open(io.BytesIO(store.fetch(0, tile)))).astype(int)
            red, green, blue = np.moveaxis(written, -1, 0)
            marked = ((green > red + 25) & (written.max(-1) > 60)) | (blue > red + 90)
            if name.endswith("pyramid"):  # whose colours OpenSlide shows wrong, and which has pen marks
                assert marked.mean() < 0.02
            else:
                read = through.read_region(store.coordinates_of(tile), 0, (224, 224)).convert("RGB")
                assert np.abs(written - np.asarray(read)).mean() < 5
