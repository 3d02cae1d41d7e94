"""What `fastdeq.compat.torchdeq` takes and refuses; it does not need torchdeq."""

import argparse
from typing import Any

import pytest
import torch
from torch import nn

from fastdeq.compat import torchdeq as ours
from tests.loops import each

# Arguments


def test_arguments_are_taken_from_a_namespace_a_dictionary_and_keywords():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.1)
    ours.add_deq_args(parser)
    args = parser.parse_args(["--core", "indexing", "--n_states", "2", "--ift", "--grad", "2", "3"])
    deq = ours.get_deq(args, f_tol=1e-5)
    assert isinstance(deq, ours.DEQIndexing)
    assert (deq.arguments.n_states, deq.arguments.grad, deq.arguments.f_tol) == (2, (2, 3), 1e-5)
    given = {"f_solver": "anderson"}
    assert ours.get_deq(given, f_max_iter=7).arguments.f_solver == "anderson"
    assert given == {"f_solver": "anderson"}, "it is not changed"
    assert isinstance(ours.get_deq(), ours.DEQSliced)


@each(
    "options, error, sentence",
    [
        ({"f_maxiter": 9}, TypeError, "no argument 'f_maxiter': did you mean 'f_max_iter'"),
        ({"args": {"tol": 9}}, TypeError, "no argument 'tol'"),
        ({"args": 7}, TypeError, "args is a int: give an argparse.Namespace or a dictionary"),
        ({"f_solver": "newton"}, TypeError, "f_solver is 'newton'"),
        ({"core": "other"}, TypeError, "core is 'other'"),
        ({"f_stop_mode": "absolute"}, TypeError, "f_stop_mode is 'absolute'"),
        ({"f_max_iter": 0}, ValueError, "f_max_iter is 0"),
        ({"grad": 0}, ValueError, "grad is 0, but must be steps of at least 1"),
        ({"grad": [1, 2], "n_states": 3}, ValueError, "one for each of the 3 states"),
        ({"indexing": [50]}, ValueError, "must ascend between 0 and f_max_iter=40"),
    ],
)
def test_unknown_and_wrong_arguments_are_refused(options, error, sentence):
    with pytest.raises(error, match=sentence):
        ours.get_deq(**options)


@each(
    "f_solver, solver_kwargs, error, sentence",
    [
        ("anderson", {"memory": 3}, TypeError, "no argument 'memory'"),
        ("anderson", {"lam": 0.1}, ValueError, "lam has no counterpart"),
        ("broyden", {"ls": True}, ValueError, "ls=True .* is not supported"),
        ("broyden", {"tau": 0.5}, TypeError, "no argument 'tau'"),
    ],
)
def test_unknown_options_of_a_solver_are_refused(f_solver, solver_kwargs, error, sentence):
    deq = ours.get_deq(f_solver=f_solver)
    with pytest.raises(error, match=sentence):
        deq(torch.tanh, torch.zeros(2, 3), solver_kwargs=solver_kwargs)


# Normalization and losses


def test_an_unknown_norm_is_refused_and_none_does_nothing():
    model = nn.Sequential(nn.Linear(3, 3))
    before = list(model.state_dict())
    ours.apply_norm(model, "none")
    assert list(model.state_dict()) == before
    with pytest.raises(ValueError, match="norm_type is 'batch'"):
        ours.apply_norm(model, "batch")


def test_constant_weights_are_a_plain_sum_and_unknown_ones_are_refused():
    states = [torch.ones(2), torch.zeros(2)]
    assert float(ours.fp_correction(torch.sum, [states], "const", c=2.0)) == 4
    with pytest.raises(ValueError, match="weight_func is 'cubic'"):
        ours.fp_correction(torch.sum, [states], "cubic")
    with pytest.raises(TypeError):
        ours.fp_correction(torch.sum, [states], "const", gamma=2.0)


def test_the_backward_writer_gets_the_statistics_of_each_backward_solve_once():
    w = (0.1 * torch.ones(6, 6)).requires_grad_()
    seen: list[Any] = []
    deq = ours.get_deq(ift=True)
    (z,), _ = deq(lambda z: torch.tanh(z @ w + 1), torch.zeros(2, 6), backward_writer=seen.append)
    for count in (1, 2):
        torch.autograd.grad(z.sum(), w, retain_graph=True)
        assert len(seen) == count
    assert (seen[0]["abs_lowest"] <= 1e-5).all()


def test_without_statistics_the_names_of_the_record_remain():
    w = 0.1 * torch.ones(3, 3)
    _, info = ours.get_deq(no_stat=True)(lambda z: torch.tanh(z @ w + 1), torch.zeros(2, 3))
    assert set(info.values()) != set()
    assert all((value == -1).all() for value in info.values())


@each("core", ["sliced", "indexing"])
def test_a_solve_that_converges_early_has_as_many_states_as_were_asked_for(core):
    w = 0.1 * torch.ones(3, 3)
    deq = ours.get_deq(core=core, n_states=4, ift=True, f_tol=0.1)
    states, _ = deq(lambda z: torch.tanh(z @ w + 1), torch.zeros(2, 3))
    assert len(states) == 4
