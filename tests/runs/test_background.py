"""A write in the background: from a copy, one at a time, and its errors are heard."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from hpcssl.runs.background import BackgroundWriter


@pytest.fixture
def writer():
    made = BackgroundWriter()
    yield made
    made.close()


def test_what_is_written_is_the_state_at_the_call(writer):
    weight, written, go = torch.arange(6.0).reshape(2, 3), [], threading.Event()

    def write(tensors) -> None:
        go.wait(10)
        written.append(tensors["weight"].clone())

    writer.start({"weight": weight.T}, write)
    weight += 100  # training goes on
    go.set()
    writer.wait()
    assert torch.equal(written[0], torch.arange(6.0).reshape(2, 3).T)
    assert written[0].is_contiguous()


def test_a_second_write_is_taken_while_a_slow_disk_holds_up_the_first(writer):
    """Training that stood still would be taken for a rank that hangs."""
    go, written = threading.Event(), []

    def write(tensors) -> None:
        go.wait(10)
        written.append(tensors["weight"].tolist())

    for value in (1.0, 2.0):
        writer.start({"weight": torch.full((2,), value)}, write)
    writer.check()
    assert not written, "both calls returned before the first write ended"
    go.set()
    writer.wait()
    assert written == [[1.0, 1.0], [2.0, 2.0]]


def test_a_third_write_waits_and_none_is_overwritten_while_it_is_written(writer):
    under_way, most, seen = [], [], []

    def write(tensors) -> None:
        under_way.append(1)
        most.append(len(under_way))
        before = tensors["weight"].clone()
        time.sleep(0.05)
        seen.append((before, tensors["weight"].clone()))
        under_way.pop()

    for value in range(4):
        writer.start({"weight": torch.full((3,), float(value))}, write)
    writer.wait()
    assert most == [1] * 4
    assert [before.tolist() for before, _ in seen] == [[float(v)] * 3 for v in range(4)]
    assert all(torch.equal(*pair) for pair in seen)


def test_the_copy_uses_its_memory_again(writer):
    places = []
    for shape in ((3,), (3,), (4,)):
        tensors = {"weight": torch.zeros(shape), "late": torch.zeros(2)}
        writer.start(tensors, lambda copies: places.append({n: (t.data_ptr(), t.shape) for n, t in copies.items()}))
        writer.wait()
    assert places[0] == places[1]
    assert places[2]["weight"][1] == (4,)
    assert places[2]["late"] == places[0]["late"]


def _fail(tensors) -> None:
    raise OSError(28, "No space left on device", "checkpoints/x")


@pytest.mark.parametrize("listen", ["check", "wait", "start"])
def test_an_error_of_the_thread_is_raised_by_the_next_call_once(writer, listen):
    writer.start({}, _fail)
    calls = {"check": writer.check, "wait": writer.wait, "start": lambda: writer.start({}, lambda tensors: None)}
    writer._thread.submit(int).result(10)  # behind the failing one: it has failed by now
    with pytest.raises(OSError, match="No space left"):
        calls[listen]()
    writer.check()
    writer.start({}, lambda tensors: None)
    writer.wait()


def test_closing_lets_the_write_end():
    writer, written = BackgroundWriter(), threading.Event()
    writer.start({}, lambda tensors: time.sleep(0.05) or written.set())
    writer.close()
    assert written.is_set()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_copy_of_a_gpus_tensors_lies_in_pinned_memory(writer):
    weight, seen = torch.arange(1 << 20, dtype=torch.float32, device="cuda"), []
    writer.start({"weight": weight}, lambda tensors: seen.append(tensors["weight"]))
    weight += 1
    writer.wait()
    assert seen[0].is_pinned()
    assert torch.equal(seen[0], torch.arange(1 << 20, dtype=torch.float32))
