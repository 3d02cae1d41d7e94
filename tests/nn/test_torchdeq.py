"""`fastdeq.compat.torchdeq` gives the results of torchdeq, and refuses what it does not know."""

import argparse
import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdeq.compat import torchdeq as ours
from tests.loops import each

theirs = pytest.importorskip("torchdeq")
for name in ("norm", "dropout", "loss"):  # it does not export these names at its top
    pytest.importorskip(f"torchdeq.{name}")

CORES = ("sliced", "indexing")
WIDTH = 6
W = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
W = 0.7 * W / torch.linalg.matrix_norm(W, 2)
X = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))


def leaves() -> list[Tensor]:
    return [W.clone().requires_grad_(), X.clone().requires_grad_()]


def results(library: Any, options: dict[str, Any], training: bool = True, **call: Any) -> Any:
    """States, gradients of their weighted sum, and statistics."""
    w, x = leaves()
    deq = library.get_deq(**options).train(training)
    z0 = torch.zeros_like(X)
    states, info = deq(lambda z: torch.tanh(z @ w + x), z0, **call)
    grads = None
    if training:
        loss = sum((k + 1) * z.square().sum() for k, z in enumerate(states))
        grads = torch.autograd.grad(loss, (w, x))
    return states, grads, info


def compared(options: dict[str, Any], tol: float, **call: Any) -> None:
    mine, other = results(ours, options, **call), results(theirs, dict(options), **call)
    assert len(mine[0]) == len(other[0])
    torch.testing.assert_close(mine[0], other[0], rtol=tol, atol=tol)
    torch.testing.assert_close(mine[1], other[1], rtol=tol, atol=10 * tol)


SOLVERS = ("fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden")
TIGHT = {"f_tol": 1e-6, "b_tol": 1e-6, "f_max_iter": 60, "b_max_iter": 60}


# Solves and gradients


@each("core", CORES)
@each("f_solver", SOLVERS)
@each("training", [True, False])
def test_a_converged_solve_gives_their_states_and_gradients(core, f_solver, training):
    options = {"core": core, "f_solver": f_solver, **TIGHT}
    for more in ({}, {"grad": 4, "tau": 0.6}, {"f_stop_mode": "rel"}):
        compared({**options, **more}, 1e-4, training=training)


@each("core", CORES)
@each("b_solver", SOLVERS)
@each("name", ["ift", "hook_ift"])
def test_implicit_gradients_are_theirs(core, b_solver, name):
    if b_solver == "simple_fixed_point_iter":  # a TypeError in torchdeq
        mine = results(ours, {"core": core, "b_solver": b_solver, name: True, **TIGHT})
        other = results(theirs, {"core": core, name: True, **TIGHT})
        torch.testing.assert_close(mine[1], other[1], rtol=1e-4, atol=1e-3)
        return
    compared({"core": core, "b_solver": b_solver, name: True, **TIGHT}, 1e-4)


@each("core", CORES)
@each(
    "options",
    [
        {"n_states": 3},
        {"n_states": 4, "grad": [1, 2, 3, 4], "tau": 0.7},
        {"indexing": [1, 2, 5]},
        {"indexing": [3], "ift": True, "b_tol": 1e-6},
        {"grad": 6, "sup_gap": 2},
        {"grad": 6, "sup_loc": [1, 4]},
    ],
)
def test_states_on_the_way_are_theirs_with_their_gradients(core, options):
    # The steps of the fixed-point iteration are the same numbers; none of these has converged.
    compared({"core": core, "f_max_iter": 9, "f_tol": 1e-9, **options}, 1e-5)


@each("core", CORES)
def test_a_call_may_change_the_number_of_evaluations_and_evaluation_takes_a_factor(core):
    options = {"core": core, "f_tol": 1e-9, "f_max_iter": 4, "eval_factor": 3.0}
    for call in ({}, {"solver_kwargs": {"f_max_iter": 7}}, {"solver_kwargs": {"tau": 0.8}}):
        for training in (True, False):
            compared(options, 1e-5, training=training, **call)
    fixed = {**options, "eval_f_max_iter": 2}
    compared(fixed, 1e-5, training=False)


@each("core", CORES)
def test_several_scales_are_lists_as_theirs(core):
    def run(library: Any) -> Any:
        w = W.clone().requires_grad_()
        z0 = [torch.zeros(5, 2, 3), torch.zeros(5, 6)]
        deq = library.get_deq(core=core, ift=True, **TIGHT)
        (state,), _ = deq(
            lambda a, b: [
                torch.tanh(0.5 * (b @ w) + X).view(5, 2, 3),
                torch.tanh(a.flatten(1) @ w - X),
            ],
            z0,
        )
        assert isinstance(state, list)
        return [*state, torch.autograd.grad(sum(z.square().sum() for z in state), w)[0]]

    torch.testing.assert_close(run(ours), run(theirs), rtol=1e-4, atol=1e-4)


