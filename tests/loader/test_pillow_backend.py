"""The Pillow backend against torchvision's own functions on Pillow images, operation by operation and all together."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from hpcssl.core.errors import StoreError
from hpcssl.loader import cpu, pillow
from hpcssl.loader.stain import stain_jitter
from hpcssl.plan import draw
from hpcssl.plan.draw import Q16, draw_plan
from hpcssl.plan.recipe import AugmentRecipe, ViewRecipe

POSITIONS = 40
PX = 32


def _recipe(**kind) -> AugmentRecipe:
    views = {"count": 2, "view_px": PX, "scale": (0.3, 1.0), "flip": 0.0, **kind}
    return AugmentRecipe(global_views=ViewRecipe(**views))


def _execute(recipe: AugmentRecipe, plan, tiles: list[bytes]) -> list[np.ndarray]:
    out = [np.zeros((k.count, len(tiles), k.view_px, k.view_px, 3), np.uint8) for k in recipe.kinds]
    for index, tile in enumerate(tiles):
        pillow.augment(pillow.decode(tile, name=f"tile {index}"), recipe, plan, index, out)
    return out


def _reference(tile: bytes, kind: ViewRecipe, views, index: int, v: int) -> np.ndarray:
    """Return one view as torchvision computes it."""
    image = Image.open(io.BytesIO(tile)).convert("RGB")
    left, top, width, height = views.windows(*image.size)[index, v].tolist()
    size = [kind.view_px, kind.view_px]
    image = tv.resized_crop(image, top, left, height, width, size, InterpolationMode.BICUBIC)
    if views.flip[index, v]:
        image = tv.hflip(image)
    if views.flip_vertical[index, v]:
        image = tv.vflip(image)
    if views.turns[index, v]:
        image = tv.rotate(image, 90 * int(views.turns[index, v]))  # counter-clockwise, as torchvision means it
    if views.stain[index, v]:
        factors, shifts = views.stain_factors[index, v] / Q16, views.stain_shifts[index, v] / Q16
        image = Image.fromarray(stain_jitter(np.asarray(image), factors, shifts))
    if views.jitter[index, v]:
        amounts = [int(a[index, v]) / Q16 for a in (views.brightness, views.contrast, views.saturation, views.hue)]
        change = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
        for operation in list(permutations(range(4)))[int(views.order[index, v])]:
            image = change[operation](image, amounts[operation])
    if views.grey[index, v]:
        image = tv.to_grayscale(image, 3)
    if views.blur[index, v]:
        image = image.filter(ImageFilter.GaussianBlur(int(views.sigma[index, v]) / Q16))
    if views.solarize[index, v]:
        image = tv.solarize(image, 128)
    return np.asarray(image)


def _compare(recipe: AugmentRecipe, tiles: list[bytes], seed: int = 3) -> np.ndarray:
    """Check every view of every tile and return the views of the first kind."""
    plan = draw_plan(recipe, seed, np.arange(len(tiles)) + 10**9)
    out = _execute(recipe, plan, tiles)
    for kind, views, pixels in zip(recipe.kinds, plan.kinds, out, strict=True):
        for index, tile in enumerate(tiles):
            for v in range(kind.count):
                wanted = _reference(tile, kind, views, index, v)
                np.testing.assert_array_equal(pixels[v, index], wanted, err_msg=f"tile {index}, view {v}")
    return out[0]


@pytest.fixture(scope="module")
def tiles(small) -> list[bytes]:
    return [small.jpeg(seed) for seed in range(POSITIONS)]


ONE_OPERATION = {
    "crop": {},
    "flip": {"flip": 0.5},
    "vertical flip": {"flip_vertical": 0.5},
    "quarter turns": {"quarter_turns": True},
    "flips and quarter turns": {"flip": 0.5, "flip_vertical": 0.5, "quarter_turns": True},
    "stain": {"stain": 0.7},
    "jitter": {"jitter": 1.0},
    "grey": {"grey": 0.5},
    "blur": {"blur": (1.0, 0.5)},
    "solarize": {"solarize": (1.0, 0.5)},
}


@pytest.mark.parametrize("operation", ONE_OPERATION)
def test_each_operation_is_torchvisions(tiles, operation):
    changed = _compare(_recipe(**ONE_OPERATION[operation]), tiles)
    if operation != "crop":  # it does something at all
        plain = _compare(_recipe(), tiles)
        assert (changed != plain).any(axis=(2, 3, 4)).mean() > 0.4


@pytest.mark.parametrize("change", ["brightness", "contrast", "saturation", "hue"])
def test_each_part_of_the_jitter_is_torchvisions(tiles, change):
    off = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    strength = {"hue": 0.5}.get(change, 0.9)  # the extremes, too: hue goes round, brightness clips
    recipe = replace(_recipe(jitter=1.0), **{**off, change: strength})
    assert (_compare(recipe, tiles) != _compare(_recipe(), tiles)).any(axis=(2, 3, 4)).mean() > 0.9


def test_all_operations_in_dinos_order_are_torchvisions(tiles):
    colour = {"flip": 0.5, "jitter": 0.8, "grey": 0.2}
    recipe = AugmentRecipe(
        global_views=ViewRecipe(count=2, view_px=PX, scale=(0.4, 1.0), blur=(1.0, 0.1), solarize=(0.0, 0.2), **colour),
        local_views=ViewRecipe(count=3, view_px=16, scale=(0.05, 0.4), blur=(0.5,) * 3, **colour),
    )
    _compare(recipe, tiles)
    tissue = {"flip_vertical": 0.5, "quarter_turns": True, "stain": 0.8}
    _compare(replace(recipe, global_views=replace(recipe.global_views, **tissue), stain_alpha=0.2), tiles)


def test_stains_change_before_colours(tiles, monkeypatch):
    """Stains are of the scanned picture; after a change of hue they would be another's."""
    recipe = _recipe(stain=1.0, jitter=1.0)
    plan = draw_plan(recipe, 3, np.arange(1))
    calls = []
    monkeypatch.setattr(pillow, "planned_jitter", lambda rgb, *at: calls.append(rgb) or rgb)
    _execute(recipe, plan, tiles[:1])
    plain = _execute(_recipe(), draw_plan(_recipe(), 3, np.arange(1)), tiles[:1])[0]
    np.testing.assert_array_equal(calls, plain[:, 0])


