"""What happens between optimizer steps happens there: not between the batches of one step, and not
before everything that follows a step has been done."""

import csv
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer

from fastdeq.experiment.optimization import check_optimizer
from fastdeq.experiment.replay import replay
from fastdeq.experiment.sweep import RESUMABLE
from fastdeq.runs.folder import FAILURE, RESUME
from fastdeq.training import Failures, Resumption, StepTimer, TrainingFailed
from fastdeq.training import task as task_module
from tests.commands import SHORT as COMMAND_SHORT
from tests.commands import CommandLine, refused
from tests.comparisons import assert_equal, assert_same, rows
from tests.configurations import composed
from tests.process.faults import gradients
from tests.runs import AT_ONCE, SHORT, run, run_in_pieces
from tests.training.failing import EARLY, GOOD, NAN, OTHER, kept, task_of
from tests.training.tasks import make_task, metrics_of, samples, trained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:f is not finite:RuntimeWarning", "ignore:backward solve failed:RuntimeWarning"
    ),
]

EMA = "+callbacks.ema={_target_: pytorch_lightning.callbacks.EMAWeightAveraging, decay: 0.9}"
COUNT = "+callbacks.count._target_=tests.process.faults.StepCount"
LOGGED = "trainer.log_every_n_steps=1"


def accumulated(batches: int) -> str:
    return f"+trainer.accumulate_grad_batches={batches}"


def callback_states(folder: Path) -> dict[str, Any]:
    """What callbacks have in last.ckpt, and what weight averaging puts beside the weights."""
    state = torch.load(folder / "last.ckpt", weights_only=True)
    kept = {name: value for name, value in state["callbacks"].items() if "Checkpoint" not in name}
    averaging = {name: state.get(name) for name in ("current_model_state", "averaging_state")}
    return {**kept, **averaging}


# Saving and stopping


@pytest.mark.parametrize(
    ("batches", "steps"), [(2, 6), (3, 6), (4, 3), (7, 3)]
)  # of three epochs of four batches: two steps an epoch, or one
def test_a_run_is_stopped_between_optimizer_steps_and_resumes_as_if_it_had_not_been(
    tmp_path: Path, batches: int, steps: int
) -> None:
    """Lightning 2530 and 17903: gradients that were accumulated are lost."""
    overrides = ("model=skip_deq", "scheduler=cosine", accumulated(batches), LOGGED)
    whole = run(tmp_path / "whole", *overrides)
    assert run_in_pieces(tmp_path / "pieces", *overrides) == steps - 1
    assert_same(whole, tmp_path / "pieces")


@pytest.mark.parametrize(
    "callbacks", [(EMA, COUNT), (EMA, COUNT, accumulated(3))], ids=["plain", "accumulated"]
)
def test_a_saved_state_has_what_every_callback_has_made_of_the_step(
    tmp_path: Path, callbacks: tuple[str, ...]
) -> None:
    """Lightning pull 5731, with callbacks that come after the one that saves."""
    overrides = ("model=skip_deq", LOGGED, *callbacks)
    whole = run(tmp_path / "whole", *overrides)
    run_in_pieces(tmp_path / "pieces", *overrides)
    assert_same(whole, tmp_path / "pieces")
    one, other = callback_states(whole), callback_states(tmp_path / "pieces")
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert one["averaging_state"]
    assert {"count": 12} in one.values()
    assert [row["count"] for row in rows(whole) if row["count"]][-1] == "12.0"


@pytest.mark.parametrize(
    "length",
    [
        ("+trainer.val_check_interval=2",),
        ("+trainer.val_check_interval=1",),
        ("+trainer.val_check_interval=2", accumulated(2), COUNT),
        ("trainer.max_steps=6",),
        ("trainer.max_steps=6", "trainer.max_epochs=-1"),
        ("trainer.max_steps=8", accumulated(3)),
    ],
    ids=" ".join,
)
def test_evaluations_within_an_epoch_and_the_last_step_are_made_once(
    tmp_path: Path, length: tuple[str, ...]
) -> None:
    overrides = ("model=skip_deq", LOGGED, *length)
    whole = run(tmp_path / "whole", *overrides)
    run_in_pieces(tmp_path / "pieces", *overrides)
    assert_same(whole, tmp_path / "pieces")


def test_a_state_is_saved_every_so_many_optimizer_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[tuple[int, int]] = []
    write = Resumption.save

    def save(self: Resumption, trainer: Trainer) -> None:
        saved.append((trainer.global_step, trainer.fit_loop.epoch_loop.total_batch_idx + 1))
        write(self, trainer)

    monkeypatch.setattr(Resumption, "save", save)
    overrides = ("model=deq", "callbacks.resumption.steps=2", "trainer.max_epochs=4")
    run(tmp_path / "run", *overrides, accumulated(3))
    # Two steps an epoch, the second at its end; none after the last, when the run is done.
    assert saved == [(2, 4), (4, 8), (6, 12)]


