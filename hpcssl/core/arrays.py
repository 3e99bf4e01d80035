"""Arrays in files: the header of a .npy file that is written piece by piece, and mapping one that may be damaged."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np

_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<>|][a-z][0-9]+)', 'fortran_order': False, 'shape': \(([0-9]+),\), \} *\n",
    re.DOTALL,
)
_MOST_HEADER = 256


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
    """Map the one-dimensional array of a .npy file; ValueError with the reason where the file holds none.

    numpy's own reading of the header goes through Python's parser, which fails in Python 3.11 when several threads use
    it at once ("AST constructor recursion depth mismatch").
    """
    with path.open("rb") as stream:
        header = _HEADER.match(stream.read(_MOST_HEADER))
    if not header:
        raise ValueError("not the header of a one-dimensional array")
    return np.memmap(path, np.dtype(header[1].decode()), "r", offset=header.end(), shape=(int(header[2]),))
