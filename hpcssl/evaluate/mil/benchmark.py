"""The benchmark of slide features: heads fitted on every feature set of every task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hpcssl.core.config import nearest, to_mapping
from hpcssl.core.errors import ConfigError, FeatureError
from hpcssl.evaluate.labelled import LabelledFeatures, label_features, refuse_twins
from hpcssl.evaluate.mil.bags import MEMORY_GIB, Bags
from hpcssl.evaluate.mil.fits import Fit, fit_heads
from hpcssl.evaluate.mil.presets import HEAD_SETTINGS, HEADS, MccvPreset
from hpcssl.evaluate.results import COLUMNS, Record, ResultsFolder, check_made_with, part_name, write_table
from hpcssl.features.feature_files import read_coords


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is fitted on every feature set of every task; for the last three settings see `label_features`."""

    preset: MccvPreset
    heads: Sequence[str] = ("gma",)
    """Names of `hpcssl.evaluate.mil.presets.HEADS`, all trained as the preset says."""
    replicas: int = 2
    only: tuple[int, int] | None = None
    """Split and replica of the sole fit; it comes out as among all."""
    seed: int = 0
    """Of weights, orders and dropout."""
    kind: str | None = None
    allow_missing: bool = False
    allow_extra: bool = True

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigError(f"{self.replicas} replicas: expected at least 1")
        for head in self.heads:
            if head not in HEADS:
                raise ConfigError(f"head {head}: no such head; {nearest(head, list(HEADS))}")

    @property
    def presets(self) -> list[MccvPreset]:
        """The preset with each of the heads."""
        return [replace(self.preset, head=head, **HEADS[head]) for head in dict.fromkeys(self.heads)]


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How heads are fitted, which changes no result on one kind of device."""

    threads: int = 1
    """Heads fitted at a time on a CPU."""
    memory_gib: float = MEMORY_GIB
    """Features of a task that stay in memory; those of a larger one stand in a scratch file."""
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One head on one feature set of one task: a part of the results."""

    data: LabelledFeatures
    preset: MccvPreset
    fits: tuple[tuple[int, int], ...]
    """(split, replica), both from 1."""
    name: str
    """Of the part."""
    record: Record

    @property
    def num_epochs(self) -> int:
        """Epochs of all its fits, which its progress counts."""
        return self.preset.epochs * len(self.fits)

    def validated(self, slides: Sequence[str]) -> list[str]:
        """Return those of some slides that one of its fits has in validation."""
        rows = np.concatenate([self.data.sides(split)[1] for split in {split for split, _ in self.fits}])
        in_validation = set(self.data.table["slide"].iloc[rows])
        return [slide for slide in slides if slide in in_validation]


def plan_measurements(features: Sequence[Path], splits: Sequence[Path], benchmark: Benchmark) -> list[Measurement]:
    """Check all inputs without reading features, and return the measurements in order of task, feature set and head.

    A UserError names the file that cannot be used, a fit `only` that does not exist, or two inputs of the same name.
    """
    allowed = {"allow_missing": benchmark.allow_missing, "allow_extra": benchmark.allow_extra}
    pairs = label_features(features, splits, kind=benchmark.kind, **allowed)
    planned = [_measurement(data, preset, benchmark) for data in pairs for preset in benchmark.presets]
    refuse_twins((one.name, one.data) for one in planned)
    return planned


def _measurement(data: LabelledFeatures, preset: MccvPreset, benchmark: Benchmark) -> Measurement:
    replicas, only = benchmark.replicas, benchmark.only
    fits = tuple((split, replica) for split in data.split_numbers for replica in range(1, replicas + 1))
    if only is not None:
        if only not in fits:
            raise ConfigError(
                f"{data.splits}: no split {only[0]}, replica {only[1]}; it has splits 1 to {fits[-1][0]},"
                f" {replicas} replicas"
            )
        fits = (only,)
    about = data.about("" if preset.head == "gma" else preset.head)
    drawn = {"preset": to_mapping(preset), "seed": benchmark.seed, "replicas": replicas, "only": only and list(only)}
    record = about | drawn | data.record([split for split, _ in fits])
    return Measurement(data=data, preset=preset, fits=fits, name=part_name(**about, only=only), record=record)


def check_training(results: ResultsFolder, record: Record) -> None:
    """Refuse (ConfigError) a folder whose heads were trained otherwise, or with another seed, than a record says."""
    requested = _training_of(record)
    for file, stored in results.records():
        if "preset" in stored:  # nearest neighbours have none
            check_made_with(file, _training_of(stored), requested)


def _training_of(record: Record) -> dict[str, Any]:
    """Return what all heads of a folder share."""
    preset = {key: value for key, value in record["preset"].items() if key not in HEAD_SETTINGS}
    return {"preset": preset, "seed": record.get("seed")}


def measure(
    measurement: Measurement,
    compute: Compute,
    *,
    scratch: Path,
    attention: Mapping[str, Path],
    on_progress: Callable[[int], None],
) -> pd.DataFrame:
    """Fit the heads of a measurement and return its rows; write the attention to the tiles of some slides.

    Parameters
    ----------
    scratch : folder of the scratch file
    attention : slide to the file of its attention: the mean over the heads that had the slide in validation
    on_progress : counts epochs of fits

    FeatureError names the slide that cannot be used, or the fit whose loss is no longer finite.
    """
    data = measurement.data
    coords = {slide: _coords(data, slide) for slide in attention}
    slides = data.table["slide"].tolist()
    read = map(data.features.load, slides)
    bags = Bags(read, memory_gib=compute.memory_gib, scratch=scratch, device=compute.device)
    shares: dict[str, list[NDArray[np.float64]]] = {slide: [] for slide in attention}

    def keep_attention(fit: Fit, attention_to: Callable[[int], NDArray[np.float64]]) -> None:
        for slide, of_slide in shares.items():
            index = slides.index(slide)
            if index in fit.val:
                of_slide.append(attention_to(index))

    table = fit_heads(
        bags,
        data.targets,
        [Fit(split, replica, *data.sides(split)) for split, replica in measurement.fits],
        measurement.preset,
        seed=measurement.record["seed"],
        threads=compute.threads,
        on_fitted=keep_attention,
        on_progress=on_progress,
    )
    for slide, file in attention.items():
        x, y = coords[slide].T
        file.parent.mkdir(parents=True, exist_ok=True)
        write_table(file, pd.DataFrame({"x": x, "y": y, "attention": np.mean(shares[slide], axis=0)}))
    about = {key: measurement.record[key] for key in ("task", "encoder", "checkpoint")}
    return table.assign(**about)[list(COLUMNS)]


def _coords(data: LabelledFeatures, slide: str) -> NDArray[np.int64]:
    file = data.features.paths[slide]
    coords_N2 = read_coords(file)
    if (coords_N2 < 0).any():
        raise FeatureError(f"{file}: the places of its tiles are unknown; no map can be drawn of it")
    return coords_N2
