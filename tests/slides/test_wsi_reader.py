"""Reading whole slides: the same pixels as OpenSlide's, from disk and from servers, and what damage is told."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile

from hpcssl.core.errors import SlideError
from hpcssl.slides import ranges, tiff
from hpcssl.slides.opening import open_slide
from hpcssl.slides.slide import Slide
from hpcssl.slides.tiff import TiffSlide
from hpcssl.slides.vendor import OpenSlideSlide
from hpcssl.synthetic.drawn_slides import draw_slide

WIDTH, HEIGHT = 1200, 900
KINDS = {"plain.tif": {}, "jpeg.svs": {"kind": "svs"}, "jpeg2000.svs": {"kind": "svs-jpeg2000"}}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for name, kind in KINDS.items():
        draw_slide(folder / name, seed=3, width=WIDTH, height=HEIGHT, **kind)
    return folder


def rectangles(slide: Slide, number: int = 12) -> Iterator[tuple[int, int, int, int, int]]:
    """Places in a slide, the first of them beyond its edges."""
    random = np.random.default_rng(5)
    for n in range(number):
        level = n % len(slide.levels)
        size = slide.levels[level]
        x, y = (-30, -20) if n < len(slide.levels) else random.integers(0, (size.width, size.height)).tolist()
        yield x, y, level, int(random.integers(1, 400)), int(random.integers(1, 400))


@pytest.mark.parametrize("name", KINDS)
def test_blocks_read_directly_are_the_pixels_of_openslide(drawn, name):
    direct, through = open_slide(drawn / name), OpenSlideSlide(str(drawn / name), cache_mb=0)
    assert direct.reader == "tiff"
    assert through.reader == "openslide"
    assert direct.levels == through.levels
    assert direct.mpp == pytest.approx(0.25) == through.mpp
    for place in rectangles(direct):
        ours, theirs = direct.read(*place), through.read(*place)
        assert ours.shape == (place[4], place[3], 3)
        np.testing.assert_array_equal(ours, theirs, err_msg=str(place))


@pytest.mark.parametrize(
    ("name", "levels", "mpp", "scanner"),
    [
        ("CMU-1-Small-Region.svs", [1], 0.499, "Aperio CPAPERIOCS"),
        ("TCGA-CR-7395-01A-01-TS1.svs", [1, 2], None, "Aperio"),
        ("TCGA-XK-AAJU-01A-01-TS1_pyramid.tif", [1, 2, 4, 8], None, ""),
    ],
)
def test_real_slides(real_data, name, levels, mpp, scanner):
    slide = open_slide(real_data / "wsi" / name)
    assert [level.downsample for level in slide.levels] == levels
    assert slide.mpp == mpp
    assert slide.about.scanner == scanner
    if not slide.reader.startswith("tiff ("):  # whose colours OpenSlide shows wrong
        through = OpenSlideSlide(slide.path, cache_mb=0)
        for place in rectangles(slide):
            if slide.levels[place[2]].downsample == 1:  # OpenSlide moves others by parts of a pixel
                np.testing.assert_array_equal(slide.read(*place), through.read(*place), err_msg=str(place))


def write_philips(path: Path, pixels: np.ndarray, *, height: float = 1.0) -> None:
    """Write a TIFF as Philips scanners do: levels filled up to whole blocks, and XML that says their spacing."""
    spacing = '<Attribute Name="DICOM_PIXEL_SPACING">"{1}" "{0}"</Attribute>'
    level = f'<DataObject ObjectType="PixelDataRepresentation">{spacing}</DataObject>'
    levels = "".join(level.format(0.00025 * 2**n, height * 0.00025 * 2**n) for n in range(3))
    xml = (
        '<DataObject ObjectType="DPUfsImport"><Attribute Name="DICOM_MANUFACTURER">PHILIPS</Attribute>'
        f'<Attribute Name="X"><Array>{levels}</Array></Attribute></DataObject>'
    )
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for n in range(3):
            part = pixels[:: 2**n, :: 2**n]
            padding = [(0, -part.shape[0] % 256), (0, -part.shape[1] % 256), (0, 0)]
            options = {"description": f"level={n}" if n else xml, "software": "Philips DP v1.0", "metadata": None}
            options |= {"tile": (256, 256), "photometric": "rgb", "compression": "deflate", "subfiletype": int(n > 0)}
            writer.write(np.pad(part, padding, constant_values=255), **options)


def test_philips_levels_are_halves_though_filled_up_to_whole_blocks(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (768, 1280, 3), np.uint8)
    write_philips(tmp_path / "p.tiff", pixels)
    slide = open_slide(tmp_path / "p.tiff")
    assert slide.reader == "tiff"
    levels = [(level.width, level.height, level.downsample) for level in slide.levels]
    assert levels == [(1280, 768, 1), (640, 384, 2), (320, 192, 4)]
    assert (slide.mpp, slide.about.scanner) == (pytest.approx(0.25), "PHILIPS")
    for n in range(3):
        part = pixels[:: 2**n, :: 2**n]
        np.testing.assert_array_equal(slide.read(0, 0, n, part.shape[1], part.shape[0]), part)


@pytest.mark.parametrize(
    "options",
    [
        {"bigtiff": True, "compression": "deflate"},
        {"byteorder": ">", "compression": "lzw", "predictor": True},
        {},
        {"compression": "webp", "compressionargs": {"lossless": True}},
    ],
)
def test_other_tiffs(tmp_path, options):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)
    inch = {"resolution": (101_600, 101_600), "resolutionunit": "INCH"}
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(128, 128), photometric="rgb", **inch, **options)
    slide = open_slide(tmp_path / "a.tif")
    assert (slide.reader, slide.mpp) == ("tiff", pytest.approx(0.25))
    np.testing.assert_array_equal(slide.read(0, 0, 0, 500, 300), pixels)


def test_ome_levels_that_stand_below_the_first(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)
    metadata = {"axes": "YXS", "PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm"}
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as writer:
        writer.write(pixels, subifds=1, tile=(128, 128), photometric="rgb", metadata=metadata)
        writer.write(pixels[::2, ::2], subfiletype=1, tile=(128, 128), photometric="rgb")
    slide = open_slide(tmp_path / "a.ome.tif")
    assert (slide.mpp, [level.downsample for level in slide.levels]) == (0.25, [1, 2])
    np.testing.assert_array_equal(slide.read(0, 0, 1, 250, 150), pixels[::2, ::2])


@pytest.mark.parametrize("kind", ["philips", "ome", "resolution", "openslide"])
def test_pixels_that_are_not_square_are_refused(tmp_path, kind):
    """And not taken for square ones, whose tiles would be half as high; half a per cent is none of that."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)
    path = tmp_path / {"philips": "a.tiff", "ome": "a.ome.tif"}.get(kind, "a.tif")

    def write(height: float) -> None:
        options = {"tile": (128, 128), "photometric": "rgb"}
        if kind == "philips":
            return write_philips(path, pixels, height=height)
        if kind == "ome":
            sizes = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 250 * height, "PhysicalSizeYUnit": "nm"}
            return tifffile.imwrite(path, pixels, metadata={"axes": "YXS", **sizes}, **options)
        if kind == "openslide":
            options |= {"extrasamples": ["unassalpha"]}
        data = np.dstack([pixels, pixels[..., :1]]) if kind == "openslide" else pixels
        inch = {"resolution": (101_600, 101_600 / height), "resolutionunit": "INCH"}
        return tifffile.imwrite(path, data, metadata=None, **inch, **options)

    write(1.003)
    slide = open_slide(path)
    assert slide.reader == ("openslide" if kind == "openslide" else "tiff")
    assert (slide.mpp, slide.about.mpp_y) == (pytest.approx(0.25), pytest.approx(0.25075))
    write(0.5)
    with pytest.raises(SlideError, match=r"its pixels are not square \(0.25 × 0.125 microns by .*; save it with"):
        open_slide(path)


