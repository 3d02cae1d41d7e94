"""Stopwatches: their values, and that they do not wait before they are read."""

import copy
import pickle
import time
import warnings
from typing import Any

import pytest
import torch

from fastdeq import fixed_point
from fastdeq.solution import SolveStats
from fastdeq.timer import Stopwatch
from tests.loops import each

CPU = torch.device("cpu")
on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The values that `time.perf_counter` returns, in turn."""
    readings: list[float] = []
    monkeypatch.setattr(time, "perf_counter", lambda: readings.pop(0))
    return readings


def test_a_stopwatch_reads_the_time_between_its_making_and_its_stop(clock):
    clock += [10.0, 12.5]
    watch = Stopwatch(CPU).stop()
    assert (watch.seconds, float(watch), watch.seconds) == (2.5, 2.5, 2.5)
    assert repr(watch) == "Stopwatch(2.500000 s)"


def test_a_running_stopwatch_is_not_read():
    watch = Stopwatch(CPU)
    assert repr(watch) == "Stopwatch()"
    with pytest.raises(RuntimeError, match=r"call stop\(\)"):
        _ = watch.seconds


@each("copied", [copy.deepcopy, lambda watch: pickle.loads(pickle.dumps(watch))])
def test_a_copy_reads_the_same(copied, clock):
    clock += [1.0, 4.0]
    assert copied(Stopwatch(CPU).stop()).seconds == 3.0


def test_the_seconds_of_a_solve_are_a_number_whatever_they_are_read_from(clock):
    row = torch.zeros(2)
    names = ("residual", "relative_residual", "steps", "nfe", "status")
    statistics: dict[str, Any] = dict.fromkeys(names, row)
    clock += [1.0, 1.5]
    read = [SolveStats(**statistics, elapsed=e).seconds for e in (Stopwatch(CPU).stop(), 2.0)]
    assert [*read, SolveStats(**statistics).seconds] == [0.5, 2.0, 0.0]


class Event:
    """A CUDA event without a device: every record takes a second, waits are recorded."""

    recorded, awaited = 0, 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: str) -> None:
        assert stream == "the current stream of cuda:1"
        Event.recorded += 1
        self.time = Event.recorded

    def synchronize(self) -> None:
        Event.awaited += 1

    def elapsed_time(self, end: "Event") -> float:
        return 1000.0 * (end.time - self.time)


def test_on_cuda_only_the_first_reading_waits_and_only_for_the_second_event(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: f"the current stream of {device}"
    )
    watches = [Stopwatch(torch.device("cuda:1")) for _ in range(2)]
    for watch in watches:
        watch.stop()
    assert (Event.recorded, Event.awaited) == (4, 0)
    assert [watch.seconds for watch in watches + watches] == [2.0] * 4
    assert Event.awaited == 2


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_a_gpu)])
def test_on_a_gpu_the_events_agree_with_the_clock_of_the_host(device):
    x = torch.randn(2048, 2048, device=device)
    for _ in range(2):  # the first round loads libraries
        torch.cuda.synchronize()
        begin, watch = time.perf_counter(), Stopwatch(x.device)
        for _ in range(50):
            x = torch.tanh(x @ x)
        watch.stop()
        torch.cuda.synchronize()
        host = time.perf_counter() - begin
    # The host's time includes the device's, and the time to launch and to wait.
    assert 0 < watch.seconds <= 1.05 * host + 1e-4


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_a_gpu)])
def test_on_a_gpu_a_solve_does_not_wait_but_where_it_says(device):
    z0 = torch.zeros(4, 8, device=device)
    fixed_point(torch.cos, z0)  # loads libraries
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            solution = fixed_point(torch.cos, z0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in caught if "called a synchronizing" in str(one.message)]
    # The loop's read before every step, one after the last, one of whether f is finite.
    assert len(waits) == int(solution.steps.max()) + 2
