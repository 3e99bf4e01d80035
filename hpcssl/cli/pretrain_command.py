"""`hpcssl pretrain`: start or continue a run."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpcssl.jobs.cluster import Resources
    from hpcssl.train.pretrain_config import PretrainConfig, Timeline

SUMMARY = "pretrain an encoder with DINO or MAE; on an existing --out it goes on where it was"
EXAMPLE = (
    "hpcssl pretrain dino-vits16-opal --store STORE --schedule SCHED --out runs/a"
    " --cluster slurm --profile a100 --nodes 3 --gpus-per-node 4"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe that ships, or a YAML file")
    parser.add_argument("--store", type=Path, required=True, help="tile store")
    parser.add_argument("--schedule", type=Path, required=True, help="schedule built for that store")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="run folder, new or to be continued")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the recipe"
    )
    parser.add_argument(
        "--cluster",
        choices=("none", "local", "slurm"),
        default="local",
        help="in this process, on this machine (default), or on SLURM",
    )
    machines = parser.add_mutually_exclusive_group()
    machines.add_argument("--nodes", type=int, default=1, help="machines (SLURM)")
    machines.add_argument(
        "--gpus",
        metavar="MIN..MAX",
        help="instead of --nodes: as many nodes as there are whenever the job starts, with so many GPUs in all (SLURM)",
    )
    parser.add_argument(
        "--wait-min",
        type=float,
        default=10,
        metavar="MINUTES",
        help="with --gpus: how long the most GPUs are worth waiting for at first (%(default)g)",
    )
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        metavar="N",
        help="processes on each machine, one GPU each where it has GPUs (default: the profile's, or the GPUs here)",
    )
    parser.add_argument("--profile", help="cluster profile: a name that ships, or a YAML file (SLURM)")
    parser.add_argument("--partition", help="instead of the profile's (SLURM)")
    parser.add_argument("--account", help="instead of the profile's (SLURM)")
    parser.add_argument(
        "--benchmark-with",
        type=Path,
        metavar="BENCH.yaml",
        help="have every pseudo-epoch's checkpoint embedded and measured by SLURM jobs while the run trains",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print resources and batch script, write nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Prepare the run folder, start the run, and on this machine wait for it."""
    from hpcssl.core.errors import ConfigError

    if args.gpus and args.cluster != "slurm":
        raise ConfigError(f"--gpus {args.gpus} needs --cluster slurm; elsewhere say --gpus-per-node N")
    outcome = pretrain(
        args.recipe,
        store=args.store,
        schedule=args.schedule,
        out=args.out,
        overrides=args.set,
        resources=_resources(args),
        cluster=args.cluster,
        gpus=args.gpus,
        wait_min=args.wait_min,
        dry_run=args.dry_run,
        benchmark_with=args.benchmark_with,
    )
    if args.dry_run:
        print(outcome)
        return 0
    if args.cluster == "slurm":
        folder = shlex.quote(str(args.out))
        print(
            f"job {outcome} submitted; run folder {args.out}\n"
            f"  how it is:    hpcssl jobs list {folder}\n"
            f"  what it says: hpcssl jobs logs {folder} --follow\n"
            f"  stop it:      hpcssl jobs cancel {folder}\n"
            f"  again:        hpcssl jobs requeue {folder}"
        )
        return 0
    print(f"{outcome}: {args.out}")
    return 0 if outcome == "finished" else 2


