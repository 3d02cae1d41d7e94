"""Batched GMRES against dense solves, sample by sample and as one space for the batch."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastdeq import GMRES, gmres
from fastdeq.solution import Status
from tests.loops import each


def numbers(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw


def with_conditions(seed: int, conditions: list[float], size: int) -> Tensor:
    """(B, D, D) nonsymmetric matrices U S Vᵀ whose singular values run from 1 to 1/condition."""
    draw = numbers(seed)
    made = []
    for condition in conditions:
        u, _ = torch.linalg.qr(draw(size, size))
        v, _ = torch.linalg.qr(draw(size, size))
        s = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size).double()
        made.append(u @ torch.diag(s) @ v.mT)
    return torch.stack(made)


def times(a: Tensor) -> Callable[[Tensor], Tensor]:
    """(B, D) ↦ A v, sample by sample."""
    return lambda v: torch.bmm(a, v[:, :, None])[:, :, 0]


def relative_error(x: Tensor, exact: Tensor) -> Tensor:
    error: Tensor = (x - exact).norm(dim=1) / exact.norm(dim=1)
    return error


def counted(matvec: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor], Tensor], list[int]]:
    calls = [0]

    def product(v: Tensor) -> Tensor:
        calls[0] += 1
        return matvec(v)

    return product, calls


# Against dense solves


@each("seed", range(5))
def test_gmres_equals_the_dense_solve_on_nonsymmetric_matrices(seed):
    draw = numbers(seed)
    a, b = torch.eye(12).double() + 0.5 * draw(6, 12, 12) / 12**0.5, draw(6, 12)
    result = gmres(times(a), b, tol=1e-12, max_steps=12)
    assert result.converged.all()
    exact = torch.linalg.solve(a, b)
    condition = torch.linalg.cond(a)
    assert (relative_error(result.value, exact) <= 1e-12 * condition).all()


def test_samples_of_very_different_conditioning_are_each_solved_to_their_own():
    conditions = [1.0, 1e2, 1e4, 1e6]
    a, b = with_conditions(7, conditions, 10), numbers(8)(4, 10)
    b = b * torch.tensor([[1e6], [1.0], [1e-6], [1.0]])  # the tolerance is relative to ‖b‖
    result = gmres(times(a), b, tol=1e-9, max_steps=40, restart=10)
    assert result.converged.all()
    error = relative_error(result.value, torch.linalg.solve(a, b))
    # ‖x − x*‖ ≤ ‖A⁻¹‖ · tol · ‖b‖ ≤ condition · tol · ‖x*‖
    assert (error <= 1e-9 * torch.tensor(conditions)).all()


def test_the_reported_residual_is_the_true_one():
    draw = numbers(1)
    a, b = torch.eye(9).double() + 0.3 * draw(5, 9, 9), draw(5, 9)
    for max_steps in (1, 3, 9):
        result = gmres(times(a), b, tol=1e-10, max_steps=max_steps)
        residual = (b - times(a)(result.value)).norm(dim=1)
        torch.testing.assert_close(result.residual, residual, rtol=1e-6, atol=1e-14)
        torch.testing.assert_close(
            result.relative_residual, residual / b.norm(dim=1), rtol=1e-6, atol=1e-14
        )


def test_every_step_minimizes_the_residual_over_the_krylov_space():
    draw = numbers(2)
    a, b = torch.eye(8).double() + 0.5 * draw(1, 8, 8), draw(1, 8)
    for k in range(1, 8):
        powers = [b]
        for _ in range(k):
            powers.append(times(a)(powers[-1]))
        space, _ = torch.linalg.qr(torch.stack(powers[:-1], dim=2)[0])
        y = torch.linalg.lstsq(a[0] @ space, b[0, :, None]).solution
        least = (b[0, :, None] - a[0] @ space @ y).norm()
        result = gmres(times(a), b, tol=1e-14, max_steps=k)
        # The monomial basis of the reference loses digits as k grows.
        torch.testing.assert_close(result.residual[0], least, rtol=1e-6, atol=1e-12)


def test_the_trace_is_the_smallest_residual_of_each_step_per_sample():
    a, b = with_conditions(3, [2.0, 30.0], 6), numbers(4)(2, 6)
    for restart in (None, 2):
        solver = GMRES(tol=1e-6, max_steps=12, restart=restart)
        result = solver.solve(times(a), b, trace=True)
        assert result.trace is not None
        residuals = result.trace.residuals
        assert len(residuals) == int(result.steps.max()) + 1
        assert torch.equal(residuals[0], b.norm(dim=1))
        assert (residuals.diff(dim=0) <= 0).all()
        # The recurrence equals the measured residual up to rounding.
        assert torch.allclose(residuals[-1], result.residual, rtol=1e-6, atol=1e-12)
    assert solver.solve(times(a), b).trace is None


def test_states_of_any_shape_come_back_in_their_shape():
    draw = numbers(3)
    b, mix = draw(3, 2, 4, 4), 0.3 * draw(2, 2)

    def matvec(v: Tensor) -> Tensor:
        return v - torch.einsum("oc,bchw->bohw", mix, v)

    result = gmres(matvec, b, tol=1e-12)
    exact = torch.einsum("oc,bchw->bohw", torch.linalg.inv(torch.eye(2).double() - mix), b)
    assert result.value.shape == b.shape
    torch.testing.assert_close(result.value, exact, rtol=0, atol=1e-10)  # 1e-12 · ‖b‖ · condition


def test_float32_reaches_a_float32_tolerance():
    draw = numbers(4)
    a, b = torch.eye(10).double() + 0.2 * draw(4, 10, 10), draw(4, 10)
    result = gmres(times(a.float()), b.float(), tol=1e-5, max_steps=10)
    assert result.value.dtype == torch.float32
    assert result.converged.all()
    exact = torch.linalg.solve(a, b)
    assert (relative_error(result.value, exact) <= 2e-5 * torch.linalg.cond(a)).all()


# When a sample ends


def test_every_sample_stops_at_its_own_step():
    # 1, 2, 3 and 6 distinct eigenvalues: exactly so many steps are needed.
    spectra = [[2.0] * 6, [1, 2.0] * 3, [1, 2, 3.0] * 2, [1, 2, 3, 4, 5, 6.0]]
    a = torch.diag_embed(torch.tensor(spectra, dtype=torch.float64))
    b = numbers(5)(4, 6)
    product, calls = counted(times(a))
    result = gmres(product, b, tol=1e-10, max_steps=20)
    assert result.converged.all()
    assert result.steps.tolist() == [1, 2, 3, 6]
    assert result.nfe.tolist() == [2, 3, 4, 7]  # and the product that measures the residual
    assert calls == [7]


@each("i", range(4))
def test_a_sample_does_not_depend_on_the_rest_of_the_batch(i):
    a, b = with_conditions(9, [1.0, 3.0, 30.0, 300.0], 10), numbers(10)(4, 10)
    together = gmres(times(a), b, tol=1e-8, max_steps=50, restart=6)
    alone = gmres(times(a[i : i + 1]), b[i : i + 1], tol=1e-8, max_steps=50, restart=6)
    for name in ("steps", "nfe", "status"):
        assert int(getattr(alone, name)) == int(getattr(together, name)[i]), name
    torch.testing.assert_close(alone.value[0], together.value[i], rtol=1e-9, atol=1e-12)


@each("restart", [3, 5, None])
def test_restarts_converge_in_the_memory_they_are_given(restart):
    draw = numbers(11)
    a, b = torch.eye(20).double() + 0.3 * draw(3, 20, 20) / 20**0.5, draw(3, 20)
    widths = set()

    def matvec(v: Tensor) -> Tensor:
        widths.add(tuple(v.shape))
        return times(a)(v)

    result = gmres(matvec, b, tol=1e-10, max_steps=60, restart=restart)
    assert result.converged.all()
    assert widths == {(3, 20)}
    condition = torch.linalg.cond(a)
    assert (relative_error(result.value, torch.linalg.solve(a, b)) <= 1e-10 * condition).all()


@each("condition, tol", [(100, 1e-3), (1000, 0.1)])
def test_restarts_solve_a_slow_problem_at_the_rate_of_the_theory(condition, tol):
    # diag(1, κ) with b = (√κ, 1): the angle between r and A r is the largest there is, and stays
    # so: GMRES(1) reduces ‖r‖ by exactly (κ − 1)/(κ + 1) per cycle.
    a = torch.diag(torch.tensor([1.0, condition]).double()).expand(2, 2, 2)
    b = torch.tensor([[condition**0.5, 1.0]]).double().repeat(2, 1)
    expected = math.ceil(math.log(tol) / math.log((condition - 1) / (condition + 1)))
    result = gmres(times(a), b, tol=tol, max_steps=2 * expected, restart=1)
    assert result.converged.all()
    assert result.steps.tolist() == [expected, expected]


def test_a_cycle_without_progress_is_a_stall_and_ends_the_sample():
    # A cyclic shift: no Krylov space of fewer than D directions reduces the residual at all.
    product, calls = counted(lambda v: v.roll(1, dims=1))
    b = torch.zeros(1, 8).double().index_fill(1, torch.tensor([0]), 1.0)
    result = gmres(product, b, tol=1e-3, max_steps=1000, restart=7)
    assert result.status.tolist() == [Status.STALLED]
    assert calls == [8]  # one cycle, and the product that measures its residual
    assert gmres(product, b, tol=1e-3, max_steps=1000, restart=8).converged.all()


def test_the_step_limit_is_a_status_and_is_kept():
    a, b = with_conditions(12, [1e4, 1e4], 12), numbers(13)(2, 12)
    product, calls = counted(times(a))
    result = gmres(product, b, tol=1e-12, max_steps=5)
    assert (result.status == Status.STEP_LIMIT).all()
    assert result.steps.tolist() == [5, 5]
    assert calls == [6]
    assert (result.residual < b.norm(dim=1)).all()


def test_the_identity_breaks_down_happily_after_one_step():
    b = numbers(14)(3, 5)
    result = gmres(lambda v: v.clone(), b, tol=1e-15)
    assert result.steps.tolist() == [1, 1, 1]
    assert result.converged.all()
    torch.testing.assert_close(result.value, b, rtol=1e-15, atol=0)


@each("rank", [1, 2, 4])
def test_identity_plus_low_rank_needs_at_most_rank_plus_one_steps(rank):
    draw = numbers(15)
    a = torch.eye(12).double() + draw(3, 12, rank) @ draw(3, rank, 12) / 12
    b = draw(3, 12)
    result = gmres(times(a), b, tol=1e-12, max_steps=30)
    assert result.converged.all()
    assert (result.steps <= rank + 1).all()
    exact = torch.linalg.solve(a, b)
    assert (relative_error(result.value, exact) <= 1e-12 * torch.linalg.cond(a)).all()


def test_a_zero_right_hand_side_costs_nothing_and_gives_zero():
    b = numbers(16)(3, 4)
    b[1] = 0
    result = gmres(lambda v: 2 * v, b, tol=1e-12)
    assert result.converged.all()
    assert result.steps.tolist() == [1, 0, 1]
    assert result.nfe.tolist() == [2, 0, 2]
    assert (result.value[1] == 0).all()
    assert result.relative_residual[1] == 0
    product, calls = counted(lambda v: 2 * v)
    assert gmres(product, torch.zeros(2, 3), tol=1e-12).converged.all()
    assert calls == [0]


# What cannot be solved


@each("per_sample", [True, False])
def test_a_singular_inconsistent_system_does_not_claim_convergence(per_sample):
    draw = numbers(17)
    a = draw(3, 6, 5) @ draw(3, 5, 6)  # rank 5 of 6
    b = draw(3, 6)
    result = gmres(times(a), b, tol=1e-10, max_steps=30, per_sample=per_sample)
    assert not result.converged.any()
    assert torch.isfinite(result.value).all()
    # GMRES never makes the residual larger than that of x = 0, of its sample or of the batch.
    start = b.norm(dim=1) if per_sample else b.norm()
    assert (result.residual <= start * (1 + 1e-12)).all()


def test_the_zero_matrix_and_a_nilpotent_one_end_at_once():
    shift = torch.diag(torch.ones(3), 1).double()
    a = torch.stack((torch.zeros(4, 4).double(), shift))
    b = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 1]]).double()  # e₄ is not in the image of the shift
    result = gmres(times(a), b, tol=1e-10, max_steps=30)
    assert (result.status == Status.STALLED).all()
    assert (result.value == 0).all()
    assert result.relative_residual.tolist() == [1, 1]


def test_a_singular_but_consistent_system_is_solved():
    a = torch.diag_embed(torch.tensor([[1.0, 2.0, 3.0, 0.0]]).double())
    b = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).double()
    result = gmres(times(a), b, tol=1e-12)
    assert result.converged.all()
    torch.testing.assert_close(result.value[0], torch.tensor([1, 1 / 2, 1 / 3, 0]).double())


@each("first_bad", [0, 2])
def test_a_sample_whose_product_is_nan_leaves_the_others_exact(first_bad):
    draw = numbers(18)
    a, b = torch.eye(8).double() + 0.4 * draw(4, 8, 8) / 8**0.5, draw(4, 8)
    calls = [0]

    def matvec(v: Tensor) -> Tensor:
        product = times(a)(v)
        if calls[0] >= first_bad:
            product = product.index_fill(0, torch.tensor([1]), torch.nan)
        calls[0] += 1
        return product

    result = gmres(matvec, b, tol=1e-11, max_steps=20)
    assert result.status.tolist() == [0, int(Status.DIVERGED), 0, 0]
    assert torch.isfinite(result.value).all()
    others = torch.tensor([0, 2, 3])
    clean = gmres(times(a), b, tol=1e-11, max_steps=20)
    assert torch.equal(result.value[others], clean.value[others])
    assert result.steps[others].tolist() == clean.steps[others].tolist()


def test_the_operator_is_never_shown_what_is_not_finite():
    a, b = torch.eye(3).double() + 0.1, numbers(0)(3, 3)
    b[0, 1], b[1] = torch.nan, 0.0
    shown = []

    def matvec(v: Tensor) -> Tensor:
        shown.append(bool(v.isfinite().all()))
        return v @ a

    assert gmres(matvec, b).status.tolist() == [Status.DIVERGED, *[Status.CONVERGED] * 2]
    assert shown
    assert all(shown)


def test_a_right_hand_side_of_nan_is_lost_alone():
    b = numbers(19)(3, 4)
    b[0, 2] = torch.nan
    result = gmres(lambda v: 3 * v, b, tol=1e-12)
    assert result.status.tolist() == [int(Status.DIVERGED), 0, 0]
    assert torch.isfinite(result.value).all()
    torch.testing.assert_close(result.value[1:], b[1:] / 3)


# Operators that couple the samples


def coupled(seed: int, strength: float, shape: tuple[int, int] = (4, 5)) -> Tensor:
    size = shape[0] * shape[1]
    noise: Tensor = numbers(seed)(size, size) / size**0.5
    return torch.eye(size).double() + strength * noise


def as_batch(a: Tensor, shape: tuple[int, int] = (4, 5)) -> Callable[[Tensor], Tensor]:
    return lambda v: (a @ v.reshape(-1)).view(shape)


def test_one_space_for_the_batch_solves_an_operator_that_couples_samples():
    a, b = coupled(20, 0.6), numbers(21)(4, 5)
    result = gmres(as_batch(a), b, tol=1e-12, max_steps=20, per_sample=False)
    exact = torch.linalg.solve(a, b.reshape(-1)).view(4, 5)
    assert result.converged.all()
    assert len(result.steps.unique()) == 1
    error = (result.value - exact).norm() / exact.norm()
    assert float(error) <= 1e-12 * float(torch.linalg.cond(a))


@each("restart", [2, 4, None])
def test_a_space_for_each_sample_does_not_claim_to_have_solved_a_coupled_operator(restart):
    draw = numbers(22)
    for seed in range(40):
        a, b = coupled(seed, 0.15), draw(4, 5) * torch.tensor([[1.0], [1e-3], [1.0], [30.0]])
        result = gmres(as_batch(a), b, tol=1e-2, max_steps=12, restart=restart)
        true = (b - as_batch(a)(result.value)).norm(dim=1) / b.norm(dim=1)
        # CONVERGED is a claim about the returned x; 1e-9 is for rounding.
        assert (true[result.converged] <= 1e-2 * (1 + 1e-9)).all(), (seed, true, result.status)


def test_a_sample_solved_early_is_judged_by_the_final_state_of_its_batch_mates():
    # Sample 0 reads the last entry of sample 1, which only later cycles reach.
    chain = torch.eye(4).double() + torch.diag(torch.full((3,), 0.5).double(), -1)

    def matvec(v: Tensor) -> Tensor:
        return torch.stack((v[0] + v[1, 3], chain @ v[1]))

    b = torch.zeros(2, 4).double()
    b[:, 0] = 1
    result = gmres(matvec, b, tol=1e-3, max_steps=40, restart=1)
    true = (b - matvec(result.value)).norm(dim=1)
    assert (true[result.converged] <= 1e-3 * (1 + 1e-9)).all()
    torch.testing.assert_close(result.residual, true, rtol=1e-9, atol=1e-12)


@each("size", [1e-30, 1e-22, 1e25])
def test_tiny_and_huge_right_hand_sides_are_solved_like_those_of_order_one(size):
    # In float32 the square of 1e-22 underflows: its norm would be 0, and 0 would count as solved.
    a = torch.eye(6) + 0.5 * torch.randn(3, 6, 6) / 6**0.5
    b = torch.randn(3, 6)

    def matvec(v: Tensor) -> Tensor:
        return torch.bmm(a, v[:, :, None])[:, :, 0]

    one, scaled = gmres(matvec, b, tol=1e-5), gmres(matvec, size * b, tol=1e-5)
    torch.testing.assert_close(scaled.value / size, one.value, rtol=1e-4, atol=1e-5)
    assert scaled.steps.tolist() == one.steps.tolist()


def test_a_last_cycle_cut_short_is_the_step_limit_and_no_stall():
    a = torch.linspace(1, 30, 20).double()
    result = gmres(lambda v: a * v, torch.ones(1, 20).double(), tol=1e-10, max_steps=6, restart=5)
    assert result.status.tolist() == [Status.STEP_LIMIT]


# Settings and inputs


def test_what_is_not_a_batch_is_refused():
    with pytest.raises(TypeError, match=r"b.float\(\)"):
        gmres(lambda v: v, torch.ones(2, 3, dtype=torch.int64))
    for b in (torch.ones(3), torch.ones(0, 3), torch.ones(3, 0)):
        with pytest.raises(ValueError, match="non-empty"):
            gmres(lambda v: v, b)
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        gmres(lambda v: v[:, :2], torch.ones(2, 3))


@each("settings", [{"tol": 0.0}, {"tol": -1.0}, {"max_steps": 0}, {"restart": 0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        gmres(lambda v: v, torch.ones(2, 3), **settings)
    with pytest.raises(ValueError, match=next(iter(settings))):
        GMRES(**settings)


def test_a_misspelt_setting_is_refused_with_the_nearest_name():
    with pytest.raises(TypeError, match="did you mean 'restart'"):
        GMRES(restarts=3)  # type: ignore[call-arg]


def test_a_finished_sample_is_frozen_while_the_others_continue():
    draw = numbers(3)
    a = torch.eye(9).double() + torch.linspace(0.01, 0.9, 6)[:, None, None] * draw(6, 9, 9) / 3
    b = draw(6, 9)
    together = gmres(times(a), b, tol=1e-5)
    assert len(together.steps.unique()) > 2
    for i in range(6):
        alone = gmres(times(a[i : i + 1]), b[i : i + 1], tol=1e-5)
        assert int(alone.steps) == int(together.steps[i])
        torch.testing.assert_close(alone.value[0], together.value[i], rtol=0, atol=1e-12)