# Metrics and times


def test_an_optimizer_step_is_one_row_with_the_metrics_of_all_its_batches(tmp_path: Path) -> None:
    overrides = ("model=skip_deq", "trainer.max_epochs=1", LOGGED, "optimizer.lr=0")
    small = run(tmp_path / "small", *overrides, accumulated(2), "data.batch_size=180")
    large = run(tmp_path / "large", *overrides, "data.batch_size=360")
    found, expected = (
        [row for row in rows(folder) if row["step/loss"]] for folder in (small, large)
    )
    assert (
        [row["step"] for row in found] == [row["step"] for row in expected] == ["0", "1", "2", "3"]
    )
    # So are the rows of the epoch and of the test.
    for name, step in (("train/loss", "3"), ("val/loss", "3"), ("test/loss", "4")):
        assert [row["step"] for row in rows(small) if row.get(name)] == [step], name
    names = [name for name in expected[0] if name.startswith("step/")]
    assert {"step/loss", "step/accuracy", "step/nfe", "step/lr"} <= set(names)
    for one, other in zip(found, expected, strict=True):
        for name in names:
            # Float32 means of halves, and samples solved in another batch.
            assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-5), name


def test_rows_come_every_so_many_optimizer_steps(tmp_path: Path) -> None:
    for every, steps in ((1, ["0", "1", "2"]), (2, ["1"]), (3, ["2"])):
        folder = tmp_path / f"{every}"
        logged = f"trainer.log_every_n_steps={every}"
        run(
            folder,
            "model=deq",
            "trainer.max_epochs=1",
            "data.batch_size=240",
            accumulated(2),
            logged,
        )
        assert [row["step"] for row in rows(folder) if row.get("step/loss")] == steps
        with (folder / "metrics.csv").open() as lines:
            assert all(int(row["step"]) >= 0 for row in csv.DictReader(lines))


class Second:
    """A stopwatch that always measures a second."""

    seconds = 1.0

    def __init__(self, device: torch.device) -> None:
        pass

    def stop(self) -> "Second":
        return self

    def __float__(self) -> float:
        return self.seconds


def test_the_seconds_of_a_step_are_those_of_all_its_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_module, "Stopwatch", Second)
    timer = StepTimer()
    options = {"accumulate_grad_batches": 2, "max_epochs": 4, "callbacks": [timer]}
    trainer = trained(make_task(), [samples(5)] * 5, tmp_path, **options)
    # Steps of 2, 2 and 1 batches; twelve, of which the first five are warm-up.
    assert timer.seconds == [1.0, 2.0, 2.0, 1.0, 2.0, 2.0, 1.0]
    assert metrics_of(trainer, "train")["seconds"] == pytest.approx(5 / 3, rel=1e-6)


# Failing steps


def test_a_step_fails_as_a_whole_and_is_counted_once(tmp_path: Path, lines: list[str]) -> None:
    """Neither the good batches after a bad one nor its further bad ones are steps."""
    watch = partial(Failures, on_failure="skip_step")
    options = {"accumulate_grad_batches": 2}
    batches = [NAN, GOOD, NAN, NAN, GOOD, OTHER]
    trained(task_of(), batches, tmp_path, callbacks=[watch()], **options)
    assert [line.split(":")[0] for line in lines] == ["step 0", "steps 0 to 1"]
    assert lines[1].endswith("2 of 2 failed and were skipped")
    trained(task_of(), [NAN, GOOD] * 2, tmp_path, callbacks=[watch(in_a_row=3)], **options)
    with pytest.raises(TrainingFailed, match="the last 3 steps in a row failed"):
        trained(task_of(), [GOOD, NAN] * 3, tmp_path, callbacks=[watch(in_a_row=3)], **options)


