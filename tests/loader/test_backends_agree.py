"""Every backend against the Pillow reference: same plan, the same pictures within stated limits."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from hpcssl.core.errors import BadTileError
from hpcssl.loader import cpu, pillow
from hpcssl.loader.colour import change_colours, colours_of
from hpcssl.plan.draw import Q16, Plan, draw_plan
from hpcssl.plan.recipe import AugmentRecipe, dino_augment, mae_augment
from hpcssl.plan.tables import ONE

MOST_MEAN, MOST_RARE = 2.0, 16.0  # levels of 255: mean difference, 99.9th percentile


@pytest.fixture(scope="module")
def tiles(real_data: Path) -> list[bytes]:
    """64 real tiles of all folders."""
    files = sorted((real_data / "tiles").glob("*/*/*.jpg"))
    return [file.read_bytes() for file in files[:: len(files) // 64][:64]]


@pytest.fixture(scope="module")
def drawn() -> list[bytes]:
    """Tiles that need no real data: smooth colours with noise, some not square."""
    random = np.random.default_rng(0)
    encoded = []
    for size in ((64, 64), (64, 64), (80, 48), (33, 65)):
        coarse = Image.fromarray(random.integers(60, 250, (6, 6, 3), dtype=np.uint8))
        coarse = coarse.resize(size, Image.Resampling.BICUBIC)
        noise = random.integers(-9, 10, (*size[::-1], 3))
        pixels = Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8))
        stream = io.BytesIO()
        pixels.save(stream, "JPEG", quality=90)
        encoded.append(stream.getvalue())
    return encoded


def views_of(backend, recipe: AugmentRecipe, plan: Plan, tiles: list[bytes]) -> list[np.ndarray]:
    out = [np.zeros((k.count, len(tiles), k.view_px, k.view_px, 3), np.uint8) for k in recipe.kinds]
    for index, tile in enumerate(tiles):
        backend.augment(backend.decode(tile, name=f"tile {index}"), recipe, plan, index, out)
    return out


by_cpu = functools.partial(views_of, cpu)


def by_dali(recipe: AugmentRecipe, plan: Plan, tiles: list[bytes], device="cpu", threads=1) -> list[np.ndarray]:
    """The graph as a GPU runs it, on the CPU."""
    dali = pytest.importorskip("hpcssl.loader.dali", reason="DALI is not installed")
    executor = dali.Dali(recipe, batch=len(tiles), threads=threads, device=torch.device(device))
    found = executor.execute([dali.decode(tile, name="x") for tile in tiles], plan)
    return [views.cpu().numpy() for views in found]


def by_device_colours(recipe: AugmentRecipe, plan: Plan, tiles: list[bytes]) -> list[np.ndarray]:
    """Pillow's crops, and on them the colours as a GPU changes them."""
    never = {"stain": False, "jitter": False, "grey": False, "blur": False, "solarize": False}
    found = views_of(pillow, recipe, changed(plan, **never), tiles)
    for kind, views, crops in zip(recipe.kinds, plan.kinds, found, strict=True):
        for v, crop in enumerate(crops):
            colours = colours_of(recipe, kind, views, v, torch.device("cpu"))
            crops[v] = change_colours(torch.from_numpy(crop), colours).numpy()
    return found


BACKENDS = {"cpu": by_cpu, "dali": by_dali, "device colours": by_device_colours}


def check_close(recipe: AugmentRecipe, plan: Plan, tiles: list[bytes], fast=by_cpu) -> None:
    pairs = zip(views_of(pillow, recipe, plan, tiles), fast(recipe, plan, tiles), strict=True)
    differences = np.concatenate([np.abs(a.astype(int) - b).ravel() for a, b in pairs])
    assert differences.mean() <= MOST_MEAN
    assert np.percentile(differences, 99.9) <= MOST_RARE


def changed(plan: Plan, **values: object) -> Plan:
    """Return the plan with some parameters at these values for every view."""
    kinds = [
        replace(views, **{name: np.full_like(getattr(views, name), value) for name, value in values.items()})
        for views in plan.kinds
    ]
    return replace(plan, kinds=tuple(kinds))


