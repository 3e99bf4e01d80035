"""Work in threads, with results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    pool: Executor, work: Callable[[Item], Result], items: Iterable[Item], *, window: int
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, work(item)) in the items' order, at most `window` of them begun and not yet taken.

    `Executor.map` would begin all of them at once, and hold every result that is not yet taken.
    """
    ahead: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            ahead.append((item, pool.submit(work, item)))
            if len(ahead) >= window:
                first, future = ahead.popleft()
                yield first, future.result()
        while ahead:
            first, future = ahead.popleft()
            yield first, future.result()
    finally:
        for _, future in ahead:
            future.cancel()