def test_blocks_that_hold_rgb_though_said_to_hold_ycbcr_are_shown_as_rgb(tmp_path, drawn):
    pixels = draw_slide(tmp_path / "right.tif", seed=3, width=WIDTH, height=HEIGHT, downsamples=(1,))
    tifffile.imwrite(tmp_path / "wrong.tif", pixels, photometric="ycbcr", compression="jpeg", tile=(256, 256))
    wrong, right = open_slide(tmp_path / "wrong.tif"), open_slide(tmp_path / "right.tif")
    assert wrong.reader != right.reader == "tiff"
    for slide in (wrong, right):
        error = np.abs(slide.read(0, 0, 0, WIDTH, HEIGHT).astype(int) - pixels)
        assert error.mean() < 3


def test_what_is_magenta_by_right_stays_so(tmp_path):
    pixels = np.full((300, 400, 3), (255, 120, 255), np.uint8)
    pixels[100:200] = (90, 20, 140)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", compression="jpeg", tile=(128, 128))
    slide = open_slide(tmp_path / "a.tif")
    assert np.abs(slide.read(0, 0, 0, 400, 300).astype(int) - pixels).mean() < 3


def test_pixels_of_real_glass_that_was_stored_untransformed(real_data):
    slide = open_slide(real_data / "wsi" / "TCGA-XK-AAJU-01A-01-TS1_pyramid.tif")
    glass = np.median(slide.read(150, 500, 2, 80, 120), (0, 1))
    assert np.ptp(glass) < 6
    assert glass.min() > 225