@pytest.mark.parametrize(("share", "fails"), [(0.4, True), (0.6, False)])
def test_the_share_of_unconverged_samples_is_that_of_the_whole_step(
    tmp_path: Path, lines: list[str], share: float, fails: bool
) -> None:
    class Alternating(Callback):
        """5 samples of a step's 11 do not converge."""

        def on_train_batch_start(
            self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            pl_module.model.equilibrium.solver = solvers[batch_idx % 2]

    task = task_of()
    solvers = [EARLY, task.model.equilibrium.solver]
    watch = [Alternating(), Failures(on_failure="skip_step", unconverged=share)]
    trained(task, [GOOD, OTHER], tmp_path, callbacks=watch, accumulate_grad_batches=2)
    assert bool(lines) == fails
    if fails:
        assert lines[0].startswith("step 0: 5 of 11 samples did not converge in the forward solve")


@pytest.mark.parametrize("step", [0, 1])
def test_a_failing_step_is_kept_and_made_again_with_all_its_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    """Three batches, and the one that is left of an epoch; bit for bit."""
    overrides = (
        *("model=skip_mdeq", "arch.normalization=batch", "arch.dropout=0.3"),
        *("arch.channels=[4,4]", "loss.jacobian=0.1", accumulated(3), "trainer.max_epochs=1"),
        *("solver.max_steps=2", "solver.tol=1e-9", f"callbacks.failures.patience={step + 1}"),
        "+callbacks.gradients._target_=tests.process.faults.Gradients",
    )
    folder = run(tmp_path / "run", *overrides)
    failure = kept(folder)["failure"]
    assert failure["step"] == step
    assert len(failure["ranks"][0]["accumulated"]) == (2, 0)[step]
    capsys.readouterr()
    torch.manual_seed(17)
    found = replay(composed(*SHORT, *overrides, "mode=replay", f"from_run={folder}"))
    assert_equal(found.gradients, gradients(folder, (2, 3)[step]))
    then = failure["diagnosis"]
    assert found.diagnosis.gradient_norm == then["gradient_norm"] > 0
    assert found.diagnosis.loss == then["loss"]
    assert found.diagnosis.forward == then["forward"]
    lines = capsys.readouterr().out.splitlines()
    count = (3 * 360, 1437 - 3 * 360)[step]
    assert lines[0] == f"step {step} of {folder / FAILURE}: {count} samples"
    assert lines[1].removeprefix("then").strip() == lines[2].removeprefix("now").strip()


def test_two_processes_that_accumulate_stop_resume_and_replay_as_one(command: CommandLine) -> None:
    """What one process of them does is in the modules of DDP."""
    two = (
        *SHORT,
        *("model=skip_deq", "trainer=ddp_cpu", "trainer.devices=2", "trainer.max_epochs=2"),
        *("solver.max_steps=2", "solver.tol=1e-9", "callbacks.failures.patience=1"),
        *(accumulated(3), LOGGED, "+callbacks.gradients._target_=tests.process.faults.Gradients"),
    )
    whole = command(*two, "paths.run=whole")
    assert whole.status == 0, whole.err
    found = replay(composed(*two, "mode=replay", f"from_run={command.folder / 'whole'}"))
    assert_equal(found.gradients, gradients(command.folder / "whole", 2))
    then = kept(command.folder / "whole")["failure"]["diagnosis"]
    assert found.diagnosis.gradient_norm == then["gradient_norm"]
    assert (found.diagnosis.loss, found.diagnosis.forward) == (then["loss"], then["forward"])
    # A stop request goes along with the gradients of the first step, and is read at the next.
    stopped = command(*two, "paths.run=pieces", AT_ONCE)
    assert stopped.status == RESUMABLE, stopped.err
    assert torch.load(command.folder / "pieces" / RESUME, weights_only=True)["global_step"] == 2
    ended = command(*two, "paths.run=pieces")
    assert ended.status == 0, ended.err
    assert_same(command.folder / "whole", command.folder / "pieces")


# Optimizers that evaluate their loss several times in a step

LBFGS = (
    *("optimizer._target_=torch.optim.LBFGS", "optimizer.lr=0.5", "~optimizer.weight_decay"),
    *("+optimizer.max_iter=3", "data.batch_size=720", "trainer.max_epochs=2"),
)


def test_lbfgs_trains_and_each_optimizer_step_is_recorded_once(tmp_path: Path) -> None:
    """Lightning 246. The metrics of a step are those before it moves anything."""
    folder = run(tmp_path / "run", "model=deq", LOGGED, *LBFGS)
    found = [row for row in rows(folder) if row["step/loss"]]
    assert [row["step"] for row in found] == ["0", "1", "2", "3"]
    losses = [float(row["step/loss"]) for row in found]
    assert losses[-1] < 0.5 * losses[0]
    epochs = [float(row["train/loss"]) for row in rows(folder) if row["train/loss"]]
    # Two batches an epoch, of 720 and 717 samples.
    means = [(720 * a + 717 * b) / 1437 for a, b in (losses[:2], losses[2:])]
    assert epochs == pytest.approx(means, rel=1e-6)


def test_a_run_with_lbfgs_resumes_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "model=deq", LOGGED, *LBFGS)
    assert run_in_pieces(tmp_path / "pieces", "model=deq", LOGGED, *LBFGS) == 3
    assert_same(whole, tmp_path / "pieces")


