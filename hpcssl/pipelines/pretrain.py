"""The verb `pretrain`: all that can be checked before a job waits in a queue, then a start of the run."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from hpcssl.core.atomic import digest_file
from hpcssl.core.config import dump_yaml, to_mapping
from hpcssl.core.errors import ConfigError, RunError, StoreError
from hpcssl.core.world import check_divides
from hpcssl.jobs.cluster import check_cluster
from hpcssl.jobs.elastic import parse_gpus, with_gpus
from hpcssl.jobs.launch import batch_of, launch, reserved, submit
from hpcssl.jobs.profile import Resources
from hpcssl.jobs.submission import FILE
from hpcssl.pipelines.display import Display
from hpcssl.pipelines.follow import Bench, attach, load_bench
from hpcssl.pipelines.pretrain_rank import train_rank
from hpcssl.runs.run_folder import CONFIG, prepare_run
from hpcssl.runs.trace import last_record
from hpcssl.schedule.file import Schedule, check_matches
from hpcssl.stores.kinds import open_store
from hpcssl.train.objective import check_recipe
from hpcssl.train.pretrain_config import PretrainConfig, Timeline, load_recipe


@dataclass(frozen=True, kw_only=True)
class PretrainRequest:
    """What is trained, on what, and where.

    Attributes
    ----------
    recipe : name of a recipe that ships, or a YAML file
    store, schedule : folders of the data
    out : run folder, new or to be continued
    overrides : settings of the recipe, as `key=value`
    cluster, resources : in this process (`none`), on this machine or on SLURM, and of which size
    gpus : `MIN..MAX` instead of the number of nodes; None = that number alone
    wait_min : how long the most GPUs are worth waiting for at first, in minutes
    benchmark_with : bench.yaml of what is measured while the run trains; None = nothing
    """

    recipe: str
    store: Path
    schedule: Path
    out: Path
    overrides: Sequence[str] = ()
    cluster: Literal["none", "local", "slurm"] = "local"
    resources: Resources = field(default_factory=Resources)
    gpus: str | None = None
    wait_min: float = 0.0
    benchmark_with: Path | None = None


@dataclass(frozen=True, kw_only=True)
class PretrainPlan:
    """A request that has been checked.

    Attributes
    ----------
    recipe, timeline : resolved settings, and the steps that they come to
    data : where the data are, and their digests
    resources : of the request, with the numbers of nodes that `gpus` allows
    bench : what is measured while the run trains
    note : what there is to say of the initial weights; empty where there is nothing
    """

    request: PretrainRequest
    recipe: PretrainConfig
    timeline: Timeline
    data: dict[str, str]
    resources: Resources
    bench: Bench | None
    note: str


@dataclass(frozen=True, kw_only=True)
class PretrainOutcome:
    """What came of a start: on SLURM its `job`; elsewhere how it ended."""

    state: Literal["finished", "stopped", "submitted"]
    job: str | None = None


def plan_pretraining(request: PretrainRequest) -> PretrainPlan:
    """Check everything that can be checked before a job waits in a queue; nothing is written.

    UserError for a recipe, data, resources or a benchmark that cannot be used, or not together.
    """
    check_cluster(request.cluster, request.resources, request.out)
    if not 0 <= request.wait_min < math.inf:
        raise ConfigError(f"--wait-min {request.wait_min:g}; expected minutes, at least 0")
    recipe = load_recipe(request.recipe, request.overrides)
    registered_in = type(recipe.objective).__module__
    if request.cluster != "none" and registered_in.partition(".")[0] != __package__.partition(".")[0]:
        raise ConfigError(
            f"objective {recipe.objective.kind} is registered in {registered_in}, which the processes of --cluster"
            f" {request.cluster} do not import; give --cluster none"
        )
    if recipe.initial_weights:  # a job may start in another folder
        recipe = replace(recipe, initial_weights=str(Path(recipe.initial_weights).resolve()))
    store, schedule = open_store(request.store), Schedule.open(request.schedule)
    check_matches(schedule, store.slides, store=request.store)
    store.drawn_by(schedule.seed, schedule.mpp_weights)  # or says why not
    if not store.root.is_dir():
        raise StoreError(f"{request.store}: its tiles are gone, no folder {store.root}; is its file system mounted?")
    timeline = Timeline(recipe, schedule)
    timeline.values(0)
    note = check_recipe(recipe)
    data = {
        "store": str(request.store.resolve()),
        "store_digest": store.digest,
        "schedule": str(request.schedule.resolve()),
        "schedule_digest": schedule.digest,
    }
    if recipe.initial_weights:
        data["initial_weights_digest"] = digest_file(Path(recipe.initial_weights))
    resources = request.resources
    if request.gpus:
        resources = with_gpus(resources, *parse_gpus(request.gpus), global_batch=recipe.global_batch)
    check_divides(resources.nodes * resources.processes_per_node, recipe.global_batch)
    bench = load_bench(request.benchmark_with) if request.benchmark_with else None
    return PretrainPlan(
        request=request, recipe=recipe, timeline=timeline, data=data, resources=resources, bench=bench, note=note
    )


def describe_start(plan: PretrainPlan) -> str:
    """Return what a start would ask for, and on SLURM its batch script; nothing is written."""
    request, resources, batch_size = plan.request, plan.resources, plan.recipe.global_batch
    lines = [f"run folder: {request.out} (nothing is written)"]
    for nodes in (*resources.fewer_nodes, resources.nodes):
        share = batch_size // (nodes * resources.processes_per_node)
        lines.append(
            f"{nodes} {'node' if nodes == 1 else 'nodes'} x {resources.processes_per_node} processes,"
            f" {share} tiles of the global batch of {batch_size} each"
        )
    if request.cluster == "slurm":
        batch = batch_of(request.out, resources, work=train_rank, wait_min=request.wait_min)
        lines += ["", "resources:", dump_yaml(to_mapping(resources))]
        lines += [f"# {batch.folder}/JOB_submission.sh", batch.script()]
    return "\n".join(lines)


def pretrain(plan: PretrainPlan, display: Display) -> PretrainOutcome:
    """Prepare the run folder, and start the run: on SLURM submit it, here train to its end.

    UserError if the folder holds something else or another run, the run is under way, or its start fails.
    """
    request, out = plan.request, plan.request.out
    was_there = out.exists()
    with reserved(out):
        is_new = not (out / CONFIG).exists()
        prepare_run(out, plan.recipe, data=plan.data, derived=plan.timeline.derived())
        if plan.bench:
            attach(out, plan.bench)
        if request.cluster == "slurm":
            return PretrainOutcome(state="submitted", job=_submit(plan, is_new=is_new, was_there=was_there))
    record = last_record(out)
    done = record["step"] if record else 0
    with display.progress("pretraining", plan.timeline.stop_step - done, "steps") as advance:

        def on_step(step: int) -> None:
            nonlocal done
            if step > done:
                advance(step - done)
                done = step

        state = launch(out, plan.resources, request.cluster, work=train_rank, on_step=on_step, on_words=display.say)
    return PretrainOutcome(state=state)


def _submit(plan: PretrainPlan, *, is_new: bool, was_there: bool) -> str:
    """Submit the run; where SLURM refuses one that is new, what was made for it goes again."""
    out = plan.request.out
    try:
        return submit(out, plan.resources, work=train_rank, wait_min=plan.request.wait_min)
    except RunError:
        if is_new and not (out / FILE).exists():
            if not was_there:
                shutil.rmtree(out)
            for made in out.glob("[!.]*"):  # nothing but hidden names was there before
                shutil.rmtree(made) if made.is_dir() else made.unlink()
        raise
