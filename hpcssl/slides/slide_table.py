"""The slide table: one row a slide, `slide_id, organ, num_tiles` and whatever else the user knows."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from hpcssl.core.errors import SlideError

REQUIRED = ("slide_id", "organ", "num_tiles")
MISSING = ("", "nan", "na", "none", "null")  # words for no value, in any case and with blanks around them
_MOST_TILES = 2**31 - 1


def read_slides(path: Path) -> pd.DataFrame:
    """Return a slide table from CSV or Parquet: `num_tiles` as int64, every other column as text, blank = "".

    SlideError names a missing column or the row of a duplicate or blank slide_id, a blank organ, or a count that is no
    positive integer.
    """
    return check_slides(read_table(path), where=str(path))


def read_table(path: Path) -> pd.DataFrame:
    """Read CSV or Parquet as text, blank = "", unchecked; SlideError where that cannot be done."""
    try:
        is_parquet = path.suffix == ".parquet"
        return _texts(pd.read_parquet(path, dtype_backend="pyarrow")) if is_parquet else read_csv(path)
    except FileNotFoundError:
        raise SlideError(f"{path}: no such slide table") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, ValueError) as error:
        raise SlideError(f"{path}: not a slide table ({' '.join(str(error).split())})") from None


def _texts(frame: pd.DataFrame) -> pd.DataFrame:
    """Return every value as text, blank where there is none; a whole number is written without a point."""
    if frame.index.name:
        frame = frame.reset_index()

    def text(value: object) -> str:
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)

    objects = frame.astype(object)
    return objects.where(objects.notna(), "").map(text)


def read_csv(path: Path) -> pd.DataFrame:
    """Read a CSV file as text; ValueError for a row with more fields than the header, which pandas would shift."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            frame = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
        except pd.errors.ParserWarning:
            raise ValueError("its rows have more fields than its header") from None
    return frame.fillna("")


def check_slides(frame: pd.DataFrame, *, where: str) -> pd.DataFrame:
    """Check a slide table and return it with `num_tiles` as int64; SlideError names what is wrong and where."""
    check_columns(frame, REQUIRED, where=where)
    if frame.empty:
        raise SlideError(f"{where}: no slides")
    for column in ("slide_id", "organ"):
        blank = frame.index[frame[column].str.strip() == ""]
        if len(blank):
            raise SlideError(f"{where}: row {blank[0] + 1} has no {column}")
        unfit = frame.index[frame[column].str.contains(r"[/\0]|^\.", regex=True)]  # it names files and folders
        if len(unfit):
            name = f"{column} {frame.loc[unfit[0], column]!r}"
            raise SlideError(f"{where}: row {unfit[0] + 1} has {name}; no slash, and no dot in front, please")
    twice = frame["slide_id"][frame["slide_id"].duplicated()]
    if len(twice):
        raise SlideError(
            f"{where}: slide id {twice.iloc[0]} stands in it more than once; slide ids are unique over all organs"
        )
    counts = pd.to_numeric(frame["num_tiles"], errors="coerce")
    bad = frame.index[~counts.between(1, _MOST_TILES) | (counts % 1 != 0)]
    if len(bad):
        row = frame.loc[bad[0]]
        raise SlideError(
            f"{where}: slide {row['slide_id']} has num_tiles {row['num_tiles']!r}; expected a positive integer"
            f" below 2^31 ({len(bad)} such rows)"
        )
    return frame.assign(num_tiles=counts.astype("int64")).reset_index(drop=True)


def check_columns(frame: pd.DataFrame, required: Sequence[str], *, where: str) -> None:
    """Refuse a table that lacks a column, telling those that it has, quoted: blanks and semicolons are seen so."""
    for column in required:
        if column not in frame.columns:
            found = ", ".join(map(repr, frame.columns))
            raise SlideError(
                f"{where}: no column {column}; expected {', '.join(required)}, separated by commas alone, found {found}"
            )


def missing(column: pd.Series) -> pd.Series:
    """Return which cells of a text column hold no value.

    >>> missing(pd.Series(["a", " ", "NA", "NaN"])).tolist()
    [False, True, True, True]
    """
    return column.str.strip().str.lower().isin(MISSING)


def group_keys(frame: pd.DataFrame, column: str, slide: str = "slide_id") -> pd.Series:
    """Return the group of every slide; a missing one makes the slide its own group, never one group of all such.

    Blanks around a name do not count, nor does the point of a whole number (`12.0`), as tables with blanks get it.

    >>> table = pd.DataFrame({"slide_id": ["a", "b", "c", "d"], "patient_id": ["7", "7.0 ", "", "NA"]})
    >>> group_keys(table, "patient_id").tolist()
    ['patient_id 7', 'patient_id 7', 'slide c', 'slide d']
    """
    if column not in frame.columns:
        raise SlideError(f"the slide table has no column {column}; it has {', '.join(frame.columns)}")
    names = frame[column].str.strip().str.replace(r"^([0-9]+)\.0+$", r"\1", regex=True)
    return (column + " " + names).where(~missing(names), "slide " + frame[slide])


def slide_of(tiles: ArrayLike, first_tiles: ArrayLike) -> NDArray[np.intp]:
    """Return the number of the slide of every global tile number; `first_tiles` are those of the slides, in order."""
    return np.searchsorted(first_tiles, tiles, side="right") - 1


def digest_slides(frame: pd.DataFrame) -> str:
    """Return the SHA-256 of the rows (slide_id, organ, num_tiles) in order: a new label column changes nothing."""
    digest = hashlib.sha256()
    for slide_id, organ, num_tiles in zip(frame["slide_id"], frame["organ"], frame["num_tiles"], strict=True):
        digest.update(f"{slide_id}\t{organ}\t{num_tiles}\n".encode())
    return digest.hexdigest()
