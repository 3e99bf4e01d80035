"""The benchmark that follows a run: every pseudo-epoch's checkpoint is embedded and measured while training goes on.

RUN/benchmark/bench.yaml                what is measured, with whole paths
RUN/benchmark/features/step-000000320/  feature files of the slides that the splits name
RUN/benchmark/submitted.json            for which checkpoints jobs were submitted once, and by which bench.yaml
RUN/benchmark/results/                  as `hpcssl mccv` writes it; a curve over checkpoints in `hpcssl report`

`submit_missing` looks at what is there and what is under way, and submits the rest; it may be called at any time. When
training starts and at each new checkpoint it is called for the newest and for those that nothing was submitted for yet:
what fails whenever it is tried shall not be tried ever more often.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from hpcssl.core import config
from hpcssl.core.atomic import digest_file, read_json, write_atomic
from hpcssl.core.config import settings
from hpcssl.core.errors import ConfigError, RunError
from hpcssl.jobs.array import Call, Submitted, jobs_under_way, submit_calls
from hpcssl.jobs.profile import load_profile
from hpcssl.jobs.stages import submit_embedding
from hpcssl.runs.run_folder import read_config

_FIXED = ("store", "preset", "replicas", "seed", "tile_px")  # other values would mix in one table of results
_POLL_S = 20.0
_APART_S = 600.0
_SUBMIT = (
    "import pathlib, sys; from hpcssl.jobs import follow; follow.submit_missing(pathlib.Path(sys.argv[1]), again=False)"
)


@settings
class Bench:
    """What is measured of a run's checkpoints.

    Attributes
    ----------
    store : tile store that holds the slides that the splits name
    splits : split files; each is a task of the benchmark
    profile : of the nodes: a name that ships, or a YAML file
    preset, head, replicas, seed : as for `hpcssl mccv`
    every : pseudo-epochs between two checkpoints that are measured, from the untrained one on
    array : tasks of the job array that embeds a checkpoint, at most
    tile_px : side that tiles are resized to; None = the encoder's native size
    device : that heads are fitted on
    """

    store: str
    splits: tuple[str, ...]
    profile: str
    preset: str = "gma-50"
    head: tuple[str, ...] = ("gma",)
    replicas: int = 2
    seed: int = 0
    every: int = 1
    array: int = 16
    tile_px: int | None = None
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        for name in ("replicas", "every", "array"):
            if getattr(self, name) < 1:
                raise ConfigError(f"bench: {name} = {getattr(self, name)}; expected at least 1")
        for name in ("splits", "head"):
            if not getattr(self, name):
                raise ConfigError(f"bench: {name} is empty; expected at least one")


def load_bench(path: Path) -> Bench:
    """Read bench.yaml and check all that can be checked before there is a checkpoint.

    Relative paths in it start at its folder.

    Raises
    ------
    UserError
        For anything unknown in it, splits or a store that cannot be used, or where SLURM does not answer.
    """
    values = config.read_yaml(path)
    bench = config.build(Bench, values, where=f"bench {path}")
    base = path.resolve().parent
    own_profile = bench.profile.endswith((".yaml", ".yml"))
    bench = config.build(
        Bench,
        values
        | {
            "store": str((base / bench.store).resolve()),
            "splits": [str((base / splits).resolve()) for splits in bench.splits],
            "profile": str((base / bench.profile).resolve()) if own_profile else bench.profile,
        },
        where=f"bench {path}",
    )
    load_profile(bench.profile)
    presets = importlib.import_module("hpcssl.evaluate.mil.presets")
    presets.preset_named(bench.preset)
    for head in bench.head:
        if head not in presets.HEADS:
            raise ConfigError(f"bench {path}: head {head}; {config.nearest(head, list(presets.HEADS))}")
    store = importlib.import_module("hpcssl.stores.kinds").open_store(Path(bench.store))
    # both for what they refuse: a slide that the store lacks, a machine without SLURM
    importlib.import_module("hpcssl.embed.embedding").missing_slides(store, path.parent, _slides_of(bench))
    jobs_under_way("hpcssl-bench")
    return bench


def attach(run: Path, bench: Bench) -> None:
    """Write what is measured into a prepared run folder; it may be extended, but not be made another benchmark.

    Raises
    ------
    RunError
        If the run is measured otherwise already; both values are named.
    """
    file = _folder(run) / "bench.yaml"
    if file.exists():
        old, new = ({key: getattr(one, key) for key in _FIXED} for one in (_bench_of(run), bench))
        difference = config.first_difference(old, new)
        if difference:
            key, before, now = difference
            raise RunError(f"{file.parent}: made with {key} = {before}, now {now}; give the same, or remove it")
    file.parent.mkdir(exist_ok=True)
    write_atomic(file, config.dump_yaml(config.to_mapping(bench)))


def submit_missing(run: Path, *, again: bool = True) -> list[tuple[str, Submitted]]:
    """Submit what the benchmark of a run lacks: per checkpoint an array over slides, after it one over tasks.

    Parameters
    ----------
    again : also for checkpoints before the newest for which jobs were submitted once

    Returns
    -------
    (what, job) of everything that was submitted.

    Raises
    ------
    UserError
        If the run has no benchmark, a file of it cannot be used, or SLURM refuses a job.
    """
    bench = _bench_of(run)
    profile, slides = load_profile(bench.profile), _slides_of(bench)
    embedding = importlib.import_module("hpcssl.embed.embedding")
    store = importlib.import_module("hpcssl.stores.kinds").open_store(Path(bench.store))
    results, done = _folder(run) / "results", _done(_folder(run) / "results")
    submitted = []
    steps, tried = measured_steps(run, every=bench.every), _tried(run)
    for step in steps if again else [step for step in steps if step == steps[-1] or step not in tried]:
        features = _folder(run) / "features" / f"step-{step:09d}"
        embedded = None
        if embedding.missing_slides(store, features, slides):
            embedded = submit_embedding(
                store.path,
                f"{run}@{step}",
                features,
                profile=profile,
                num_tasks=bench.array,
                tile_px=bench.tile_px,
                wanted=slides,
            )
        calls = _fits(bench, features, results, step, done, threads=profile.cpus_per_gpu)
        fitted = None
        if calls:
            gpus = min(1, profile.gpus_per_node) if bench.device == "cuda" else 0
            after = [embedded.job] if embedded else []
            fitted = submit_calls(calls, results, profile, kind=f"mccv-{step}", gpus=gpus, after=after)
        for what, job in ((f"embeds step {step}", embedded), (f"measures step {step}", fitted)):
            if job and job.tasks:
                submitted.append((what, job))
        _note_tried(run, step)
    return submitted


def measured_steps(run: Path, *, every: int) -> list[int]:
    """Return the steps whose checkpoints are there and end every so many pseudo-epochs; 0, untrained, is one."""
    steps_there = importlib.import_module("hpcssl.runs.checkpoint").checkpoint_steps(run)
    settings = read_config(run)
    batch, positions = settings["global_batch"], settings["derived"]["positions_per_pseudo_epoch"]

    def is_measured(step: int) -> bool:
        number = -(-step * batch // positions)
        return number % every == 0 and number * positions // batch == step

    return [step for step in steps_there if is_measured(step)]


def measure(
    features: Path,
    splits: Path,
    results: Path,
    *,
    preset: str,
    heads: Sequence[str],
    replicas: int,
    seed: int,
    threads: int,
    device: str,
) -> None:
    """Fit the heads of one task on one checkpoint's features: one task of a job array."""
    mccv: Any = importlib.import_module("hpcssl.evaluate.mil.benchmark")
    chosen = importlib.import_module("hpcssl.evaluate.mil.presets").preset_named(preset)
    benchmark = mccv.Benchmark(preset=chosen, heads=heads, replicas=replicas, seed=seed)
    measurements = mccv.plan_measurements([features], [splits], benchmark)
    fit_missing = importlib.import_module("hpcssl.pipelines.evaluate").fit_missing
    fit_missing(measurements, results, mccv.Compute(threads=threads, device=device))


