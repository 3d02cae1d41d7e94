"""What is said of a training step: whether it has failed, how, and what helps."""

from typing import Any

import pytest
import torch

from fastdeq.solution import Status, Trace
from fastdeq.training import Diagnosis, measure, trend_of, with_norm
from tests.training.failing import EARLY, GOOD, task_of


def diagnosis(
    forward: tuple[int, ...] = (10, 0, 0, 0, 0),
    backward: tuple[int, ...] = (10, 0, 0, 0, 0),
    loss: float = 1.0,
    gradient_norm: float = 1.0,
    **more: Any,
) -> Diagnosis:
    return Diagnosis(
        forward=forward, backward=backward, loss=loss, gradient_norm=gradient_norm, **more
    )


@pytest.mark.parametrize(
    ("seen", "most", "failed"),
    [
        (diagnosis(), 0.0, False),
        (diagnosis((5, 5, 0, 0, 0)), 0.5, False),  # above, not at
        (diagnosis((4, 4, 1, 1, 0)), 0.5, True),
        (diagnosis(backward=(4, 0, 0, 6, 0)), 0.5, True),
        (diagnosis((0, 10, 0, 0, 0)), None, False),
        (diagnosis((0, 10, 0, 0, 0)), 1.0, False),
        (diagnosis((0, 0, 0, 0, 10), (0, 0, 0, 0, 0)), 0.0, False),  # pretraining
        (diagnosis(loss=float("nan")), None, True),
        (diagnosis(gradient_norm=float("inf")), None, True),
        (diagnosis((0, 0, 0, 0, 0), (0, 0, 0, 0, 0)), 0.0, False),
    ],
)
def test_a_step_fails_above_the_share_or_where_it_is_not_finite(seen, most, failed):
    assert seen.failed(most) == failed


@pytest.mark.parametrize(
    ("seen", "symptom", "advice"),
    [
        (diagnosis((1, 9, 0, 0, 0)), "9 of 10 samples", "solver.max_steps or solver.tol"),
        (diagnosis((1, 9, 0, 0, 0), trend="falling"), "forward solve", "solver.max_steps"),
        (diagnosis((1, 9, 0, 0, 0), trend="growing"), "9 step_limit", "loss.jacobian=1"),
        (diagnosis((1, 4, 0, 5, 0)), "4 step_limit, 5 diverged", "loss.jacobian=1"),
        (diagnosis((1, 0, 9, 0, 0)), "9 stalled", "a larger solver.tol"),
        (diagnosis(backward=(1, 9, 0, 0, 0)), "backward solve", "adjoint.solver.max_steps"),
        (diagnosis(loss=float("nan")), "the loss is nan", "a smaller optimizer.lr"),
        (diagnosis(gradient_norm=float("inf")), "its gradient inf", "gradient_clip_val=1"),
        (diagnosis((0, 0, 0, 9, 0), loss=float("nan")), "is nan", "optimizer.lr"),
        (diagnosis(loss=float("nan"), finite_inputs=False), "inputs", "look at the data"),
    ],
)
def test_the_advice_depends_on_the_symptom(seen, symptom, advice):
    assert symptom in seen.symptom
    assert advice in seen.advice


def test_processes_are_judged_together_each_in_its_proportion():
    first = [4.0, 0, 0, 0, 0, 4.0, 0, 0, 0, 0, 1.5, 2.0, 1.0]
    second = [1.0, 3.0, 0, 0, 0, 4.0, 0, 0, 0, 0, 0.5, 2.0, 1.0]
    assert Diagnosis.of([first, second]) == diagnosis((5, 3, 0, 0, 0), (8, 0, 0, 0, 0), 1.0, 2.0)
    second[-2] = float("nan")
    assert not Diagnosis.of([first, second]).finite
    second[-1] = 0.0
    assert not Diagnosis.of([first, second]).finite_inputs


@pytest.mark.parametrize(
    ("residuals", "trend"),
    [
        ([8.0, 4.0, 2.0, 1.0, 0.5], "falling"),
        ([8.0, 4.0, 2.0, 2.0, 2.0], "level"),
        ([8.0, 4.0, 2.0, 4.0, 8.0], "growing"),
        ([8.0, 1.0], None),  # a single step says nothing
    ],
)
def test_the_trend_is_that_of_the_samples_that_did_not_converge(residuals, trend):
    converged = [8.0] + [1e-9] * (len(residuals) - 1)
    trace = Trace(residuals=torch.tensor([residuals, converged]).T)
    assert trend_of(trace, torch.tensor([Status.STEP_LIMIT, Status.CONVERGED])) == trend
    assert trend_of(trace, torch.tensor([Status.CONVERGED, Status.CONVERGED])) is None


def test_what_is_measured_is_what_the_solution_says():
    task = task_of(EARLY)
    loss, solution, _ = task.evaluate(GOOD, 0)
    loss.backward()
    gradients = [p.grad for p in task.parameters() if p.grad is not None]
    measured = measure(GOOD, solution, loss.detach())
    found = Diagnosis.of([with_norm(measured, gradients).tolist()])
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert found.forward == (0, 5, 0, 0, 0)
    assert found.backward == (5, 0, 0, 0, 0)
    assert found.loss == loss.item()
    assert found.gradient_norm == pytest.approx(norm.item(), rel=1e-6)  # one float32 rounding each
