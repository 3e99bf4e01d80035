"""Opening a slide with the reader that fits it, and keeping it open between reads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path

from hpcssl.core.errors import SlideError
from hpcssl.slides.ranges import is_remote
from hpcssl.slides.slide import Slide
from hpcssl.slides.tiff import TiffSlide, UnfitTiffError
from hpcssl.slides.vendor import OpenSlideSlide


def open_slide(path: str | Path, *, cache_mb: float = 0.0) -> Slide:
    """Open a slide: tiled TIFF pyramids directly, local or remote; all else through OpenSlide, from a local disk.

    `path` may be a URL that fsspec knows (`https://…`, `s3://…`); `cache_mb` of decoded blocks are kept for reads that
    touch each other. SlideError says what is wrong with the file; OSError where a disk or server fails, which may
    answer another time.
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


class OpenSlides:
    """The slides that were used last, at most `most` and of `most_bytes`, or one that is larger.

    One that is let go is closed when no thread reads from it any more.
    Threads that want the same slide wait for one opening of it, and share its failure.
    """

    def __init__(self, most: int, most_bytes: int):
        self._most, self._most_bytes, self._lock = most, most_bytes, threading.Lock()
        self._slides: OrderedDict[str, Future[Slide]] = OrderedDict()

    def get(self, path: str) -> Slide:
        """Return an opened slide; raises as `open_slide`."""
        with self._lock:
            slide = self._slides.get(path)
            is_new = slide is None
            if slide is None:
                slide = self._slides[path] = Future()
                self._let_go()
            self._slides.move_to_end(path)
        if is_new:
            try:
                slide.set_result(open_slide(path))
                with self._lock:
                    self._let_go()
            except BaseException as error:
                with self._lock:
                    if self._slides.get(path) is slide:
                        del self._slides[path]
                slide.set_exception(error)
                raise
        return slide.result()

    def _let_go(self) -> None:
        """Forget those used longest ago, until the others are few and small enough."""
        sizes = [slide.result().held_bytes if slide.done() else 0 for slide in self._slides.values()]
        while len(sizes) > 1 and (len(sizes) > self._most or sum(sizes) > self._most_bytes):
            self._slides.popitem(last=False)
            sizes.pop(0)
