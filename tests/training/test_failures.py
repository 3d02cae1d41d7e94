"""Training steps that fail: what is reported, skipped and kept, and how a run ends."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor

from fastdeq.commands import typed
from fastdeq.data import Batch
from fastdeq.runs.files import is_sealed
from fastdeq.runs.folder import FAILURE
from fastdeq.solution import Status
from fastdeq.training import Failures, Pretraining, TrainingFailed
from tests.comparisons import assert_equal
from tests.training.failing import EARLY, GOOD, NAN, OTHER, kept, task_of
from tests.training.tasks import WIDTH, Listed, make_task, make_trainer, trained

# For a batch of NaN the solver and the adjoint warn once each.
pytestmark = pytest.mark.filterwarnings(
    "ignore:f is not finite:RuntimeWarning", "ignore:backward solve failed:RuntimeWarning"
)


class States(Callback):
    """Copies of the weights before every step."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.before.append({name: t.clone() for name, t in pl_module.state_dict().items()})


# warn


def test_warn_changes_nothing_and_reports_the_beginning_and_length_of_a_phase(tmp_path, lines):
    plain, watched = task_of(EARLY), task_of(EARLY)
    batches = [GOOD, OTHER] * 5
    trained(plain, batches, tmp_path)
    trained(watched, batches, tmp_path, callbacks=[Failures(patience=1)])
    assert_equal(plain.state_dict(), watched.state_dict())
    assert len(lines) == 2
    assert lines[0].startswith(
        "step 0: 5 of 5 samples did not converge in the forward solve (5 step_limit); what helps: "
    )
    assert lines[0].endswith(f"step 0 again: {typed('train')} mode=replay from_run={tmp_path}")
    assert lines[1] == "steps 0 to 9: 10 of 10 failed and were made"


def test_a_phase_is_over_after_a_hundred_good_steps(tmp_path, lines):
    batches = [GOOD] * 3 + [NAN] + [GOOD] * 99 + [NAN] + [GOOD] * 101 + [NAN]
    trained(task_of(lr=0.0), batches, tmp_path, callbacks=[Failures(on_failure="skip_step")])
    reported = [line.split(":")[0] for line in lines]
    assert reported == ["step 3", "steps 3 to 103", "step 205"]
    assert lines[1].endswith("2 of 101 failed and were skipped")


def test_a_step_that_converges_enough_or_does_not_solve_has_not_failed(tmp_path, lines):
    trained(task_of(), [GOOD] * 3, tmp_path, callbacks=[Failures(unconverged=0.0)])
    trained(task_of(EARLY), [GOOD] * 3, tmp_path, callbacks=[Failures(unconverged=None)])
    pretrained = [Pretraining(steps=3), Failures(unconverged=0.0)]
    trained(task_of(EARLY), [GOOD] * 3, tmp_path, callbacks=pretrained)
    assert lines == []
    assert not (tmp_path / FAILURE).exists()


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("on_failure", ["warn", "skip_step", "raise"])
def test_the_first_failing_step_is_kept_with_all_it_began_with(tmp_path, on_failure, failing):
    batches = [GOOD, OTHER, GOOD]
    batches[failing] = NAN
    states = States()
    try:
        trained(
            *(task_of(), batches, tmp_path),
            callbacks=[states, Failures(on_failure=on_failure)],
        )
    except TrainingFailed:
        assert on_failure == "raise"
    assert is_sealed(tmp_path / FAILURE)
    found = kept(tmp_path)
    assert_equal(found["state_dict"], states.before[failing])
    failure = found["failure"]
    assert (failure["step"], failure["epoch"], failure["depth"]) == (failing, 0, None)
    (part,) = failure["ranks"]
    assert part["batch"][0].isnan().all()
    assert torch.equal(part["batch"][1], NAN.targets)
    assert part["batch"][2] == 1
    assert part["status"].tolist() == [Status.DIVERGED] * 5
    assert [z.shape for z in (*part["z0"], *part["z_star"])] == [(5, 2 * WIDTH)] * 2
    # From this random state, drawn by `trained`, a step without dropout draws nothing.
    torch.manual_seed(1)
    assert torch.equal(part["random"]["torch"], torch.get_rng_state())


class Breaking(Listed):
    """Raises another error at the third batch."""

    def __iter__(self) -> Iterator[Batch]:
        yield from self.batches[:2]
        raise RuntimeError("the disk is gone")


def test_a_failing_step_is_kept_even_if_it_is_the_last_one(tmp_path, lines):
    with pytest.raises(RuntimeError, match="the disk is gone"):
        make_trainer(tmp_path, callbacks=[Failures()]).fit(
            task_of(),
            train_dataloaders=Breaking(GOOD, NAN, GOOD),
            val_dataloaders=Listed(GOOD),
        )
    assert kept(tmp_path)["failure"]["step"] == 1
    assert [line.split(":")[0] for line in lines] == ["step 1"]


