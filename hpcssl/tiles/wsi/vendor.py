"""Every slide that OpenSlide can read: the one module that imports it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpcssl.core.errors import SlideError
from hpcssl.tiles.wsi.slide import About, Level, Slide, nominal_downsample, plausible_mpp


class OpenSlideSlide(Slide):
    """A slide read through OpenSlide."""

    reader = "openslide"

    def __init__(self, path: str, *, cache_mb: float):
        """Open a file; SlideError, saying what OpenSlide says, where that cannot be done."""
        try:
            import openslide
        except ImportError as error:
            raise SlideError(f"{path}: needs OpenSlide ({error}); pip install openslide-python openslide-bin") from None
        self._failure = openslide.OpenSlideError
        try:
            self._slide = openslide.OpenSlide(path)
        except openslide.OpenSlideUnsupportedFormatError:
            raise SlideError(f"{path}: not a format that OpenSlide knows") from None
        except openslide.OpenSlideError as error:
            raise SlideError(f"{path}: OpenSlide cannot read it ({' '.join(str(error).split())})") from None
        self._slide.set_cache(openslide.OpenSlideCache(int(cache_mb * 1e6)))
        full = self._slide.level_dimensions[0]
        levels = [
            Level(width=w, height=h, downsample=nominal_downsample(full, (w, h)))
            for w, h in self._slide.level_dimensions
        ]
        super().__init__(path, levels, _about(dict(self._slide.properties)))

    def read(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        """See `Slide.read`."""
        step = self._slide.level_downsamples[level]
        try:
            image = self._slide.read_region((round(x * step), round(y * step)), level, (width, height))
        except self._failure as error:
            raise SlideError(f"{self.path}: OpenSlide cannot read level {level} ({error})") from None
        pixels = np.asarray(image)
        if (pixels[..., 3] == 255).all():
            return np.ascontiguousarray(pixels[..., :3])
        white = Image.new("RGBA", image.size, "white")
        return np.asarray(Image.alpha_composite(white, image).convert("RGB")).copy()


def _about(said: dict[str, str]) -> About:
    try:
        mpp = plausible_mpp(float(said.get("openslide.mpp-x", "nan")))
    except ValueError:
        mpp = None
    named = [said[name].strip() for name in ("tiff.Make", "tiff.Model") if said.get(name)]
    return About(mpp=mpp, mpp_places="openslide.mpp-x", scanner=" ".join(named) or said.get("openslide.vendor", ""))