def fixed(plan: Plan, **values: object) -> Plan:
    """Return the plan with all colour operations off but those given, at these values for every view."""
    off = {"jitter": False, "grey": False, "blur": False, "solarize": False, "hue": 0}
    off |= dict.fromkeys(("brightness", "contrast", "saturation"), Q16)
    return changed(plan, **{**off, **values})


OPERATIONS = {
    "crop": [{}],
    "flips and turns": [{"flip": True}, {"flip_vertical": True}, {"turns": 1}, {"turns": 3, "flip": True}],
    "stain": [{"stain": True, "stain_factors": int(f * Q16), "stain_shifts": 300} for f in (0.8, 1.0, 1.2)],
    "brightness": [{"jitter": True, "brightness": int(f * Q16)} for f in (0, 0.6, 1, 1.2, 1.4, 2)],
    "contrast": [{"jitter": True, "contrast": int(f * Q16)} for f in (0, 0.6, 1, 1.2, 1.4, 2)],
    "saturation": [{"jitter": True, "saturation": int(f * Q16)} for f in (0, 0.8, 1, 1.2, 2)],
    "hue": [{"jitter": True, "hue": int(t * Q16)} for t in (-0.5, -0.1, -0.03, 0, 0.05, 0.1, 0.5)],
    "grey": [{"grey": True}],
    "blur": [{"blur": True, "sigma": int(s * Q16)} for s in (0.1, 0.5, 1, 1.4, 1.5, 2, 5)],
    "solarise": [{"solarize": True}],
    "every order": [
        {"jitter": True, "order": order, "brightness": 80_000, "contrast": 50_000, "saturation": 75_000, "hue": 5_000}
        for order in range(24)
    ],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_is_the_reference_s(operation: str, backend: str, tiles: list[bytes]) -> None:
    recipe = histology(dino_augment(), blur_sigma=(0.1, 5.0))
    some = tiles[::32] if operation == "every order" else tiles[::16]
    plan = draw_plan(recipe, 0, np.arange(len(some)))
    for values in OPERATIONS[operation]:
        check_close(recipe, fixed(plan, **values), some, BACKENDS[backend])


def histology(recipe: AugmentRecipe, **values: object) -> AugmentRecipe:
    """Return a recipe whose views may also be turned, and their stains jittered; every one may be blurred."""
    extra = {"flip_vertical": 0.5, "quarter_turns": True, "stain": 0.8}
    kinds = {
        name: replace(kind, **extra, blur=(0.5,) * kind.count, solarize=(0.5,) * kind.count)
        for name, kind in (("global_views", recipe.global_views), ("local_views", recipe.local_views))
        if kind
    }
    return replace(recipe, **kinds, **values)


RECIPES = {
    "dino": dino_augment(),
    "mae": mae_augment(),
    "dino, turned and stained": histology(dino_augment(), stain_alpha=0.2),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_whole_recipes_are_the_reference_s(recipe: str, backend: str, tiles: list[bytes]) -> None:
    plan = draw_plan(RECIPES[recipe], 1, np.arange(16), num_patches=196)
    check_close(RECIPES[recipe], plan, tiles[::4], BACKENDS[backend])


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_real_tiles(backend: str, drawn: list[bytes]) -> None:
    recipe = histology(dino_augment())
    check_close(recipe, draw_plan(recipe, 2, np.arange(len(drawn))), drawn, BACKENDS[backend])


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_dali_on_a_gpu_is_the_reference(recipe: str, tiles: list[bytes]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    plan = draw_plan(RECIPES[recipe], 1, np.arange(64), num_patches=196)
    check_close(RECIPES[recipe], plan, tiles, functools.partial(by_dali, device="cuda"))


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: replace(plan, kinds=tuple(replace(v, flip=~v.flip) for v in plan.kinds)),
        lambda plan: replace(plan, kinds=tuple(replace(v, hue=v.hue + 7000) for v in plan.kinds)),
        lambda plan: replace(plan, kinds=tuple(replace(v, contrast=v.brightness) for v in plan.kinds)),
        lambda plan: replace(plan, kinds=tuple(replace(v, place_x=v.place_y) for v in plan.kinds)),
    ],
    ids=["mirrored", "another hue", "another contrast", "another corner"],
)
@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_the_limits_catch_another_plan(change: Callable[[Plan], Plan], backend: str, tiles: list[bytes]) -> None:
    recipe = dino_augment()
    plan = draw_plan(recipe, 0, np.arange(16))
    with pytest.raises(AssertionError):
        check_close(recipe, plan, tiles[:16], lambda r, p, t: BACKENDS[backend](r, change(p), t))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_recipe_without_colours_changes_none(backend: str, tiles: list[bytes]) -> None:
    """What is not asked for is not done: not even a rounding."""
    recipe = replace(mae_augment(), global_views=replace(mae_augment().global_views, scale=(1.0, 1.0)))
    plan = changed(draw_plan(recipe, 0, np.arange(8), num_patches=196), area=ONE, ratio_half=ONE, flip=False)
    for wanted, found in zip(views_of(pillow, recipe, plan, tiles[:8]), BACKENDS[backend](recipe, plan, tiles[:8])):
        np.testing.assert_array_equal(wanted, found)


def test_decoding_is_pillow_s_bit_for_bit(tiles: list[bytes], drawn: list[bytes]) -> None:
    for jpeg in tiles + drawn:
        found = cpu.decode(jpeg, name="x")
        np.testing.assert_array_equal(found, np.asarray(pillow.decode(jpeg, name="x")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_a_pixel_become_eight(kind: str) -> None:
    """Whatever the name of the file says: cut off at 255 instead, such a tile would be all white."""
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    stream = io.BytesIO()
    Image.fromarray(ramp * 257).save(stream, kind)
    for decode in (pillow.decode, cpu.decode):
        assert np.array_equal(np.asarray(decode(stream.getvalue(), name="a.jpg")), ramp[..., None].repeat(3, axis=2))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_thirty_two_bits_a_pixel_are_a_bad_tile(dtype: type) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), 1000, dtype)).save(stream, "TIFF")
    for decode in (pillow.decode, cpu.decode):
        with pytest.raises(BadTileError, match=r"a\.jpg: cannot be decoded \(pixels of ., 32 bits"):
            decode(stream.getvalue(), name="a.jpg")


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_become_rgb(mode: str) -> None:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(stream, "JPEG")
    found = cpu.decode(stream.getvalue(), name="x").astype(int)
    expected = np.asarray(pillow.decode(stream.getvalue(), name="x")).astype(int)
    assert found.shape == expected.shape == (40, 40, 3)
    assert np.abs(found - expected).mean() <= MOST_MEAN


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.41, 1.42, 2.0, 3.0])
def test_the_blur_is_pillow_s_gaussian(sigma: float) -> None:
    spot = np.zeros((41, 41), np.uint8)
    spot[20, 20] = 255
    wide = np.asarray(Image.fromarray(spot).filter(ImageFilter.GaussianBlur(sigma))).astype(float)
    kernel = cpu.blur_kernel(sigma).astype(float)
    reach = len(kernel) // 2
    found = np.zeros((41, 41))
    found[20 - reach : 21 + reach, 20 - reach : 21 + reach] = 255 * np.outer(kernel, kernel)
    assert kernel.sum() == pytest.approx(1, abs=1e-6)
    assert np.abs(found - wide).max() <= 3, "Pillow rounds after each of its six passes"


def test_threads_change_nothing(drawn: list[bytes]) -> None:
    recipe = dino_augment()
    plan = draw_plan(recipe, 5, np.arange(len(drawn)))
    alone = views_of(cpu, recipe, plan, drawn)
    out = [np.zeros_like(views) for views in alone]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: cpu.augment(cpu.decode(drawn[i], name="x"), recipe, plan, i, out), range(len(drawn))))
    for a, b in zip(alone, out, strict=True):
        np.testing.assert_array_equal(a, b)