@pytest.mark.parametrize("on_failure", ["warn", "skip_step"])
def test_of_several_evaluations_the_first_is_judged_and_skipped_with_all_others(
    tmp_path: Path, lines: list[str], on_failure: Any
) -> None:
    task, plain = task_of(), task_of()
    for each in (task, plain):
        each.make_optimizer = partial(torch.optim.LBFGS, lr=0.1, max_iter=3)
    watch = [Failures(on_failure=on_failure)]
    bad = [NAN] if on_failure == "skip_step" else []
    trained(task, [*bad, GOOD, OTHER], tmp_path, callbacks=watch)
    trained(plain, [GOOD, OTHER], tmp_path)
    assert_equal(task.state_dict(), plain.state_dict())
    assert [line.split(":")[0] for line in lines] == ["step 0"] * len(bad)


@pytest.mark.parametrize(
    ("make", "several"),
    [
        (torch.optim.Adam, False),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), False),
        (torch.optim.LBFGS, True),
        (partial(torch.optim.LBFGS, line_search_fn="strong_wolfe"), True),
    ],
)
def test_several_evaluations_are_refused_where_they_cannot_be_right(
    make: Any, several: bool
) -> None:
    for trainer, ranks, cure in (
        ({"accumulate_grad_batches": 2}, 1, r"trainer\.accumulate_grad_batches=1"),
        ({}, 2, "one device"),
        ({"precision": "16-mixed"}, 1, r"another trainer\.precision"),
    ):
        check_optimizer(make, {}, 1)
        if several:
            with pytest.raises(ValueError, match=f"several times in a step, which needs {cure}"):
                check_optimizer(make, trainer, ranks)
        else:
            check_optimizer(make, trainer, ranks)


# Schedulers of torch

TORCH = "torch.optim.lr_scheduler"
SCHEDULERS = {
    "plateau": (  # on which no epoch but the first is an improvement
        *("scheduler=plateau", "scheduler.scheduler.patience=0"),
        *("+scheduler.scheduler.threshold=100", "+scheduler.scheduler.threshold_mode=abs"),
    ),
    "epochs": (
        f"+scheduler={{_target_: {TORCH}.StepLR, _partial_: true, step_size: 1, gamma: 0.5}}",
    ),
    "steps": (
        "+scheduler={_target_: fastdeq.training.LRSchedulerConfig, interval: step, scheduler: "
        f"{{_target_: {TORCH}.OneCycleLR, _partial_: true, max_lr: 0.01, total_steps: 20}}}}",
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_scheduler_of_torch_has_its_state_in_a_run_that_resumes(
    tmp_path: Path, scheduler: str
) -> None:
    overrides = ("model=skip_deq", LOGGED, "data.batch_size=720", *SCHEDULERS[scheduler])
    whole = run(tmp_path / "whole", *overrides)
    run_in_pieces(tmp_path / "pieces", *overrides)
    assert_same(whole, tmp_path / "pieces")
    assert len({row["step/lr"] for row in rows(whole) if row["step/lr"]}) > 1
    one, other = (
        torch.load(folder / "last.ckpt", weights_only=True)["lr_schedulers"]
        for folder in (whole, tmp_path / "pieces")
    )
    assert len(one) == 1
    assert one == other


REFUSED = {
    "scheduler=plateau scheduler.monitor=val/los": "no metric 'val/los' to monitor; did you mean",
    "scheduler=plateau trainer.check_val_every_n_epoch=2": "does not come every 1 epochs",
    "scheduler=plateau trainer.limit_val_batches=0": "val/accuracy is never there to monitor",
    "scheduler=plateau scheduler.interval=step": "use interval=epoch",
    "scheduler=plateau scheduler.frequency=0": "frequency is 0",
    f"scheduler={{_target_:{TORCH}.ReduceLROnPlateu,_partial_:true}}": (
        "torch.optim.lr_scheduler has no 'ReduceLROnPlateu'; did you mean "
        "torch.optim.lr_scheduler.ReduceLROnPlateau?"
    ),
    f"scheduler={{_target_:{TORCH}.StepLR,_partial_:true}}": "scheduler: StepLR.__init__() missing",
    f"scheduler={{_target_:{TORCH}.StepLR,_partial_:true,step_siz:2}}": (
        "no key 'scheduler.step_siz'; did you mean 'scheduler.step_size'"
    ),
}


@pytest.mark.parametrize("typed", REFUSED)
def test_a_scheduler_that_cannot_work_is_refused_before_a_run_is_made(
    command: CommandLine, typed: str
) -> None:
    answer = command("trainer.accelerator=cpu", "model=deq", *typed.split())
    refused(answer, REFUSED[typed])


def test_a_scheduler_is_given_on_the_command_line_as_a_mapping(command: CommandLine) -> None:
    plateau = f"scheduler={{_target_:{TORCH}.ReduceLROnPlateau,_partial_:true,patience:3}}"
    answer = command(*COMMAND_SHORT, plateau)
    assert answer.status == 0, answer.err
