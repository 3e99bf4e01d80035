"""The run folder: what a run is, and which process may write to it.

config.yaml          resolved settings with derived values and data digests, written before step 0
provenance.json      versions, git, hardware
metrics.jsonl        the training trace
checkpoints/         step-000000320.safetensors …
bad_tiles.csv        tiles that could not be used, and why; only if there were any
failed-step-000000123/  all of a step that was not finite and could not be skipped; see hpcssl.train.failure
restarts.jsonl       one line a start: when, why, on which nodes, from which step, with how many processes
end.json             how the newest start that has ended did so; see hpcssl.runs.history
submission.json      what was asked for last, of this machine or of SLURM: all that it takes to ask again
generations/         fencing: one file a start, saying whose; the newest start owns the folder
logs/                the launcher's logs
benchmark/           what follows the run: bench.yaml, features, results; see hpcssl.pipelines.follow
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from hpcssl.core.atomic import write_atomic
from hpcssl.core.claim import check_same
from hpcssl.core.config import build, dump_yaml, is_free, read_yaml, to_mapping
from hpcssl.core.errors import RunError
from hpcssl.core.provenance import provenance

T = TypeVar("T")
CONFIG = "config.yaml"
BAD_TILES = "bad_tiles.csv"
NOT_SETTINGS = ("data", "derived")


def prepare_run(run: Path, config: Any, *, data: Mapping[str, Any], derived: Mapping[str, Any]) -> None:
    """Make a run folder, or check that an existing one is this run and take over its free settings.

    Where data lie may change, as may every setting that is declared `free`; what data are may not. A setting that the
    run's config.yaml lacks, because it is younger than the run, counts there as its default: a new setting's default is
    what was done before there was the setting.

    `config` is a dataclass; `data` says where store and schedule are, and their digests (`store`, `store_digest`,
    `schedule`, `schedule_digest`); `derived` are values computed from both, for the reader.

    RunError where the folder holds something else, or a run with another setting or other data, with both values.
    """
    # hidden names are what a killed start left before there was a config.yaml
    if run.exists() and not (run / CONFIG).exists() and any(not e.name.startswith(".") for e in run.iterdir()):
        raise RunError(f"{run}: not empty and no run (no {CONFIG}); choose another --out")
    if (run / CONFIG).exists():
        stored, stored_data = read_settings(run, type(config))
        check_same(
            _fixed(stored) | _digests(stored_data),
            _fixed(config) | _digests(data),
            made=f"{run}: this run has",
            now="asked for is",
            advice="use the same, or another --out",
            error=RunError,
        )
    run.mkdir(parents=True, exist_ok=True)
    write_atomic(run / CONFIG, dump_yaml({**to_mapping(config), "data": dict(data), "derived": dict(derived)}))
    for folder in ("checkpoints", "generations", "logs"):
        (run / folder).mkdir(exist_ok=True)
    write_atomic(run / "provenance.json", json.dumps(provenance(), indent=1) + "\n")


def read_config(run: Path) -> dict[str, Any]:
    """Return the resolved settings of a run; RunError where there is none."""
    if not (run / CONFIG).is_file():
        raise RunError(f"{run}: no run (no {CONFIG}); start one with hpcssl pretrain")
    return read_yaml(run / CONFIG)


def read_settings(run: Path, kind: type[T]) -> tuple[T, dict[str, str]]:
    """Return the settings of a run as a dataclass of this kind, and what its config.yaml says of its data.

    RunError where there is no run; ConfigError where its settings are no such dataclass's.
    """
    stored = read_config(run)
    settings = {key: value for key, value in stored.items() if key not in NOT_SETTINGS}
    return build(kind, settings, where=str(run / CONFIG)), stored["data"]


def _fixed(config: Any) -> dict[str, Any]:
    """Return a dataclass as plain values, without the settings that are declared free."""
    values, kept = to_mapping(config), {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            kept[field.name] = _fixed(value)
        elif not is_free(field):
            kept[field.name] = values[field.name]
    return kept


def _digests(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key.endswith("_digest")}


class Generation:
    """A start's claim to a run folder; a later start makes it stale."""

    def __init__(self, run: Path, number: int):
        self.number = number
        self._next = _generation_file(run, number + 1)

    @classmethod
    def take(cls, run: Path, **about: Any) -> Generation:
        """Claim the folder for this start; `about` says whose it is, and joins its line in the restart history."""
        (run / "generations").mkdir(exist_ok=True)
        number = newest_generation(run)
        while True:
            number += 1
            try:
                with _generation_file(run, number).open("x", encoding="utf-8") as stream:
                    json.dump(about, stream)
                return cls(run, number)
            except FileExistsError:
                continue

    def is_stale(self) -> bool:
        """Return whether a later start has taken over; a stale process publishes nothing more."""
        return self._next.exists()


def read_claims(run: Path) -> dict[int, dict[str, Any]]:
    """Return what the starts that have claimed a folder say of themselves, and when that was, by generation."""
    claims = {}
    for file in (run / "generations").glob("*"):
        if file.name.isdigit():
            with suppress(json.JSONDecodeError):  # none was said, or it died as it said it
                start = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(file.stat().st_mtime))
                about = json.loads(file.read_text(encoding="utf-8"))
                claims[int(file.name)] = {"time": start, "generation": int(file.name), **about}
    return dict(sorted(claims.items()))


def newest_generation(run: Path) -> int:
    """Return the number of the newest start's claim; 0 before the first."""
    return max((int(f.name) for f in (run / "generations").glob("*") if f.name.isdigit()), default=0)


def _generation_file(run: Path, number: int) -> Path:
    return run / "generations" / f"{number:06d}"


def record_start(run: Path, *, generation: int, **facts: Any) -> None:
    """Append one line to the restart history: these facts, and what the start's claim says about it."""
    claim = _generation_file(run, generation)
    about = json.loads(claim.read_text(encoding="utf-8") or "{}") if claim.exists() else {}
    start = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "host": platform.node(), "generation": generation}
    line = json.dumps({**start, **about, **facts})
    with (run / "restarts.jsonl").open("ab+") as stream:
        if stream.tell():
            stream.seek(-1, 2)
            if stream.read() != b"\n":  # torn by a kill
                stream.write(b"\n")
        stream.write(f"{line}\n".encode())