@contextmanager
def following(run: Path, say: Callable[[str], None]) -> Iterator[None]:
    """While a run trains here, have its new checkpoints measured; what fails is said, and does not hurt training."""
    if not (_folder(run) / "bench.yaml").exists():
        yield
        return
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(run, ended, say), name="follow", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
    watcher.join()
    _submit_apart(run, say)


def _watch(run: Path, ended: threading.Event, say: Callable[[str], None]) -> None:
    seen = None
    while not ended.is_set():
        with suppress(OSError):  # a file system that is away for a moment
            steps = measured_steps(run, every=1)
            if steps != seen:
                _submit_apart(run, say)
            seen = steps
        ended.wait(_POLL_S)


def _submit_apart(run: Path, say: Callable[[str], None]) -> None:
    """Call `submit_missing` in a process of its own."""
    command = [sys.executable, "-c", _SUBMIT, str(run)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_APART_S)
    except subprocess.CalledProcessError as error:
        why = (error.stderr.strip() or "no words").splitlines()[-1]
    except (subprocess.TimeoutExpired, OSError) as error:
        why = str(error)
    else:
        return
    say(f"benchmark not submitted; hpcssl jobs benchmark {run} tries again: {why}")


def _fits(
    bench: Bench, features: Path, results: Path, step: int, done: set[tuple[str, str, str]], *, threads: int
) -> list[Call]:
    """Return a call for every task of which a head is missing."""
    task_name = importlib.import_module("hpcssl.evaluate.results").task_name
    shared: dict[str, Any] = {
        "features": features.resolve(),
        "results": results.resolve(),
        "preset": bench.preset,
        "heads": bench.head,
        "replicas": bench.replicas,
        "seed": bench.seed,
        "threads": threads,
        "device": bench.device,
    }
    return [
        Call(measure, shared | {"splits": Path(splits)})
        for splits in bench.splits
        if any((task_name(Path(splits)), head, str(step)) not in done for head in bench.head)
    ]


