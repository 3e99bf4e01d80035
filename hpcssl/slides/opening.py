"""Opening a slide with the reader that fits it."""

from __future__ import annotations

from pathlib import Path

from hpcssl.core.errors import SlideError
from hpcssl.slides.ranges import is_remote
from hpcssl.slides.slide import Slide
from hpcssl.slides.tiff import TiffSlide, UnfitTiffError
from hpcssl.slides.vendor import OpenSlideSlide


def open_slide(path: str | Path, *, cache_mb: float = 0.0) -> Slide:
    """Open a slide: tiled TIFF pyramids directly, local or remote; all else through OpenSlide, from a local disk.

    Parameters
    ----------
    path : a file, or a URL that fsspec knows (`https://…`, `s3://…`)
    cache_mb : decoded blocks that are kept for reads that touch each other

    Raises
    ------
    SlideError
        Saying what is wrong with the file, in one line.
    OSError
        If a disk or server fails: it may answer another time.
    """
    path = str(path)
    try:
        return TiffSlide(path, cache_mb=cache_mb)
    except UnfitTiffError as unfit:
        reason = str(unfit)
    if is_remote(path):
        raise SlideError(f"{path}: only tiled TIFF pyramids can be read from afar ({reason}); copy it to a disk")
    try:
        return OpenSlideSlide(path, cache_mb=cache_mb)
    except SlideError as error:
        raise SlideError(f"{error}; nor can its blocks be read directly ({reason})") from None
