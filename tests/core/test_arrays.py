"""Mapped arrays: what numpy wrote, what is damaged, and many threads at once."""

from __future__ import annotations

import ast
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hpcssl.core.arrays import map_array, npy_header


@pytest.mark.parametrize("dtype", ["<u4", "<u8", "|b1", "<i8"])
def test_it_maps_what_numpy_saves(tmp_path: Path, dtype: str) -> None:
    saved = np.arange(7).astype(dtype)
    np.save(tmp_path / "a.npy", saved)
    found = map_array(tmp_path / "a.npy")
    np.testing.assert_array_equal(found, saved)
    assert found.dtype == saved.dtype
    assert not found.flags.writeable
    assert (tmp_path / "a.npy").read_bytes() == npy_header(saved.dtype.str, 7) + saved.tobytes()


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:60], lambda b: b[1:], lambda b: b[:-1]])
def test_what_is_damaged_is_refused(tmp_path: Path, damage) -> None:
    np.save(tmp_path / "a.npy", np.arange(7))
    (tmp_path / "a.npy").write_bytes(damage((tmp_path / "a.npy").read_bytes()))
    with pytest.raises(ValueError, match=r"header|mmap"):
        map_array(tmp_path / "a.npy")


def test_two_dimensions_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 3)))
    with pytest.raises(ValueError, match="one-dimensional"):
        map_array(tmp_path / "a.npy")


def test_many_threads_may_map_while_others_parse(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(7))
    stop = threading.Event()

    def parse() -> None:
        while not stop.is_set():
            ast.parse("{'a': (1, 2, [3, (4, 5)])}")

    with ThreadPoolExecutor(6) as pool:
        parsing = [pool.submit(parse) for _ in range(2)]
        try:
            assert {int(a.sum()) for a in pool.map(lambda _: map_array(tmp_path / "a.npy"), range(2000))} == {21}
        finally:
            stop.set()
        for parser in parsing:
            parser.exception()  # Python's own defect, where it has it
