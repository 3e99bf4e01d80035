"""Stains and colours of a batch of views at once, on the device where they lie: what DALI has not, or does otherwise.

Pillow's operations as torch functions of whole numbers kept in float32, each view with its own parameters: one chain
without branches over the samples, which `torch.compile` fuses into a few passes over the pixels.

Legend: N views, H × W their pixels; planes are three tensors NHW (red, green, blue) of whole numbers 0 … 255.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from hpcssl.loader.cpu import blur_kernel
from hpcssl.loader.stain import stain_mixing
from hpcssl.plan.draw import BRIGHTNESS, CONTRAST, HUE, ORDERS, Q16, SATURATION, ViewParameters
from hpcssl.plan.recipe import AugmentRecipe, ViewRecipe

Planes = tuple[Tensor, Tensor, Tensor]
_ORDERS = np.array(ORDERS)
_SOLARIZE_FROM = 128


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Brightness, contrast, saturation and hue of N views, in each one's order.

    Attributes
    ----------
    operation : (4, N, 1, 1) float32, the first to the fourth, as numbered in ORDERS
    factor : (4, N, 1, 1) float32, of each operation
    shift : (N, 1, 1) float32, hue, in whole steps of 1/256 turn
    """

    operation: Tensor
    factor: Tensor
    shift: Tensor


@dataclass(frozen=True, kw_only=True)
class Colours:
    """What is done to the colours of N views; None for what no view of the recipe can have done to it.

    Attributes
    ----------
    mixing : (N, 4, 3) float32, from the old densities of red, green and blue, and 1, to the new ones
    grey, solarize : (N, 1, 1) bool
    kernel : (N, 1 + reach) float32, right half of the blur's symmetric kernel
    """

    mixing: Tensor | None
    jitter: Jitter | None
    grey: Tensor | None
    kernel: Tensor | None
    solarize: Tensor | None


def colours_of(recipe: AugmentRecipe, kind: ViewRecipe, views: ViewParameters, v: int, device: torch.device) -> Colours:
    """Return what a plan does to the v-th view of a kind, for all of its N positions."""

    def sent(array: NDArray[Any]) -> Tensor:
        dtype = np.bool_ if array.dtype == bool else np.float32
        return torch.from_numpy(np.ascontiguousarray(array, dtype)).to(device)

    return Colours(
        mixing=sent(_mixing(views, v)) if kind.stain else None,
        jitter=Jitter(**{name: sent(a) for name, a in _jitter_arrays(views, v).items()}) if kind.jitter else None,
        grey=sent(views.grey[:, v, None, None]) if kind.grey else None,
        kernel=sent(_kernels(views, v, recipe.blur_sigma[1])) if any(kind.blur[v : v + 1]) else None,
        solarize=sent(views.solarize[:, v, None, None]) if any(kind.solarize[v : v + 1]) else None,
    )


def _mixing(views: ViewParameters, v: int) -> NDArray[Any]:
    mixing, shifts = stain_mixing(views.stain_factors[:, v] / Q16, views.stain_shifts[:, v] / Q16)
    return np.where(views.stain[:, v, None, None], np.concatenate([mixing, shifts[:, None]], axis=1), np.eye(4, 3))


def _jitter_arrays(views: ViewParameters, v: int) -> dict[str, NDArray[Any]]:
    jitter, order = views.jitter[:, v], _ORDERS[views.order[:, v]].T  # (4, N)
    amounts = [amount[:, v] / Q16 for amount in (views.brightness, views.contrast, views.saturation)]
    factors = np.stack([*amounts, np.ones(len(jitter))])
    arrays = {
        "operation": np.where(jitter, order, BRIGHTNESS),  # by a factor of 1, which leaves a view as it is
        "factor": np.where(jitter, np.take_along_axis(factors, order, axis=0), 1),
        "shift": np.trunc(views.hue[:, v] / Q16 * 255),
    }
    return {name: array[..., None, None] for name, array in arrays.items()}


