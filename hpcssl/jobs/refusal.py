"""What to do about a job that SLURM refuses: its own words, and beside them what this cluster has."""

from __future__ import annotations

import re
import subprocess

_PATIENCE_S = 30.0
_SIZE = r"generic resource|\bgres\b|node configuration|node count|cpu count|more processors|memory"
# "… (job submit limit, user's size and/or time limits)": it may be any of them
_POLICY = r"(?<!and/or )time limit"
# of SLURM's words: what to change, and the format in which sinfo lists what there is
_FIXES = (
    (r"invalid partition|partition name", "set partition in the profile, or --partition; there are", "%R"),
    (
        r"invalid account|account/partition",
        "set account in the profile, or --account; sacctmgr show associations user=$USER lists yours",
        None,
    ),
    (
        _SIZE,
        "ask for no more than there is (--nodes, --gpus-per-node; cpus_per_gpu and mem_gb_per_gpu in the profile):",
        "%R has %D nodes of %c cores, %m MB, GPUs %G",
    ),
    (_POLICY, "set timeout_min in the profile; there are", "%R: at most %l"),
    (r"feature|constraint", "set constraint in the profile; there are", "%R: %f"),
)


def with_fix(words: str) -> str:
    """Return one line for a refusal: SLURM's words, what to change, and what there is."""
    words = " ".join(words.split())
    message = f"SLURM refused the job: {words}"
    for pattern, advice, form in _FIXES:
        if re.search(pattern, words, re.IGNORECASE):
            return f"{message}; {advice} {_listed(form) if form else ''}".rstrip()
    return message


def _listed(form: str) -> str:
    """Return what `sinfo` lists in a format, one after the other."""
    ask = ["sinfo", "--noheader", f"--format={form}"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "what sinfo lists"
    return ", ".join(dict.fromkeys(" ".join(line.split()) for line in done.stdout.splitlines()))
