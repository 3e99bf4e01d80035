"""The evaluations of slide features: what a folder of results lacks is measured here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from hpcssl.core.errors import ConfigError
from hpcssl.evaluate.knn import Neighbours
from hpcssl.evaluate.labelled import LabelledFeatures, refuse_twins
from hpcssl.evaluate.mil.benchmark import Compute, Measurement, check_training, measure
from hpcssl.evaluate.results import ResultsFolder


def fit_missing(
    measurements: Sequence[Measurement],
    out: Path,
    compute: Compute | None = None,
    *,
    attention: Sequence[str] = (),
    on_progress: Callable[[int], None] = lambda n: None,
) -> pd.DataFrame:
    """Fit the heads of the measurements that are not yet in `out`, and return all rows there.

    Of the slides `attention` that a measurement has in validation, the attention to every tile is written with its
    place; a part without these files is measured again. Features of a task beyond the memory that is granted stand in a
    scratch file in `out`.

    Parameters
    ----------
    measurements : at least one, of one benchmark
    on_progress : counts epochs of fits: `num_epochs` for every measurement, also for one that was there

    ConfigError if a part in `out` was made with something else, or a part of the same task from another split file, or
    a slide of `attention` is in validation nowhere; FeatureError names the features that cannot be used.
    """
    results, compute = ResultsFolder(out), compute or Compute()
    check_training(results, measurements[0].record)
    results.check_tasks((one.data.splits, one.record) for one in measurements)
    files = {
        one.name: {slide: results.attention_file(one.name, slide) for slide in one.validated(attention)}
        for one in measurements
    }
    for slide in attention:
        if not any(slide in of_part for of_part in files.values()):
            raise ConfigError(
                f"slide {slide}: in validation in no run; attention is told by heads that did not train on it"
            )
    is_there = {
        one.name: results.has(one.name, one.record) and all(file.exists() for file in files[one.name].values())
        for one in measurements
    }
    results.parts.mkdir(parents=True, exist_ok=True)
    for one in measurements:
        if is_there[one.name]:
            on_progress(one.num_epochs)
            continue
        table = measure(one, compute, scratch=out, attention=files[one.name], on_progress=on_progress)
        results.write(one.name, one.record, table)
    return results.collect()


def find_neighbours(
    pairs: Sequence[LabelledFeatures],
    neighbours: Neighbours,
    *,
    out: Path | None = None,
    on_progress: Callable[[int], None] = lambda n: None,
) -> pd.DataFrame:
    """Measure every feature set on every task by nearest neighbours; return the rows of all.

    With `out`, what that folder of results lacks is measured, and all rows there are returned. `on_progress` counts
    pairs. A UserError as for `fit_missing`, or for a target of values.
    """
    parts = [(*neighbours.part(data), data) for data in pairs]
    refuse_twins((name, data) for name, _, data in parts)
    results = None if out is None else ResultsFolder(out)
    if results:
        results.check_tasks((data.splits, record) for _, record, data in parts)
    tables = []
    for name, record, data in parts:
        if not results:
            tables.append(neighbours.measure(data))
        elif not results.has(name, record):
            results.write(name, record, neighbours.measure(data))
        on_progress(1)
    return results.collect() if results else pd.concat(tables, ignore_index=True)
