"""When the Jacobian's term is added, and what weights are allowed."""

import math
from typing import Any

import pytest
import torch

from fastdeq import fixed_point
from fastdeq.training import LossWeights

STEPS = 10_000


def draws(weights: LossWeights, seed: int = 0) -> list[bool]:
    return [weights.wants_jacobian(step, seed) for step in range(STEPS)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_jacobians_term_comes_in_the_wanted_share_of_the_steps(seed: int) -> None:
    share = sum(draws(LossWeights(jacobian=1.0, jacobian_probability=0.3), seed)) / STEPS
    # Four standard deviations of a binomial share, ±0.018: one seed in 16 000 would miss it.
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / STEPS)


def test_the_draw_depends_on_seed_and_step_alone() -> None:
    weights = LossWeights(jacobian=1.0, jacobian_probability=0.3)
    first = draws(weights)
    torch.manual_seed(7)
    # Asked in another order, after other random numbers, of an equal object.
    again = LossWeights(jacobian=1.0, jacobian_probability=0.3)
    assert [again.wants_jacobian(step, 0) for step in reversed(range(STEPS))] == first[::-1]
    assert draws(weights, seed=1) != first


def test_the_draws_of_two_seeds_are_independent() -> None:
    weights = LossWeights(jacobian=1.0, jacobian_probability=0.5)
    agree = sum(a == b for a, b in zip(draws(weights, 0), draws(weights, 1), strict=True)) / STEPS
    assert abs(agree - 0.5) < 4 * math.sqrt(0.25 / STEPS)  # as above


def test_with_probability_one_every_step_and_without_a_weight_none_has_the_term() -> None:
    assert all(draws(LossWeights(jacobian=0.1)))
    assert not any(draws(LossWeights(skip=1.0, residual=1.0)))


def test_from_jacobian_until_on_the_term_is_left_out() -> None:
    weights = LossWeights(jacobian=1.0, jacobian_until=3)
    assert [weights.wants_jacobian(step, 0) for step in range(5)] == [True] * 3 + [False] * 2
    assert not LossWeights(jacobian=1.0, jacobian_until=0).wants_jacobian(0, 0)


def test_only_terms_with_a_weight_are_computed() -> None:
    solution = fixed_point(lambda z: 0.5 * z + 1, torch.zeros(2, 3))
    assert LossWeights().parts(solution) == {}
    assert set(LossWeights(skip=1.0, residual=2.0).parts(solution)) == {"skip", "residual"}
    # No estimate was made in this step, so there is no term to weigh.
    assert LossWeights(jacobian=1.0).parts(solution) == {}


@pytest.mark.parametrize(
    ("wrong", "cure"),
    [
        ({"skip": -1.0}, r"LossWeights\.skip is -1\.0, but must be finite and at least 0"),
        ({"jacobian": -0.1}, "at least 0"),
        ({"residual": float("inf")}, "must be finite"),
        ({"jacobian_probability": 0.0}, "above 0 and at most 1"),
        ({"jacobian_probability": 1.5}, "above 0 and at most 1"),
        ({"jacobian_until": -1}, "at least 0"),
    ],
)
def test_weights_out_of_range_are_refused(wrong: dict[str, Any], cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        LossWeights(**wrong)


def test_a_misspelt_weight_is_refused_with_the_right_name() -> None:
    with pytest.raises(TypeError, match="did you mean 'jacobian'"):
        LossWeights(jacobean=1.0)  # type: ignore[call-arg]
