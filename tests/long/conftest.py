"""A whole demo, run once for all long tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HPCSSL = Path(sys.executable).with_name("hpcssl")


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `hpcssl demo` was run, undisturbed, into `demo-out`."""
    folder = tmp_path_factory.mktemp("a demo")  # with a space in its name
    done = subprocess.run([HPCSSL, "demo"], cwd=folder, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "terminal.txt").write_text(done.stdout, encoding="utf-8")
    return folder
