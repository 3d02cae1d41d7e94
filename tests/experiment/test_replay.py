"""mode=replay: the failed step of a run, exactly as it was, or with other settings."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdeq import experiment
from fastdeq.experiment.replay import replay
from fastdeq.runs.files import is_sealed, seal_of
from fastdeq.runs.folder import FAILURE
from fastdeq.training import TrainingFailed
from tests.commands import CommandLine, refused
from tests.configurations import composed
from tests.damage import cut, empty, flip, replace
from tests.process.faults import gradients

SHORT = ("trainer.max_epochs=1", "trainer.accelerator=cpu", "data.batch_size=360")
KEEP = "+callbacks.gradients._target_=tests.process.faults.Gradients"
NEVER = ("solver.max_steps=2", "solver.tol=1e-9", "callbacks.failures.patience=1")
"""Four steps, none of which converges; the first is kept."""

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:f is not finite:RuntimeWarning")]

NETWORKS = {
    "dense": ("model=skip_deq",),
    "random regularization": ("model=deq", "loss.jacobian=0.1", "loss.jacobian_probability=0.5"),
    "batch statistics, dropout": (
        *("model=skip_mdeq", "arch.normalization=batch", "arch.dropout=0.3"),
        *("arch.channels=[4,4]", "loss.jacobian=0.1"),
    ),
    "reused equilibria": ("model=deq", "callbacks=reuse"),
    "in bf16": ("model=skip_deq", "trainer.precision=bf16-mixed"),
}


def run(folder: Path, *overrides: str) -> Path:
    return experiment.run_config(composed(*SHORT, f"paths.run={folder}", *overrides))


def kept(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / FAILURE, weights_only=True)
    return found


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_made_again_has_the_loss_and_the_gradient_it_had(
    tmp_path: Path, network: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit, wherever the random numbers stand now."""
    overrides = (*NETWORKS[network], *NEVER, "callbacks.failures.on_failure=warn", KEEP)
    folder = run(tmp_path / "run", *overrides)
    torch.manual_seed(17)
    capsys.readouterr()
    found = replay(composed(*SHORT, *overrides, "mode=replay", f"from_run={folder}"))
    assert_equal(found.gradients, gradients(folder, 0))
    then = kept(folder)["failure"]["diagnosis"]
    assert found.diagnosis.loss == then["loss"]
    assert found.diagnosis.gradient_norm == then["gradient_norm"]
    assert (found.diagnosis.forward, found.diagnosis.backward) == (
        then["forward"],
        then["backward"],
    )
    assert found.failed
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"step 0 of {folder / FAILURE}: 360 samples")
    then_numbers, now_numbers = lines[1].removeprefix("then"), lines[2].removeprefix("now")
    assert then_numbers.strip() == now_numbers.strip()


def test_a_step_that_started_at_reused_equilibria_starts_there_again(tmp_path: Path) -> None:
    overrides = (
        *("model=deq", "callbacks=reuse", *NEVER[:2], KEEP),
        *("callbacks.failures.patience=6", "trainer.max_epochs=2"),  # the second epoch's second
    )
    folder = run(tmp_path / "run", *overrides)
    failure = kept(folder)["failure"]
    assert failure["step"] == 5
    assert failure["ranks"][0]["start"].any()
    found = replay(composed(*SHORT, *overrides, "mode=replay", f"from_run={folder}"))
    assert_equal(found.gradients, gradients(folder, 5))


def test_a_later_step_too_with_the_draws_of_its_number(tmp_path: Path) -> None:
    """Of the Jacobian's term, drawn for every step, and of the weights that have moved by then."""
    overrides = (
        *(
            "model=deq",
            "solver.max_steps=7",
            "callbacks.failures.unconverged=0",
            KEEP,
            "callbacks.failures.patience=1",
        ),
        *("loss.jacobian=0.1", "loss.jacobian_probability=0.5", "trainer.max_epochs=3"),
    )
    folder = run(tmp_path / "run", *overrides)
    number = kept(folder)["failure"]["step"]
    assert number > 0
    found = replay(composed(*SHORT, *overrides, "mode=replay", f"from_run={folder}"))
    assert found.failed
    assert_equal(found.gradients, gradients(folder, number))


