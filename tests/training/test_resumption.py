"""A run that is interrupted and resumed equals the run that was not."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdeq import experiment
from fastdeq.experiment.sweep import RESUMABLE
from fastdeq.runs.files import is_sealed, seal_of
from fastdeq.runs.folder import BEFORE, RESUME
from fastdeq.runs.lock import run_lock
from fastdeq.runs.status import Interrupted
from fastdeq.training import TrainingFailed
from tests.commands import ROOT, CommandLine
from tests.comparisons import assert_same, failure_lines, kept_step, summary
from tests.configurations import composed
from tests.runs import AT_ONCE, SHORT, run, run_in_pieces

pytestmark = pytest.mark.slow

NOT_FINITE = ("optimizer.lr=1e30", "callbacks.pretraining.steps=99")
"""Every step but the first."""
NETWORKS = {
    "dense": ("model=skip_deq", "scheduler=cosine"),
    "batch statistics, dropout, both phases": (
        *("model=skip_mdeq", "arch.normalization=batch", "arch.dropout=0.3"),
        *(
            "arch.channels=[4,4]",
            "callbacks.pretraining.steps=6",
            "solver.max_steps=4",
            "callbacks.failures.patience=3",
        ),
    ),
    "random regularization": ("model=deq", "loss.jacobian=0.1", "loss.jacobian_probability=0.5"),
    "equilibria reused": ("model=deq", "callbacks=reuse"),
    "some steps skipped": (
        *("model=deq", "solver.max_steps=7", "scheduler=cosine"),
        *("callbacks.failures.on_failure=skip_step", "callbacks.failures.unconverged=0.002"),
    ),
    "Lightning's callbacks": (
        *("model=skip_deq", "callbacks=[early_stopping,ema,learning_rate]", "trainer=profile"),
        *("data.validation=100", "callbacks.ema.decay=0.9", "scheduler=cosine"),
    ),
    "augmented, seldom evaluated": (
        *("model=skip_reg_deq", "trainer.check_val_every_n_epoch=2", "logger=tensorboard"),
    ),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_a_run_stopped_after_every_step_equals_the_run_that_was_not(
    tmp_path: Path, network: str
) -> None:
    if "logger=tensorboard" in NETWORKS[network]:
        pytest.importorskip("tensorboard")
    whole = run(tmp_path / "whole", *NETWORKS[network])
    pieces = run_in_pieces(tmp_path / "pieces", *NETWORKS[network])
    assert pieces == 11  # twelve steps, stopped after each but the last
    assert_same(whole, tmp_path / "pieces")


def test_of_the_network_whose_failing_steps_are_skipped_some_fail_and_some_do_not(
    tmp_path: Path,
) -> None:
    folder = run(tmp_path / "whole", *NETWORKS["some steps skipped"])
    first, last = failure_lines(folder)
    assert first.startswith("step 1: ")
    failed, steps = (int(word) for word in last.split(": ")[1].split()[:3:2])
    assert 1 < failed < steps
    assert last.endswith("failed and were skipped")


@pytest.mark.filterwarnings("ignore:f is not finite:RuntimeWarning")  # in the evaluations
@pytest.mark.parametrize("on_failure", ["warn", "skip_step"])
def test_a_row_of_failing_steps_continues_where_it_was(tmp_path: Path, on_failure: str) -> None:
    # Nothing in these steps is finite, so that warn counts them too.
    failing = ("model=deq", *NOT_FINITE, f"callbacks.failures.on_failure={on_failure}")
    errors = []
    for folder, words in (("whole", ()), ("pieces", (AT_ONCE,))):
        for _ in range(20):
            try:
                run(tmp_path / folder, *failing, "callbacks.failures.in_a_row=5", *words)
            except Interrupted:
                continue
            except TrainingFailed as error:
                errors.append(str(error).rpartition("; step ")[0])
                break
    assert errors[0] == errors[1]
    assert "the last 5 steps in a row failed" in errors[0]
    assert failure_lines(tmp_path / "whole") == failure_lines(tmp_path / "pieces")
    assert kept_step(tmp_path / "whole") == kept_step(tmp_path / "pieces")


def test_saving_often_changes_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", *NETWORKS["dense"])
    often = run(tmp_path / "often", *NETWORKS["dense"], "callbacks.resumption.steps=1")
    assert_same(whole, often)
    assert not list(often.glob("resume*"))
    for name in ("last.ckpt", "best.ckpt"):
        assert is_sealed(often / name)


def test_a_state_that_is_due_leaves_the_other_checkpoints_as_they_are(tmp_path: Path) -> None:
    """Their loops are where they were saved, at the end of an epoch."""
    never, always = (
        run(tmp_path / name, "model=deq", f"callbacks.resumption.steps={steps}")
        for name, steps in (("never", "null"), ("always", "1"))
    )
    for name in ("last.ckpt", "best.ckpt"):
        one, other = (torch.load(folder / name, weights_only=True) for folder in (never, always))
        assert one["loops"] == other["loops"], name


def test_the_state_is_saved_every_so_many_steps_and_the_one_before_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(folder, "model=deq", "callbacks.resumption.steps=1", AT_ONCE)
    assert not (folder / BEFORE).exists()
    with pytest.raises(Interrupted):
        run(folder, "model=deq", AT_ONCE)
    steps = [
        torch.load(folder / name, weights_only=True)["global_step"] for name in (RESUME, BEFORE)
    ]
    assert steps == [2, 1]
    assert is_sealed(folder / RESUME)
    assert is_sealed(folder / BEFORE)


def test_saving_by_minutes_does_not_change_the_run(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "model=deq")
    saved_often = run(tmp_path / "saved_often", "model=deq", "callbacks.resumption.minutes=1e-9")
    assert_same(whole, saved_often)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def unseal(path: Path) -> None:
    seal_of(path).unlink()


@pytest.mark.parametrize("damage", [flip, cut, empty, unseal, Path.unlink])
def test_a_damaged_state_is_skipped_for_the_one_before(tmp_path: Path, damage: Any) -> None:
    whole = run(tmp_path / "whole", "model=deq")
    folder = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(Interrupted):
            run(folder, "model=deq", AT_ONCE)
    damage(folder / RESUME)
    run_in_pieces(folder, "model=deq")
    assert_same(whole, folder)


def test_with_no_state_that_is_whole_the_run_begins_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(tmp_path / "whole", "model=deq")
    folder = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(Interrupted):
            run(folder, "model=deq", AT_ONCE)
    for name in (RESUME, BEFORE):
        flip(folder / name)
    run(folder, "model=deq")
    assert capsys.readouterr().out.count("is damaged: resuming from the beginning") == 2
    assert_same(whole, folder)


def test_a_finished_run_is_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path / "run", "model=deq")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".lock"}
    capsys.readouterr()
    assert run(folder, "model=deq") == folder
    assert "done already" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".lock"}
    assert before == after


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("solver.tol=1e-4", "solver.tol=0.005, and here it is 0.0001"),
        ("seed=1", "seed=0"),
        ("model=skip_deq", "model.deq"),
        ("trainer.max_epochs=4", "trainer.max_epochs=3"),
    ],
)
def test_a_folder_with_other_settings_is_refused(tmp_path: Path, changed: str, named: str) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(folder, "model=deq", AT_ONCE)
    with pytest.raises(FileExistsError, match=r"resume with the settings of that run") as caught:
        run(folder, "model=deq", changed)
    assert named in str(caught.value)


def test_a_folder_may_be_refused_whatever_is_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(folder, "model=deq", AT_ONCE)
    with pytest.raises(FileExistsError, match="exists: give another name"):
        run(folder, "model=deq", "resume=never")


def test_a_folder_that_another_process_holds_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(folder, "model=deq", AT_ONCE)
    with run_lock(folder), pytest.raises(BlockingIOError, match="in use"):
        run(folder, "model=deq")
    run(folder, "model=deq")  # free again


def test_the_weights_of_a_state_can_be_used_like_those_of_any_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(folder, "model=deq", AT_ONCE)
    tested = experiment.run_config(
        composed(
            *SHORT,
            *("mode=test", "model=deq", f"checkpoint={folder / RESUME}"),
            f"paths.outputs={tmp_path}",
        )
    )
    assert summary(tested)["mode"] == "test"


def test_two_processes_stop_together_and_resume_together(command: CommandLine) -> None:
    two = ("trainer=ddp_cpu", "trainer.devices=2", "trainer.max_epochs=2")
    short = (*SHORT, "model=deq", "loss.jacobian=0.1", *two)
    whole = command(*short, "paths.run=whole")
    assert whole.status == 0, whole.err
    # The stop request is sent with the gradients of the first step, and read after the next step:
    # in the middle of an epoch of four, and at its end.
    for steps in (2, 4):
        stopped = command(*short, "paths.run=pieces", AT_ONCE)
        assert stopped.status == RESUMABLE, stopped.err
        assert "the same command resumes it, with paths.run=pieces\n" in stopped.out
        state = torch.load(command.folder / "pieces" / RESUME, weights_only=True)
        assert state["global_step"] == steps
        first, second = (each["random"]["torch"] for each in state["fastdeq"]["ranks"])
        assert not torch.equal(first, second)  # from the first step on
    ended = command(*short, "paths.run=pieces")
    assert ended.status == 0, ended.err
    assert_same(command.folder / "whole", command.folder / "pieces")


def test_the_command_says_that_it_resumes_and_its_status_too(command: CommandLine) -> None:
    words = (*SHORT, "model=deq", "paths.run=mine", AT_ONCE)
    answers = [command(*words) for _ in range(3)]
    for number, answer in enumerate(answers, 1):
        assert answer.status == RESUMABLE
        assert f"stopped after {number} step" in answer.out
        assert "the same command resumes" in answer.out
        assert answer.err == ""
    assert "resuming    from resume.ckpt" in answers[1].out
    for word in ("stopped after 1 step", "resuming"):
        assert word in (command.folder / "mine" / "train.log").read_text()
    assert "Traceback" not in (command.folder / "mine" / "train.log").read_text()


def test_a_row_of_a_table_is_made_by_calls_that_end_in_time(tmp_path: Path) -> None:
    call = [
        *(sys.executable, str(ROOT / "tools" / "published_row.py"), "skip_reg_mdeq", "vcab3"),
        *("--experiment", "mnist_mdeq", "--minutes", "1e-9", "--outputs", str(tmp_path)),
        *("data=digits", "arch=digits_conv", "trainer.max_epochs=1", "trainer.accelerator=cpu"),
        *("data.batch_size=720", "solver.max_steps=3"),
    ]
    answers = [subprocess.run(call, capture_output=True, text=True, check=False) for _ in range(2)]
    assert [answer.returncode for answer in answers] == [75, 0], answers[-1].stderr
    folder = tmp_path / "mnist_mdeq" / "skip_reg_mdeq_vcab3_seed1"
    assert summary(folder)["steps"] == 2
    assert "| Skip Reg. DEQ | vcab3" in answers[-1].stdout
