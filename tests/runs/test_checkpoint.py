"""A checkpoint is whole, or an error that is told; never another state."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hpcssl.core.atomic import remove_temporary
from hpcssl.core.errors import RunError
from hpcssl.runs import checkpoint
from hpcssl.runs.checkpoint import (
    checkpoint_path,
    checkpoint_steps,
    load_checkpoint,
    load_latest,
    prune_checkpoints,
    save_checkpoint,
)

TENSORS = {
    "weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "count": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 3),
    "mask": torch.tensor([True, False]),
}
STATE = {"objective": "dino", "updates": {"weight": 3.0}, "scale": 6.1e-05, "none": None}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def _same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        t.dtype == wanted[n].dtype and t.shape == wanted[n].shape and torch.equal(t, wanted[n])
        for n, t in found.items()
    )


def test_round_trip_and_name(run):
    path = save_checkpoint(run, 320, TENSORS, STATE)
    assert path == checkpoint_path(run, 320) == run / "checkpoints" / "step-000000320.safetensors"
    tensors, state = load_checkpoint(path)
    assert _same(tensors, TENSORS)
    assert state == {**STATE, "step": 320}
    assert [f.name for f in path.parent.iterdir()] == [path.name], "no temporary file is left"


def test_tensors_of_any_layout_come_back_and_other_readers_find_the_same(run):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {**TENSORS, "transposed": base.T, "slice": base[:, 1:3], "needs_grad": torch.nn.Parameter(base)}
    path = save_checkpoint(run, 1, tensors, {})
    for loaded in (load_checkpoint(path)[0], load_file(path)):
        assert _same(loaded, {n: t.detach() for n, t in tensors.items()})


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_whoever_may_read_the_folder_may_read_the_checkpoint(run, umask):
    before = os.umask(umask)
    try:
        path = save_checkpoint(run, 1, TENSORS, STATE)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_steps_are_those_of_whole_names_in_order(run):
    for step in (20, 3, 1_000_000_000):
        save_checkpoint(run, step, TENSORS, STATE)
    (run / "checkpoints" / ".step-000000099.safetensors.123.tmp").write_bytes(b"half")
    (run / "checkpoints" / "step-abc.safetensors").write_bytes(b"")
    assert checkpoint_steps(run) == [3, 20, 1_000_000_000]
    assert checkpoint_steps(run / "no such run") == []


@pytest.mark.parametrize("tenth", range(10))
def test_a_truncated_checkpoint_falls_back_to_the_one_before(run, tenth):
    save_checkpoint(run, 4, TENSORS, STATE)
    newest = save_checkpoint(run, 8, {**TENSORS, "weight": TENSORS["weight"] + 1}, STATE)
    os.truncate(newest, newest.stat().st_size * tenth // 10)
    with pytest.raises(RunError, match="damaged") as caught:
        load_checkpoint(newest)
    assert str(newest) in str(caught.value)
    told: list[str] = []
    tensors, state = load_latest(run, told.append)
    assert state["step"] == 4
    assert _same(tensors, TENSORS)
    assert len(told) == 1
    assert "step-000000008" in told[0]
    assert "falling back" in told[0]


def _damaged_copies(run, flips) -> list[tuple[int, BaseException]]:
    """Load the checkpoint with each (place, xor) applied; return the places whose outcome is not as promised."""
    path = save_checkpoint(run, 8, TENSORS, STATE)
    whole = path.read_bytes()
    wrong: list[tuple[int, BaseException]] = []
    for place, flip in flips(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= flip
        path.write_bytes(damaged)
        try:
            tensors, state = load_checkpoint(path)
            # 6.1E-05 for 6.1e-05 in the header is the same state; anything else is not
            if not (_same(tensors, TENSORS) and state == {**STATE, "step": 8}):
                wrong.append((place, AssertionError("another state")))
        except RunError:
            continue
        except Exception as error:  # noqa: BLE001 - any other kind is what this looks for
            wrong.append((place, error))
    return wrong


def test_any_flipped_byte_is_noticed(run):
    wrong = _damaged_copies(run, lambda size: ((place, 0xFF >> (place % 8) or 1) for place in range(size)))
    assert not wrong, wrong[:3]


def test_no_flipped_bit_gives_another_state(run):
    """What is promised above less the kind of error: nothing is loaded that was not saved."""
    rng = np.random.default_rng(0)
    flips = lambda size: ((int(p), 1 << int(b)) for p, b in rng.integers((0, 0), (size, 8), (400, 2)))  # noqa: E731
    wrong = _damaged_copies(run, flips)
    assert not [error for _, error in wrong if isinstance(error, AssertionError)]


def test_where_none_can_be_read_nothing_begins_anew(run):
    """A run of weeks whose checkpoints are all of another version, say, would be buried by a new beginning."""
    for step in (0, 1, 2):
        checkpoint_path(run, step).write_bytes(b"nothing")
    told: list[str] = []
    with pytest.raises(RunError, match=r"none of its 3 checkpoints can be read \(the newest: .*000002") as caught:
        load_latest(run, told.append)
    assert "\n" not in str(caught.value)
    assert not told


def test_a_damaged_beginning_is_computed_again(run):
    told: list[str] = []
    assert load_latest(run, told.append) is None
    assert not told
    checkpoint_path(run, 0).write_bytes(b"nothing")
    assert load_latest(run, told.append) is None
    assert len(told) == 1
    assert "computed again" in told[0]


def _save_on_a_small_disk(run, outcome) -> None:
    """Save where a file may have 64 kB: the system's own refusal in the middle of writing."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    try:
        save_checkpoint(run, 8, {"weight": torch.zeros(1 << 16)}, STATE)
    except OSError as error:
        outcome.write_text(json.dumps([error.errno, error.filename]))