def test_pretrained_steps_are_unrolled_again(tmp_path: Path) -> None:
    overrides = ("model=deq", "callbacks.pretraining.steps=9", "optimizer.lr=1e30", KEEP)
    folder = run(tmp_path / "run", *overrides)
    assert kept(folder)["failure"]["depth"] == 5
    cfg = composed(*SHORT, *overrides, "mode=replay", f"from_run={folder}")
    found = replay(cfg)
    assert found.failed
    assert found.diagnosis.forward == (0, 0, 0, 0, 360)


def test_other_settings_show_what_helps(command: CommandLine) -> None:
    trained = command(*SHORT, "model=skip_deq", *NEVER, "paths.run=mine")
    assert trained.status == 0, trained.err
    before = {path: path.stat().st_mtime_ns for path in trained.files}
    again = command("mode=replay", "from_run=mine")
    assert again.status == 0, again.err
    assert again.out.splitlines()[-1].startswith(
        "it fails again: 360 of 360 samples did not converge in the forward solve (360 step_limit)"
    )
    assert "after 0, 1, 2 steps (median of samples)" in again.out
    helped = command("mode=replay", "from_run=mine", "solver.max_steps=50", "solver.tol=1e-3")
    assert helped.status == 0, helped.err
    assert helped.out.splitlines()[-1] == "it does not fail"
    assert "forward 360 converged; backward 360 converged" in helped.out
    allowed = command("mode=replay", "from_run=mine", "callbacks.failures.unconverged=null")
    assert allowed.out.splitlines()[-1] == "it does not fail"
    # A run's folder is made by runs alone, and the one that was read is what it was.
    assert {path: path.stat().st_mtime_ns for path in helped.files} == before


def test_a_run_that_raises_says_it_in_a_line_and_leaves_the_step(command: CommandLine) -> None:
    strict = "callbacks.failures.on_failure=raise"
    answer = command(*SHORT, "model=skip_deq", *NEVER, strict, "paths.run=mine")
    assert answer.status == 1
    assert answer.err.count("\n") == 1
    assert answer.err.startswith("error: step 0: 360 of 360 samples did not converge")
    assert is_sealed(command.folder / "mine" / FAILURE)
    assert command(*answer.err.split("train.py ")[1].split()).status == 0  # the command it gives


@pytest.mark.parametrize(
    ("what", "seen"), [("inputs", "inputs of the batch are not finite"), ("solve", "180 of 360")]
)
def test_two_processes_skip_together_what_one_of_them_cannot_do(
    command: CommandLine, what: str, seen: str
) -> None:
    bad = (
        "+callbacks.bad._target_=tests.process.faults.BadPart",
        f"+callbacks.bad.what={what}",
        "callbacks.failures.unconverged=0.4",  # half of the samples are the second's
        "callbacks.failures.on_failure=skip_step",
    )
    two = ("trainer=ddp_cpu", "trainer.devices=2", "model=skip_deq", KEEP, "paths.run=mine")
    answer = command(*SHORT, *two, *bad)
    assert answer.status == 0, answer.err
    folder = command.folder / "mine"
    assert json.loads((folder / "summary.json").read_text())["steps"] == 4
    log = (folder / "train.log").read_text()
    assert f"step 1: {seen}" in log or f"step 1: the {seen}" in log
    failure = kept(folder)["failure"]
    assert [len(part["batch"][0]) for part in failure["ranks"]] == [180, 180]
    first, second = (part["batch"][0].isfinite().all() for part in failure["ranks"])
    assert (first, second) == (True, what != "inputs")
    plain = ("mode=replay", f"checkpoint={folder / FAILURE}", *SHORT, "model=skip_deq")
    found = replay(composed(*plain, "callbacks.failures.unconverged=0.4"))
    assert found.failed == (what == "inputs")  # the solver of the other was tampered with
    if what == "inputs":
        for name, gradient in found.gradients.items():
            # All that DistributedDataParallel averages, it has averaged to the same.
            expected = gradients(folder, 1)[name]
            torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)