def _done(results: Path) -> set[tuple[str, str, str]]:
    """Return (task, head, checkpoint) of all that is measured, from the records beside the results."""
    records = [json.loads((results / "parts" / f"{name}.json").read_text()) for name in _parts_in(results)]
    return {(r["task"], r["preset"]["head"], r["checkpoint"]) for r in records if "preset" in r and not r.get("only")}


def _parts_in(results: Path) -> list[str]:
    return sorted(file.stem for file in (results / "parts").glob("[!.]*.csv"))


def _tried(run: Path) -> set[int]:
    """Return the steps for which jobs were submitted by the bench.yaml of now."""
    file, bench = _folder(run) / "submitted.json", digest_file(_folder(run) / "bench.yaml")
    noted = read_json(file, RunError(f"{file}: damaged; remove it")) if file.exists() else {}
    return {int(step) for step in noted["steps"]} if noted.get("bench") == bench else set()


def _note_tried(run: Path, step: int) -> None:
    noted = {"bench": digest_file(_folder(run) / "bench.yaml"), "steps": sorted({*_tried(run), step})}
    write_atomic(_folder(run) / "submitted.json", json.dumps(noted) + "\n")


def _slides_of(bench: Bench) -> list[str]:
    """Return the ids of all slides that the splits name."""
    read_splits = importlib.import_module("hpcssl.evaluate.splits").read_splits
    return sorted({slide for splits in bench.splits for slide in read_splits(Path(splits))["slide"]})


def _bench_of(run: Path) -> Bench:
    file = _folder(run) / "bench.yaml"
    if not file.is_file():
        raise RunError(f"{run}: no benchmark follows it; begin one with hpcssl pretrain … --benchmark-with bench.yaml")
    return config.build(Bench, config.read_yaml(file), where=str(file))


def _folder(run: Path) -> Path:
    return run / "benchmark"