def test_threads_share_a_slide_and_its_cache(drawn):
    alone, shared = open_slide(drawn / "plain.tif"), open_slide(drawn / "plain.tif", cache_mb=1)
    places = list(rectangles(alone, 60))
    expected = [alone.read(*place) for place in places]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(lambda place: shared.read(*place), places), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_neighbours_share_the_blocks_that_are_kept(drawn):
    blocks = {}
    for cache_mb in (0, 8):
        slide = TiffSlide(str(drawn / "plain.tif"), cache_mb=cache_mb)
        for x in range(0, 1024, 64):
            slide.read(x, 10, 0, 64, 64)
        blocks[cache_mb] = slide.blocks_decoded
    assert blocks == {0: 16, 8: 4}


def test_an_open_slide_holds_sixteen_bytes_for_a_block(tmp_path):
    """What `held_bytes` says: Python's numbers in the tags of its pages would be four times as much."""
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((1024, 1024, 3), np.uint8), tile=(16, 16), photometric="rgb")
    open_slide(tmp_path / "a.tif")
    gc.collect()
    tracemalloc.start()
    try:
        slide = open_slide(tmp_path / "a.tif")
        gc.collect()
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert slide.held_bytes == 16 * 64 * 64 < held < 1.3 * slide.held_bytes


def test_a_file_is_open_as_long_as_its_slide_and_no_longer(drawn):
    def is_open() -> bool:
        return any(p.resolve().name == "plain.tif" for p in Path("/proc/self/fd").iterdir())

    gc.collect()
    gc.disable()  # nothing may wait for it
    try:
        slide = open_slide(drawn / "plain.tif")
        slide.read(0, 0, 0, 10, 10)
        assert is_open()
        del slide
        assert not is_open()
    finally:
        gc.enable()


def test_blocks_where_nothing_was_scanned_are_white(tmp_path):
    path = tmp_path / "sparse.tif"
    tifffile.imwrite(path, np.zeros((64, 96, 3), np.uint8), tile=(32, 32), photometric="rgb")
    with tifffile.TiffFile(path, mode="r+b") as file:
        counts = [*file.pages[0].databytecounts]
        counts[1] = 0
        file.pages[0].tags["TileByteCounts"].overwrite(counts)
    pixels = open_slide(path).read(0, 0, 0, 96, 64)
    assert (pixels[:32, 32:64] == 255).all()
    assert (pixels[:, :32] == 0).all()


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.7, 0.8, 0.9, 0.99])
def test_a_truncated_slide_is_told_as_one(tmp_path, drawn, share):
    """Also where level 0 is whole and only a coarser one is cut off."""
    for name in KINDS:
        data = (drawn / name).read_bytes()
        (tmp_path / name).write_bytes(data[: int(len(data) * share)])
        with pytest.raises(SlideError, match="truncated") as told:
            open_slide(tmp_path / name)
        assert "\n" not in str(told.value)


