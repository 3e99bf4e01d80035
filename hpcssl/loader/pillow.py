"""The reference backend: a plan executed by Pillow, each operation as torchvision's transforms do it on its images."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps, UnidentifiedImageError

from hpcssl.core.errors import BadTileError
from hpcssl.loader.stain import planned_jitter
from hpcssl.plan.draw import BRIGHTNESS, CONTRAST, HUE, Q16, SATURATION, Plan, ViewParameters
from hpcssl.plan.recipe import AugmentRecipe
from hpcssl.stores.store import TileData

_SOLARIZE_FROM = 128
_ENHANCERS = {
    BRIGHTNESS: ImageEnhance.Brightness,
    CONTRAST: ImageEnhance.Contrast,
    SATURATION: ImageEnhance.Color,
}
_TURNS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)  # counter-clockwise


def decode(tile: TileData, *, name: str) -> Image.Image:
    """Return an RGB image of a JPEG or of pixels; BadTileError naming the tile where the bytes cannot be decoded."""
    if not isinstance(tile, bytes):
        return Image.fromarray(tile)
    try:
        image: Image.Image = Image.open(io.BytesIO(tile))
        if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):  # Pillow would cut it at 255
            image = Image.fromarray(((np.asarray(image, np.uint32) + 128) // 257).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError(f"pixels of {image.mode}, 32 bits, of which none is known to be white")
        return image.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise BadTileError(
            f"{name}: cannot be decoded ({' '.join(str(error).split())}); replace it or rebuild the store"
        ) from None


def whole_tile(tile: TileData, px: int, *, name: str) -> NDArray[np.uint8]:
    """Return the whole tile at `px` pixels a side, unaugmented, (px, px, 3) uint8; bicubic where the size differs."""
    image = decode(tile, name=name)
    return np.asarray(image if image.size == (px, px) else image.resize((px, px), Image.Resampling.BICUBIC))


def augment(tile: Image.Image, recipe: AugmentRecipe, plan: Plan, index: int, out: Sequence[NDArray[np.uint8]]) -> None:
    """Compute every view of the plan's `index`-th tile, which `decode` gave.

    `out` has for every kind of view an array (views, positions, px, px, 3), of which [:, index] is written.
    """
    for kind, views, target in zip(recipe.kinds, plan.kinds, out, strict=True):
        windows = views.windows(*tile.size, at=index)
        for v, (left, top, width, height) in enumerate(windows.tolist()):
            crop = tile.crop((left, top, left + width, top + height))
            crop = crop.resize((kind.view_px, kind.view_px), Image.Resampling.BICUBIC)
            target[v, index] = np.asarray(_colour(crop, views, index, v))


def _colour(image: Image.Image, views: ViewParameters, p: int, v: int) -> Image.Image:
    """Flip, turn and change the colours of one view: stains first, then in DINO's order."""
    if views.flip[p, v]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if views.flip_vertical[p, v]:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if views.turns[p, v]:
        image = image.transpose(_TURNS[views.turns[p, v] - 1])
    if views.stain[p, v]:
        image = Image.fromarray(planned_jitter(np.asarray(image), views, p, v))
    if views.jitter[p, v]:
        for operation, amount in views.jitter_at(p, v):
            image = _shift_hue(image, amount) if operation == HUE else _ENHANCERS[operation](image).enhance(amount)
    if views.grey[p, v]:
        image = image.convert("L").convert("RGB")
    if views.blur[p, v]:
        image = image.filter(ImageFilter.GaussianBlur(int(views.sigma[p, v]) / Q16))
    if views.solarize[p, v]:
        image = ImageOps.solarize(image, _SOLARIZE_FROM)
    return image


def _shift_hue(image: Image.Image, turns: float) -> Image.Image:
    """Shift the hue in HSV, on Pillow's 8-bit hue, truncating the shift as torchvision does."""
    hue, saturation, value = image.convert("HSV").split()
    shifted = np.asarray(hue) + np.uint8(int(turns * 255) & 0xFF)
    return Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert("RGB")