def test_statistics_have_their_names_and_values():
    options = {"f_tol": 1e-4, "f_max_iter": 8}
    for training in (True, False):
        torch.manual_seed(6)
        mine = results(ours, options, training=training, sradius_mode=not training)[2]
        torch.manual_seed(6)
        other = results(theirs, dict(options), training=training, sradius_mode=not training)[2]
        assert set(mine) == set(other)
        for name in ("abs_lowest", "rel_lowest"):
            torch.testing.assert_close(mine[name], other[name], rtol=0.5, atol=1e-3)
        if not training:
            torch.testing.assert_close(mine["sradius"], other["sradius"], rtol=0.05, atol=1e-3)


def test_their_command_line_options_are_ours_with_the_same_defaults():
    found = []
    for library in (ours, theirs):
        parser = argparse.ArgumentParser()
        library.add_deq_args(parser)
        found.append(vars(parser.parse_args([])))
    assert found[0] == found[1]


# Normalization and dropout


def network() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(3, 2, 3), nn.Flatten(), nn.Linear(50, 4)
    )


@each("norm_type", ["weight_norm", "spectral_norm"])
@each(
    "options",
    [
        {},
        {"clip": True, "clip_value": 0.5},
        {"learn_scale": False, "target_norm": 0.7},
        {"filter_out": "3"},
        {"prefix_filter_out": ["0", "1"]},
        {"args": {"norm_no_scale": True, "norm_clip": True, "sn_n_power_iters": 3}},
    ],
)
def test_normalized_weights_their_gradients_and_their_checkpoints_are_theirs(norm_type, options):
    x = torch.randn(2, 2, 5, 5)

    def run(library: Any) -> Any:
        model = network()
        torch.manual_seed(3)
        library.apply_norm(model, norm_type, **copy.deepcopy(options))
        outputs = []
        for _ in range(2):
            library.reset_deq(model)
            outputs.append(model(x))
        outputs[-1].square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        state = {name: value.clone() for name, value in model.state_dict().items()}
        library.norm.remove_norm(model) if library is theirs else library.remove_norm(model)
        return outputs, grads, state, model.state_dict()

    torch.testing.assert_close(run(ours), run(theirs), rtol=1e-4, atol=1e-5)


KINDS = [
    ("VariationalDropout", (3, 4)),
    *(
        (f"Variational{kind}{n}d", (3, *range(4, 5 + n)))
        for kind in ("Dropout", "DropToken")
        for n in (1, 2, 3)
    ),
]


@each("name, shape", KINDS)
@each("token_first", [True, False])
def test_dropout_masks_are_theirs_and_kept_until_the_reset(name, shape, token_first):
    options = {} if name == "VariationalDropout" else {"token_first": token_first}
    x = torch.ones(shape)

    def run(library: Any) -> list[Tensor]:
        torch.manual_seed(4)
        module = getattr(library, name)(0.4, **options)
        found = [module(x), module(2 * x)]
        library.reset_deq(module)
        found.append(module(x))
        return [*found, module.eval()(x)]

    mine = run(ours)
    torch.testing.assert_close(mine, run(theirs))
    assert torch.equal(2 * mine[0], mine[1])


# Losses


@each("weight_func, options", [("exp", {}), ("exp", {"gamma": 0.5}), ("linear", {"bias": 0.1})])
def test_the_fixed_point_correction_is_theirs(weight_func, options):
    states, y = [torch.randn(3, 4) for _ in range(4)], torch.randn(3, 4)

    def crit(z: Tensor, y: Tensor) -> Tensor:
        return (z - y).abs().mean()

    arguments = (crit, (states, y), weight_func)
    found = [library.fp_correction(*arguments, True, **options) for library in (ours, theirs)]
    assert found[0][0] == pytest.approx(found[1][0])
    assert found[0][1] == pytest.approx(found[1][1])


def test_the_jacobian_loss_and_the_power_method_are_theirs():
    def run(library: Any) -> list[Tensor]:
        w, x = leaves()
        z = torch.zeros_like(X, requires_grad=True)
        f = torch.tanh(z @ w + x)
        torch.manual_seed(5)
        loss = library.jac_reg(f, z, vecs=2)
        (grad,) = torch.autograd.grad(loss, w, retain_graph=True)
        return [loss, grad, *library.power_method(f, z, n_iters=30)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(run(ours), run(theirs), rtol=1e-4, atol=1e-6)
