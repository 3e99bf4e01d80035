"""Same settings or refuse: a folder, a store or a run goes on only as what it was started as."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpcssl.core.atomic import read_json, write_atomic
from hpcssl.core.config import first_difference
from hpcssl.core.errors import UserError


def check_same(
    stored: Mapping[str, Any],
    requested: Mapping[str, Any],
    *,
    made: str,
    advice: str,
    error: type[UserError],
    now: str = "now",
    show: Callable[[Any], str] = str,
) -> None:
    """Refuse what was made with other settings, naming the first that differs and both values.

    Parameters
    ----------
    stored, requested : settings by name, as they were and as they are to be; a key that one of them lacks is None there
    made : what was made with them, and where: begins the error
    advice : what to do: ends the error; may be empty
    error : what is raised
    now : introduces the requested value, or surrounds it where it holds `{}`
    show : how both values are written

    >>> check_same({"mpp": 0.5}, {"mpp": 1.0}, made="TILES: cut with", advice="choose another --out", error=UserError)
    Traceback (most recent call last):
    hpcssl.core.errors.UserError: TILES: cut with mpp = 0.5, now 1.0; choose another --out
    """
    difference = first_difference(stored, requested)
    if difference:
        key, before, after = difference
        request = (now if "{}" in now else f"{now} {{}}").format(show(after))
        raise error(f"{made} {key} = {show(before)}, {request}" + (f"; {advice}" if advice else ""))


def claim(
    file: Path,
    settings: Mapping[str, Any],
    *,
    made: str,
    advice: str,
    error: type[UserError],
    damaged: str,
    now: str = "now",
    show: Callable[[Any], str] = str,
) -> None:
    """Write the settings of what a folder holds into a JSON file, or check that they are those of the file there.

    `damaged` says what to do about a file that is no JSON; for the rest see `check_same`.
    """
    if file.exists():
        stored = read_json(file, error(f"{file}: damaged; {damaged}"))
        check_same(stored, settings, made=made, advice=advice, error=error, now=now, show=show)
    else:
        write_atomic(file, json.dumps(settings, indent=1) + "\n")
