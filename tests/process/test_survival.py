"""Runs that are killed, stopped by a request, or started twice: real processes and real signals."""

import json
import os
import re
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from fastdeq.experiment.sweep import RESUMABLE
from fastdeq.runs.files import is_sealed
from fastdeq.runs.folder import RESUME
from tests.commands import ROOT, CommandLine
from tests.comparisons import assert_same
from tests.process import kills
from tests.process.started import LIMIT, TRAIN, at_a_terminal, train, until
from tests.processes import PROCESSES, children

pytestmark = pytest.mark.slow

LONG = (
    *("model=deq", "trainer.accelerator=cpu", "trainer.max_epochs=100000"),
    *("trainer.limit_test_batches=1", "callbacks.resumption.minutes=null"),
)
"""Hours, if nobody stops it."""


def status(folder: Path) -> dict[str, Any]:
    path = folder / "status.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def trains(folder: Path) -> bool:
    """Whether an epoch is behind it: its line is in the log."""
    return re.search(r"^\S+ \S+ 1/", read(folder / "train.log"), re.MULTILINE) is not None


def test_a_run_that_is_killed_again_and_again_equals_the_run_that_was_not(tmp_path: Path) -> None:
    process = PROCESSES.Process(target=kills.check, args=(tmp_path, 8, 0))
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_stops_the_run_after_its_step_and_it_resumes(
    command: CommandLine, number: signal.Signals
) -> None:
    process, folder = train(command.folder, *LONG), command.folder / "run"
    until(lambda: trains(folder) or process.ended())
    os.kill(process.pid, number)
    ended, (out, err) = process.status(), process.printed()
    assert ended == RESUMABLE, err
    assert f" by {number.name}" in out
    assert "the same command resumes" in out
    assert err == ""
    assert is_sealed(folder / RESUME)
    said = status(folder)
    assert said["status"] == "interrupted"
    assert said["pid"] == process.pid
    again = command(*LONG, "paths.run=run", "stop_after=1e-9")
    assert again.status == RESUMABLE, again.err
    assert "resuming    from resume.ckpt" in again.out


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_a_signal_to_all_processes_stops_them(tmp_path: Path) -> None:
    # A cluster or systemd sends it to all of them, and the parent passes it on as well. Below, a
    # terminal sends it to the parent alone.
    process = train(tmp_path, *LONG, "trainer=ddp_cpu", "trainer.devices=2")
    until(lambda: trains(tmp_path / "run") or process.ended())
    for pid in [process.pid, *children(process.pid)]:
        os.kill(pid, signal.SIGTERM)
    ended, (out, err) = process.status(), process.printed()
    assert ended == RESUMABLE, err
    assert " by SIGTERM" in out
    assert is_sealed(tmp_path / "run" / RESUME)
    assert status(tmp_path / "run")["status"] == "interrupted"


def read_until_closed(terminal: int) -> str:
    """All that is printed from now on."""
    printed = b""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        if not select.select([terminal], [], [], 0.1)[0]:
            continue
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        printed += chunk
    return printed.decode(errors="replace")


def drained(terminal: int, condition: Callable[[], bool]) -> None:
    """Wait for the condition, and read meanwhile: a full terminal stops who writes to it."""

    def once() -> bool:
        if select.select([terminal], [], [], 0)[0]:
            os.read(terminal, 65536)
        return condition()

    until(once)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_once_saves_and_ends(tmp_path: Path, ranks: int) -> None:
    # To several processes of a terminal it goes at once, and yet it must count as one signal.
    process, terminal = at_a_terminal(tmp_path, TRAIN, "paths.run=run", *LONG, *several(ranks))
    drained(terminal, lambda: trains(tmp_path / "run"))
    os.write(terminal, b"\x03")
    printed = read_until_closed(terminal)
    assert process.status() == RESUMABLE, printed
    assert "the same command resumes" in printed
    assert "Traceback" not in printed
    assert is_sealed(tmp_path / "run" / RESUME)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_terminal_that_closes_stops_the_run_with_its_state_saved(
    tmp_path: Path, ranks: int
) -> None:
    # Lightning issue 1455. The kernel sends SIGHUP, and every print fails from then on (EIO).
    process, terminal = at_a_terminal(tmp_path, TRAIN, "paths.run=run", *LONG, *several(ranks))
    drained(terminal, lambda: trains(tmp_path / "run"))
    os.close(terminal)
    assert process.status() == RESUMABLE
    assert status(tmp_path / "run")["status"] == "interrupted"
    assert is_sealed(tmp_path / "run" / RESUME)
    assert " by SIGHUP" in read(tmp_path / "run" / "train.log")