def test_the_parts_of_two_processes_give_the_gradient_that_they_had_together(
    command: CommandLine,
) -> None:
    two = (*SHORT, "model=skip_deq", *NEVER, "trainer=ddp_cpu", "trainer.devices=2", KEEP)
    answer = command(*two, "paths.run=mine")
    assert answer.status == 0, answer.err
    folder = command.folder / "mine"
    found = replay(composed(*two, "mode=replay", f"from_run={folder}"))
    assert_equal(found.gradients, gradients(folder, 0))  # halves: exact
    then = kept(folder)["failure"]["diagnosis"]
    assert found.diagnosis.loss == then["loss"]
    assert found.diagnosis.forward == then["forward"]


# Refusals


@pytest.fixture(scope="module")
def failed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a failed step."""
    return run(tmp_path_factory.mktemp("failed") / "run", "model=skip_deq", *NEVER)


@pytest.fixture
def failed(failed_run: Path, tmp_path: Path) -> Path:
    """A copy to be changed, away from where the command works."""
    return shutil.copytree(failed_run, tmp_path / "failed")


def test_a_replay_needs_a_failed_step(command: CommandLine, tmp_path: Path) -> None:
    refused(command("mode=replay"), "from_run=FOLDER", "checkpoint=PATH")
    refused(command("mode=replay", "from_run=nowhere"), "nowhere is not a run folder")
    refused(command("mode=replay", "checkpoint=nowhere.ckpt"), "nowhere.ckpt does not exist")
    good = tmp_path / "good"
    assert command(*SHORT, "model=skip_deq", f"paths.run={good}").status == 0
    refused(command("mode=replay", f"from_run={good}"), FAILURE, "of which a step has failed")
    last = f"checkpoint={good / 'last.ckpt'}"
    refused(command("mode=replay", last, "model=skip_deq"), "holds no failed step", "mode=test")


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("damage", [cut, empty, flip, replace])
def test_a_damaged_file_is_refused(
    command: CommandLine, failed: Path, damage: Callable[[Path], None], sealed: bool
) -> None:
    if damage is flip and not sealed:
        pytest.skip("without its seal, a flipped bit looks like another number")
    damage(failed / FAILURE)
    if not sealed:
        seal_of(failed / FAILURE).unlink()
    refused(command("mode=replay", f"from_run={failed}"), FAILURE, "damaged")


def test_a_file_without_its_seal_is_taken(
    command: CommandLine, failed: Path, tmp_path: Path
) -> None:
    shutil.copy(failed / FAILURE, tmp_path / "mailed.ckpt")
    answer = command("mode=replay", f"checkpoint={tmp_path / 'mailed.ckpt'}", "model=skip_deq")
    assert answer.status == 0, answer.err


def test_a_failed_step_of_another_model_is_refused(command: CommandLine, failed: Path) -> None:
    refused(command("mode=replay", f"from_run={failed}", "model=deq"), "another model")
    refused(command("mode=replay", f"from_run={failed}", "arch.width=64"), "another model")


def test_a_sweep_of_replays_is_refused(command: CommandLine, failed: Path) -> None:
    sweep = ("-m", "mode=replay", f"checkpoint={failed / FAILURE}", "solver.max_steps=5,9")
    refused(command(*sweep), "mode=replay", "leave -m out")


def test_a_replay_is_not_a_run(failed: Path) -> None:
    cfg = composed("mode=replay", f"from_run={failed}")
    with pytest.raises(ValueError, match=r"fastdeq\.experiment\.replay"):
        experiment.run_config(cfg)


def test_what_goes_wrong_in_training_is_not_an_exception_of_this_module(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="mode=replay from_run="):
        run(tmp_path / "run", "model=deq", *NEVER, "callbacks.failures.on_failure=raise")
