"""`hpcssl pretrain`: start or continue a run."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpcssl.jobs.cluster import Resources

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
    parser.add_argument("--nodes", type=int, default=1, help="machines (SLURM)")
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        metavar="N",
        help="processes on each machine, one GPU each where it has GPUs (default: the profile's, or the GPUs here)",
    )
    parser.add_argument("--profile", help="cluster profile: a name that ships, or a YAML file (SLURM)")
    parser.add_argument("--partition", help="instead of the profile's (SLURM)")
    parser.add_argument("--account", help="instead of the profile's (SLURM)")


def run(args: argparse.Namespace) -> int:
    """Prepare the run folder, start the run, and on this machine wait for it."""
    resources = _resources(args)
    outcome = pretrain(
        args.recipe,
        store=args.store,
        schedule=args.schedule,
        out=args.out,
        overrides=args.set,
        resources=resources,
        cluster=args.cluster,
    )
    if args.cluster == "slurm":
        print(
            f"job {outcome} submitted; run folder {args.out}\n"
            f"  follow it: tail -f {shlex.quote(f'{args.out}/logs/{outcome}_0_log.err')}\n"
            f"  stop it:   scancel {outcome}"
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
) -> str:
    """Check everything that can be checked before a job waits in a queue, then launch; returns how it ended."""
    from dataclasses import replace

    from hpcssl.cli.progress import progress
    from hpcssl.core.atomic import digest_file
    from hpcssl.core.world import check_divides
    from hpcssl.jobs.cluster import check_cluster
    from hpcssl.jobs.launch import launch
    from hpcssl.runs.folder import prepare_run
    from hpcssl.runs.metrics import last_record
    from hpcssl.schedule.file import Schedule, check_matches
    from hpcssl.tiles.store import Store
    from hpcssl.train.config import Timeline, load_recipe
    from hpcssl.train.objective import check_recipe

    check_cluster(cluster, resources)
    recipe = load_recipe(recipe_name, overrides)
    if recipe.initial_weights:  # a job may start in another folder
        recipe = replace(recipe, initial_weights=str(Path(recipe.initial_weights).resolve()))
    opened_store, opened_schedule = Store.open(store), Schedule.open(schedule)
    check_matches(opened_schedule, opened_store.slides, store=store)
    timeline = Timeline(recipe, opened_schedule)
    timeline.values(0)
    told = check_recipe(recipe)
    check_divides(resources.nodes * resources.processes_per_node, recipe.global_batch)
    data = {
        "store": str(store.resolve()),
        "store_digest": opened_store.digest,
        "schedule": str(schedule.resolve()),
        "schedule_digest": opened_schedule.digest,
    }
    if recipe.initial_weights:
        data["initial_weights_digest"] = digest_file(Path(recipe.initial_weights))
        print(told)
    prepare_run(out, recipe, data=data, derived=timeline.derived())
    if cluster == "slurm":
        return launch(out, resources, cluster, on_step=lambda step: None)  # type: ignore[arg-type]
    record = last_record(out)
    done = record["step"] if record else 0
    with progress("pretraining", total=timeline.stop_step - done, unit="steps") as advance:

        def on_step(step: int) -> None:
            nonlocal done
            if step > done:
                advance(step - done)
                done = step

        return launch(out, resources, cluster, on_step=on_step)  # type: ignore[arg-type]


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
