"""What `hpcssl doctor --profile` asks of a live cluster; `hpcssl.doctor.cluster_checks` judges the answers."""

from __future__ import annotations

import getpass
import json
import re
import secrets
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hpcssl.doctor import cluster_checks as checks
from hpcssl.doctor.machine_checks import FAIL, Check
from hpcssl.jobs.profile import Profile

_ANSWER_S = 30.0
_FREE_NODE_S = 60  # how long to wait for a node
_PROBE_S = 180.0  # for that, and for the first import of torch from a cold disk
_MOST_WORDS = 300  # characters
_NODES_FORMAT = "%N|%c|%m|%G|%f|%T"
_PROBE = """
import json, os, platform, sys
facts = {"host": os.environ.get("SLURMD_NODENAME", platform.node()), "python": platform.python_version(), "gpus": []}
try:
    import torch, hpcssl
    facts |= {"hpcssl": hpcssl.__version__, "torch": torch.__version__, "cuda": torch.version.cuda}
    facts["archs"] = torch.cuda.get_arch_list()
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        facts["gpus"].append([gpu.name, [gpu.major, gpu.minor], gpu.total_memory / 2**30])
except Exception as error:
    facts["failure"] = " ".join(f"{type(error).__name__}: {error}".split())
try:
    with open(sys.argv[1]) as stream:
        facts["folder"] = stream.read() == sys.argv[2] and os.access(os.path.dirname(sys.argv[1]), os.W_OK)
except OSError:
    facts["folder"] = False
print(json.dumps(facts))
"""


def diagnose_cluster(profile: Profile, name: str, out: Path) -> list[Check]:
    """Return all checks of a profile of this name against the cluster of this machine, whose nodes must see `out`."""
    answer = _ask("scontrol", "show", "partition", "--oneliner")
    if isinstance(answer, Check):
        return [answer]
    check, partition = checks.check_partition(profile, checks.read_partitions(answer))
    if partition is None:
        return [check]
    report = [check, checks.check_time_limit(profile, partition)]
    answer = _ask("sinfo", "--noheader", "--Node", f"--partition={partition.name}", f"--format={_NODES_FORMAT}")
    if isinstance(answer, Check):
        return [*report, answer]
    nodes = checks.read_nodes(answer)
    report.append(checks.check_nodes(profile, partition, nodes))
    report.append(checks.check_account(profile, partition, _accounts()))
    accepted = _would_be_accepted(profile)
    kinds = {node.gpu_kinds for node in checks.nodes_that_fit(profile, nodes)}
    names = " ".join([name, partition.name, profile.constraint or "", *kinds])
    import torch

    report += [accepted, *checks.check_stack(names, torch.__version__, torch.version.cuda)]
    return report if accepted.status == FAIL else [*report, *_probe(profile, out)]


def _ask(*command: str) -> str | Check:
    """Return what a command of SLURM answers, or the failed line that says why it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_ANSWER_S)
        return done.stdout
    except FileNotFoundError:
        detail, fix = f"no {command[0]} on PATH", "run on a login node of the cluster, or load its slurm module"
    except subprocess.TimeoutExpired:
        detail, fix = f"{command[0]} gave no answer within {_ANSWER_S:.0f} s", "try again when the controller answers"
    except subprocess.CalledProcessError as error:
        detail, fix = f"{command[0]}: {_words(error.stderr)}", "see that SLURM runs and that SLURM_CONF is right"
    return Check.failure("slurm", detail, fix)


def _accounts() -> list[str] | None:
    """Return this user's accounts; None where the cluster tells none."""
    who = f"user={getpass.getuser()}"
    answer = _ask("sacctmgr", "--noheader", "--parsable2", "show", "associations", "where", who, "format=account")
    return None if isinstance(answer, Check) else sorted({line.strip("|") for line in answer.split()})


def _options(profile: Profile) -> list[str]:
    """Return what names the nodes in sbatch and srun."""
    named = {"partition": profile.partition, "account": profile.account, "constraint": profile.constraint}
    return [f"--{option}={value}" for option, value in named.items() if value]


def _would_be_accepted(profile: Profile) -> Check:
    ranks = profile.gpus_per_node or 1
    command = ["sbatch", "--test-only", *_options(profile), "--nodes=1", f"--ntasks-per-node={ranks}"]
    command += [f"--cpus-per-task={profile.cpus_per_gpu}", f"--time={profile.timeout_min}", "--wrap=true"]
    if profile.gpus_per_node:
        command.append(f"--gpus-per-node={profile.gpus_per_node}")
    if profile.mem_gb_per_gpu:
        command.append(f"--mem={profile.mem_gb_per_gpu * ranks * 1024:.0f}M")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_ANSWER_S)
    except (subprocess.TimeoutExpired, OSError) as error:
        return checks.check_accepted(_words(str(error)), "")
    words = _words(done.stderr)
    return checks.check_accepted(words if done.returncode else None, words)


def _probe(profile: Profile, out: Path) -> list[Check]:
    """Run a process on a node for a moment."""
    folder = out.resolve()
    token, file = secrets.token_hex(8), folder / f".hpcssl-doctor-{secrets.token_hex(4)}"
    command = ["srun", *_options(profile), "--nodes=1", "--ntasks=1", f"--cpus-per-task={profile.cpus_per_gpu}"]
    command += [f"--immediate={_FREE_NODE_S}", "--time=5", "--job-name=hpcssl-doctor", "--quiet"]
    if profile.gpus_per_node:
        command.append("--gpus-per-node=1")
    command += ["bash", "-c", "\n".join([*profile.batch_setup, 'exec "$0" "$@"'])]
    try:
        file.write_text(token)
        code, output, words = _run([*command, sys.executable, "-c", _PROBE, str(file), token])
    finally:
        file.unlink(missing_ok=True)
    facts = re.search(r"^\{.*\}$", output, re.MULTILINE)
    if facts:
        return checks.check_probe(profile, json.loads(facts[0]), str(folder))
    if code is None:
        return [checks.check_no_probe(f"no answer within {_PROBE_S:.0f} s {words}".strip(), busy=True)]
    if "Immediate" in words or "busy" in words:
        return [checks.check_no_probe(f"no node was free for {_FREE_NODE_S} s ({words})", busy=True)]
    why = f"a process on a node ended with exit code {code}; {words or 'without a word'}"
    return [checks.check_no_probe(why, busy=False)]


def _run(command: Sequence[str]) -> tuple[int | None, str, str]:
    """Return exit code (None = out of time), output and errors; srun takes its job with it when it is terminated."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = process.communicate(timeout=_PROBE_S)
        return process.returncode, output, _words(errors)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, errors = process.communicate()
        return None, output, _words(errors)


def _words(text: str) -> str:
    """Return a command's words in one line, without its name in front of each."""
    lines = (re.sub(r"^(sbatch|srun|sacctmgr|scontrol|sinfo): (error: )?", "", line) for line in text.splitlines())
    return " ".join(lines)[:_MOST_WORDS].strip()
