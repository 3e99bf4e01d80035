"""The fast backend of machines without DALI: one decode a tile, libraries for JPEG and resizing, compiled colour loops.

libjpeg-turbo (through simplejpeg) decodes, PyTorch resizes with the antialiased bicubic of Pillow, `pixels` does the
colours as Pillow does them. The result differs from the reference backend by rounding: a level here and there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch.nn import functional

from hpcssl.loader import pillow, pixels
from hpcssl.loader.stain import planned_jitter
from hpcssl.plan.draw import BRIGHTNESS, CONTRAST, HUE, Q16, SATURATION, Plan, ViewParameters
from hpcssl.plan.recipe import AugmentRecipe
from hpcssl.stores.store import TileData

_BLENDS = {BRIGHTNESS: pixels.brightness, CONTRAST: pixels.contrast, SATURATION: pixels.saturation}
_PASSES = 3  # box blurs that make Pillow's Gaussian one


def decode(tile: TileData, *, name: str) -> NDArray[np.uint8]:
    """Return (H, W, 3) uint8 of a JPEG or of pixels; BadTileError naming the tile where bytes cannot be decoded."""
    if not isinstance(tile, bytes):
        return tile
    try:
        image: NDArray[np.uint8] = simplejpeg.decode_jpeg(tile, "RGB")
        return image
    except ValueError:  # CMYK, or damaged: Pillow knows more kinds, and says what is wrong
        return np.array(pillow.decode(tile, name=name))


def augment(
    tile: NDArray[np.uint8], recipe: AugmentRecipe, plan: Plan, index: int, out: Sequence[NDArray[np.uint8]]
) -> None:
    """Compute every view of the plan's `index`-th tile; as `hpcssl.loader.pillow.augment`."""
    height, width = tile.shape[:2]
    plain, mirrored = torch.from_numpy(tile), None
    for kind, views, target in zip(recipe.kinds, plan.kinds, out, strict=True):
        for v, (left, top, w, h) in enumerate(views.windows(width, height, at=index).tolist()):
            source, x = plain, left
            if views.flip[index, v]:  # a mirrored crop is a crop of the mirrored tile
                mirrored = plain.flip(1) if mirrored is None else mirrored
                source, x = mirrored, width - left - w
            view = _resized(source[top : top + h, x : x + w], kind.view_px)
            if views.flip_vertical[index, v]:
                view = view[::-1]
            if views.turns[index, v]:
                view = np.rot90(view, int(views.turns[index, v]))
            change_colours(np.ascontiguousarray(view), views, index, v, target[v, index])


def change_colours(view: NDArray[np.uint8], views: ViewParameters, index: int, v: int, out: NDArray[np.uint8]) -> None:
    """Change stains and colours of one view as planned, from (px, px, 3) into another array, which may be the same."""
    if views.stain[index, v]:
        view = planned_jitter(view, views, index, v)
    if views.jitter[index, v] or views.grey[index, v] or views.blur[index, v] or views.solarize[index, v]:
        planes = np.empty((3, view.shape[0] * view.shape[1]), np.float32)
        pixels.split(view, planes)
        _colour(planes, views, index, v, view.shape[1])
        pixels.join(planes, out)
    elif view is not out:
        out[:] = view


def _resized(crop: torch.Tensor, px: int) -> NDArray[np.uint8]:
    """Return (px, px, 3) of an (h, w, 3) crop."""
    crop = crop.contiguous()
    if crop.shape[:2] != (px, px):  # the kernel is fastest on channels that lie together, and leaves them so
        image = crop[None].permute(0, 3, 1, 2)
        image = functional.interpolate(image, size=[px, px], mode="bicubic", antialias=True)
        crop = image.permute(0, 2, 3, 1)[0]
    array: NDArray[np.uint8] = crop.numpy()
    return array


def _colour(planes: NDArray[np.float32], views: ViewParameters, p: int, v: int, view_px: int) -> None:
    """Change the colours of one view, in DINO's order."""
    if views.jitter[p, v]:
        for operation, amount in views.jitter_at(p, v):
            if operation == HUE:
                pixels.hue(planes, int(amount * 255))
            else:
                _BLENDS[operation](planes, amount)
    if views.grey[p, v]:
        pixels.grey(planes)
    if views.blur[p, v]:
        pixels.blur(planes, view_px, blur_kernel(int(views.sigma[p, v]) / Q16))
    if views.solarize[p, v]:
        pixels.solarize(planes)


def blur_kernel(sigma: float) -> NDArray[np.float32]:
    """Return Pillow's Gaussian of a radius, three box blurs with fractional ends, as one kernel.

    Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering" (SSVM 2011).
    """
    length = math.sqrt(12 * sigma * sigma / _PASSES + 1)
    whole = math.floor((length - 1) / 2)
    end = (2 * whole + 1) * (whole * (whole + 1) - 3 * sigma * sigma / _PASSES)
    end /= 6 * (sigma * sigma / _PASSES - (whole + 1) ** 2)
    box = np.array([end, *[1.0] * (2 * whole + 1), end])
    box /= box.sum()
    return np.convolve(np.convolve(box, box), box).astype(np.float32)