def pretrain(
    recipe_name: str,
    *,
    store: Path,
    schedule: Path,
    out: Path,
    overrides: Sequence[str],
    resources: Resources,
    cluster: str,
    gpus: str | None = None,
    wait_min: float = 0.0,
    dry_run: bool = False,
    benchmark_with: Path | None = None,
) -> str:
    """Check everything that can be checked before a job waits in a queue, then launch.

    Returns
    -------
    How it ended; on SLURM the job's id; of a dry run what would have been done.
    """
    from hpcssl.cli.progress import progress
    from hpcssl.core.world import check_divides
    from hpcssl.jobs.cluster import check_cluster
    from hpcssl.jobs.elastic import parse_gpus, with_gpus
    from hpcssl.jobs.follow import attach, load_bench
    from hpcssl.jobs.launch import launch, reserved
    from hpcssl.runs.run_folder import CONFIG, prepare_run
    from hpcssl.runs.trace import last_record

    check_cluster(cluster, resources, out)
    recipe, data, timeline, told = _checked(recipe_name, overrides, store, schedule)
    if gpus:
        resources = with_gpus(resources, *parse_gpus(gpus), global_batch=recipe.global_batch)
    check_divides(resources.nodes * resources.processes_per_node, recipe.global_batch)
    bench = load_bench(benchmark_with) if benchmark_with else None
    if dry_run:
        return _dry_run(out, resources, cluster, recipe.global_batch, wait_min)
    if told:
        print(told)
    was_there = out.exists()
    with reserved(out):
        is_new = not (out / CONFIG).exists()
        prepare_run(out, recipe, data=data, derived=timeline.derived())
        if bench:
            attach(out, bench)
        if cluster == "slurm":
            return _submit(out, resources, wait_min, is_new=is_new, was_there=was_there)
    record = last_record(out)
    done = record["step"] if record else 0
    with progress("pretraining", total=timeline.stop_step - done, unit="steps") as advance:

        def on_step(step: int) -> None:
            nonlocal done
            if step > done:
                advance(step - done)
                done = step

        def on_words(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        return launch(out, resources, cluster, on_step=on_step, on_words=on_words)  # type: ignore[arg-type]


def _checked(
    recipe_name: str, overrides: Sequence[str], store: Path, schedule: Path
) -> tuple[PretrainConfig, dict[str, str], Timeline, str]:
    """Return the resolved recipe, what data it is for, its timeline, and what is to be told of its initial weights."""
    from dataclasses import replace

    from hpcssl.core.atomic import digest_file
    from hpcssl.core.errors import StoreError
    from hpcssl.schedule.file import Schedule, check_matches
    from hpcssl.stores.kinds import open_store
    from hpcssl.train.objective import check_recipe
    from hpcssl.train.pretrain_config import Timeline, load_recipe

    recipe = load_recipe(recipe_name, overrides)
    if recipe.initial_weights:  # a job may start in another folder
        recipe = replace(recipe, initial_weights=str(Path(recipe.initial_weights).resolve()))
    opened_store, opened_schedule = open_store(store), Schedule.open(schedule)
    check_matches(opened_schedule, opened_store.slides, store=store)
    opened_store.drawn_by(opened_schedule.seed, opened_schedule.mpp_weights)  # or says why not
    if not opened_store.root.is_dir():
        raise StoreError(f"{store}: its tiles are gone, no folder {opened_store.root}; is its file system mounted?")
    timeline = Timeline(recipe, opened_schedule)
    timeline.values(0)
    told = check_recipe(recipe)
    data = {
        "store": str(store.resolve()),
        "store_digest": opened_store.digest,
        "schedule": str(schedule.resolve()),
        "schedule_digest": opened_schedule.digest,
    }
    if recipe.initial_weights:
        data["initial_weights_digest"] = digest_file(Path(recipe.initial_weights))
    return recipe, data, timeline, told


def _submit(out: Path, resources: Resources, wait_min: float, *, is_new: bool, was_there: bool) -> str:
    """Submit the run; where SLURM refuses one that is new, what was made for it goes again."""
    import shutil

    from hpcssl.core.errors import RunError
    from hpcssl.jobs.launch import submit
    from hpcssl.jobs.submission import FILE

    try:
        return submit(out, resources, wait_min=wait_min)
    except RunError:
        if is_new and not (out / FILE).exists():
            if not was_there:
                shutil.rmtree(out)
            for made in out.glob("[!.]*"):  # nothing but hidden names was there before
                shutil.rmtree(made) if made.is_dir() else made.unlink()
        raise


def _dry_run(out: Path, resources: Resources, cluster: str, global_batch: int, wait_min: float) -> str:
    """Return what a start would ask for, and on SLURM its batch script."""
    from hpcssl.core.config import dump_yaml, to_mapping
    from hpcssl.jobs.launch import batch_of

    counts = [*resources.fewer_nodes, resources.nodes]
    shares = [
        f"{nodes} {'node' if nodes == 1 else 'nodes'} x {resources.processes_per_node} processes,"
        f" {global_batch // (nodes * resources.processes_per_node)} tiles of the global batch of {global_batch} each"
        for nodes in counts
    ]
    lines = [f"run folder: {out} (nothing is written)", *shares]
    if cluster == "slurm":
        batch = batch_of(out, resources, wait_min=wait_min)
        lines += [
            "",
            "resources:",
            dump_yaml(to_mapping(resources)),
            f"# {batch.folder}/JOB_submission.sh",
            batch.script(),
        ]
    return "\n".join(lines)


def _resources(args: argparse.Namespace) -> Resources:
    """Return what the command line asks for: on SLURM of the profile's nodes, here of the GPUs that there are."""
    from dataclasses import replace

    from hpcssl.jobs.cluster import Resources
    from hpcssl.jobs.profile import Profile, load_profile

    if args.cluster == "slurm":
        named = {key: value for key in ("partition", "account") if (value := getattr(args, key))}
        profile = replace(load_profile(args.profile) if args.profile else Profile(), **named)
    else:
        import torch

        profile = Profile(gpus_per_node=torch.cuda.device_count())
    asked = 1 if args.cluster == "none" else args.gpus_per_node
    processes = asked if asked is not None else profile.gpus_per_node or 1
    return Resources(nodes=args.nodes, processes_per_node=processes, profile=profile)
