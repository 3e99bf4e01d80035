"""Tiled TIFF pyramids (Aperio, Philips, OME, generic), read block by block: only what is needed, no process-wide lock.

The blocks' places are taken from the file's directories once; a read is then one `pread` or one ranged request for each
block, and one call of its codec, which leaves Python's lock to the other threads.
"""

from __future__ import annotations

import logging
import re
import struct
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, BinaryIO
from xml.etree import ElementTree

import numpy as np
import tifffile
from numpy.typing import NDArray

from hpcssl.core.errors import SlideError
from hpcssl.slides.ranges import Ranges
from hpcssl.slides.slide import About, Level, Slide, nominal_downsample, parse_mpp, plausible_mpp
from hpcssl.slides.untransformed import decode_untransformed, holds_rgb

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # its complaints come as our errors

_BACKGROUND = 255
_MOST_BLOCK_PX = 4096  # a side; larger blocks (whole images in one strip) are left to others
_LOOKED_AT = 16  # blocks of the coarsest level, to see whether its colours are what the file says
_JPEG = (6, 7)
_YCBCR = 6
_FOREIGN = ("is_ndpi", "is_bif", "is_scn", "is_lsm", "is_stk", "is_eer")  # blocks there are no places in the image
_MICRONS = {"m": 1e6, "mm": 1e3, "µm": 1.0, "um": 1.0, "nm": 1e-3}
_PER_UNIT = {2: 25_400.0, 3: 10_000.0}  # ResolutionUnit: inch, centimetre; in microns
# of a TIFF's header, by its version: where the first directory is told, and how a number of tags, a tag and an offset
# are written; a tag is its number, kind, length and value, or where the value is
_LAYOUTS: dict[int, tuple[Any, ...]] = {42: (4, "H", "HHI4s", "I"), 43: (8, "Q", "HHQ8s", "Q")}
_BYTES_OF_KIND = dict(enumerate((0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)))
_OFFSETS = {4: "I", 13: "I", 16: "Q", 18: "Q"}
_SUB_DIRECTORIES, _PRIVATE = 330, 32_768  # tags; private ones are not looked at


class UnfitTiffError(Exception):
    """A file that this reader leaves to others; says why."""


@dataclass(frozen=True)
class _Blocks:
    """Where the blocks of a level are, and how they are decoded."""

    decode: Any  # tifffile's, a function of bytes that threads share; its page, which holds far more, is let go
    says_ycbcr: bool  # of JPEG blocks
    tables: bytes | None  # of JPEG, common to all blocks
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]  # 0: nothing was scanned there
    width: int
    height: int
    columns: int


