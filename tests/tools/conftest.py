"""Runs a tool as a user does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def run_tool(repository: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a tool with one thread and no GPU; its output is text."""

    def run(name: str, *arguments: object, timeout: float = 500) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(repository / "tools" / name), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, env=environment)

    return run


@pytest.fixture
def figures_of(run_tool: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., dict[str, Any]]:
    """Runs a tool that must come to its end; returns the JSON object of its last line."""

    def run(name: str, *arguments: object, timeout: float = 500) -> dict[str, Any]:
        done = run_tool(name, *arguments, timeout=timeout)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))

    return run
