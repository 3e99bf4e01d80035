"""What SLURM says when it refuses a job, and what to do then."""

from __future__ import annotations

import pytest

from hpcssl.jobs import refusal
from hpcssl.jobs.refusal import with_fix


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ("Invalid partition name specified", "set partition in the profile, or --partition; there are <%R>"),
        ("Invalid account or account/partition combination specified", "set account in the profile, or --account"),
        ("Invalid generic resource (gres) specification", "ask for no more than there is"),
        ("Requested node configuration is not available", "ask for no more than there is"),
        ("Memory specification can not be satisfied", "ask for no more than there is"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "set timeout_min in the profile"),
        ("Invalid feature specification", "set constraint in the profile; there are <%R: %f>"),
    ],
)
def test_slurms_words_and_the_fix_in_one_line(monkeypatch, words, fix):
    monkeypatch.setattr(refusal, "_listed", lambda form: f"<{form}>")
    told = with_fix(f"sbatch: error: Batch job submission failed:\n {words}")
    assert told.startswith(f"SLURM refused the job: sbatch: error: Batch job submission failed: {words}; {fix}")
    assert "\n" not in told


def test_other_words_are_told_as_they_are():
    words = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
    assert with_fix(words) == f"SLURM refused the job: {words}"


def test_without_sinfo(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert with_fix("Invalid partition name specified").endswith("there are what sinfo lists")
