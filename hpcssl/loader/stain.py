"""Stain jitter: the amounts of haematoxylin, eosin and DAB in a picture, each scaled and shifted.

A pixel's optical density is -ln(level / 255), and by Beer and Lambert's law the stains' densities add up: Ruifrok and
Johnston, "Quantification of histochemical staining by color deconvolution" (Anal Quant Cytol Histol 23(4), 2001). The
matrix is theirs as scikit-image's rgb2hed uses it. The jitter is that of Tellez et al. 2018 (see `AugmentRecipe`).

Amounts are in units of natural optical density, as in Tellez's equations; scikit-image's of today are smaller by
ln 10^6 = 13.8, so that the same shift means far more there. Unlike scikit-image's, negative amounts are kept: without
jitter a picture comes back as it was, also in colours that no mixture of the three stains gives.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hpcssl.plan.draw import Q16, ViewParameters

RGB_FROM_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
HED_FROM_RGB = np.linalg.inv(RGB_FROM_HED)
# a level of 0 counts as half a level: with a smaller one, a dark channel's density would outweigh the other two
_DENSITY = -np.log(np.maximum(np.arange(256), 0.5) / 255)


def stain_jitter(rgb: NDArray[np.uint8], factors: ArrayLike, shifts: ArrayLike) -> NDArray[np.uint8]:
    """Scale and shift the amounts of haematoxylin, eosin and DAB in (..., 3) uint8; returns the same shape.

    `factors` and `shifts` are (3,), the latter in units of natural optical density; 1 and 0 change nothing.

    >>> pink = np.array([[[230, 160, 200]]], dtype=np.uint8)
    >>> stain_jitter(pink, [1, 1, 1], [0, 0, 0]).tolist(), stain_jitter(pink, [1, 1.2, 1], [0, 0, 0]).tolist()
    ([[[230, 160, 200]]], [[[229, 151, 199]]])
    """
    mixing, shifted = stain_mixing(factors, shifts)
    # each new level is a product of powers of the three old ones
    powers = np.exp(-_DENSITY[:, None, None] * mixing)  # (256 levels, 3 old channels, 3 new channels)
    powers[:, 0] *= 255 * np.exp(-shifted)
    red, green, blue = powers.astype(np.float32).transpose(1, 0, 2)
    level = red[rgb[..., 0]] * green[rgb[..., 1]] * blue[rgb[..., 2]]
    result: NDArray[np.uint8] = np.rint(np.minimum(level, 255)).astype(np.uint8)
    return result


def stain_mixing(factors: ArrayLike, shifts: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what a jitter of stains does to optical densities: density → density @ (..., 3, 3) + (..., 3).

    Densities → amounts → jitter → densities is linear. `factors` and `shifts` are (..., 3).
    """
    mixing = HED_FROM_RGB @ (np.asarray(factors, np.float64)[..., None] * RGB_FROM_HED)
    return mixing, np.asarray(shifts, np.float64) @ RGB_FROM_HED


def planned_jitter(rgb: NDArray[np.uint8], views: ViewParameters, p: int, v: int) -> NDArray[np.uint8]:
    """Jitter the stains of a view as planned."""
    return stain_jitter(rgb, views.stain_factors[p, v] / Q16, views.stain_shifts[p, v] / Q16)