def several(ranks: int) -> tuple[str, ...]:
    if ranks > 1 and not dist.is_available():
        pytest.skip("torch without distributed")
    return ("trainer=ddp_cpu", f"trainer.devices={ranks}") if ranks > 1 else ()


def test_ctrl_c_on_the_tool_for_a_row_stops_its_run_once(tmp_path: Path) -> None:
    given = ("skip_mdeq", "--experiment", "mnist_mdeq", "--outputs", "rows", *LONG[1:])
    small = ("data=digits", "arch=digits_conv", "solver.max_steps=3")
    process, terminal = at_a_terminal(
        tmp_path,
        ROOT / "tools" / "published_row.py",
        *given,
        *small,
        "trainer.limit_train_batches=3",
    )
    run = tmp_path / "rows" / "mnist_mdeq" / "skip_mdeq_lbroyden_seed1"
    drained(terminal, lambda: trains(run))
    os.write(terminal, b"\x03")
    printed = read_until_closed(terminal)
    assert process.status() == RESUMABLE, printed
    assert is_sealed(run / RESUME)


def test_ctrl_c_twice_ends_at_once(tmp_path: Path) -> None:
    # One step takes many seconds: the first signal has not ended the run when the second comes.
    slow = ("model=deq", "trainer.accelerator=cpu", "solver=picard", "solver.tol=1e-30")
    process, terminal = at_a_terminal(
        *(tmp_path, TRAIN, "paths.run=run", *slow, "solver.max_steps=20000"), "data.batch_size=1437"
    )
    drained(terminal, lambda: "residual" in read(tmp_path / "run" / "train.log"))

    def pressed() -> bool:
        # Nothing can be seen of the first one: until the second one is taken, it is pressed again.
        with suppress(OSError):  # at its end
            os.write(terminal, b"\x03")
        return process.ended()

    until(pressed)
    assert process.status() == -signal.SIGINT
    # Nobody was there to say so, but the lock is open.
    assert status(tmp_path / "run")["status"] == "running"
    assert not (tmp_path / "run" / RESUME).exists()


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_two_identical_commands_started_at_the_same_moment_make_one_run(
    command: CommandLine,
) -> None:
    settings = ("model=deq", "trainer.accelerator=cpu", "trainer.max_epochs=3")
    both = [train(command.folder, *settings) for _ in range(2)]
    statuses = [process.status() for process in both]
    ends = [process.printed() for process in both]
    # The other one has found it in use, or, if it was late, done.
    assert 0 in statuses
    for code, (out, err) in zip(statuses, ends, strict=True):
        if code != 0:
            assert code == 1
            assert "is in use: another process" in err
            assert len(err.splitlines()) == 1
        else:
            assert "see " in out
    assert command(*settings, "paths.run=whole").status == 0
    assert_same(command.folder / "run", command.folder / "whole")


def test_a_run_whose_process_was_killed_is_taken_over(command: CommandLine) -> None:
    folder, mine = command.folder / "run", (*LONG, "paths.run=run")
    process = train(command.folder, *LONG, "callbacks.resumption.steps=5")
    until(lambda: is_sealed(folder / RESUME) or process.ended())
    busy = command(*mine)
    assert busy.status == 1
    assert f"another process ({process.pid} on " in busy.err
    os.kill(process.pid, signal.SIGKILL)
    assert process.status() == -signal.SIGKILL
    assert status(folder)["status"] == "running"  # nobody was left to say otherwise
    taken = command(*mine, "stop_after=1e-9")
    assert taken.status == RESUMABLE, taken.err
    # Killed while it wrote, it has left the state before.
    assert re.search(r"resuming    from resume(\.before)?\.ckpt", taken.out)


def test_a_failed_run_says_why_and_a_done_one_that_it_is(
    command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ("model=deq", "trainer.max_epochs=1", "trainer.limit_train_batches=2")
    assert command(*short, "trainer.accelerator=cpu", "paths.run=good").status == 0
    said = status(command.folder / "good")
    assert said["status"] == "done"
    assert said["error"] is None
    assert {"identity", "host", "pid", "commit", "since", "updated"} <= set(said)

    def fail(*arguments: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("fastdeq.training.AbstractTask.training_step", fail)
    assert command(*short, "trainer.accelerator=cpu", "paths.run=bad").status == 1
    said = status(command.folder / "bad")
    assert said["status"] == "failed"
    assert said["error"] == "RuntimeError: out of luck"
