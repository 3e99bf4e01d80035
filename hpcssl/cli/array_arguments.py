"""What commands that run as job arrays share: `--cluster slurm --array N --profile NAME`, and what they print."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpcssl.jobs.profile import Profile
    from hpcssl.pipelines.stage import StageJobs


def add_array_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a command that can run as a job array."""
    parser.add_argument(
        "--cluster",
        choices=("none", "slurm"),
        default="none",
        help="in this process (default), or on SLURM; the same command again does only what is missing",
    )
    parser.add_argument("--array", type=int, metavar="N", help="tasks of the job array, at most (SLURM)")
    parser.add_argument("--profile", help="cluster profile: a name that ships, or a YAML file (SLURM)")


def array_profile(args: argparse.Namespace) -> Profile | None:
    """Return the profile of the job array that is asked for; None where the work is to be done here.

    Raises
    ------
    ConfigError
        If one of the arguments lacks the others.
    """
    from hpcssl.core.errors import ConfigError
    from hpcssl.jobs.profile import load_profile

    if args.cluster == "none":
        given = next((name for name in ("array", "profile") if getattr(args, name) is not None), None)
        if given:
            raise ConfigError(f"--{given} is of a job array; give --cluster slurm, too")
        return None
    for name in ("array", "profile"):
        if getattr(args, name) is None:
            raise ConfigError(f"--cluster slurm: no --{name}; expected --cluster slurm --array N --profile NAME")
    if args.array < 1:
        raise ConfigError(f"--array {args.array}; expected at least 1")
    return load_profile(args.profile)


def tell_job(job: str, out: Path, what: str) -> None:
    """Print what was submitted, and the commands to follow and stop it."""
    print(
        f"job {job} {what}\n"
        f"  follow it: squeue --jobs {job}\n"
        f"  its logs:  {shlex.quote(f'{out}/logs')}\n"
        f"  stop it:   scancel {job}"
    )


def tell_stage(jobs: StageJobs, out: Path, *, array: str, last: str) -> None:
    """Print which jobs of a stage were submitted; `array` and `last` say what these do, as in "builds the parts"."""
    if jobs.array and jobs.array.tasks:
        tell_job(jobs.array.job, out, f"submitted: {jobs.array.tasks} tasks {array}")
    elif jobs.array:
        tell_job(jobs.array.job, out, "is under way already; nothing is submitted beside it")
    if jobs.last:
        tell_job(jobs.last.job, out, last if jobs.last.tasks else f"is under way already: it {last}")
