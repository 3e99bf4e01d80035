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

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from hpcssl.core import config
from hpcssl.core.atomic import digest_file, read_json, write_atomic
from hpcssl.core.claim import check_same
from hpcssl.core.config import AtLeast1, settings
from hpcssl.core.errors import ConfigError, RunError
from hpcssl.embed.embedding import missing_slides
from hpcssl.evaluate.mil.benchmark import Benchmark, Compute, plan_measurements
from hpcssl.evaluate.mil.presets import HEADS, preset_named
from hpcssl.evaluate.results import ResultsFolder, task_name
from hpcssl.evaluate.splits import read_splits
from hpcssl.jobs.array import Call, Submitted, jobs_under_way
from hpcssl.jobs.profile import load_profile
from hpcssl.pipelines.embed import EmbedRequest, is_embedded, submit_embedding
from hpcssl.pipelines.evaluate import fit_missing
from hpcssl.pipelines.followed_run import folder_of, is_followed, measured_steps
from hpcssl.pipelines.stage import Stage, submit_stage
from hpcssl.stores.kinds import open_store

_FIXED = ("store", "preset", "replicas", "seed", "tile_px")  # other values would mix in one table of results


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
    replicas: AtLeast1 = 2
    seed: int = 0
    every: AtLeast1 = 1
    array: AtLeast1 = 16
    tile_px: int | None = None
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        if not self.splits or not self.head:
            raise ConfigError(f"bench: {'head' if self.splits else 'splits'} is empty; expected at least one")


def load_bench(path: Path) -> Bench:
    """Read bench.yaml and check all that can be checked before there is a checkpoint.

    Relative paths in it start at its folder. UserError for anything unknown in it, splits or a store that cannot be
    used, or where SLURM does not answer.
    """
    bench = config.build(Bench, config.read_yaml(path), where=f"bench {path}")
    base = path.resolve().parent
    own_profile = bench.profile.endswith((".yaml", ".yml"))
    bench = replace(
        bench,
        store=str((base / bench.store).resolve()),
        splits=tuple(str((base / splits).resolve()) for splits in bench.splits),
        profile=str((base / bench.profile).resolve()) if own_profile else bench.profile,
    )
    load_profile(bench.profile)
    preset_named(bench.preset)
    for head in bench.head:
        if head not in HEADS:
            raise ConfigError(f"bench {path}: head {head}; {config.nearest(head, list(HEADS))}")
    # both for what they refuse: a slide that the store lacks, a machine without SLURM
    missing_slides(open_store(Path(bench.store)), path.parent, _slides_of(bench))
    jobs_under_way("hpcssl-bench")
    return bench


def attach(run: Path, bench: Bench) -> None:
    """Write what is measured into a prepared run folder; it may be extended, but not be made another benchmark.

    RunError names both values where the run is measured otherwise already.
    """
    file = folder_of(run) / "bench.yaml"
    if file.exists():
        old, new = ({key: getattr(one, key) for key in _FIXED} for one in (_bench_of(run), bench))
        advice = "give the same, or remove it"
        check_same(old, new, made=f"{file.parent}: made with", advice=advice, error=RunError)
    file.parent.mkdir(exist_ok=True)
    write_atomic(file, config.dump_yaml(config.to_mapping(bench)))


def submit_missing(run: Path, *, again: bool = True) -> list[tuple[str, Submitted]]:
    """Submit what the benchmark of a run lacks: per checkpoint an array over slides, after it one over tasks.

    With `again`, also for checkpoints before the newest for which jobs were submitted once. Returns (what, job) of
    everything that was submitted. UserError if the run has no benchmark, a file of it cannot be used, or SLURM refuses
    a job.
    """
    bench = _bench_of(run)
    profile, slides, results = load_profile(bench.profile), _slides_of(bench), folder_of(run) / "results"
    steps, tried, done = measured_steps(run, every=bench.every), _tried(run), _done(results)
    fixed = {"results": results.resolve(), "bench": bench, "threads": profile.cpus_per_gpu}
    submitted = []
    for step in steps if again else [step for step in steps if step == steps[-1] or step not in tried]:
        features = folder_of(run) / "features" / f"step-{step:09d}"
        of_step = EmbedRequest(store=Path(bench.store), encoder=f"{run}@{step}", out=features)
        request = replace(of_step, tile_px=bench.tile_px, slides=slides)
        embedding = None if is_embedded(request) else submit_embedding(request, profile, num_tasks=bench.array)
        calls = [
            Call(measure, {"features": features.resolve(), "splits": splits, **fixed})
            for splits in bench.splits
            if any((task_name(Path(splits)), head, str(step)) not in done for head in bench.head)
        ]
        gpus = min(1, profile.gpus_per_node) if bench.device == "cuda" else 0
        stage = Stage(kind=f"mccv-{step}", out=results, calls=partial(list, calls), gpus=gpus)
        measuring = submit_stage(stage, profile, after=[embedding.job] if embedding else []).array
        for what, job in ((f"embeds step {step}", embedding), (f"measures step {step}", measuring)):
            if job and job.tasks:
                submitted.append((what, job))
        _note_tried(run, step)
    return submitted


def measure(features: Path, splits: str, results: Path, bench: Bench, threads: int) -> None:
    """Fit the heads of one task on one checkpoint's features: one task of a job array."""
    benchmark = Benchmark(preset=preset_named(bench.preset), heads=bench.head, replicas=bench.replicas, seed=bench.seed)
    measurements = plan_measurements([features], [Path(splits)], benchmark)
    fit_missing(measurements, results, Compute(threads=threads, device=bench.device))


def _done(results: Path) -> set[tuple[str, str, str]]:
    """Return (task, head, checkpoint) of all that is measured, from the records beside the results."""
    records = [record for _, record in ResultsFolder(results).records()]
    return {(r["task"], r["preset"]["head"], r["checkpoint"]) for r in records if "preset" in r and not r.get("only")}


def _tried(run: Path) -> set[int]:
    """Return the steps for which jobs were submitted by the bench.yaml of now."""
    file, bench = folder_of(run) / "submitted.json", digest_file(folder_of(run) / "bench.yaml")
    stored = read_json(file, RunError(f"{file}: damaged; remove it")) if file.exists() else {}
    return {int(step) for step in stored["steps"]} if stored.get("bench") == bench else set()


def _note_tried(run: Path, step: int) -> None:
    record = {"bench": digest_file(folder_of(run) / "bench.yaml"), "steps": sorted({*_tried(run), step})}
    write_atomic(folder_of(run) / "submitted.json", json.dumps(record) + "\n")


def _slides_of(bench: Bench) -> list[str]:
    """Return the ids of all slides that the splits name."""
    return sorted({slide for splits in bench.splits for slide in read_splits(Path(splits))["slide"]})


def _bench_of(run: Path) -> Bench:
    file = folder_of(run) / "bench.yaml"
    if not is_followed(run):
        raise RunError(f"{run}: no benchmark follows it; begin one with hpcssl pretrain … --benchmark-with bench.yaml")
    return config.build(Bench, config.read_yaml(file), where=str(file))
