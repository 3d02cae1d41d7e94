"""Runs to be reported, and what ``fastdeq report`` prints of them."""

from pathlib import Path

import pytest

from fastdeq.report.command import main
from tests.experiment.run_folders import MNIST, unfinished_run, write_job, write_run

JACOBIAN = {
    **MNIST,
    "where": {"model": "deq", "loss.jacobian": 1.0},
    "metrics": {"test/accuracy": 0.98123, "test/nfe": 5.034, "test/seconds": 0.011},
    "deviations": {"test/accuracy": 0.00025, "test/nfe": 0.059},
    "parameters": 138000,
    "training_minutes": 7.321,
}

HEADINGS = [
    *("model", "solver", "continuous", "Jacobian reg.", "parameters", "runs", "test accuracy %"),
    *("test NFE", "training s/batch", "backward s/batch", "prediction s/batch", "training min"),
    "verdict",
]


def several_runs() -> Path:
    """Three seeds of one configuration, one of another, one unfinished, one that failed, in
    the current folder.
    """
    outputs = Path("outputs")
    for seed, share in enumerate((0.979, 0.980, 0.982), start=1):
        write_run(
            outputs / "mnist_fc" / f"deq_{seed}",
            settings={"seed": seed},
            metrics={"test/accuracy": share, "test/nfe": 7.0 + seed},
            reference=MNIST,
        )
    write_run(
        outputs / "mnist_fc" / "jacobian",
        settings={"loss.jacobian": 1.0},
        metrics={"test/accuracy": 0.983, "test/nfe": 4.0},
        reference=JACOBIAN,
        commit="0813f8e8b9",
        dirty=True,
        device="NVIDIA H200",
        devices=2,
    )
    unfinished_run(outputs / "mnist_fc" / "under_way")
    sweep = outputs / "multirun" / "1"
    write_job(sweep, 0, None, error="out of memory", model="deq", seed="4")
    return outputs


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, list[str]]:
    """What the command prints where all is well, and its notes on stderr."""
    assert main(arguments) == 0
    answer = capsys.readouterr()
    return answer.out, answer.err.splitlines()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, status: int) -> str:
    """What the command says where something is wrong: one line on stderr, nothing on stdout."""
    assert main(arguments) == status
    answer = capsys.readouterr()
    assert answer.out == ""
    (line,) = answer.err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def table_of(out: str) -> list[list[str]]:
    """The cells of a Markdown table, headings first."""
    lines = [line for line in out.splitlines() if line.startswith("|")]
    del lines[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