def test_every_order_of_the_jitter_occurs_and_matters(tiles):
    plan = draw_plan(_recipe(jitter=1.0), 3, np.arange(600))
    assert sorted(set(plan.kinds[0].order.ravel().tolist())) == list(range(24))
    one = draw_plan(_recipe(jitter=1.0), 3, np.arange(len(tiles)))
    reversed_order = replace(one.kinds[0], order=(23 - one.kinds[0].order).astype(np.uint8))
    other = replace(one, kinds=(reversed_order,))
    first, second = (_execute(_recipe(jitter=1.0), plan, tiles)[0] for plan in (one, other))
    assert (first != second).any(axis=(2, 3, 4)).mean() > 0.9


def test_the_comparison_notices_a_missing_clamp(tiles, monkeypatch):
    """Fusing brightness and contrast without the clamp between them is another image: the check is sharp enough."""
    monkeypatch.setattr(draw, "ORDERS", (draw.ORDERS[0],) * 24)
    with pytest.raises(AssertionError, match="tile"):
        _compare(_recipe(jitter=1.0), tiles)


def test_real_tiles_are_torchvisions(real_data):
    files = sorted((real_data / "tiles").glob("*/*/*.jpg"))[::401][:8]
    colour = {"flip": 0.5, "jitter": 0.8, "grey": 0.2}
    recipe = AugmentRecipe(
        global_views=ViewRecipe(count=2, view_px=96, scale=(0.4, 1.0), blur=(1.0, 0.1), solarize=(0.0, 0.2), **colour)
    )
    _compare(recipe, [file.read_bytes() for file in files])


@pytest.mark.parametrize("decode", [pillow.decode, cpu.decode])
@pytest.mark.parametrize("length", [0, 2, 100, 300, -10, -200])
def test_a_tile_that_cannot_be_decoded_is_named(tiles, decode, length):
    for damaged in (tiles[0][:length], b"text"[:length]):
        with pytest.raises(StoreError, match=r"breast/a/7\.jpg: cannot be decoded") as caught:
            decode(damaged, name="breast/a/7.jpg")
        assert "\n" not in str(caught.value)


def test_damaged_bytes_give_an_image_or_the_named_error(tiles):
    rng = np.random.default_rng(0)
    named = []
    for _ in range(400):
        damaged = bytearray(tiles[0])
        for place in rng.integers(0, len(damaged), 4):
            damaged[place] = rng.integers(0, 256)
        try:
            pillow.decode(bytes(damaged), name="x.jpg")
        except StoreError as error:
            named.append(str(error))
    assert len(named) > 5
    assert all(line.startswith("x.jpg: cannot be decoded") for line in named)


def test_a_tile_whose_header_claims_a_huge_size_is_named(tiles):
    damaged = bytearray(tiles[0])
    start = damaged.index(b"\xff\xc0")
    damaged[start + 5 : start + 9] = b"\xff\xdc\xff\xdc"
    with pytest.raises(StoreError, match=r"x\.jpg: cannot be decoded"):
        pillow.decode(bytes(damaged), name="x.jpg")


def test_whole_tiles_are_resized_only_where_they_differ(tiles):
    image = Image.open(io.BytesIO(tiles[0])).convert("RGB")
    np.testing.assert_array_equal(pillow.whole_tile(tiles[0], image.width, name="t"), np.asarray(image))
    resized = pillow.whole_tile(tiles[0], 20, name="t")
    np.testing.assert_array_equal(resized, np.asarray(tv.resize(image, [20, 20], InterpolationMode.BICUBIC)))
