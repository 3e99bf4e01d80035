"""What commands that run as job arrays share: `--cluster slurm --array N --profile NAME`, and what they print."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpcssl.jobs.array import Submitted
    from hpcssl.jobs.profile import Profile
    from hpcssl.pipelines.stage import StageJobs


def add_array_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a command that can run as a job array."""
    add = parser.add_argument
    cluster = "in this process (default), or on SLURM; the same command again does only what is missing"
    add("--cluster", choices=("none", "slurm"), default="none", help=cluster)
    add("--array", type=int, metavar="N", help="tasks of the job array, at most (SLURM)")
    add("--profile", help="cluster profile: a name that ships, or a YAML file (SLURM)")


def array_profile(args: argparse.Namespace) -> Profile | None:
    """Return the profile of the job array that is asked for; None where the work is to be done here.

    ConfigError where one of the arguments lacks the others.
    """
    from hpcssl.core.errors import ConfigError
    from hpcssl.jobs.profile import load_profile

    for name in ("array", "profile"):
        is_given = getattr(args, name) is not None
        if is_given and args.cluster == "none":
            raise ConfigError(f"--{name} is of a job array; give --cluster slurm, too")
        if not is_given and args.cluster == "slurm":
            raise ConfigError(f"--cluster slurm: no --{name}; expected --cluster slurm --array N --profile NAME")
    if args.cluster == "none":
        return None
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


def tell_array(array: Submitted, out: Path, does: str) -> None:
    """Print that an array was submitted, or is under way; `does` says what its tasks do, as in "build the parts"."""
    submitted = f"submitted: {array.tasks} tasks {does}"
    tell_job(array.job, out, submitted if array.tasks else "is under way already; nothing is submitted beside it")


def tell_stage(jobs: StageJobs, out: Path, *, array: str, last: str) -> None:
    """Print which jobs of a stage were submitted; `array` and `last` say what these do, as in "builds the parts"."""
    if jobs.array:
        tell_array(jobs.array, out, array)
    if jobs.last:
        tell_job(jobs.last.job, out, last if jobs.last.tasks else f"is under way already: it {last}")