class TiffSlide(Slide):
    """A tiled TIFF pyramid; `blocks_decoded` counts the compressed blocks that it has decoded so far."""

    reader = "tiff"

    def __init__(self, path: str, *, cache_mb: float):
        """Open a file; `cache_mb` of decoded blocks are kept, those used last, for reads that touch each other.

        At least four are kept, where any are: as many as meet in a corner. UnfitTiffError where the file is no TIFF, or
        one whose blocks cannot be read alone; SlideError where it is not there, or truncated.
        """
        self._ranges = Ranges.open(path)
        try:
            with self._ranges.stream() as stream:
                _check_directories(stream, path, self._ranges.size)
                stream.seek(0)
                with tifffile.TiffFile(stream, name=path) as file:
                    pages = _pyramid(file)
                    about = _about(file, pages[0])
                    self._levels = [_blocks(page) for page in pages]
                    sizes = [(page.imagewidth, page.imagelength) for page in pages]
                    padded = file.is_philips  # its levels are filled up to whole blocks
        except (SlideError, OSError, UnfitTiffError):
            raise
        except Exception as error:  # what tifffile raises on damage is not told apart: any of a dozen
            raise UnfitTiffError(" ".join(str(error).split()) or type(error).__name__) from error
        for level, blocks in enumerate(self._levels):
            end = int((blocks.offsets + blocks.sizes).max())
            if end > self._ranges.size:
                reason = f"level {level} ends at byte {end:,}, the file at {self._ranges.size:,}"
                raise SlideError(f"{path}: truncated ({reason}); copy it again")
        steps = [nominal_downsample(sizes[0], size) for size in sizes]
        if padded:
            steps = [float(2 ** round(np.log2(step))) for step in steps]
        levels = [Level(width=w, height=h, downsample=d) for (w, h), d in zip(sizes, steps, strict=True)]
        super().__init__(path, levels, about)
        self.held_bytes = sum(blocks.offsets.nbytes + blocks.sizes.nbytes for blocks in self._levels)
        self.blocks_decoded = 0
        self._untransformed = False
        self._cache: OrderedDict[tuple[int, int], NDArray[np.uint8]] = OrderedDict()
        largest = max(blocks.width * blocks.height * 3 for blocks in self._levels)
        self._cached_bytes, self._cache_bytes = 0, max(int(cache_mb * 1e6), 4 * largest) if cache_mb else 0
        self._lock = threading.Lock()
        self._untransformed = self._holds_rgb()
        if self._untransformed:
            self.reader = "tiff (RGB tagged as YCbCr)"

    def read(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        """See `Slide.read`."""
        out = np.full((height, width, 3), _BACKGROUND, np.uint8)
        blocks, size = self._levels[level], self.levels[level]
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, size.width), min(y + height, size.height)
        if left >= right or top >= bottom:
            return out
        rows = range(top // blocks.height, (bottom - 1) // blocks.height + 1)
        columns = range(left // blocks.width, (right - 1) // blocks.width + 1)
        indices = [row * blocks.columns + column for row in rows for column in columns]
        for index, pixels in self._decoded(level, indices).items():
            row, column = divmod(index, blocks.columns)
            x0, y0 = column * blocks.width, row * blocks.height
            x1, y1 = min(x0 + pixels.shape[1], right), min(y0 + pixels.shape[0], bottom)
            xs, ys = max(x0, left), max(y0, top)
            out[ys - y : y1 - y, xs - x : x1 - x] = pixels[ys - y0 : y1 - y0, xs - x0 : x1 - x0]
        return out

    def _decoded(self, level: int, indices: list[int]) -> dict[int, NDArray[np.uint8]]:
        """Return pixels of the blocks of some indices that hold any; those that are not cached are read together."""
        blocks = self._levels[level]
        scanned = [index for index in indices if blocks.sizes[index]]
        decoded: dict[int, NDArray[np.uint8]] = {}
        if self._cache_bytes:
            with self._lock:
                for index in scanned:
                    if (level, index) in self._cache:
                        self._cache.move_to_end((level, index))
                        decoded[index] = self._cache[level, index]
        missing = [index for index in scanned if index not in decoded]
        places = [(int(blocks.offsets[index]), int(blocks.sizes[index])) for index in missing]
        for index, data in zip(missing, self._ranges.read_many(places) if places else (), strict=True):
            decoded[index] = self._decode(level, index, data)
        if missing:
            with self._lock:
                self.blocks_decoded += len(missing)
                if self._cache_bytes:
                    self._keep({(level, index): decoded[index] for index in missing})
        return decoded

    def _decode(self, level: int, index: int, data: bytes) -> NDArray[np.uint8]:
        blocks = self._levels[level]
        try:
            if self._untransformed:
                return decode_untransformed(data, blocks.tables)
            return blocks.decode(data, index, jpegtables=blocks.tables)[0][0]
        except Exception as error:  # every codec has errors of its own
            text = " ".join(str(error).split()) or type(error).__name__
            raise SlideError(f"{self.path}: block {index} of level {level} cannot be decoded ({text})") from error

    def _holds_rgb(self) -> bool:
        """Say whether some blocks of the coarsest level hold RGB though the file says YCbCr."""
        level = len(self._levels) - 1
        blocks = self._levels[level]
        if not blocks.says_ycbcr:
            return False
        scanned = np.flatnonzero(blocks.sizes)
        some = scanned[:: max(1, len(scanned) // _LOOKED_AT)].tolist()
        data = self._ranges.read_many([(int(blocks.offsets[i]), int(blocks.sizes[i])) for i in some])
        return holds_rgb(data, blocks.tables, lambda block: self._decode(level, some[0], block))

    def _keep(self, new: dict[tuple[int, int], NDArray[np.uint8]]) -> None:
        for key, pixels in new.items():
            if key not in self._cache:
                self._cache[key] = pixels
                self._cached_bytes += pixels.nbytes
        while self._cached_bytes > self._cache_bytes:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes


def _check_directories(stream: BinaryIO, path: str, size: int) -> None:
    """Raise SlideError if a directory, or what its tags name, lies beyond the end of the file: it was cut off.

    tifffile passes over some of these, and with them a level, and tells others in words that help nobody.
    """

    def check(end: int) -> None:
        if end > size:
            reason = f"a level's directory should reach to byte {end:,}, the file ends at {size:,}"
            raise SlideError(f"{path}: truncated ({reason}); copy it again")

    def bytes_at(start: int, number: int) -> bytes:
        check(start + number)
        stream.seek(start)
        return stream.read(number)

    head = bytes_at(0, 8)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    version = struct.unpack(f"{order}H", head[2:4])[0] if order else 0
    if version not in _LAYOUTS or path.lower().endswith(".ndpi"):  # whose offsets are of a kind of their own
        return
    start, *forms = _LAYOUTS[version]
    of_count, of_tag, of_offset = (f"{order}{form}" for form in forms)
    count_bytes, tag_bytes, offset_bytes = map(struct.calcsize, (of_count, of_tag, of_offset))
    waiting, seen = [*struct.unpack(of_offset, bytes_at(start, offset_bytes))], {0}
    while waiting:
        directory = waiting.pop()
        if directory in seen:
            continue
        seen.add(directory)
        (count,) = struct.unpack(of_count, bytes_at(directory, count_bytes))
        tags = bytes_at(directory + count_bytes, count * tag_bytes + offset_bytes)
        waiting += struct.unpack(of_offset, tags[-offset_bytes:])
        for tag, kind, number, value in struct.iter_unpack(of_tag, tags[:-offset_bytes]):
            length, within = number * _BYTES_OF_KIND.get(kind, 0), value
            if length > offset_bytes:
                (place,) = struct.unpack(of_offset, value)
                if tag < _PRIVATE:
                    check(place + length)
                within = bytes_at(place, length) if tag == _SUB_DIRECTORIES else b""
            if tag == _SUB_DIRECTORIES and kind in _OFFSETS:
                waiting += struct.unpack(f"{order}{number}{_OFFSETS[kind]}", within[:length])


def _pyramid(file: tifffile.TiffFile) -> list[Any]:
    """Return the pages of the levels, finest first; of a series without a reduced picture, one."""
    foreign = next((flag for flag in _FOREIGN if getattr(file, flag)), None)
    if foreign:
        raise UnfitTiffError(f"a TIFF of the kind {foreign.removeprefix('is_')}")
    first: Any = file.pages.first
    if str(first.software).startswith("MedScan"):
        raise UnfitTiffError("a TIFF of Trestle: its blocks overlap")
    series = file.series[0]
    pages = [level.keyframe for level in series.levels if level.axes == "YXS" and _is_fit(level.keyframe)]
    if not pages or pages[0].shape != series.shape:
        raise UnfitTiffError(f"a TIFF whose image {series.shape} {series.dtype} does not stand in blocks of RGB")
    return pages


def _is_fit(page: Any) -> bool:
    """Say whether a page is 8-bit RGB in blocks of a fit size."""
    is_rgb = page.dtype == np.uint8 and page.samplesperpixel == 3 and page.planarconfig == 1
    return is_rgb and page.is_tiled and max(page.tilewidth, page.tilelength) <= _MOST_BLOCK_PX


def _blocks(page: Any) -> _Blocks:
    offsets, sizes = np.array(page.dataoffsets, np.int64), np.array(page.databytecounts, np.int64)
    columns, rows = -(-page.imagewidth // page.tilewidth), -(-page.imagelength // page.tilelength)
    if len(offsets) != columns * rows or len(sizes) != columns * rows:
        raise UnfitTiffError(f"a TIFF with {len(offsets)} blocks where {columns} × {rows} are needed")
    return _Blocks(
        decode=page.decode,
        says_ycbcr=page.photometric == _YCBCR and page.compression in _JPEG,
        tables=page.jpegtables,
        offsets=offsets,
        sizes=sizes,
        width=page.tilewidth,
        height=page.tilelength,
        columns=columns,
    )


def _about(file: tifffile.TiffFile, page: Any) -> About:
    """Return MPP and scanner; each kind of file says them elsewhere."""
    text = page.description
    if file.is_svs:
        said = dict(re.findall(r"\|\s*([\w ]+?)\s*=\s*([^|;\r\n]*)", text))
        scanner = " ".join(filter(None, ("Aperio", said.get("ScanScope ID", "").strip())))
        return About(mpp=parse_mpp(said.get("MPP")), mpp_places="MPP in its ImageDescription", scanner=scanner)
    if file.is_philips:
        return _about_philips(text)
    if file.is_ome:
        pixels = next(e for e in ElementTree.fromstring(file.ome_metadata or "<a/>").iter() if e.tag.endswith("Pixels"))
        across, down = (
            parse_mpp(pixels.get(name), _MICRONS.get(pixels.get(f"{name}Unit", "µm"), float("nan")))
            for name in ("PhysicalSizeX", "PhysicalSizeY")
        )
        return About(mpp=across, mpp_y=down, mpp_places="PhysicalSizeX in its OME-XML", scanner="")
    maker = " ".join(str(page.tags[name].value).strip() for name in ("Make", "Model") if name in page.tags)
    across, down = _resolution(page, "XResolution"), _resolution(page, "YResolution")
    return About(mpp=across, mpp_y=down, mpp_places="XResolution and ResolutionUnit", scanner=maker)


def _about_philips(text: str) -> About:
    said: dict[str, list[str]] = {}
    for element in ElementTree.fromstring(text).iter("Attribute"):
        said.setdefault(element.get("Name", ""), []).append((element.text or "").replace('"', " ").strip())
    texts = (text.split() for text in said.get("DICOM_PIXEL_SPACING", []))  # from row to row, from column to column
    spacings = [(parse_mpp(pair[1], 1e3), parse_mpp(pair[0], 1e3)) for pair in texts if len(pair) == 2]
    across, down = min((pair for pair in spacings if all(pair)), default=(None, None))  # level 0 is the finest
    names = (said.get(name, [""])[0] for name in ("DICOM_MANUFACTURER", "DICOM_MANUFACTURERS_MODEL_NAME"))
    scanner, place = " ".join(filter(None, names)), "DICOM_PIXEL_SPACING in its ImageDescription"
    return About(mpp=across, mpp_y=down, mpp_places=place, scanner=scanner)


def _resolution(page: Any, name: str) -> float | None:
    unit = _PER_UNIT.get(int(page.resolutionunit))
    if unit is None or name not in page.tags:
        return None
    numerator, denominator = page.tags[name].value
    return plausible_mpp(unit * denominator / numerator) if numerator else None
