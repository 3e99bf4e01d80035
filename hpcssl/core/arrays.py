"""Arrays in files: the header of a .npy file that is written piece by piece, and mapping one that may be damaged."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np


def npy_header(dtype: str, length: int) -> bytes:
    """Return the first bytes of a one-dimensional .npy file, as `numpy.save` writes them.

    >>> saved = io.BytesIO()
    >>> np.save(saved, np.zeros(3, "<u4"))
    >>> saved.getvalue()[:-12] == npy_header("<u4", 3)
    True
    """
    stream = io.BytesIO()
    about = {"descr": dtype, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(stream, about)
    return stream.getvalue()


def map_array(path: Path) -> np.ndarray:
    """Map the array of a .npy file; ValueError with the reason, in one line, where the file holds none."""
    try:
        mapped: np.ndarray = np.load(path, mmap_mode="r")
    except Exception as error:  # noqa: BLE001 - numpy parses a header with Python's own parser and its many errors
        raise ValueError(" ".join(str(error).split())) from None
    return mapped
