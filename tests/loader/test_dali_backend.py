"""DALI's own: what it is fed, what it cannot decode, and that the size of a batch changes nothing."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hpcssl.core.errors import BadTileError, ConfigError
from hpcssl.loader import pillow
from hpcssl.loader.colour import change_colours, colours_of
from hpcssl.loader.execute import open_executor
from hpcssl.plan.draw import draw_plan
from hpcssl.plan.recipe import AugmentRecipe, ViewRecipe, mae_augment

dali = pytest.importorskip("hpcssl.loader.dali", reason="DALI is not installed")
CPU = torch.device("cpu")
PX = 40


def encoded(image: np.ndarray, mode: str = "RGB", **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).convert(mode).save(stream, "JPEG", **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def jpegs() -> list[bytes]:
    random = np.random.default_rng(0)
    coarse = (Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8)) for _ in range(8))
    return [encoded(np.asarray(image.resize((PX, PX), Image.Resampling.BICUBIC)), quality=90) for image in coarse]


def recipe() -> AugmentRecipe:
    colours = {"jitter": 0.8, "grey": 0.2, "quarter_turns": True, "stain": 0.5}
    return AugmentRecipe(
        global_views=ViewRecipe(count=2, view_px=32, scale=(0.4, 1.0), blur=(1.0, 0.1), solarize=(0.0, 0.2), **colours),
        local_views=ViewRecipe(count=3, view_px=16, scale=(0.05, 0.4), **colours),
    )


def whole(tiles: list[bytes]) -> np.ndarray:
    """The tiles as DALI decodes them, uncropped."""
    whole_tile = AugmentRecipe(global_views=ViewRecipe(count=1, view_px=PX, scale=(1.0, 1.0), flip=0.0))
    plan = draw_plan(whole_tile, 0, np.arange(len(tiles)))
    plan.kinds[0].ratio_half[:] = 1 << 30
    executor = dali.Dali(whole_tile, batch=len(tiles), threads=1, device=CPU)
    return executor.execute([dali.decode(tile, name="x") for tile in tiles], plan)[0][0].numpy()


@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (2, 1), (4, 3), (8, 2)])
def test_neither_the_size_of_a_batch_nor_threads_nor_what_came_before_change_a_view(jpegs, batch, threads) -> None:
    tiles = [dali.decode(jpeg, name="x") for jpeg in jpegs]
    together = dali.Dali(recipe(), batch=8, threads=1, device=CPU).execute(tiles, draw_plan(recipe(), 0, np.arange(8)))
    executor = dali.Dali(recipe(), batch=batch, threads=threads, device=CPU)
    parts = [
        executor.execute(tiles[first : first + batch], draw_plan(recipe(), 0, np.arange(first, first + batch)))
        for first in reversed(range(0, 8, batch))
    ]
    for kind, views in enumerate(together):
        assert torch.equal(views, torch.cat([part[kind] for part in reversed(parts)], dim=1))


def test_tiles_of_several_sizes_share_a_batch(jpegs) -> None:
    random = np.random.default_rng(1)
    odd = [encoded(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((64, 48), (20, 90))]
    tiles, plan = [*jpegs[:2], *odd], draw_plan(mae_augment(), 0, np.arange(4), num_patches=196)
    found = dali.Dali(mae_augment(), batch=4, threads=1, device=CPU)
    views = found.execute([dali.decode(tile, name="x") for tile in tiles], plan)[0].numpy()
    wanted = [np.zeros_like(views)]
    for index, tile in enumerate(tiles):
        pillow.augment(pillow.decode(tile, name="x"), mae_augment(), plan, index, wanted)
    assert np.abs(wanted[0].astype(int) - views).max() <= 16


def test_decoding_is_pillow_s_also_where_pillow_has_to_do_it(jpegs) -> None:
    pixels = np.asarray(Image.open(io.BytesIO(jpegs[0])))
    turned = Image.Exif()
    turned[0x0112] = 6  # "rotate by 90 degrees"; no backend does
    tiles = [
        jpegs[0],
        encoded(pixels, "L"),
        encoded(pixels, "CMYK"),
        encoded(pixels, exif=turned),
        encoded(pixels, progressive=True),
        encoded(pixels, subsampling=0),
        jpegs[0] + b"after the end",
    ]
    wanted = np.stack([np.asarray(pillow.decode(tile, name="x")) for tile in tiles])
    np.testing.assert_array_equal(whole(tiles), wanted)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b"text", lambda b: b[:300], lambda b: b[: len(b) // 2]])
def test_what_pillow_cannot_decode_names_the_tile(jpegs, damage) -> None:
    for decode in (dali.decode, dali.decode_fully):
        with pytest.raises(BadTileError, match=r"lung/x\.jpg: cannot be decoded"):
            decode(damage(jpegs[0]), name="lung/x.jpg")


def test_a_batch_that_dali_refuses_is_decoded_by_pillow(jpegs, monkeypatch) -> None:
    """The header and the end are right, the data between them are not JPEG's: found only when it is decoded."""
    executor = open_executor("dali", recipe(), batch=4, threads=1, device=CPU)
    plan = draw_plan(recipe(), 0, np.arange(4))
    broken = dali.Encoded(b"\xff\xd8 no JPEG \xff\xd9", PX, PX)
    asked = []

    def source(index: int, decode) -> tuple[object, float, float]:
        asked.append((index, decode))
        return (broken if index == 2 and decode is dali.decode else decode(jpegs[index], name="x")), 0.0, 0.0

    found, _ = executor.start(source, plan)()
    again, _ = executor.start(lambda index, decode: (decode(jpegs[index], name="x"), 0.0, 0.0), plan)()
    executor.close()
    assert asked == [(i, dali.decode) for i in range(4)] + [(i, dali.decode_fully) for i in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "BMP files carry the same pixels"


def test_without_dali_one_line_says_what_to_do(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "hpcssl.loader.dali", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ConfigError, match=r"DALI cannot be imported .*pip install '\.\[dali\]', or set loader.backend"):
        open_executor("dali", recipe(), batch=1, threads=1, device=CPU)


def test_the_colours_compile_in_one_piece(jpegs) -> None:
    """On a GPU they are one compiled graph; what breaks it would cost launches and transfers."""
    plan = draw_plan(recipe(), 0, np.arange(8))
    compiled = torch.compile(change_colours, backend="eager", fullgraph=True, dynamic=False)
    pixels = torch.from_numpy(np.stack([np.asarray(pillow.decode(jpeg, name="x")) for jpeg in jpegs]))
    for v in range(2):
        colours = colours_of(recipe(), recipe().global_views, plan.kinds[0], v, CPU)
        assert torch.equal(compiled(pixels, colours), change_colours(pixels, colours))
