"""`hpcssl pretrain`: start or continue a run."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpcssl.jobs.profile import Resources

SUMMARY = "pretrain an encoder with DINO or MAE; on an existing --out it goes on where it was"
EXAMPLE = (
    "hpcssl pretrain dino-vits16-opal --store STORE --schedule SCHED --out runs/a"
    " --cluster slurm --profile a100 --nodes 3 --gpus-per-node 4"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="a recipe that ships, or a YAML file")
    add("--store", type=Path, required=True, help="tile store")
    add("--schedule", type=Path, required=True, help="schedule built for that store")
    add("--out", type=Path, required=True, metavar="RUN", help="run folder, new or to be continued")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the recipe")
    cluster = "in this process, on this machine (default), or on SLURM"
    add("--cluster", choices=("none", "local", "slurm"), default="local", help=cluster)
    machines = parser.add_mutually_exclusive_group()
    machines.add_argument("--nodes", type=int, default=1, help="machines (SLURM)")
    gpus = "instead of --nodes: as many nodes as there are whenever the job starts, with so many GPUs in all (SLURM)"
    machines.add_argument("--gpus", metavar="MIN..MAX", help=gpus)
    wait = "with --gpus: how long the most GPUs are worth waiting for at first (%(default)g)"
    add("--wait-min", type=float, default=10, metavar="MINUTES", help=wait)
    processes = "processes on each machine, one GPU each where it has GPUs (default: the profile's, or the GPUs here)"
    add("--gpus-per-node", type=int, metavar="N", help=processes)
    add("--profile", help="cluster profile: a name that ships, or a YAML file (SLURM)")
    add("--partition", help="instead of the profile's (SLURM)")
    add("--account", help="instead of the profile's (SLURM)")
    bench = "have every pseudo-epoch's checkpoint embedded and measured by SLURM jobs while the run trains"
    add("--benchmark-with", type=Path, metavar="BENCH.yaml", help=bench)
    add("--dry-run", action="store_true", help="check everything, print resources and batch script, write nothing")


def run(args: argparse.Namespace) -> int:
    """Check, then start the run, and on this machine wait for it."""
    from hpcssl.cli.progress import display
    from hpcssl.core.errors import ConfigError
    from hpcssl.pipelines.pretrain import PretrainRequest, describe_start, plan_pretraining, pretrain

    if args.gpus and args.cluster != "slurm":
        raise ConfigError(f"--gpus {args.gpus} needs --cluster slurm; elsewhere say --gpus-per-node N")
    names = ("recipe", "store", "schedule", "out", "cluster", "gpus", "wait_min", "benchmark_with")
    given = {name: getattr(args, name) for name in names}
    plan = plan_pretraining(PretrainRequest(**given, overrides=args.set, resources=_resources(args)))
    if args.dry_run:
        print(describe_start(plan))
        return 0
    if plan.note:
        print(plan.note)
    outcome = pretrain(plan, display())
    if outcome.state == "submitted":
        folder = shlex.quote(str(args.out))
        print(
            f"job {outcome.job} submitted; run folder {args.out}\n"
            f"  how it is:    hpcssl jobs list {folder}\n"
            f"  what it says: hpcssl jobs logs {folder} --follow\n"
            f"  stop it:      hpcssl jobs cancel {folder}\n"
            f"  again:        hpcssl jobs requeue {folder}"
        )
        return 0
    print(f"{outcome.state}: {args.out}")
    return 0 if outcome.state == "finished" else 2


def _resources(args: argparse.Namespace) -> Resources:
    """Return what the command line asks for: on SLURM of the profile's nodes, here of the GPUs that there are."""
    from dataclasses import replace

    from hpcssl.jobs.profile import Profile, Resources, load_profile

    if args.cluster == "slurm":
        named = {key: value for key in ("partition", "account") if (value := getattr(args, key))}
        profile = replace(load_profile(args.profile) if args.profile else Profile(), **named)
    else:
        import torch

        profile = Profile(gpus_per_node=torch.cuda.device_count())
    processes = 1 if args.cluster == "none" else args.gpus_per_node
    if processes is None:
        processes = profile.gpus_per_node or 1
    return Resources(nodes=args.nodes, processes_per_node=processes, profile=profile)
