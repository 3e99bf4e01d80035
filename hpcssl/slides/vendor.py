"""Every slide that OpenSlide can read: the one module that imports it."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpcssl.core.errors import SlideError
from hpcssl.slides.slide import About, Level, Slide, nominal_downsample, parse_mpp


class OpenSlideSlide(Slide):
    """A slide read through OpenSlide."""

    reader = "openslide"

    def __init__(self, path: str, *, cache_mb: float):
        """Open a file; SlideError, saying what OpenSlide says, where that cannot be done."""
        try:
            import openslide
        except ImportError as error:
            raise SlideError(f"{path}: needs OpenSlide ({error}); pip install openslide-python openslide-bin") from None
        self.path, self._lib = path, openslide
        self._cache = openslide.OpenSlideCache(int(cache_mb * 1e6))
        self._slide, self._lock = self._opened(), threading.Lock()
        self._steps = self._slide.level_downsamples  # asked for once: a handle that failed tells nothing any more
        sizes = self._slide.level_dimensions
        levels = [Level(width=w, height=h, downsample=nominal_downsample(sizes[0], (w, h))) for w, h in sizes]
        super().__init__(path, levels, _about(dict(self._slide.properties)))

    def _opened(self) -> Any:
        try:
            slide = self._lib.OpenSlide(self.path)
        except self._lib.OpenSlideUnsupportedFormatError:
            raise SlideError(f"{self.path}: not a format that OpenSlide knows") from None
        except self._lib.OpenSlideError as error:
            raise SlideError(f"{self.path}: OpenSlide cannot read it ({' '.join(str(error).split())})") from None
        slide.set_cache(self._cache)
        return slide

    def read(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        """See `Slide.read`."""
        slide = self._slide
        step = self._steps[level]
        place = (round(x * step), round(y * step)), level, (width, height)
        try:
            image = slide.read_region(*place)
        except self._lib.OpenSlideError:  # which a handle keeps for good: it may be that of another thread's read
            image = self._read_alone(slide, *place)
        pixels = np.asarray(image)
        if (pixels[..., 3] == 255).all():
            return np.ascontiguousarray(pixels[..., :3])
        white = Image.new("RGBA", image.size, "white")
        return np.asarray(Image.alpha_composite(white, image).convert("RGB")).copy()

    def _read_alone(self, failed: Any, corner: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """Read from a handle of this read's own, and put one without an error in place of the failed one."""
        with self._lock:
            slide = self._opened()
            try:
                image = slide.read_region(corner, level, size)
            except self._lib.OpenSlideError as error:
                if self._slide is failed:
                    self._slide = self._opened()
                raise SlideError(f"{self.path}: OpenSlide cannot read level {level} ({error})") from None
            self._slide = slide
            return image


def _about(said: dict[str, str]) -> About:
    named = [said[name].strip() for name in ("tiff.Make", "tiff.Model") if said.get(name)]
    return About(
        mpp=parse_mpp(said.get("openslide.mpp-x")),
        mpp_y=parse_mpp(said.get("openslide.mpp-y")),
        mpp_places="openslide.mpp-x",
        scanner=" ".join(named) or said.get("openslide.vendor", ""),
    )
