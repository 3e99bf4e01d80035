"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real H&E tiles, slides and MIL bags: HPCSSL_TEST_DATA, else ../shared/data; skips where there are none."""
    folder = Path(os.environ.get("HPCSSL_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "tiles").is_dir():
        pytest.skip(f"no real data at {folder}; set HPCSSL_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY
