"""A run that is interrupted and resumed equals the run that was not."""

import runpy
import shutil
import sys
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdeq import experiment
from fastdeq.experiment.sweep import RESUMABLE
from fastdeq.report.command import main
from fastdeq.runs.files import is_sealed, seal_of
from fastdeq.runs.folder import BEFORE, RESUME
from fastdeq.runs.lock import run_lock
from fastdeq.runs.status import Interrupted
from fastdeq.training import TrainingFailed
from tests.commands import ROOT, CommandLine
from tests.comparisons import assert_same, failure_lines, kept_step, summary
from tests.configurations import composed
from tests.damage import cut, empty, flip
from tests.runs import AT_ONCE, SHORT, run, run_in_pieces

pytestmark = pytest.mark.slow

NOT_FINITE = ("optimizer.lr=1e30", "callbacks.pretraining.steps=99")
"""Every step but the first."""
LARGE = "data.batch_size=720"
"""Six steps instead of twelve."""
NETWORKS = {
    "dense": ("model=skip_deq", "scheduler=cosine"),
    "batch statistics, dropout, both phases": (
        *("model=skip_mdeq", "arch.normalization=batch", "arch.dropout=0.3"),
        *(
            "arch.channels=[4,4]",
            "callbacks.pretraining.steps=3",
            "solver.max_steps=4",
            "callbacks.failures.patience=2",
            LARGE,
        ),
    ),
    "random regularization": (
        *("model=deq", "loss.jacobian=0.1", "loss.jacobian_probability=0.5", LARGE),
    ),
    "equilibria reused": ("model=deq", "callbacks=reuse", LARGE),
    "some steps skipped": (
        *("model=deq", "solver.max_steps=7", "scheduler=cosine"),
        *("callbacks.failures.on_failure=skip_step", "callbacks.failures.unconverged=0.002"),
    ),
    "Lightning's callbacks": (
        *("model=skip_deq", "callbacks=[early_stopping,ema,learning_rate]", "trainer=profile"),
        *("data.validation=100", "callbacks.ema.decay=0.9", "scheduler=cosine", LARGE),
    ),
    "augmented, seldom evaluated": (
        *("model=skip_reg_deq", "trainer.check_val_every_n_epoch=2", "logger=tensorboard", LARGE),
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has interrupted."""
    return run(tmp_path_factory.mktemp("whole") / "run", "model=deq")


@pytest.fixture(scope="module")
def stopped_twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with its states of two steps."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    for _ in range(2):
        with pytest.raises(Interrupted):
            run(folder, "model=deq", AT_ONCE)
    return folder


@pytest.fixture
def stopped(stopped_twice: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return shutil.copytree(stopped_twice, tmp_path / "stopped")


@pytest.mark.parametrize("network", NETWORKS)
def test_a_run_stopped_after_every_step_equals_the_run_that_was_not(
    tmp_path: Path, network: str
) -> None:
    if "logger=tensorboard" in NETWORKS[network]:
        pytest.importorskip("tensorboard")
    whole = run(tmp_path / "whole", *NETWORKS[network])
    pieces = run_in_pieces(tmp_path / "pieces", *NETWORKS[network])
    # Stopped after each step but the last.
    assert pieces == (5 if LARGE in NETWORKS[network] else 11)
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


def test_saving_often_changes_nothing_and_leaves_nothing(whole: Path, tmp_path: Path) -> None:
    often = run(tmp_path / "often", "model=deq", "callbacks.resumption.steps=1")
    assert_same(whole, often)
    assert not list(often.glob("resume*"))
    for name in ("last.ckpt", "best.ckpt"):
        assert is_sealed(often / name)
        # The loops are where they were saved, at the end of an epoch.
        one, other = (torch.load(folder / name, weights_only=True) for folder in (whole, often))
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


def test_saving_by_minutes_does_not_change_the_run(whole: Path, tmp_path: Path) -> None:
    saved_often = run(tmp_path / "saved_often", "model=deq", "callbacks.resumption.minutes=1e-9")
    assert_same(whole, saved_often)


def unseal(path: Path) -> None:
    seal_of(path).unlink()


@pytest.mark.parametrize("damage", [flip, cut, empty, unseal, Path.unlink])
def test_a_damaged_state_is_skipped_for_the_one_before(
    whole: Path, stopped: Path, damage: Any
) -> None:
    damage(stopped / RESUME)
    run(stopped, "model=deq")
    assert_same(whole, stopped)


def test_with_no_state_that_is_whole_the_run_begins_again(
    whole: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (RESUME, BEFORE):
        flip(stopped / name)
    run(stopped, "model=deq")
    assert capsys.readouterr().out.count("is damaged: resuming from the beginning") == 2
    assert_same(whole, stopped)


def test_a_finished_run_is_not_run_again(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
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
def test_a_folder_with_other_settings_is_refused(stopped: Path, changed: str, named: str) -> None:
    with pytest.raises(FileExistsError, match=r"resume with the settings of that run") as caught:
        run(stopped, "model=deq", changed)
    assert named in str(caught.value)


def test_a_folder_may_be_refused_whatever_is_in_it(stopped: Path) -> None:
    with pytest.raises(FileExistsError, match="exists: give another name"):
        run(stopped, "model=deq", "resume=never")


def test_a_folder_that_another_process_holds_is_refused(stopped: Path) -> None:
    with run_lock(stopped), pytest.raises(BlockingIOError, match="in use"):
        run(stopped, "model=deq")
    with pytest.raises(Interrupted):  # free again
        run(stopped, "model=deq", AT_ONCE)


def test_the_weights_of_a_state_can_be_used_like_those_of_any_checkpoint(
    stopped: Path, tmp_path: Path
) -> None:
    tested = experiment.run_config(
        composed(
            *SHORT,
            *("mode=test", "model=deq", f"checkpoint={stopped / RESUME}"),
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


def test_a_row_of_a_table_is_made_by_calls_that_end_in_time(
    command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool's processes are in test_survival; here is what it starts, in this one."""
    tool = ROOT / "tools" / "published_row.py"
    call = [
        *(str(tool), "skip_reg_mdeq", "vcab3"),
        *("--experiment", "mnist_mdeq", "--minutes", "1e-9", "--outputs", "rows"),
        *("data=digits", "arch=digits_conv", "trainer.max_epochs=1", "trainer.accelerator=cpu"),
        *("data.batch_size=720", "solver.max_steps=3", "trainer.limit_test_batches=1"),
    ]

    def train(words: list[str]) -> int:
        assert words[:2] == [sys.executable, str(ROOT / "train.py")]
        answer = command(*words[2:])
        assert answer.status != 1, answer.err
        return answer.status

    def report(words: list[str]) -> CompletedProcess[str]:
        assert words[:4] == [sys.executable, "-m", "fastdeq", "report"]
        return CompletedProcess(words, main(words[4:]))

    made = runpy.run_path(str(tool))["main"]
    monkeypatch.setitem(made.__globals__, "run", train)
    monkeypatch.setitem(made.__globals__, "subprocess", SimpleNamespace(run=report))
    statuses = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", call)
        statuses.append(made())
    assert statuses == [RESUMABLE, 0]
    folder = Path("rows") / "mnist_mdeq" / "skip_reg_mdeq_vcab3_seed1"
    assert summary(folder)["steps"] == 2
    assert "| Multiscale Skip Reg. DEQ | vcab3" in command.capture.readouterr().out
