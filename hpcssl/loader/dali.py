"""The DALI backend: whole batches, decoded and cropped by one graph, on a GPU or on the CPU.

DALI decodes, crops, resizes and flips, with arguments from the plan for every tile; none of its random operators is
used. Stains and colours are changed by `colour`, on the device where the views lie: DALI's hue is another one, and its
operations on colours neither round nor clamp between each other, as Pillow's do.

The hardware decoder is left alone (`hw_decoder_load=0`): it and the CUDA decoder differ, and DALI would split a batch
between the two. EXIF's orientation is ignored, as in the other backends.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from hpcssl.loader import cpu, pillow
from hpcssl.loader.colour import change_colours, colours_of
from hpcssl.plan.draw import Plan
from hpcssl.plan.recipe import AugmentRecipe
from hpcssl.stores.store import TileData

_END_OF_IMAGE = b"\xff\xd9"


@dataclass(frozen=True)
class Encoded:
    """An encoded tile that DALI can decode, and its size in pixels."""

    data: bytes
    width: int
    height: int


class Undecodable(Exception):
    """DALI could not decode a batch; it does not tell which tile."""


def decode(tile: TileData, *, name: str) -> Encoded:
    """Return what is handed to DALI: the JPEG itself, after a look at its header and end.

    Pixels, and what is no plain JPEG, go through `decode_fully`, and raise BadTileError as there.
    """
    if not isinstance(tile, bytes):
        return decode_fully(tile, name=name)
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(tile)
    except ValueError:
        return decode_fully(tile, name=name)
    if colours not in ("YCbCr", "Gray") or not tile.endswith(_END_OF_IMAGE):
        return decode_fully(tile, name=name)
    return Encoded(tile, width, height)


def decode_fully(tile: TileData, *, name: str) -> Encoded:
    """Return a tile that Pillow decoded, as a BMP file; BadTileError naming the tile where it cannot."""
    image, stream = pillow.decode(tile, name=name), io.BytesIO()
    image.save(stream, "BMP")
    return Encoded(stream.getvalue(), *image.size)


class Dali:
    """Executes plans for batches of one size; tiles are decoded and changed on `device`, and the views lie there."""

    def __init__(self, recipe: AugmentRecipe, *, batch: int, threads: int, device: torch.device):
        self._recipe, self._batch, self._threads, self._device = recipe, batch, threads, device
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._change = torch.compile(change_colours, dynamic=False)  # fuses it into a few kernels; lazy
        self._pipeline = self._build()

    def execute(self, tiles: Sequence[Encoded], plan: Plan) -> tuple[Tensor, ...]:
        """Return every view of the tiles at the plan's positions, (views, positions, px, px, 3) uint8 for each kind.

        They are complete, on the device. Undecodable where DALI refuses a tile; the next batch has a new pipeline.
        """
        self._feed(tiles, plan)
        try:
            outputs = iter(self._pipeline.run())
        except RuntimeError as error:
            self._pipeline = self._build()
            raise Undecodable(str(error)) from None
        views_of_kinds = []
        with torch.cuda.stream(self._stream):
            for kind, views in zip(self._recipe.kinds, plan.kinds, strict=True):
                shape = (kind.count, len(tiles), kind.view_px, kind.view_px, 3)
                target = torch.empty(shape, dtype=torch.uint8, device=self._device)
                for v in range(kind.count):
                    feed_ndarray(next(outputs).as_tensor(), target[v], cuda_stream=self._stream)
                    _turn(target[v], views.turns[:, v])
                    if self._stream:
                        colours = colours_of(self._recipe, kind, views, v, self._device)
                        target[v] = self._change(target[v], colours)
                    else:  # there, the compiled loops are ten times as fast
                        for n, view in enumerate(target[v].numpy()):
                            cpu.change_colours(view, views, n, v, view)
                views_of_kinds.append(target)
        if self._stream:
            self._stream.synchronize()
        return tuple(views_of_kinds)

    def _build(self) -> Pipeline:
        on_gpu = self._device.type == "cuda"
        pipeline = Pipeline(
            batch_size=self._batch,
            num_threads=self._threads,
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=1,
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            decoder = {"hw_decoder_load": 0.0} if on_gpu else {}
            images = fn.decoders.image(
                encoded,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,  # as libjpeg-turbo does
                **decoder,
            )
            outputs = []
            for k, kind in enumerate(self._recipe.kinds):
                for v in range(kind.count):
                    at = {
                        name: fn.external_source(name=f"{name}_{k}_{v}", dtype=types.INT32, ndim=ndim)
                        for name, ndim in (("corner", 1), ("size", 1), ("flip", 0), ("flip_vertical", 0))
                    }
                    view = fn.slice(images, at["corner"], at["size"], axes=[0, 1])
                    view = fn.resize(view, size=[kind.view_px] * 2, interp_type=types.INTERP_CUBIC, antialias=True)
                    outputs.append(fn.flip(view, horizontal=at["flip"], vertical=at["flip_vertical"]))
            pipeline.set_outputs(*outputs)
        pipeline.build()
        return pipeline

    def _feed(self, tiles: Sequence[Encoded], plan: Plan) -> None:
        feed = self._pipeline.feed_input
        feed("encoded", [np.frombuffer(tile.data, np.uint8) for tile in tiles])
        width, height = (np.array([[getattr(t, side)] for t in tiles]) for side in ("width", "height"))
        for k, views in enumerate(plan.kinds):
            windows = views.windows(width, height).astype(np.int32)  # (P, V, 4): left, top, width, height
            for v in range(windows.shape[1]):
                feed(f"corner_{k}_{v}", np.ascontiguousarray(windows[:, v, 1::-1]))
                feed(f"size_{k}_{v}", np.ascontiguousarray(windows[:, v, :1:-1]))
                feed(f"flip_{k}_{v}", views.flip[:, v].astype(np.int32))
                feed(f"flip_vertical_{k}_{v}", views.flip_vertical[:, v].astype(np.int32))


def _turn(pixels_NHWC: Tensor, turns: NDArray[np.uint8]) -> None:
    """Turn views counter-clockwise, in place."""
    for number in range(1, 4):
        chosen = torch.from_numpy(np.flatnonzero(turns == number)).to(pixels_NHWC.device)
        if len(chosen):
            pixels_NHWC[chosen] = pixels_NHWC[chosen].rot90(number, dims=(1, 2))
