"""Progress of work that finds out how much of it there is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from hpcssl.cli.progress import progress


@contextmanager
def late_progress(label: str, unit: str) -> Iterator[dict[str, Any]]:
    """Give `on_total` and `on_progress`, the first of which begins to show how far the work is."""
    with ExitStack() as stack:
        advance = [lambda n: None]

        def on_total(total: int) -> None:
            advance[0] = stack.enter_context(progress(label, total=total, unit=unit))

        yield {"on_total": on_total, "on_progress": lambda n: advance[0](n)}