def _kernels(views: ViewParameters, v: int, most_sigma: float) -> NDArray[Any]:
    reach = len(blur_kernel(most_sigma)) // 2
    kernels = np.zeros((len(views.blur), 1 + reach))
    kernels[:, 0] = 1  # leaves a view as it is
    for n in np.flatnonzero(views.blur[:, v]):
        kernel = blur_kernel(int(views.sigma[n, v]) / Q16)
        half = kernel[len(kernel) // 2 :]
        kernels[n, : len(half)] = half
    return kernels


def change_colours(pixels_NHWC: Tensor, colours: Colours) -> Tensor:
    """Return the views with stains and colours changed, (N, H, W, 3) uint8."""
    planes: Planes = pixels_NHWC.float().unbind(-1)  # type: ignore[assignment]
    if colours.mixing is not None:
        planes = _mix_stains(planes, colours.mixing)
    if colours.jitter is not None:
        for stage in range(4):
            planes = _jitter(planes, colours.jitter, stage)
    if (chosen := colours.grey) is not None:
        luma = _luma(planes)
        planes = _each(planes, lambda plane: torch.where(chosen, luma, plane))
    if (kernel := colours.kernel) is not None:
        planes = _each(planes, lambda plane: _blur(plane, kernel))
    if (solarized := colours.solarize) is not None:
        planes = _each(planes, lambda p: torch.where(solarized & (p >= _SOLARIZE_FROM), 255 - p, p))
    return torch.stack(planes, dim=-1).to(torch.uint8)


def _each(planes: Planes, change: Callable[[Tensor], Tensor]) -> Planes:
    red, green, blue = planes
    return change(red), change(green), change(blue)


def _mix_stains(planes: Planes, mixing: Tensor) -> Planes:
    """As `stain_jitter`: optical densities, a matrix, and back."""
    densities = [-(plane.clamp(min=0.5) / 255).log() for plane in planes]
    weights = mixing[:, :, :, None, None]
    mixed = [sum(d * weights[:, i, c] for i, d in enumerate(densities)) + weights[:, 3, c] for c in range(3)]
    return tuple((255 * (-m).exp()).clamp(max=255).round() for m in mixed)  # type: ignore[return-value]


def _jitter(planes: Planes, jitter: Jitter, stage: int) -> Planes:
    """Do the operation that each view has at this place of its order.

    Brightness, contrast and saturation blend with black, with the mean grey, or with the grey of the pixel.
    """
    operation, factor, luma = jitter.operation[stage], jitter.factor[stage], _luma(planes)
    mean = (luma.mean((1, 2), keepdim=True) + 0.5).floor()
    other = torch.where(operation == CONTRAST, mean, torch.where(operation == SATURATION, luma, 0.0))
    blended = _each(planes, lambda plane: (other + factor * (plane - other)).clamp(0, 255).floor())
    turned = _turn_hue(planes, jitter.shift)
    return tuple(torch.where(operation == HUE, t, b) for t, b in zip(turned, blended, strict=True))  # type: ignore[return-value]


def _luma(planes: Planes) -> Tensor:
    """Return Pillow's 8-bit grey, ITU-R 601-2 in 16-bit fixed point; every number here is whole and below 2^24."""
    r, g, b = planes
    return ((r * 19595 + g * 38470 + b * 7471 + 0x8000) / 65536).floor()


def _turn_hue(planes: Planes, shift: Tensor) -> Planes:
    """Turn the hue by `shift` of 256 steps, in Pillow's 8-bit HSV."""
    r, g, b = planes
    top, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    span = top - low
    inverse = 1 / span.clamp(min=1)
    turn = torch.where(r == top, (g - b) * inverse, torch.where(g == top, 2 + (b - r) * inverse, 4 + (r - g) * inverse))
    turn = turn / 6 + 1
    hue = torch.where(span > 0, ((turn - turn.floor()) * 255).floor(), 0.0)
    at = torch.remainder(hue + shift, 256) * (6 / 255)
    full = (span * 255 / top.clamp(min=1)).floor() / 255

    def channel(offset: float) -> Tensor:
        k = at + offset
        k = torch.where(k >= 6, k - 6, k)
        return (top - top * full * torch.minimum(k, 4 - k).clamp(0, 1) + 0.5).floor()

    return channel(5.0), channel(3.0), channel(1.0)


def _blur(plane_NHW: Tensor, kernel: Tensor) -> Tensor:
    """Convolve columns, then rows, with each view's kernel; edges are repeated."""
    reach = kernel.shape[1] - 1
    for dim, padding in ((1, (0, 0, reach, reach)), (2, (reach, reach, 0, 0))):
        length = plane_NHW.shape[dim]
        padded = functional.pad(plane_NHW[:, None], padding, mode="replicate")[:, 0]
        total = kernel[:, 0, None, None] * plane_NHW
        for t in range(1, reach + 1):
            pair = padded.narrow(dim, reach - t, length) + padded.narrow(dim, reach + t, length)
            total = total + kernel[:, t, None, None] * pair
        plane_NHW = total
    return (plane_NHW + 0.5).floor()
