"""Checkouts of the published code, where the user points to them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Puts the checkout that an environment variable names first on the import path; skips where it is not set."""
    before = set(sys.modules)

    def use(variable: str, marker: str) -> Path:
        folder = os.environ.get(variable)
        if not folder:
            pytest.skip(f"set {variable} to a checkout of the published code to compare with it")
        assert (Path(folder) / marker).is_file(), f"{variable}={folder} holds no {marker}"
        monkeypatch.syspath_prepend(folder)
        return Path(folder)

    yield use
    for name in set(sys.modules) - before:  # its modules have common names: utils, util
        file = getattr(sys.modules[name], "__file__", None)
        if file and any(file.startswith(os.environ.get(v, "\0")) for v in ("HPCSSL_DINO_REPO", "HPCSSL_MAE_REPO")):
            del sys.modules[name]
