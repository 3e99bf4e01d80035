"""What is taken for tissue, and which tiles of the grid that gives."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy import ndimage

from hpcssl.slides import foreground
from hpcssl.slides.foreground import CELL, Foreground, classify, find_foreground
from hpcssl.slides.grid import MOST_PEN, grid, region_tiles, regions
from hpcssl.slides.sampling import sample
from hpcssl.slides.slide import About, Level, Slide
from hpcssl.slides.tiff import TiffSlide
from hpcssl.synthetic.drawn_slides import GLASS, PEN, draw_slide

WIDTH, HEIGHT, MPP = 1600, 1200, 0.5


class Picture(Slide):
    """A slide of one level in memory."""

    reader = "picture"

    def __init__(self, pixels: NDArray[np.uint8]):
        height, width = pixels.shape[:2]
        level = Level(width=width, height=height, downsample=1)
        super().__init__("picture", [level], About(mpp=None, mpp_places="", scanner=""))
        self._pixels = np.pad(pixels, ((0, 64), (0, 64), (0, 0)), constant_values=255)

    def read(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        assert x >= 0
        assert y >= 0
        return self._pixels[y : y + height, x : x + width]


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.uint8]:
    path = tmp_path_factory.mktemp("tissue") / "a.tif"
    return draw_slide(path, seed=1, width=WIDTH, height=HEIGHT, mpp=MPP)


def truth(pixels: NDArray[np.uint8], cell: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which cells are mostly tissue, and which mostly pen, as they were drawn."""
    pen = (pixels == PEN).all(-1)
    glass = (np.abs(pixels.astype(int) - GLASS) <= 3).all(-1)
    island = ndimage.binary_fill_holes(ndimage.binary_closing(~glass, iterations=3))
    rows, columns = pixels.shape[0] // cell, pixels.shape[1] // cell

    def mostly(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return mask[: rows * cell, : columns * cell].reshape(rows, cell, columns, cell).mean((1, 3)) > 0.5

    return mostly(island & ~pen), mostly(pen)


def test_tissue_is_found_and_pen_is_left_out(pixels):
    found = find_foreground(Picture(pixels), slide_mpp=MPP)
    assert found.cell == CELL * 2 / MPP == 16
    tissue, pen = truth(pixels, 16)
    assert (found.tissue & tissue).sum() > 0.93 * (found.tissue | tissue)[~found.pen].sum()
    assert not (found.tissue & pen).any()
    assert (found.pen & pen).sum() > 0.99 * pen.sum()
    assert found.tissue_mm2 == pytest.approx(found.tissue.sum() * 0.008**2)


def test_strips_and_threads_change_nothing(pixels, monkeypatch):
    whole = find_foreground(Picture(pixels), slide_mpp=0.31)
    monkeypatch.setattr(foreground, "_STRIP_PX", 100_000)
    with ThreadPoolExecutor(3) as pool:
        parts = find_foreground(Picture(pixels), slide_mpp=0.31, each=pool.map)
    np.testing.assert_array_equal(whole.colours, parts.colours)
    assert (whole.tissue != parts.tissue).mean() < 0.001  # the focus of a strip's outermost pixels


def test_what_is_out_of_focus_is_no_tissue(pixels):
    image = Image.fromarray(pixels)
    slightly, badly = (np.asarray(image.filter(ImageFilter.GaussianBlur(sigma))) for sigma in (1, 8))
    sharp = find_foreground(Picture(pixels), slide_mpp=MPP).tissue.sum()
    assert find_foreground(Picture(slightly), slide_mpp=MPP).tissue.sum() > 0.95 * sharp
    assert find_foreground(Picture(badly), slide_mpp=MPP).tissue.sum() < 0.02 * sharp


def test_glass_with_dust_is_blank():
    random = np.random.default_rng(0)
    glass = random.integers(236, 246, (900, 900, 3)).astype(np.uint8)
    glass[100:140, 200:260] = (180, 90, 140)  # 0.2 % of a square millimetre
    assert not find_foreground(Picture(glass), slide_mpp=MPP).tissue.any()


def test_a_slide_full_of_tissue_is_all_tissue(real_data):
    tile = Image.open(real_data / "qc" / "high-nuclei-score-level0.png").convert("RGB").crop((0, 0, 512, 512))
    assert find_foreground(Picture(np.asarray(tile)), slide_mpp=MPP).tissue.mean() > 0.95


def test_tissue_stained_in_violet_is_no_pen_but_pen_on_it_is(real_data):
    """Laboratories whose haematoxylin is bluer than a pen elsewhere: judged against the slide's own colours."""
    files = sorted((real_data / "tiles" / "lung").glob("lung_scc*/*.jpg"))[::40][:9]
    tiles = [np.asarray(Image.open(file).convert("RGB").resize((224, 224))) for file in files]
    pixels = np.full((1120, 1120, 3), 242, np.uint8)
    pixels[224:896, 224:896] = np.concatenate([np.concatenate(tiles[n : n + 3], 1) for n in (0, 3, 6)])
    red, green, blue = (pixels[..., c].astype(int) for c in range(3))
    violet = (blue - red > 55) & (blue > green + 40)
    assert violet.mean() > 0.15
    found = find_foreground(Picture(pixels), slide_mpp=MPP)
    assert found.tissue.mean() > 0.3
    assert found.pen.mean() < 0.01
    pixels[500:560, 100:1000] = (40, 20, 190)
    assert find_foreground(Picture(pixels), slide_mpp=MPP).pen.mean() > 0.8 * (60 * 900) / 1120**2


def test_blocks_of_a_wide_slide_are_hardly_decoded_twice(tmp_path):
    draw_slide(tmp_path / "wide.tif", seed=1, width=12288, height=1536, mpp=MPP, downsamples=(1,))
    slide = TiffSlide(str(tmp_path / "wide.tif"), cache_mb=0)
    before = slide.blocks_decoded
    find_foreground(slide, slide_mpp=MPP)
    assert slide.blocks_decoded - before == 48 * 6


@pytest.mark.parametrize(
    ("name", "tissue", "pen"),
    [
        ("no-tissue-green-pen", (0, 0.01), (0.7, 1)),
        ("no-tissue-red-pen", (0, 0.02), (0.3, 1)),
        ("no-tissue", (0, 0), (0, 0)),
        ("no-tissue-line", (0, 0.01), (0, 0.2)),
        ("almost-white-1", (0, 0), (0, 0)),
        ("tcga-green-pen", (0.5, 0.8), (0.15, 0.35)),
        ("tcga-red-pen", (0.3, 0.6), (0.2, 0.45)),
        ("medium-nuclei-score-level0", (0.85, 1), (0, 0)),
        ("tcga-lung-rgb", (0.7, 1), (0, 0)),
        ("tissue-level2-3000-7666-7096-11763", (0.55, 0.8), (0, 0)),
    ],
)
def test_real_pictures(real_data, name, tissue, pen):
    image = Image.open(real_data / "qc" / f"{name}.png").convert("RGB")
    found = find_foreground(Picture(np.asarray(image)), slide_mpp=MPP)
    assert tissue[0] <= found.tissue.mean() <= tissue[1]
    assert pen[0] <= found.pen.mean() <= pen[1]


def test_a_cell_is_never_both():
    random = np.random.default_rng(0)
    colours = random.integers(0, 256, (40, 50, 3)).astype(np.uint8)
    tissue, pen = classify(colours, np.full((40, 50), 9, np.float32))
    assert not (tissue & pen).any()
    assert pen.any()


def foreground_of(tissue: NDArray[np.bool_], pen: NDArray[np.bool_], cell: float) -> Foreground:
    return Foreground(tissue=tissue, pen=pen, colours=np.zeros((*tissue.shape, 3), np.uint8), cell=cell, cell_mm2=1.0)


def test_shares_of_tiles_that_cut_cells_are_exact():
    """A tile of 3 cells a side, a third of it tissue to a hair."""
    slide = Picture(np.zeros((90, 90, 3), np.uint8))
    sampling = sample(slide, slide_mpp=1, mpp=1, tile_px=30)
    tissue, none = np.zeros((9, 9), bool), np.zeros((9, 9), bool)
    tissue[4, 3:6] = True  # of the tile at (30, 30): 3 of 9 cells
    found = foreground_of(tissue, none, 10)
    assert grid(slide, found, sampling, 3 / 9 - 1e-9).tolist() == [[30, 30]]
    assert grid(slide, found, sampling, 3 / 9 + 1e-9).tolist() == []
    shifted = foreground_of(tissue, none, 9)  # cells 4 and 3 to 5 are now 36 to 45 and 27 to 54: 9 × 24 of 900
    assert grid(slide, shifted, sampling, 9 * 24 / 900 - 1e-9).tolist() == [[30, 30]]
    assert grid(slide, shifted, sampling, 9 * 24 / 900 + 1e-9).tolist() == []


def test_a_tile_with_pen_is_left_out_though_it_has_tissue():
    slide = Picture(np.zeros((60, 60, 3), np.uint8))
    sampling = sample(slide, slide_mpp=1, mpp=1, tile_px=30)
    pen = np.zeros((30, 30), bool)
    pen[:4, :4] = True
    assert MOST_PEN < 16 / 225
    assert grid(slide, foreground_of(~pen, pen, 2), sampling, 0.4).tolist() == [[30, 0], [0, 30], [30, 30]]


def test_the_grid_stands_region_by_region_within_the_slide():
    slide = Picture(np.zeros((5000, 4000, 3), np.uint8))
    sampling = sample(slide, slide_mpp=0.5, mpp=0.5, tile_px=224)
    everything = foreground_of(np.ones((313, 250), bool), np.zeros((313, 250), bool), 16)
    corners = grid(slide, everything, sampling, 1.0)
    assert len({tuple(corner) for corner in corners.tolist()}) == len(corners) == (5000 // 224) * (4000 // 224)
    assert corners.max(0).tolist() == [(4000 // 224 - 1) * 224, (5000 // 224 - 1) * 224]
    spans = regions(corners, sampling)
    assert region_tiles(sampling) == 8
    assert len(spans) == 3 * 3
    assert [first for first, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == len(corners)
    for first, end in spans:
        assert np.ptp(corners[first:end], axis=0).max() < 8 * 224
