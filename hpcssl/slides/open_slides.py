"""Whole slides that stay open between reads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future

from hpcssl.slides.opening import open_slide
from hpcssl.slides.slide import Slide


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
