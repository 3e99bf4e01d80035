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

import json
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpcssl.core.atomic import write_atomic
from hpcssl.core.config import build, dump_yaml, first_difference, read_yaml, to_mapping
from hpcssl.core.errors import RunError
from hpcssl.core.provenance import provenance

CONFIG = "config.yaml"
BAD_TILES = "bad_tiles.csv"
NOT_SETTINGS = ("data", "derived")
# settings that may change when a run continues: where it stops, and how (not what) it computes
FREE_SETTINGS = (
    "stop_after",
    "initial_weights",  # where they lie; what they are is a digest among the data
    "checkpoint",
    "loader.threads",
    "loader.prefetch_steps",
    "loader.reads_in_flight",
    "loader.read_ahead_steps",
    "loader.read_by_slide",
    "loader.max_bad_tiles",
    "train.micro_batch",
    "train.threads",
    "train.deterministic",
    "train.compile",
    "train.checkpoint_activations",
    "train.max_skipped_steps",
    "train.watch_every_steps",
    "train.hang_s",
)


def prepare_run(run: Path, config: Any, *, data: Mapping[str, Any], derived: Mapping[str, Any]) -> None:
    """Make a run folder, or check that an existing one is this run and take over its free settings.

    A setting that the run's config.yaml lacks, because it is younger than the run, counts there as its default: a new
    setting's default is what was done before there was the setting.

    Parameters
    ----------
    config : resolved settings, a dataclass
    data : where store and schedule are, and their digests (`store`, `store_digest`, `schedule`, `schedule_digest`)
    derived : values computed from both, for the reader

    Raises
    ------
    RunError
        If the folder holds something else, or a run with another setting or other data; both values are named.
    """
    # hidden names are what a killed start left before there was a config.yaml
    if run.exists() and not (run / CONFIG).exists() and any(not e.name.startswith(".") for e in run.iterdir()):
        raise RunError(f"{run}: not empty and no run (no {CONFIG}); choose another --out")
    wanted = {**to_mapping(config), "data": dict(data), "derived": dict(derived)}
    if (run / CONFIG).exists():
        old = read_yaml(run / CONFIG)
        settings = {key: value for key, value in old.items() if key not in NOT_SETTINGS}
        complete = to_mapping(build(type(config), settings, where=str(run / CONFIG)))
        _check_same(run, {**old, **complete}, wanted)
    run.mkdir(parents=True, exist_ok=True)
    write_atomic(run / CONFIG, dump_yaml(wanted))
    for folder in ("checkpoints", "generations", "logs"):
        (run / folder).mkdir(exist_ok=True)
    write_atomic(run / "provenance.json", json.dumps(provenance(), indent=1) + "\n")


def read_config(run: Path) -> dict[str, Any]:
    """Return the resolved settings of a run; RunError where there is none."""
    if not (run / CONFIG).is_file():
        raise RunError(f"{run}: no run (no {CONFIG}); start one with hpcssl pretrain")
    return read_yaml(run / CONFIG)


def _check_same(run: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse another setting or other data; where they lie may change, what they are may not."""

    def fixed(values: Mapping[str, Any]) -> dict[str, Any]:
        kept = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items() if k not in NOT_SETTINGS}
        for setting in FREE_SETTINGS:
            group, _, key = setting.rpartition(".")
            (kept.get(group, {}) if group else kept).pop(key, None)
        return kept | {k: v for k, v in values["data"].items() if k.endswith("_digest")}

    difference = first_difference(fixed(old), fixed(new))
    if difference:
        key, before, now = difference
        raise RunError(f"{run}: this run has {key} = {before}, asked for is {now}; use the same, or another --out")


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
    found = {}
    for file in (run / "generations").glob("*"):
        if file.name.isdigit():
            with suppress(json.JSONDecodeError):  # none was said, or it died as it said it
                begun = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(file.stat().st_mtime))
                about = json.loads(file.read_text(encoding="utf-8"))
                found[int(file.name)] = {"time": begun, "generation": int(file.name), **about}
    return dict(sorted(found.items()))


def newest_generation(run: Path) -> int:
    """Return the number of the newest start's claim; 0 before the first."""
    return max((int(f.name) for f in (run / "generations").glob("*") if f.name.isdigit()), default=0)


def _generation_file(run: Path, number: int) -> Path:
    return run / "generations" / f"{number:06d}"


def record_start(run: Path, *, generation: int, **facts: Any) -> None:
    """Append one line to the restart history: these facts, and what the start's claim says about it."""
    claim = _generation_file(run, generation)
    about = json.loads(claim.read_text(encoding="utf-8") or "{}") if claim.exists() else {}
    begun = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "host": platform.node(), "generation": generation}
    line = json.dumps({**begun, **about, **facts})
    with (run / "restarts.jsonl").open("ab+") as stream:
        if stream.tell():
            stream.seek(-1, 2)
            if stream.read() != b"\n":  # torn by a kill
                stream.write(b"\n")
        stream.write(f"{line}\n".encode())
