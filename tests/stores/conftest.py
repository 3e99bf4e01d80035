"""What tests of stores share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hpcssl.stores.scan import BuildOptions, build_store


@pytest.fixture(scope="session")
def interrupt() -> Callable[..., None]:
    """Stops a build with its slide number `after`."""

    def stop_build(tiles: Path, out: Path, options: BuildOptions, *, after: int) -> None:
        done: list[int] = []

        def stop(_: int) -> None:
            done.append(1)
            if len(done) == after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build_store(tiles, out, options=options, on_progress=stop)

    return stop_build
