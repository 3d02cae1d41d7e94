"""What tasks minimize, what they report, and what they refuse."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from fastdeq import DeepEquilibriumNetwork, DEQChain, SkipDeepEquilibriumNetwork
from fastdeq.adjoints import JacobianFree, Unrolled
from fastdeq.data import Batch, Batches
from fastdeq.nn import DenseCell, RandomSteps, UnrolledNetwork
from fastdeq.regularizers import residual_loss, skip_loss
from fastdeq.training import (
    ClassificationTask,
    RegressionTask,
    StepTimer,
)
from tests.training.tasks import (
    CLASSES,
    FEATURES,
    WIDTH,
    evaluated,
    make_task,
    network,
    samples,
    train_metrics,
    trained,
    untimed,
)

KINDS = (ClassificationTask, RegressionTask)


# The loss


@pytest.mark.parametrize(
    ("kind", "loss"), [(ClassificationTask, cross_entropy), (RegressionTask, mse_loss)]
)
def test_the_criterion_is_torchs(kind, loss):
    x, targets, _ = samples(5, kind)
    task = make_task(kind)
    prediction, _ = task.model(x)
    assert torch.equal(task.criterion(prediction, targets), loss(prediction, targets))
    assert torch.equal(task.evaluate(Batch(x, targets), 0).loss, loss(prediction, targets))


def test_the_accuracy_is_the_share_of_largest_logits_at_the_label_and_regression_has_none():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 2.0], [5.0, 1.0, 2.0]])
    labels = torch.tensor([0, 1, 1, 0])
    assert make_task().scores(logits, labels) == {"accuracy": torch.tensor(0.75)}
    assert make_task(RegressionTask).scores(logits, logits) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_sum_of_its_logged_parts(kind, tmp_path):
    task = make_task(kind, skip=0.5, jacobian=0.25, residual=2.0)
    metrics = train_metrics(task, [samples(5, kind)], tmp_path)
    parts = [metrics[f"loss_{name}"] for name in ("task", "skip", "jacobian", "residual")]
    assert all(part > 0 for part in parts)
    # Four float32 numbers are added: an error of some 6e-8 of their sum at each addition.
    assert metrics["loss"] == pytest.approx(sum(parts), rel=1e-6)


def test_the_parts_are_weight_times_regularizer(tmp_path):
    model, batch = network(), samples(5)
    once = train_metrics(
        make_task(model=model, skip=1.0, jacobian=1.0, residual=1.0), [batch], tmp_path
    )
    task = make_task(model=model, skip=0.5, jacobian=0.25, residual=4.0)
    weighted = train_metrics(task, [batch], tmp_path)
    _, solution = model(batch.inputs)
    # Powers of two scale floating-point numbers exactly, and the draws of ε were the same.
    assert once["loss_skip"] == skip_loss(solution).item()
    assert weighted["loss_skip"] == 0.5 * once["loss_skip"]
    assert once["loss_residual"] == residual_loss(solution).item()
    assert weighted["loss_residual"] == 4 * once["loss_residual"]
    assert weighted["loss_jacobian"] == 0.25 * once["loss_jacobian"] > 0
    assert weighted["loss_task"] == once["loss_task"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_correction_is_the_tasks_loss_of_the_states_on_the_way(kind, tmp_path):
    given: dict[str, Any] = {"correction_states": [1, 2], "correction_weights": "linear"}
    task, batch = make_task(kind, correction=2.0, **given), samples(5, kind)
    metrics = train_metrics(task, [batch], tmp_path)
    _, solution = task.model(batch.inputs, states=[1, 2])
    losses = [
        task.criterion(task.model.predict_from(state), batch.targets).item()
        for state in solution.states
    ]
    assert metrics["loss_correction"] == pytest.approx(2 * (losses[0] + 2 * losses[1]) / 3)
    assert metrics["loss"] == pytest.approx(metrics["loss_task"] + metrics["loss_correction"])


def test_every_loss_and_metric_is_of_all_equilibria_of_a_model(tmp_path):
    layers = [SkipDeepEquilibriumNetwork(DenseCell(WIDTH)) for _ in range(2)]
    model = DEQChain(nn.Linear(FEATURES, WIDTH), *layers, nn.Linear(WIDTH, CLASSES))
    task, batch = make_task(model=model, skip=0.5, residual=1.0, jacobian=0.1), samples(5)
    metrics = train_metrics(task, [batch], tmp_path)
    _, solution = model(batch.inputs)
    assert metrics["loss_skip"] == pytest.approx(0.5 * skip_loss(solution).item())
    assert metrics["nfe"] == pytest.approx(solution.nfe.float().mean().item())
    assert metrics["nfe_backward"] > 0
    assert evaluated(task, [batch], tmp_path)["explicit_loss"] > 0
    with pytest.raises(ValueError, match=r"a model of several equilibria has none"):
        make_task(model=model, correction=1.0)


def test_pretraining_leaves_the_correction_out_and_evaluation_too(tmp_path):
    task, batch = make_task(correction=1.0), samples(5)
    _, solution, metrics = task.evaluate(batch, 0, depth=3)
    assert not solution.states
    assert "loss_correction" not in metrics
    assert "loss_correction" not in evaluated(task, [batch], tmp_path)


def test_a_correction_of_states_that_there_are_not_is_refused():
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"correction_states": [60]}, ValueError, "loss.correction_states is .60.*max_steps=50"),
        ({"correction_states": 0}, ValueError, "loss.correction_states is 0"),
        ({"correction_adjoint": Unrolled()}, ValueError, "loss.correction_adjoint is Unrolled"),
    ]
    for weights, error, message in cases:
        with pytest.raises(error, match=message):
            make_task(correction=1.0, **weights)
    drawn = DeepEquilibriumNetwork(DenseCell(WIDTH), steps=RandomSteps(4, 9))
    with pytest.raises(ValueError, match=r"max_steps=4"):
        make_task(model=DEQChain(drawn), correction=1.0, correction_states=[5])
    chain = DEQChain(
        stem=nn.Linear(FEATURES, WIDTH),
        deq=UnrolledNetwork(DenseCell(WIDTH), steps=2),
        head=nn.Linear(WIDTH, CLASSES),
    )
    with pytest.raises(ValueError, match=r"UnrolledNetwork has none: use loss\.correction=0"):
        make_task(model=chain, correction=1.0)


def test_parts_without_a_weight_are_not_logged(tmp_path):
    metrics = train_metrics(make_task(), [samples(5)], tmp_path)
    assert {name for name in metrics if name.startswith("loss")} == {"loss", "loss_task"}


def test_the_weight_of_a_batch_scales_its_loss():
    x, targets, _ = samples(5)
    task = make_task(skip=0.5)
    whole = task.evaluate(Batch(x, targets, 1.0), 0).loss
    assert torch.equal(task.evaluate(Batch(x, targets, 0.5), 0).loss, 0.5 * whole)
    assert torch.equal(task.evaluate(Batch(x, targets, 2.0), 0).loss, 2 * whole)


@pytest.mark.parametrize("adjoint", [None, JacobianFree()])
def test_a_placeholder_batch_gives_zero_gradients_to_all_parameters(adjoint):
    # All parameters, and not none: DistributedDataParallel waits for each of them.
    x, targets, _ = samples(5)
    model = network(adjoint=adjoint)
    task = make_task(model=model, skip=0.5, jacobian=0.25, residual=1.0)
    task.evaluate(Batch(x, targets, 0.0), 0).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_a_placeholder_batch_adds_nothing_to_the_metrics(tmp_path):
    batch, other = samples(5), samples(6)
    task = make_task(skip=0.5, jacobian=0.25)
    alone = train_metrics(task, [batch], tmp_path)
    accompanied = train_metrics(task, [batch, other._replace(weight=0.0)], tmp_path)
    assert untimed(accompanied) == untimed(alone)
    evaluations = [batch, other._replace(weight=0.0)]
    assert untimed(evaluated(task, evaluations, tmp_path)) == untimed(
        evaluated(task, [batch], tmp_path)
    )


def test_a_skip_loss_needs_a_model_that_predicts():
    with pytest.raises(ValueError, match=r"model=skip_deq.*loss\.skip=0"):
        make_task(model=network("zeros"), skip=0.1)
    make_task(model=network("first"), skip=0.1)


def test_parameters_are_unused_if_no_loss_draws_the_explicit_network_to_the_equilibrium():
    for start, skip, unused in (
        ("explicit", 0.0, True),
        ("explicit", 0.1, False),
        ("first", 0.0, False),
        ("zeros", 0.0, False),
    ):
        task = make_task(model=network(start), skip=skip)
        assert task.leaves_parameters_unused == unused, (start, skip)
        task.evaluate(samples(5), 0).loss.backward()
        without_gradient = [name for name, p in task.named_parameters() if p.grad is None]
        assert bool(without_gradient) == unused, (start, skip)


# The metrics


@pytest.mark.parametrize("kind", KINDS)
def test_the_metrics_of_uneven_batches_are_those_of_the_whole_set(kind, tmp_path):
    x, targets, _ = samples(25, kind)
    targets = targets.double() if targets.is_floating_point() else targets
    task = make_task(kind, model=network().double())
    whole = untimed(evaluated(task, Batches(x.double(), targets, batch_size=25), tmp_path))
    parts = untimed(evaluated(task, Batches(x.double(), targets, batch_size=7), tmp_path))
    assert {"loss", "nfe", "residual", "unconverged", "explicit_loss"} <= set(whole)
    # Every sample is solved as if it were alone. What is left is the rounding of a few float32
    # means, 6e-8 each (the solves are in float64, where a batch's size moves only the 16th digit).
    assert parts == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_in_half_precision_metrics_are_exact_whatever_the_batch_size(kind, precision, tmp_path):
    """Lightning 18620. The predictions are rounded, what is computed from them is not."""
    x, targets, _ = samples(360, kind)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float16
    task = make_task(kind, model=network())
    found = [
        untimed(evaluated(task, batches, tmp_path, precision=precision))
        for size in (1, 7, 360)
        for batches in [list(map(Batch, x.split(size), targets.split(size)))]
    ]
    targets = targets.to(dtype) if targets.is_floating_point() else targets
    with torch.no_grad():
        prediction, solution = task.model.to(dtype)(x.to(dtype))
    assert prediction.dtype == dtype
    loss = cross_entropy if kind is ClassificationTask else mse_loss
    expected = {
        "loss": float(loss(prediction.float(), targets if targets.ndim == 1 else targets.float())),
        "nfe": float(solution.nfe.double().mean()),
    }
    if kind is ClassificationTask:
        expected["accuracy"] = float((prediction.argmax(dim=1) == targets).double().mean())
    for metrics in found:
        # Float32 means of batches: a few roundings of 6e-8. Bfloat16 would round to 4e-3.
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_in_half_precision_the_loss_and_its_regularizers_are_float32():
    model = network().to(torch.bfloat16)
    weights = {"skip": 0.5, "jacobian": 0.25, "residual": 2.0}
    for kind in KINDS:
        batch = samples(5, kind)
        task = make_task(kind, model=model, **weights)
        loss, _, metrics = task.evaluate(batch._replace(inputs=batch.inputs.bfloat16()), 0)
        assert loss.dtype == torch.float32
        parts = {name: part for name, part in metrics.items() if name.startswith("loss")}
        assert len(parts) == 5
        assert all(torch.as_tensor(part).dtype == torch.float32 for part in parts.values())
        loss.backward()
        gradients = [p.grad for p in model.parameters()]
        assert all(grad is not None and grad.dtype == torch.bfloat16 for grad in gradients)


def test_the_explicit_metrics_are_those_of_the_head_on_z0(tmp_path):
    model, (x, labels, _) = network(), samples(20)
    metrics = evaluated(make_task(model=model), [Batch(x, labels)], tmp_path)
    stem, deq, head = model.children()
    assert isinstance(deq, DeepEquilibriumNetwork)
    network_of_z0 = deq.initializer.network
    assert isinstance(network_of_z0, nn.Module)
    with torch.no_grad():
        logits = head(network_of_z0(stem(x)))
        solved, _ = model(x)
    assert metrics["explicit_loss"] == cross_entropy(logits, labels).item()
    right: Tensor = logits.argmax(dim=1) == labels
    assert metrics["explicit_accuracy"] == right.float().mean().item()
    assert metrics["loss"] == cross_entropy(solved, labels).item() != metrics["explicit_loss"]


def test_a_model_that_predicts_nothing_has_no_explicit_metrics(tmp_path):
    metrics = evaluated(make_task(model=network("zeros")), [samples(5)], tmp_path)
    assert not [name for name in metrics if name.startswith("explicit")]


@pytest.mark.parametrize(("adjoint", "solves"), [(None, True), (JacobianFree(), False)])
def test_the_metrics_of_the_backward_solve_come_with_an_adjoint_that_solves(
    adjoint, solves, tmp_path
):
    metrics = train_metrics(make_task(model=network(adjoint=adjoint)), [samples(5)], tmp_path)
    names = ("nfe_backward", "residual_backward", "unconverged_backward", "backward_seconds")
    assert [name in metrics for name in names] == [solves] * 4
    if solves:
        assert metrics["backward_seconds"] > 0


def test_a_training_step_takes_longer_than_its_two_solves(tmp_path):
    batches = [samples(5), samples(6)]
    metrics = train_metrics(make_task(), batches, tmp_path, callbacks=[StepTimer()])
    assert metrics["solve_seconds"] > 0
    assert metrics["solve_seconds"] + metrics["backward_seconds"] < metrics["seconds"]


def test_a_prediction_takes_longer_than_its_solve(tmp_path):
    metrics = evaluated(make_task(), [samples(5), samples(6)], tmp_path)
    assert 0 < metrics["solve_seconds"] < metrics["seconds"]
    assert metrics["explicit_seconds"] > 0


def test_a_solve_takes_time_and_a_pass_of_fixed_depth_reports_none():
    model, (x, _, _) = network(), samples(5)
    prediction, solution = model(x)
    assert solution.seconds > 0
    prediction.sum().backward()
    assert solution.backward.stats is not None
    assert solution.backward.stats.seconds > 0
    assert model(x, depth=3)[1].seconds == 0


def test_the_metrics_of_a_step_come_at_every_nth_or_never(tmp_path):
    for every, logged in ((1, True), (3, True), (4, False), (0, False)):
        options = {"log_every_n_steps": every, "callbacks": [StepTimer()]}
        trainer = trained(make_task(), [samples(5)] * 3, tmp_path, **options)
        names = {name for name in trainer.callback_metrics if name.startswith("step/")}
        assert ({"step/loss", "step/lr", "step/nfe", "step/seconds"} <= names) == logged, every
        assert bool(names) == logged, every


# Model and data


def with_targets(targets: Tensor) -> Batch:
    return Batch(samples(4).inputs, targets)


@pytest.mark.parametrize(
    ("kind", "batch", "cure"),
    [
        (
            ClassificationTask,
            Batch(torch.randn(4, 7), torch.arange(4)),
            r"does not take inputs of shape \(7,\).*choose the arch",
        ),
        (ClassificationTask, with_targets(torch.randn(4)), "use RegressionTask"),
        (ClassificationTask, with_targets(torch.randn(4, CLASSES)), "use RegressionTask"),
        (ClassificationTask, with_targets(torch.zeros(4, 1).long()), "use RegressionTask"),
        (ClassificationTask, with_targets(torch.zeros(4).int()), r"targets\.long\(\)"),
        (
            ClassificationTask,
            with_targets(torch.tensor([0, 1, 2, CLASSES])),
            r"predicts \(3,\).*has a class 3.*sizes\.outputs outputs",
        ),
        (RegressionTask, with_targets(torch.arange(4)), "use ClassificationTask"),
        (
            RegressionTask,
            with_targets(torch.randn(4, 5)),
            r"predicts \(3,\).*targets are \(5,\).*sizes\.outputs outputs",
        ),
    ],
)
def test_data_that_does_not_fit_the_model_is_refused_with_the_cure(kind, batch, cure):
    with pytest.raises(ValueError, match=cure):
        make_task(kind).check_model(batch)


@pytest.mark.parametrize("kind", KINDS)
def test_data_that_fits_the_model_passes(kind):
    make_task(kind).check_model(samples(4, kind))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fits", [True, False])
def test_checking_a_model_leaves_it_and_the_random_state_as_they_were(training, fits):
    model = DEQChain(nn.Dropout(), *network().children())
    model.train(training)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    task = make_task(model=model)
    batch = samples(4) if fits else Batch(torch.randn(4, 7), torch.arange(4))
    state = torch.get_rng_state()
    try:
        task.check_model(batch)
    except ValueError:
        assert not fits
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training == training for module in model.modules())
    for old, parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(parameter, old)
        assert parameter.grad is not None
        assert (parameter.grad == 1).all()
