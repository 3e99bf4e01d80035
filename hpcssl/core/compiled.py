"""Loops over arrays, compiled by numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function of numbers and arrays, kept between processes where there is a folder to keep it in.

    It releases the interpreter lock.
    """
    options: Any = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(**options, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return numba.njit(**options)(function)
