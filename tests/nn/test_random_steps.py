"""A random number of steps, and random starts, of equilibrium layers in training."""

import copy

import pytest
import torch
from torch import Tensor

from fastdeq import DeepEquilibriumNetwork, export
from fastdeq.adjoints import Unrolled
from fastdeq.nn import RandomNormal, RandomSteps, Zeros
from fastdeq.solvers import Picard
from tests.nn.layers import Dense, dense_input


def layer(**options: object) -> DeepEquilibriumNetwork:
    solver = Picard(tol=1e-30, max_steps=5)
    return DeepEquilibriumNetwork(Dense(), solver=solver, adjoint=Unrolled(), **options)  # type: ignore[arg-type]


def steps_of(module: DeepEquilibriumNetwork, calls: int) -> list[int]:
    found = []
    for _ in range(calls):
        steps = module(dense_input())[1].steps
        assert len(steps.unique()) == 1
        found.append(int(steps[0]))
    return found


def test_training_draws_every_number_of_steps_and_evaluation_takes_a_factor_of_the_most():
    module = layer(steps=RandomSteps(2, 5, factor=3.0))
    assert set(steps_of(module, 60)) == {2, 3, 4, 5}
    assert steps_of(module.eval(), 2) == [15, 15]


def test_evaluation_ends_where_the_tolerance_is_met_and_training_does_not():
    steps = RandomSteps(40, 40)
    module = DeepEquilibriumNetwork(Dense(), solver=Picard(tol=0.1), steps=steps)
    assert steps_of(module, 1) == [40]
    assert module.eval()(dense_input())[1].steps.max() < 40


def test_draws_follow_from_the_seed_and_the_number_of_the_call_alone():
    one, other = layer(steps=RandomSteps(1, 100)), layer(steps=RandomSteps(1, 100))
    first = steps_of(one, 4)
    torch.manual_seed(5)  # as on another process
    assert steps_of(other, 4) == first
    resumed = layer(steps=RandomSteps(1, 100))
    resumed.load_state_dict(copy.deepcopy(one.state_dict()))
    assert steps_of(resumed, 4) == steps_of(one, 4)
    assert steps_of(layer(steps=RandomSteps(1, 100, seed=1)), 4) != first


def test_a_layer_without_random_steps_has_no_further_state():
    assert not [name for name in layer().state_dict() if "steps" in name]


def test_wrong_numbers_of_steps_are_refused_by_name():
    for arguments, sentence in (
        ((0, 3), "RandomSteps.least is 0, but must be finite and at least 1"),
        ((4, 3), "RandomSteps.most is 3, but must be finite and at least 4"),
    ):
        with pytest.raises(ValueError, match=sentence):
            RandomSteps(*arguments)
    with pytest.raises(TypeError, match="steps is 7, but must be a RandomSteps"):
        layer(steps=7)


def test_a_random_start_is_drawn_in_training_from_the_seed_and_zero_in_evaluation():
    module, x = layer(initializer=RandomNormal(0.5)), dense_input(400)

    def start() -> Tensor:
        torch.manual_seed(3)
        z0 = module(x)[1].z0
        assert isinstance(z0, Tensor)
        return z0

    first = start()
    assert torch.equal(first, start())
    assert float(first.std()) == pytest.approx(0.5, rel=0.1)  # 1600 numbers
    assert not torch.equal(first, module(x)[1].z0)
    assert (module.eval()(x)[1].z0 == 0).all()


def test_a_random_start_has_the_shapes_of_its_zeros():
    z0 = RandomNormal(zeros=Zeros([[2], [3, 4]]))(lambda z: z, torch.zeros(5, 1))
    assert [tuple(scale.shape) for scale in z0] == [(5, 2), (5, 3, 4)]
    with pytest.raises(ValueError, match=r"RandomNormal\.std is 0"):
        RandomNormal(0.0)


def test_an_exported_model_takes_the_steps_of_evaluation():
    module = layer(steps=RandomSteps(1, 2, factor=2.0)).float()
    x = torch.randn(2, 4)
    program = export(module, x).module()
    torch.testing.assert_close(program(x), module.eval()(x)[0])
