"""Which slides there are to read: a folder of them, or a slide table that says where they are; and their MPP."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hpcssl.core.atomic import write_atomic
from hpcssl.core.errors import SlideError
from hpcssl.slides.ranges import is_remote
from hpcssl.slides.slide import Slide, parse_mpp
from hpcssl.slides.slide_table import check_columns, check_slides, read_table

FAILED = "failed_slides.csv"
_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm")
_FAILED_COLUMNS = ["slide_id", "organ", "path", "reason"]
_MEASURED = ["num_tiles", "first_tile", "scanner", "reader", "tissue_mm2", "mpp_from", "bytes"]
_MEASURED += ["mask_columns", "mask_cell"]  # what reading tells; a table's own are not taken


def slides_to_read(source: Path) -> pd.DataFrame:
    """Return the slides of a table, or of a folder: `slide_id, organ, path, mpp` and what else the table has, as text.

    A table's paths count from its own folder; they may be URLs. In a folder, the name of the folder that holds a slide
    is its organ, and its own name without the ending is its slide_id; links count for what they are called. SlideError
    where a folder has no slides, or a table lacks a column or a path.
    """
    if source.is_dir():
        files = sorted(_slides_below(os.path.abspath(source)))  # noqa: PTH100 (resolve() renames links)
        if not files:
            raise SlideError(f"{source}: no slides in it; expected files that end in {', '.join(_SUFFIXES)}")
        rows = [{"slide_id": f.stem, "organ": f.parent.name, "path": str(f), "mpp": ""} for f in files]
        return _checked(pd.DataFrame(rows), str(source))
    frame = read_table(source)
    check_columns(frame, ("slide_id", "organ", "path"), where=str(source))
    blank = frame.index[frame["path"].str.strip() == ""]
    if len(blank):
        raise SlideError(f"{source}: row {blank[0] + 1} has no path")
    base = source.resolve().parent
    paths = [path if is_remote(path) else str(base / path) for path in frame["path"]]
    frame = frame.assign(path=paths, mpp=frame["mpp"] if "mpp" in frame.columns else "")
    frame = _checked(frame, str(source))
    table: Any = frame.to_dict("records")
    for row in table:
        _stated_mpp(row, str(source))
    return frame


def _slides_below(folder: str, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield the slides in a folder and below it, also below links, but not round in circles."""
    above = (*above, os.path.realpath(folder))
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_dir():
                if Path(entry.name).suffix.lower() in _SUFFIXES:
                    yield Path(entry.path)
            elif os.path.realpath(entry.path) not in above:
                yield from _slides_below(entry.path, above)


def _checked(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    frame = frame.drop(columns=_MEASURED, errors="ignore").assign(num_tiles="1")  # not known yet
    return check_slides(frame, where=where).drop(columns="num_tiles")


def _stated_mpp(row: Mapping[str, Any], where: str) -> float | None:
    text = str(row["mpp"]).strip()
    mpp = parse_mpp(text)
    if text and mpp is None:
        raise SlideError(f"{where}: slide {row['slide_id']} has mpp {text!r}; expected microns per pixel, 0.05 to 20")
    return mpp


def mpp_to_go_by(row: Mapping[str, Any], assumed: float | None) -> str:
    """Return what there is to go by for the MPP of a row's slide, besides its file; blank where there is nothing.

    >>> mpp_to_go_by({"mpp": "0.25"}, 0.5), mpp_to_go_by({"mpp": ""}, 0.5), mpp_to_go_by({"mpp": ""}, None)
    ('0.25', 'assumed 0.5', '')
    """
    return str(row["mpp"]).strip() or ("" if assumed is None else f"assumed {assumed}")


def mpp_of(slide: Slide, row: Mapping[str, Any], assumed: float | None = None) -> float:
    """Return microns per pixel of level 0: what the table says, else the file, else what is to be assumed.

    SlideError names the slide and the column to add, where nothing says it.
    """
    mpp = _stated_mpp(row, slide.path) or slide.mpp or assumed
    if mpp is None:
        raise SlideError(
            f"{slide.path}: no MPP in its metadata (looked in {slide.about.mpp_places}); give slide"
            f" {row['slide_id']} one in a column mpp of the slide table, or say --assume-mpp"
        )
    return mpp


def mpp_from(slide: Slide, row: Mapping[str, Any]) -> str:
    """Return where `mpp_of` has the MPP from: "table", "file" or "assumed"."""
    return "table" if str(row["mpp"]).strip() else "file" if slide.mpp else "assumed"


def write_failed(folder: Path, failed: Sequence[Mapping[str, Any]]) -> None:
    """Write `failed_slides.csv`: slide_id, organ, path, reason; where nothing failed, only the header."""
    table = pd.DataFrame(list(failed), columns=_FAILED_COLUMNS).fillna("")
    write_atomic(folder / FAILED, table.to_csv(index=False))
