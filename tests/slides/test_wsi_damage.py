"""Slides that are damaged: cut off anywhere, or with a block that cannot be decoded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile

from hpcssl.core.errors import SlideError
from hpcssl.slides.opening import open_slide
from hpcssl.slides.slide import Slide


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs"])
def test_a_truncated_aperio_slide_is_told_as_one(tmp_path, real_data, name):
    """Also where the first of its directories, which stand behind the blocks, is not there at all."""
    data = (real_data / "wsi" / name).read_bytes()
    for share in (0, 0.0005, 0.1, 0.5, 2 / 3, 0.9, 0.999):
        (tmp_path / "cut.svs").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(SlideError, match=r"cut\.svs: truncated") as told:
            open_slide(tmp_path / "cut.svs")
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("options", [{}, {"bigtiff": True}, {"byteorder": ">"}])
def test_a_slide_cut_off_within_a_directory_is_told_as_truncated(tmp_path, options):
    """And never opened without one of its levels, though these stand in directories below the first and behind it."""
    pixels = np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)
    kind = {"tile": (128, 128), "photometric": "rgb"}
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True, **options) as writer:
        writer.write(pixels, subifds=2, **kind)
        writer.write(pixels[::2, ::2], subfiletype=1, **kind)
        writer.write(pixels[::4, ::4], subfiletype=1, **kind)
        writer.write(pixels[:300, :200], photometric="rgb")
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as file:
        pages = [file.pages[0], *file.pages[0].pages, file.pages[1]]
        ends = [t.valueoffset + t.valuebytecount for page in pages for t in page.tags if t.valuebytecount > 8]
        starts = [page.offset for page in pages]
    assert len(open_slide(tmp_path / "a.ome.tif").levels) == 3
    data = (tmp_path / "a.ome.tif").read_bytes()
    for cut in (*(start + more for start in starts for more in (-1, 0, 1, 30)), *(end - 1 for end in ends)):
        (tmp_path / "cut.ome.tif").write_bytes(data[:cut])
        with pytest.raises(SlideError, match="truncated"):
            open_slide(tmp_path / "cut.ome.tif")


def test_private_tags_that_name_nothing_are_no_truncation(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)
    more = [(65_000, "B", 100, bytes(100), True)]
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(128, 128), photometric="rgb", extratags=more)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        place = file.pages[0].tags[65_000].offset + 8
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[place : place + 4] = b"\xff\xff\xff\x7f"
    (tmp_path / "a.tif").write_bytes(data)
    np.testing.assert_array_equal(open_slide(tmp_path / "a.tif").read(0, 0, 0, 500, 300), pixels)


def write_damaged(path: Path) -> None:
    """Write a slide that OpenSlide reads, of 4 × 4 blocks of 64 px, of which number 5 is damaged."""
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 4), np.uint8)
    pixels[..., 3] = 255
    kind = {"photometric": "rgb", "extrasamples": ["unassalpha"], "compression": "deflate"}
    tifffile.imwrite(path, pixels, tile=(64, 64), **kind)
    with tifffile.TiffFile(path) as file:
        start = file.pages[0].dataoffsets[5]
    data = bytearray(path.read_bytes())
    data[start + 2 : start + 202] = b"\xff" * 200
    path.write_bytes(data)


def test_a_damaged_block_that_openslide_met_spoils_no_other(tmp_path):
    """Though a handle of OpenSlide keeps its first error: in any order, and while other threads read."""
    write_damaged(tmp_path / "a.tif")
    places = [(x, y, 0, 64, 64) for y in range(0, 256, 64) for x in range(0, 256, 64)]

    def is_bad(slide: Slide, number: int) -> bool:
        try:
            slide.read(*places[number])
        except SlideError:
            return True
        return False

    shared = open_slide(tmp_path / "a.tif")
    assert shared.reader == "openslide"
    with pytest.raises(SlideError, match=r"a.tif: OpenSlide cannot read level 0"):
        shared.read(*places[5])
    assert [number for number in [5, *range(16), 5, *range(16)] if is_bad(shared, number)] == [5] * 4
    order = np.random.default_rng(1).permutation(np.arange(320) % 16).tolist()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: is_bad(shared, number), order))
    assert [number for number, bad in zip(order, found, strict=True) if bad] == [5] * 20