@pytest.mark.parametrize("on_failure", ["warn", "skip_step"])
def test_the_first_is_kept_until_one_is_not_finite_and_then_that(tmp_path, on_failure):
    watch = partial(Failures, on_failure=on_failure, patience=1)
    trained(task_of(EARLY, lr=0.0), [GOOD] * 3, tmp_path, callbacks=[watch()])
    assert kept(tmp_path)["failure"]["step"] == 0
    batches = [GOOD, OTHER, NAN, GOOD, NAN]
    trained(task_of(EARLY, lr=0.0), batches, tmp_path, callbacks=[watch()])
    assert kept(tmp_path)["failure"]["step"] == 2
    assert is_sealed(tmp_path / FAILURE)


@pytest.mark.parametrize(("steps", "reported"), [(2, []), (3, ["step 2", "steps 0 to 2"])])
def test_unconverged_steps_are_reported_and_kept_when_patience_ends(
    tmp_path, lines, steps, reported
):
    trained(task_of(EARLY), [GOOD] * steps, tmp_path, callbacks=[Failures(patience=3)])
    assert [line.split(":")[0] for line in lines] == reported
    assert (tmp_path / FAILURE).exists() == bool(reported)
    if reported:
        assert kept(tmp_path)["failure"]["step"] == 2


def test_a_phase_of_unconverged_steps_that_turns_non_finite_is_reported_again(tmp_path, lines):
    batches = [GOOD, NAN, GOOD, NAN]
    watch = [Failures(on_failure="skip_step", patience=1)]
    trained(task_of(EARLY, lr=0.0), batches, tmp_path, callbacks=watch)
    assert [line.split(":")[0] for line in lines] == ["step 0", "step 1", "steps 0 to 3"]


def test_a_later_line_names_the_step_that_is_kept(tmp_path, lines):
    batches = [NAN] + [GOOD] * 101 + [NAN]
    watch = [Failures(on_failure="skip_step")]
    trained(task_of(lr=0.0), batches, tmp_path, callbacks=watch)
    assert [line.split(":")[0] for line in lines] == ["step 0", "step 102"]
    assert all(f"; step 0 again: {typed('train')} mode=replay" in line for line in lines)


# skip_step


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_skipped_step_leaves_no_trace(tmp_path, clip):
    without, skipped = task_of(), task_of()
    options = {"gradient_clip_val": clip}
    first = trained(without, [GOOD, OTHER, GOOD], tmp_path, **options)
    watch = [Failures(on_failure="skip_step")]
    second = trained(skipped, [NAN, GOOD, NAN, OTHER, GOOD], tmp_path, callbacks=watch, **options)
    assert_equal(skipped.state_dict(), without.state_dict())  # running statistics too
    states = [trainer.optimizers[0].state_dict()["state"] for trainer in (first, second)]
    assert states[0].keys() == states[1].keys()
    for place in states[0]:
        assert_equal(states[0][place], states[1][place])
    assert second.global_step == 5


def test_with_a_gradient_scaler_clipping_and_skipping_do_what_they_do_without(tmp_path):
    """Gradients are clipped while they are still multiplied by the scale. A fused optimizer divides
    by it in its step.
    """
    found = {}
    for clip, scale, fused in product((0.3, None), (None, 64.0, 1024.0), (False, True)):
        torch.manual_seed(0)
        task = make_task()
        task.make_optimizer = partial(torch.optim.SGD, lr=0.5, fused=fused)
        options: dict[str, Any] = {"precision": "32-true"}
        if scale is not None:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
        trained(
            *(task, [GOOD, NAN, OTHER, GOOD], tmp_path),
            callbacks=[Failures(on_failure="skip_step")],
            gradient_clip_val=clip,
            **options,
        )
        if scale is not None:
            assert scaler.get_scale() == scale  # a skipped step does not lower it
        weights = torch.cat([p.detach().flatten() for p in task.parameters()])
        found[clip, scale, fused] = weights
    for (clip, _, _), weights in found.items():  # float16 rounds to 5e-4
        torch.testing.assert_close(weights, found[clip, None, False], rtol=0, atol=5e-3)
    assert (found[0.3, None, False] - found[None, None, False]).abs().max() > 0.05


def test_a_skipped_step_counts_for_schedules(tmp_path):
    rates = []
    for batches in ([GOOD, OTHER, GOOD, OTHER], [GOOD, NAN, NAN, OTHER]):
        trainer = trained(
            *(task_of(cosine=True), batches, tmp_path),
            callbacks=[Failures(on_failure="skip_step")],
            max_steps=3,
        )
        rates.append(trainer.optimizers[0].param_groups[0]["lr"])
    assert rates[0] == rates[1] < 0.1


def test_unconverged_steps_are_skipped_too(tmp_path, lines):
    task = task_of(EARLY)
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    trained(task, [GOOD, OTHER], tmp_path, callbacks=[Failures(on_failure="skip_step")])
    assert_equal(task.state_dict(), before)
    assert lines[-1] == "steps 0 to 1: 2 of 2 failed and were skipped"


