"""``python train.py -m``: a job for each combination, a table at the end, failures listed."""

import csv
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fastdeq.experiment.sweep import best_trial
from fastdeq.report import SweepJob
from tests.commands import SHORT, Answer, CommandLine, refused

pytestmark = pytest.mark.slow


def folders(answer: Answer) -> list[Path]:
    return [path.parent for path in answer.files if path.name == "summary.json"]


def sweep_folder(command: CommandLine) -> Path:
    (folder,) = (command.folder / "outputs" / "multirun").iterdir()
    return folder


def test_a_sweep_over_models_and_seeds_ends_with_their_means(command: CommandLine) -> None:
    answer = command("-m", *SHORT, "model=deq,skip_deq,skip_reg_deq", "seed=1,2")
    assert answer.status == 0
    runs = folders(answer)
    assert len(runs) == 6
    table = [line for line in answer.out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["deq", "skip_deq", "skip_reg_deq"]
    assert all("±" in line for line in table[2:])
    written = sweep_folder(command)
    assert sorted(path.name for path in written.iterdir()) == [
        *("jobs", "multirun.yaml", "table.csv", "table.md")
    ]
    assert (written / "table.md").read_text().splitlines() == table
    accuracies = [
        json.loads((run / "summary.json").read_text())["metrics"]["test/accuracy"]
        for run in runs
        if json.loads((run / "summary.json").read_text())["choices"]["model"] == "deq"
    ]
    with (written / "table.csv").open() as lines:
        row = next(csv.DictReader(lines))
    assert row["runs"] == "2"
    assert f"{50 * sum(accuracies):.2f} ±" in row["test accuracy %"]


def test_a_failing_job_is_named_at_the_end_and_does_not_stop_others(
    command: CommandLine,
) -> None:
    answer = command("-m", *SHORT, "solver=lbroyden,newton_krylov,anderson", "adjoint=unrolled")
    assert answer.status == 1
    assert len(folders(answer)) == 2
    assert answer.out.count("\njob ") == 3
    last = answer.err.splitlines()[-1]
    assert last.startswith("job 1 failed (")
    assert "solver=newton_krylov" in last
    assert "Implicit adjoint" in last
    failed = json.loads((sweep_folder(command) / "jobs" / "1.json").read_text())
    assert failed["folder"] is None
    assert "Implicit adjoint" in failed["error"]


def test_every_value_of_a_sweep_is_checked_before_the_first_job(command: CommandLine) -> None:
    refused(command("-m", *SHORT, "solver.tol=1e-3,-1"), "solver.tol is -1")
    refused(
        command("-m", *SHORT, "seed=1,2", "solver.max_steps=9,few"), "solver.max_steps is 'few'"
    )
    refused(command("-m", *SHORT, "model=deq,skip_deq", "mode=train,test"), "mode=test needs")


def test_a_sweep_without_values_is_refused(command: CommandLine) -> None:
    refused(command("-m", *SHORT, "seed=range(5,5)"), "seed=range(5,5) has no values")
    refused(command("-m", *SHORT, "seed=glob(*)"), "seed=glob(*) has no values")


def test_a_search_names_its_best_trial_and_the_command_that_repeats_it() -> None:
    def trial(number: int, score: float | None) -> SweepJob:
        overrides = {"solver.tol": f"0.{number}"}
        metrics = {"metric": "test/accuracy", "value": score}
        command = f"fastdeq train solver.tol=0.{number}"
        summary = None if score is None else {"score": metrics, "command": command}
        error = "it failed" if score is None else None
        return SweepJob(
            number=number, overrides=overrides, folder=None, error=error, summary=summary
        )

    trials = [trial(1, 0.5), trial(2, 0.75), trial(3, float("nan")), trial(4, None)]
    assert best_trial(trials, "maximize").splitlines() == [
        "best trial: job 2, test/accuracy 0.75 (solver.tol=0.2)",
        "its command: fastdeq train solver.tol=0.2",
    ]
    assert best_trial(trials, "minimize").startswith("best trial: job 1,")
    assert best_trial(trials[2:], "maximize") == "no trial of the search has a score"


def test_with_stop_at_failure_no_job_starts_after_a_failed_one(command: CommandLine) -> None:
    grid = ("solver=lbroyden,newton_krylov,anderson", "adjoint=unrolled")
    answer = command("-m", *SHORT, *grid, "stop_at_failure=true")
    assert answer.status == 1
    assert len(folders(answer)) == 1
    failed, left = answer.err.splitlines()[-2:]
    assert failed.startswith("job 1 failed (")
    assert left.startswith("job 2 was interrupted (")
    assert left.endswith("not started, for job 1 has failed (stop_at_failure)")
    # It changes no run: the first one is done.
    again = command("-m", *SHORT, *grid)
    assert again.status == 1
    assert again.out.count("done already") == 1
    assert len(folders(again)) == 2


def test_the_grid_of_one_scale_is_three_models_with_and_without_jacobian_over_three_seeds(
    command: CommandLine,
) -> None:
    answer = command("sweep=single_scale", "--cfg", "hydra", "--package", "hydra.sweeper.params")
    assert answer.status == 0
    grid = {key: set(values.split(",")) for key, values in OmegaConf.create(answer.out).items()}
    assert grid["model"] == {"deq", "skip_deq", "skip_reg_deq"}
    assert grid["loss.jacobian"] == {"0.0", "1.0"}
    assert len(grid["seed"]) == 3


def test_a_shipped_grid_can_be_narrowed_and_shortened(command: CommandLine) -> None:
    short = ("data.samples=64", "data.test_samples=16", "trainer.max_epochs=1")
    answer = command(
        *("-m", "sweep=single_scale", "experiment=polynomial_fitting", "seed=1"),
        *("loss.jacobian=0.0", "trainer.accelerator=cpu", *short),
    )
    assert answer.status == 0, answer.err
    runs = folders(answer)
    models = [json.loads((run / "summary.json").read_text())["choices"]["model"] for run in runs]
    assert sorted(models) == ["deq", "skip_deq", "skip_reg_deq"]
    assert {run.parent.parent.name for run in runs} == {"polynomial_fitting"}
