"""How a verb shows what it does: whoever calls it hands these functions in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

Progress = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]
"""`progress(label, total, unit)` shows some work while it goes on, and gives `advance(n)`, for n more units."""


@dataclass(frozen=True, kw_only=True)
class Display:
    """Where a verb that takes long tells what it does; `say` tells a line."""

    progress: Progress
    say: Callable[[str], None]