def test_one_failing_batch_of_an_accumulated_step_skips_the_whole_step(tmp_path):
    without, skipped = task_of(), task_of()
    options = {"accumulate_grad_batches": 2}
    trained(without, [GOOD, OTHER], tmp_path, **options)
    watch = [Failures(on_failure="skip_step")]
    trained(skipped, [NAN, OTHER, GOOD, OTHER], tmp_path, callbacks=watch, **options)
    assert_equal(skipped.state_dict(), without.state_dict())  # running statistics too


# The end of a run


def test_raise_ends_the_run_before_any_parameter_changes(tmp_path):
    task = task_of()
    states = States()
    with pytest.raises(TrainingFailed, match=r"step 1: the inputs of the batch are not finite.*"):
        trained(
            *(task, [GOOD, NAN, GOOD], tmp_path),
            callbacks=[states, Failures(on_failure="raise")],
        )
    assert len(states.before) == 2
    for name, parameter in task.named_parameters():
        assert torch.equal(parameter, states.before[1][name])


@pytest.mark.parametrize(("on_failure", "steps"), [("warn", 6), ("skip_step", 5)])
def test_a_run_whose_steps_have_no_effect_ends(tmp_path, on_failure, steps):
    states = States()
    batches = [GOOD, OTHER] + [NAN] * 20
    with pytest.raises(TrainingFailed, match=r"last 3 steps in a row failed.*look at the data"):
        trained(
            *(task_of(), batches, tmp_path),
            callbacks=[states, Failures(on_failure=on_failure, in_a_row=3)],
        )
    assert len(states.before) == steps  # the third of NaN is the fifth; warn is a step late


def test_a_learning_rate_that_is_too_large_is_named(tmp_path):
    with pytest.raises(TrainingFailed, match=r"the loss is .*a smaller optimizer\.lr"):
        trained(task_of(lr=1e30), [GOOD] * 10, tmp_path, callbacks=[Failures(in_a_row=2)])


def test_good_steps_between_begin_the_row_anew_and_null_never_ends(tmp_path):
    batches = [NAN, NAN, GOOD] * 4
    skip = partial(Failures, on_failure="skip_step")
    trained(task_of(), batches, tmp_path, callbacks=[skip(in_a_row=3)])
    trained(task_of(), [NAN] * 120, tmp_path, callbacks=[skip(in_a_row=None)])
    with pytest.raises(TrainingFailed, match="last 100 steps"):
        trained(task_of(), [NAN] * 120, tmp_path, callbacks=[skip()])


def test_unconverged_steps_end_a_run_only_if_they_are_skipped(tmp_path):
    batches = [GOOD] * 5
    trained(task_of(EARLY), batches, tmp_path, callbacks=[Failures(in_a_row=2)])
    watch = Failures(in_a_row=2, on_failure="skip_step")
    with pytest.raises(TrainingFailed, match=r"a larger solver\.max_steps or solver\.tol"):
        trained(task_of(EARLY), batches, tmp_path, callbacks=[watch])


def test_completed_unconverged_steps_end_a_run_if_a_limit_is_set(tmp_path):
    watch = partial(Failures, unconverged_in_a_row=3)
    better = (
        r"last 3 steps in a row failed.*a larger solver\.max_steps or solver\.tol.* step 2 again"
    )
    with pytest.raises(TrainingFailed, match=better):
        trained(task_of(EARLY), [GOOD] * 5, tmp_path, callbacks=[watch()])
    trained(task_of(EARLY), [GOOD] * 2, tmp_path, callbacks=[watch()])
    trained(task_of(), [GOOD] * 5, tmp_path, callbacks=[watch()])


@pytest.mark.parametrize(
    ("wrong", "cure"),
    [
        ({"on_failure": "skip"}, "on_failure is 'skip', but must be one of"),
        ({"unconverged": 1.5}, "unconverged is 1.5, but must be a share from 0 to 1"),
        ({"unconverged": -0.1}, "unconverged is -0.1"),
        ({"in_a_row": 0}, "in_a_row is 0, but must be at least 1"),
        ({"unconverged_in_a_row": 0}, "unconverged_in_a_row is 0, but must be at least 1"),
        ({"patience": 0}, "patience is 0, but must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, cure):
    with pytest.raises(ValueError, match=cure):
        Failures(**wrong)


# Cost


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_warn_does_not_wait_for_the_device(tmp_path):
    def waits(*callbacks: Callback) -> int:
        task = task_of(replace(EARLY, check_every=10))
        options: dict[str, Any] = {"accelerator": "gpu", "devices": 1, "log_every_n_steps": 0}
        on_device = [Batch(GOOD.inputs.cuda(), GOOD.targets.cuda())] * 8
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                trained(task, on_device, tmp_path, callbacks=list(callbacks), **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(warning.message) for warning in caught)

    watch = Failures()
    watch._record.kept, watch._record.final = 0, True  # writing the file waits, once per run
    assert waits(watch) == waits() == waits(watch)
