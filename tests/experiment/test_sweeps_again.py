"""A sweep that is started again: what is done is skipped, what was cut off or failed resumes."""

from pathlib import Path
from typing import Any

import pytest

from fastdeq.experiment.job import work
from fastdeq.experiment.sweep import RESUMABLE
from tests.commands import Answer, CommandLine
from tests.comparisons import assert_same
from tests.process.started import start

pytestmark = pytest.mark.slow

SWEEP = (
    *("-m", "model=deq,skip_deq", "seed=1,2", "trainer.accelerator=cpu"),
    *("trainer.max_epochs=2", "data.batch_size=720"),
)
"""Four jobs of four steps."""
TWO = (*SWEEP, "seed=1")


def folders(command: CommandLine) -> list[Path]:
    """Of runs, whether they are done or not."""
    return [path.parent for path in command.folder.glob("outputs/digits/*/*/overrides.json")]


def test_a_sweep_of_interrupted_runs_is_finished_by_starting_it_again(command: CommandLine) -> None:
    stopped = command(*TWO, "stop_after=1e-9")
    assert stopped.status == RESUMABLE
    assert stopped.err.count("was interrupted") == 2
    assert "failed" not in stopped.err
    assert len(folders(command)) == 2
    ended = command(*TWO)
    assert ended.status == 0, ended.err
    assert ended.out.count("resuming    from resume.ckpt") == 2
    pieces = folders(command)
    assert len(pieces) == 2
    # And the same in one go, elsewhere.
    whole = command(*TWO, "paths.outputs=whole")
    assert whole.status == 0
    for path in (command.folder / "whole" / "digits").glob("*/*/"):
        (same,) = (folder for folder in pieces if folder.name == path.name)
        assert_same(path, same)


def runs(command: CommandLine) -> list[Path]:
    return list(command.folder.glob("outputs/digits/*/*/summary.json"))


def table(answer: Answer) -> list[str]:
    return [line for line in answer.out.splitlines() if line.startswith("|")]


def test_with_resume_never_a_sweep_makes_new_runs(command: CommandLine) -> None:
    for _ in range(2):
        assert command(*TWO, "resume=never").status == 0
    assert len(runs(command)) == 4


def test_what_failed_is_repeated_and_what_is_done_is_skipped_and_still_in_the_table(
    command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_once(job: Any) -> None:
        if job.config["seed"] == 2:
            raise RuntimeError("the roof fell in")
        work(job)

    monkeypatch.setattr("fastdeq.experiment.launch.work", fails_once)
    first = command(*SWEEP)
    assert first.status == 1
    assert first.err.count("the roof fell in") == 4  # as it happens, and at the end
    monkeypatch.setattr("fastdeq.experiment.launch.work", work)
    again = command(*SWEEP)
    assert again.status == 0, again.err
    assert again.out.count("done already") == 2
    assert len(runs(command)) == 4
    before = {path: path.stat().st_mtime_ns for path in again.files if path.name != ".lock"}
    third = command(*SWEEP)
    assert third.status == 0
    assert third.out.count("done already") == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert table(third) == table(again)
    more = command(*SWEEP, "seed=1,2,3")
    assert more.out.count("done already") == 4
    assert len(runs(command)) == 6


@pytest.mark.slow
def test_two_sweeps_started_at_the_same_moment_make_every_run_once(command: CommandLine) -> None:
    both = [start(command.folder, *SWEEP) for _ in range(2)]
    statuses = [process.status() for process in both]
    for status, process in zip(statuses, both, strict=True):
        # What the other one was at work on is named; nothing else went wrong.
        _, err = process.printed()
        assert status == (1 if err else 0)
        for text in err.splitlines():
            assert "is in use: another process" in text, text
    last = command(*SWEEP)
    assert last.status == 0, last.err
    assert last.out.count("done already") == 4
    assert len(runs(command)) == 4
    assert len(list(command.folder.glob("outputs/multirun/*/table.md"))) == 3
