"""Figures are exact means, however the samples are cut into batches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from fastdeq import DeepEquilibriumNetwork, DEQChain
from fastdeq.bench.operations import Operations
from fastdeq.nn import DenseCell
from fastdeq.solution import BackwardReport, Solution, SolveStats, Status
from fastdeq.timer import Stopwatch
from fastdeq.training.metrics import MeanMetrics, backward_metrics, solver_metrics


def values(means: MeanMetrics) -> dict[str, float]:
    return {name: value.item() for name, value in means.compute().items()}


def test_means_over_uneven_batches_weigh_every_sample_the_same():
    samples = torch.arange(10, dtype=torch.float64)
    means = MeanMetrics(("loss",))
    for batch in samples.split(4):  # of 4, 4 and 2
        means.update({"loss": batch.mean()}, len(batch))
    assert values(means) == {"loss": 4.5}


def test_a_metric_that_misses_some_batches_is_the_mean_of_those_it_came_with():
    means = MeanMetrics(("loss", "loss_jacobian", "accuracy"))
    means.update({"loss": 1.0}, 3)
    means.update({"loss_jacobian": torch.tensor(8.0), "loss": 5.0}, 1)
    assert values(means) == {"loss": 2.0, "loss_jacobian": 8.0}


CASTS: dict[str, Callable[[nn.Module], object]] = {
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "type": lambda module: module.type(torch.bfloat16),
    "to dtype": lambda module: module.to(torch.bfloat16),  # Lightning's bf16-true
    "to device and dtype": lambda module: module.to("cpu", torch.float16),
    "torchmetrics": lambda module: [
        each.set_dtype(torch.bfloat16) for each in module.modules() if isinstance(each, Metric)
    ],
}


@pytest.mark.parametrize("cast", CASTS)
def test_sums_stay_in_float64_however_the_module_around_them_is_cast(cast: str):
    """Lightning 18620: metrics of a module in half precision are wrong."""
    means = MeanMetrics(("loss",))
    around = nn.ModuleList([means])
    CASTS[cast](around)
    for value in (2.0**24, 1.0):  # float32 knows no 2²⁴ + 1: the sum would stand still
        means.update({"loss": torch.tensor(value)}, 1)
    CASTS[cast](around)  # between two updates too
    for value in (1.0, 1.0):
        means.update({"loss": torch.tensor(value)}, 1)
    assert values(means) == {"loss": (2.0**24 + 3) / 4}
    means.reset()  # to defaults that were cast neither
    for value in (2.0**24, 1.0):
        means.update({"loss": torch.tensor(value)}, 1)
    assert values(means) == {"loss": (2.0**24 + 1) / 2}


def test_sums_follow_the_module_to_another_device():
    around = nn.ModuleList([MeanMetrics(("loss",))]).to("meta")
    (means,) = around
    assert isinstance(means, MeanMetrics)
    assert (means.totals.device.type, means.totals.dtype) == ("meta", torch.float64)
    assert (means.weights.device.type, means.weights.dtype) == ("meta", torch.float64)


def test_after_a_reset_nothing_is_left_of_the_epoch_before():
    means = MeanMetrics(("loss", "accuracy"))
    means.update({"loss": 1.0, "accuracy": 0.5}, 2)
    means.compute()
    means.reset()
    means.update({"loss": 3.0}, 1)
    assert values(means) == {"loss": 3.0}


def test_a_metric_without_a_place_is_refused_by_name():
    with pytest.raises(KeyError, match="los"):
        MeanMetrics(("loss", "accuracy")).update({"los": 1.0}, 1)


def test_an_update_does_not_wait_for_the_device_once_the_metrics_are_known():
    means = MeanMetrics(("loss", "accuracy", "seconds"))
    metrics: dict[str, Any] = {
        "accuracy": torch.tensor(0.5),
        "seconds": Stopwatch(torch.device("cpu")).stop(),
    }
    means.update(metrics, 1)
    operations = Operations()
    with operations:
        for _ in range(3):
            means.update(metrics, 2)
    assert operations.waits == 0


class Watch:
    """A stopwatch that counts its readings."""

    def __init__(self, seconds: float) -> None:
        self.value, self.reads = seconds, 0

    def __float__(self) -> float:
        self.reads += 1
        return self.value


def test_a_stopwatch_is_read_once_when_the_means_are_computed_or_much_later():
    means, watches = MeanMetrics(("seconds",)), [Watch(float(k)) for k in range(300)]
    for watch in watches:
        means.update({"seconds": watch}, 1)
    assert [watch.reads for watch in watches] == [1] * 44 + [0] * 256
    assert values(means) == {"seconds": 149.5}
    means.update({"seconds": 449.0}, 1)
    assert values(means)["seconds"] == pytest.approx((300 * 149.5 + 449) / 301, rel=1e-15)
    assert all(watch.reads == 1 for watch in watches)


def test_a_reset_forgets_what_was_never_read():
    means, watch = MeanMetrics(("seconds", "loss")), Watch(1.0)
    means.update({"seconds": watch}, 1)
    means.reset()
    means.update({"loss": 2.0}, 1)
    assert values(means) == {"loss": 2.0}
    assert watch.reads == 0


def test_a_refused_update_leaves_the_means_as_they_were():
    means = MeanMetrics(("loss",))
    means.update({"loss": 1.0}, 1)
    with pytest.raises(KeyError):
        means.update({"loss": 5.0, "los": 1.0}, 1)
    assert values(means) == {"loss": 1.0}


STATS: dict[str, Any] = {
    "residual": torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "relative_residual": torch.tensor([0.0, 0.25, 0.5, 0.25]),
    "steps": torch.tensor([1, 2, 3, 4]),
    "nfe": torch.tensor([3, 4, 10, 5]),
    "status": torch.tensor([Status.CONVERGED, Status.STEP_LIMIT, Status.DIVERGED, Status.STALLED]),
}


def test_the_solvers_metrics_are_means_over_the_samples():
    z = torch.zeros(4, 2)
    metrics = solver_metrics(Solution(value=z, z0=z, defect=z, **STATS))
    # (3 + 4 + 10 + 5) / 4; (0 + ¼ + ½ + ¼) / 4; all but the first
    assert floats(metrics) == {"nfe": 5.5, "residual": 0.25, "unconverged": 0.75}


def test_the_adjoints_metrics_are_means_over_the_samples():
    metrics = backward_metrics(BackwardReport(stats=SolveStats(**STATS)))
    assert floats(metrics) == {
        "nfe_backward": 5.5,
        "residual_backward": 0.25,
        "unconverged_backward": 0.75,
    }


def test_a_backward_pass_without_a_linear_solve_has_its_evaluations_alone():
    report = BackwardReport(stats=SolveStats(**STATS), solves=False)
    assert floats(backward_metrics(report)) == {"nfe_backward": 5.5}
    assert backward_metrics(BackwardReport()) == {}


def test_a_pass_of_fixed_depth_converges_nowhere_and_is_counted_unconverged_nowhere():
    model = DEQChain(deq=DeepEquilibriumNetwork(DenseCell(4)))
    _, solution = model(torch.randn(5, 4), depth=3)
    assert not solution.converged.any()
    metrics = solver_metrics(solution)
    assert floats(metrics) == {
        "nfe": 3.0,
        "residual": solution.relative_residual.mean().item(),
        "unconverged": 0.0,
    }


def floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name: metric.item() for name, metric in metrics.items()}