def test_a_write_that_the_system_refuses_leaves_what_was_there(small, run):
    save_checkpoint(run, 4, TENSORS, STATE)
    outcome = run / "outcome.json"
    small.in_a_fork(partial(_save_on_a_small_disk, run, outcome))
    assert outcome.exists(), "an error of the system, not one of the library"
    assert json.loads(outcome.read_text()) == [errno.EFBIG, str(checkpoint_path(run, 8))]
    assert [f.name for f in (run / "checkpoints").iterdir()] == [checkpoint_path(run, 4).name]
    assert load_checkpoint(checkpoint_path(run, 4))[1]["step"] == 4


def test_python_goes_on_while_a_file_is_written(run, monkeypatch):
    """What writes in the background must not hold the interpreter's lock, or training would wait for the disk."""
    real, span, ticks, written = checkpoint._write_safetensors, [], [], threading.Event()

    def timed(*arguments, **options) -> None:
        span.append(time.perf_counter())
        real(*arguments, **options)
        span.append(time.perf_counter())

    monkeypatch.setattr(checkpoint, "_write_safetensors", timed)
    tensors = {str(i): torch.zeros(1 << 23) for i in range(8)}  # 256 MB, for a tenth of a second or more
    writer = threading.Thread(target=lambda: (save_checkpoint(run, 1, tensors, STATE), written.set()))
    writer.start()
    while not written.is_set():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    writer.join()
    begun, ended = span
    assert sum(begun < tick < ended for tick in ticks) >= 5


def test_what_is_missing_of_another_format_or_a_foreign_safetensors_file_is_told(run, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "FORMAT", 99)
        save_checkpoint(run, 1, TENSORS, STATE)
    save_file({"weight": torch.zeros(3)}, checkpoint_path(run, 2))
    for step, words in enumerate(("no such checkpoint", "format 99; this version reads 1", "format None")):
        with pytest.raises(RunError, match=words):
            load_checkpoint(checkpoint_path(run, step))


def _save_and_die(run, where: str) -> None:
    """Save, and be gone at a given moment."""
    if where == "before rename":
        os.replace = lambda *a: os._exit(7)
    elif where == "before sync":
        os.fsync = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
    elif where == "half-written":
        real, seen = checkpoint._bytes, []

        def dying(tensor):
            if seen.count(tensor.shape):  # the second time, after the digest
                os._exit(9)
            seen.extend([tensor.shape] if len(tensor.shape) == 2 else [])
            return real(tensor)

        checkpoint._bytes = dying
    save_checkpoint(run, 8, {**TENSORS, "weight": TENSORS["weight"] + 1}, STATE)
    os._exit(0)


@pytest.mark.parametrize(
    ("where", "code"), [("half-written", 9), ("before sync", -signal.SIGKILL), ("before rename", 7), ("never", 0)]
)
@pytest.mark.parametrize("step", [8, 4])
def test_killed_while_saving_leaves_what_was_there(small, run, where, code, step):
    """Also where the checkpoint of the same step is written again (step 8)."""
    save_checkpoint(run, step, TENSORS, STATE)
    assert small.in_a_fork(partial(_save_and_die, run, where)) == code
    told: list[str] = []
    tensors, state = load_latest(run, told.append)
    assert not told
    assert state["step"] == (8 if where == "never" else step)
    assert _same(tensors, TENSORS) == (where != "never")
    save_checkpoint(run, 12, TENSORS, STATE)  # what the killed one left is in nobody's way
    assert checkpoint_steps(run)[-1] == 12
    remove_temporary(run / "checkpoints")  # as the next start does
    assert all(f.name.startswith("step-") for f in (run / "checkpoints").iterdir())


def test_pruning_keeps_the_last_and_those_asked_for(run):
    for step in range(0, 100, 10):
        save_checkpoint(run, step, TENSORS, STATE)
    prune_checkpoints(run, 90, keep_last=2, keep_steps=lambda step: step % 40 == 0)
    assert checkpoint_steps(run) == [0, 40, 80, 90]
    prune_checkpoints(run, 90, keep_last=2, keep_steps=lambda step: False)
    assert checkpoint_steps(run) == [80, 90]
    prune_checkpoints(run, 90, keep_last=5, keep_steps=lambda step: False)
    assert checkpoint_steps(run) == [80, 90]


def test_pruning_after_a_fall_back_keeps_a_whole_checkpoint(run):
    """Step 20 is damaged, the run fell back and saved step 12: the one that is left must be whole."""
    save_checkpoint(run, 8, TENSORS, STATE)
    checkpoint_path(run, 20).write_bytes(b"damaged")
    save_checkpoint(run, 12, TENSORS, STATE)
    prune_checkpoints(run, 12, keep_last=1, keep_steps=lambda step: False)
    found = load_latest(run, lambda told: None)
    assert found is not None
    assert found[1]["step"] == 12


def test_what_comes_up_right_before_the_rename_keeps_the_file_from_its_name(run):
    """The file is whole and synced by then, so nothing slow lies between the look and the name."""
    seen = []

    def look() -> None:
        (temporary,) = (run / "checkpoints").iterdir()
        seen.append(temporary.stat().st_size)
        raise KeyError("a later start")

    with pytest.raises(KeyError):
        save_checkpoint(run, 8, TENSORS, STATE, before_rename=look)
    assert not list((run / "checkpoints").iterdir())
    assert seen == [save_checkpoint(run, 8, TENSORS, STATE).stat().st_size]
