"""Small slides, online stores of them, and a loopback HTTP server of files that can be told to fail.

Tests reach this module by the fixture `online`.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tifffile

MPP = 0.5
TILE_PX = 64
BLOCK_PX = 256
_PIECE = 1 << 16

Fault = str  # "stall", "cut", "refuse" (503), "forbid" (403), "absent" (404) or "whole" (no parts of files)
_STATUS = {"refuse": 503, "forbid": 403, "absent": 404}


def draw_slide(
    path: Path, *, seed: int, width: int = 1536, height: int = 1280, mpp: float = MPP, levels: int = 3
) -> Path:
    """Write a pyramid of JPEG blocks: pieces of pink, sharp tissue of about half the area on white glass."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[: height // 4, : width // 4]
    tissue = np.zeros(rows.shape, bool)
    for _ in range(3):
        y, x, r = random.uniform(0, height / 4), random.uniform(0, width / 4), random.uniform(70, 110)
        tissue |= (rows - y) ** 2 + (columns - x) ** 2 < r * r
    colours = random.integers((150, 60, 130), (230, 140, 200), (*tissue.shape, 3))
    pixels = np.where(tissue[..., None], colours, 244).repeat(4, 0).repeat(4, 1)
    pixels = np.clip(pixels + random.normal(0, 3, pixels.shape), 0, 255).astype(np.uint8)
    options = {"tile": (BLOCK_PX, BLOCK_PX), "compression": "jpeg", "compressionargs": {"level": 90}}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as file:
        for level in range(levels):
            step = 2**level
            blocks = pixels.reshape(height // step, step, width // step, step, 3)
            reduced = blocks.mean((1, 3)).round().astype(np.uint8)
            about = {"subifds": levels - 1} if level == 0 else {"subfiletype": 1}
            resolution = (10_000 / (mpp * step),) * 2
            file.write(reduced, photometric="rgb", resolution=resolution, resolutionunit=3, **about, **options)
    return path


def draw_slides(folder: Path, *, count: int = 4) -> pd.DataFrame:
    """Write slides of two organs and their table, slides.csv; returns the table."""
    rows = [(f"s{number}", ("breast", "lung")[number % 2], f"s{number}.tif", "") for number in range(count)]
    table = pd.DataFrame(rows, columns=["slide_id", "organ", "path", "mpp"])
    for number, path in enumerate(table["path"]):
        draw_slide(folder / path, seed=number, width=1536 - 128 * number)
    table.to_csv(folder / "slides.csv", index=False)
    return table.assign(path=[str(folder / path) for path in table["path"]])


def options_of(*mpps: float, **options: Any) -> Any:
    """Return the options of an online store of 64 px tiles."""
    from hpcssl.stores.online_build import OnlineOptions

    return OnlineOptions(**{"mpps": mpps or (MPP, 2 * MPP), "tile_px": TILE_PX, "threads": 2, **options})


def build(out: Path, table: pd.DataFrame, *mpps: float, append: bool = False, **options: Any) -> Any:
    """Build or extend an online store of 64 px tiles and return it opened."""
    from hpcssl.stores.online_build import build_online

    return build_online(table, out, options_of(*mpps, **options), append=append)


def build_schedule_of(store: Any, out: Path, **settings: Any) -> Any:
    """Build a small schedule for a store and return it opened."""
    from hpcssl.schedule.build import build_schedule
    from hpcssl.schedule.file import Schedule
    from hpcssl.schedule.spec import ScheduleSpec

    spec = {"num_pseudo_epochs": 3, "positions_per_pseudo_epoch": 40, "num_groups": 2, "max_repeats": 200, **settings}
    build_schedule(ScheduleSpec(**spec), store.slides, out)
    return Schedule.open(out)


class SlideServer(ThreadingHTTPServer):
    """Serves a folder; what is done wrong is asked for every request, by its number from 0 and its file."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.fault_of: Callable[[int], Fault | None] = lambda number: None
        self.fault_of_file: Callable[[str], Fault | None] = lambda name: None
        self.requests = 0
        self.sent_bytes = 0
        self.released = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that give up are meant to."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SlideServer

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        file = self.server.folder / self.path.lstrip("/")
        with self.server.lock:
            fault = self.server.fault_of(self.server.requests) or self.server.fault_of_file(file.name)
            self.server.requests += 1
        if fault == "stall":
            self.server.released.wait(60)
            self.close_connection = True
            return
        if fault in _STATUS or not file.is_file():
            self.send_error(_STATUS.get(fault, 404))
            return
        data, whole = file.read_bytes(), file.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if fault != "whole" else None
        if wanted and int(wanted[1]) >= whole:
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        if wanted:
            start, end = int(wanted[1]), min(int(wanted[2] or whole - 1), whole - 1)
            data = data[start : end + 1]
            self.send_header("Content-Range", f"bytes {start}-{end}/{whole}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "cut":
            data, self.close_connection = data[: len(data) // 2], True
        for start in range(0, len(data), _PIECE):  # what a client that gives up does not take is not counted
            self.wfile.write(data[start : start + _PIECE])
            self.server.sent_bytes += len(data[start : start + _PIECE])


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[SlideServer]:
    """Serve a folder for as long as the block runs."""
    with SlideServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