def test_what_no_reader_can_read_is_told_with_both_reasons(tmp_path, real_data):
    (tmp_path / "text.svs").write_text("no slide")
    with pytest.raises(SlideError, match=r"OpenSlide knows; nor can its blocks be read directly \(not a TIFF"):
        open_slide(tmp_path / "text.svs")
    with pytest.raises(SlideError, match="OpenSlide cannot read it"):
        open_slide(real_data / "wsi" / "TCGA-XK-AAJU-01A-01-TS1_columnmajor.dcm")
    with pytest.raises(SlideError, match="no such slide"):
        open_slide(tmp_path / "absent.svs")


def test_what_is_not_read_directly_is_read_through_openslide(drawn, monkeypatch):
    direct = open_slide(drawn / "jpeg.svs")
    monkeypatch.setattr(tiff, "_MOST_BLOCK_PX", 128)  # as if its blocks were whole images
    through = open_slide(drawn / "jpeg.svs")
    assert (direct.reader, through.reader) == ("tiff", "openslide")
    assert (through.mpp, through.about.scanner) == (0.25, "aperio")
    np.testing.assert_array_equal(through.read(100, 90, 1, 50, 40), direct.read(100, 90, 1, 50, 40))
    with pytest.raises(SlideError, match="only tiled TIFF pyramids can be read from afar"):
        open_slide(f"file://{drawn / 'jpeg.svs'}")


def test_a_block_that_cannot_be_decoded_is_the_slides_fault(tmp_path, drawn):
    data = bytearray((drawn / "plain.tif").read_bytes())
    with tifffile.TiffFile(drawn / "plain.tif") as file:
        start, size = file.pages[0].dataoffsets[5], file.pages[0].databytecounts[5]
    data[start : start + size] = bytes(size)
    (tmp_path / "broken.tif").write_bytes(data)
    slide = open_slide(tmp_path / "broken.tif")
    slide.read(0, 0, 0, 100, 100)
    with pytest.raises(SlideError, match="block 5 of level 0 cannot be decoded"):
        slide.read(0, 256, 0, 100, 100)


def test_a_server_gives_the_same_pixels_and_is_asked_for_what_is_needed_only(online, drawn, monkeypatch):
    """And, where it fails, so many times; test_online_remote.py is about all that a server may do."""
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(ranges, "_PAUSE_S", 0.01)
    local = open_slide(drawn / "jpeg2000.svs")
    with online.serving(drawn) as server:
        remote = open_slide(f"{server.url}/jpeg2000.svs")
        assert server.requests == 2, "its size and its header, each piece once"
        server.sent_bytes = 0
        np.testing.assert_array_equal(remote.read(300, 300, 0, 224, 224), local.read(300, 300, 0, 224, 224))
        assert 0 < server.sent_bytes < 0.3 * (drawn / "jpeg2000.svs").stat().st_size
        for place in rectangles(local, 6):
            np.testing.assert_array_equal(remote.read(*place), local.read(*place))
        with pytest.raises(SlideError, match="no such slide"):
            open_slide(f"{server.url}/absent.svs")
        server.requests, server.fault_of = 0, lambda number: "cut"
        with pytest.raises(OSError, match="does not answer after 3 tries"):
            remote.read(10, 10, 0, 64, 64)  # one block
        assert server.requests == ranges.TRIES
        server.fault_of = lambda number: None
        np.testing.assert_array_equal(remote.read(10, 10, 0, 64, 64), local.read(10, 10, 0, 64, 64))
