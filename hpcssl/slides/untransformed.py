"""JPEG blocks that hold RGB though the file says YCbCr: some writers forget the transform, and readers show magenta.

White glass that was stored as it is becomes magenta when it is taken for luminance and two chrominances. Bright-field
glass is never magenta, so a slide with much of it, whose stored numbers there are mostly a light grey, is one of those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import imagecodecs
import numpy as np
from numpy.typing import NDArray

_RGB = 2  # of libjpeg's colour spaces
_FEWEST = 0.05  # of the pixels that are looked at
_SURE = 0.5  # of the magenta; pale tissue becomes magenta, too


def decode_untransformed(data: bytes, tables: bytes | None) -> NDArray[np.uint8]:
    """Return the three numbers of every pixel of a JPEG as they are stored, (height, width, 3)."""
    return imagecodecs.jpeg_decode(data, tables=tables, colorspace=_RGB, outcolorspace=_RGB)


def holds_rgb(blocks: Iterable[bytes], tables: bytes | None, as_said: Callable[[bytes], NDArray[np.uint8]]) -> bool:
    """Say whether some blocks' numbers are RGB already; `as_said` decodes a block as the file says."""
    looked_at = magenta = grey = 0
    for data in blocks:
        shown = as_said(data).astype(np.int16)
        is_magenta = (shown[..., 0] > 245) & (shown[..., 2] > 245) & (np.abs(shown[..., 1] - 130) < 40)
        stored = decode_untransformed(data, tables)[is_magenta]
        looked_at += is_magenta.size
        magenta += len(stored)
        grey += int(((stored.min(-1) > 190) & (np.ptp(stored, -1) < 30)).sum())
    return magenta > _FEWEST * looked_at and grey > _SURE * magenta
