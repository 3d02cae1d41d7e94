"""Wrong arguments are refused with the cure; and cells that become non-finite."""

import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdeq import GMRES, DeepEquilibriumNetwork, Status, fixed_depth, fixed_point, gmres
from fastdeq.adjoints import (
    Direct,
    Implicit,
    JacobianFree,
    Neumann,
    Phantom,
    Shine,
    Unrolled,
)
from fastdeq.nn import (
    DenseCell,
    ExplicitNetwork,
    SkipDeepEquilibriumNetwork,
    VariationalDropout,
    Zeros,
)
from fastdeq.regularizers import jacobian_loss, spectral_radius
from fastdeq.solvers import Anderson, NewtonKrylov, Picard, solve
from tests.loops import each

ADJOINTS = [Implicit(), Direct(), Neumann(), Shine(), JacobianFree(), Phantom(), Unrolled()]


def identity(z: Any) -> Any:
    return z


def refused(error: type[Exception], *parts: str) -> Any:
    """Expect an error whose message holds all parts, in this order."""
    return pytest.raises(error, match=".*".join(re.escape(part) for part in parts))


def refused_by_both(f: Any, z0: Any, error: type[Exception], *parts: str) -> None:
    """The solve and the unrolled loop raise the same error."""
    with refused(error, *parts):
        fixed_point(f, z0)
    with refused(error, *parts):
        fixed_depth(f, z0, depth=2)


# f and z0


def test_the_error_for_a_changed_shape_names_both_shapes():
    refused_by_both(
        lambda z: z[:, :2],
        torch.zeros(4, 3),
        ValueError,
        "f(z) has shape (4, 2) but z has shape (4, 3)",
        "restore the shape",
    )


def test_the_error_for_a_changed_batch_names_both_shapes():
    refused_by_both(lambda z: z[:2], torch.zeros(4, 3), ValueError, "(2, 3)", "(4, 3)")


def test_the_error_for_a_changed_scale_names_all_shapes():
    z0 = (torch.zeros(4, 3), torch.zeros(4, 2, 2))
    refused_by_both(
        lambda z: (z[0], z[1][:, 0]), z0, ValueError, "[(4, 3), (4, 2)]", "[(4, 3), (4, 2, 2)]"
    )


def test_the_error_for_a_dropped_scale_names_all_shapes():
    z0 = (torch.zeros(4, 3), torch.zeros(4, 2))
    refused_by_both(lambda z: (z[0],), z0, ValueError, "(4, 3)", "[(4, 3), (4, 2)]")


@each(
    "f, z0",
    [
        (lambda z: (z,), torch.zeros(4, 3)),
        (lambda z: z[0], (torch.zeros(4, 3),)),
    ],
)
def test_the_error_for_a_tuple_in_place_of_a_tensor_says_so(f, z0):
    refused_by_both(f, z0, ValueError, "f(z)", "tuple")


@each("output", [None, 3.0, "z", [torch.zeros(4, 3)]])
def test_a_cell_that_does_not_return_a_tensor_is_refused(output):
    wanted = "f(z) must be a tensor or a tuple of tensors"
    refused_by_both(lambda z: output, torch.zeros(4, 3), TypeError, wanted)


@each("z0", [None, 3.0, [torch.zeros(4, 3)], (torch.zeros(4, 3), 1)])
def test_a_start_that_is_not_a_tensor_is_refused(z0):
    refused_by_both(identity, z0, TypeError, "z0 must be a tensor or a tuple of tensors")


@each("dtype", [torch.int64, torch.bool, torch.uint8])
def test_a_start_of_whole_numbers_is_refused_with_the_cure(dtype):
    refused_by_both(identity, torch.zeros(4, 3, dtype=dtype), TypeError, str(dtype), "z0.float()")
    mixed = (torch.zeros(4, 3), torch.zeros(4, 2, dtype=dtype))
    refused_by_both(identity, mixed, TypeError, str(dtype), "z0.float()")


def test_a_complex_start_is_refused_with_view_as_real():
    z0 = torch.zeros(4, 3, dtype=torch.complex64)
    refused_by_both(identity, z0, TypeError, "z0 has dtype torch.complex64", "torch.view_as_real")
    refused_by_both(identity, (torch.zeros(4, 3), z0), TypeError, "complex64", "torch.view_as_real")


NUMBERS = {
    torch.complex64: "torch.view_as_real",
    torch.complex128: "torch.view_as_real",
    torch.int64: "f(z).float()",
    torch.uint8: "f(z).float()",
    torch.bool: "f(z).float()",
}


@each("dtype", NUMBERS)
def test_an_f_that_returns_another_kind_of_number_is_refused_with_the_cure(dtype):
    parts = (f"f(z) has dtype {dtype}", NUMBERS[dtype])
    refused_by_both(lambda z: z.to(dtype), torch.zeros(4, 3), TypeError, *parts)
    scales = (torch.zeros(4, 3), torch.zeros(4, 2))
    refused_by_both(lambda z: (z[0], z[1].to(dtype)), scales, TypeError, *parts)
    with refused(TypeError, *parts):
        solve(Picard(), lambda z: z.to(dtype), torch.zeros(4, 3))
    for measured in (jacobian_loss, spectral_radius):
        with refused(TypeError, *parts):
            measured(lambda z: z.to(dtype), torch.zeros(4, 3))


def test_an_f_that_turns_complex_on_the_way_is_refused_when_it_does():
    def f(z: Any) -> Any:  # from the second evaluation on
        return z + 1 if (z == 0).all() else torch.sqrt(z.to(torch.complex64))

    refused_by_both(f, torch.zeros(4, 3), TypeError, "f(z) has dtype torch.complex64")


def test_a_complex_equilibrium_is_found_by_its_real_and_imaginary_parts():
    # z = 0.5 i z + 1 has the solution 1 / (1 − 0.5 i) = 0.8 + 0.4 i.
    def f(z: Any) -> Any:
        return torch.view_as_real(0.5j * torch.view_as_complex(z) + 1)

    found = fixed_point(f, torch.zeros(2, 3, 2, dtype=torch.float64), solver=Picard(tol=1e-12))
    assert found.converged.all()
    expected = torch.tensor([0.8, 0.4], dtype=torch.float64).expand(2, 3, 2)
    torch.testing.assert_close(found.value, expected)


@each("dtype", [torch.float64, torch.bfloat16])
def test_floating_point_numbers_of_another_width_are_taken(dtype):
    found = fixed_point(lambda z: (0.5 * z + 1).to(dtype), torch.zeros(2, 3))
    assert found.converged.all()
    torch.testing.assert_close(found.value, torch.full((2, 3), 2.0), rtol=1e-2, atol=0)


@each("dtype", [torch.int64, torch.complex64])
def test_regularizers_refuse_a_state_of_another_kind_of_number_by_its_name(dtype):
    for measured in (jacobian_loss, spectral_radius):
        with refused(TypeError, f"z has dtype {dtype}"):
            measured(identity, torch.zeros(4, 3, dtype=dtype))


@each("shape", [(4, 0), (0, 0), ()])
def test_an_empty_or_unbatched_start_is_refused(shape):
    refused_by_both(
        identity, torch.zeros(shape), ValueError, f"z0 has shape {shape}", "first axis is the batch"
    )


def test_an_empty_tuple_of_scales_is_refused():
    refused_by_both(identity, (), ValueError, "at least one scale")


def test_scales_that_disagree_about_the_batch_are_refused():
    z0 = (torch.zeros(4, 3), torch.zeros(5, 3))
    refused_by_both(identity, z0, ValueError, "batch sizes [4, 5]", "the same")


@each("depth", [0, -1])
def test_a_depth_below_one_is_refused(depth):
    with refused(ValueError, f"depth is {depth}", "at least 1"):
        fixed_depth(identity, torch.zeros(4, 3), depth=depth)
    with refused(ValueError, f"depth is {depth}", "at least 1"):
        DeepEquilibriumNetwork(DenseCell(3))(torch.zeros(4, 3), depth=depth)


# Solvers and adjoints


@each("solver", ["anderson", None, Implicit(), GMRES()])
def test_what_is_not_a_solver_is_refused_with_an_example(solver):
    with refused(TypeError, "is not an AbstractSolver", "fastdeq.solvers.Anderson()"):
        fixed_point(identity, torch.zeros(4, 3), solver=solver)


@each("adjoint", ["implicit", None, Anderson()])
def test_what_is_not_an_adjoint_is_refused_with_an_example(adjoint):
    with refused(TypeError, "is not an AbstractAdjoint", "fastdeq.adjoints.Implicit()"):
        fixed_point(identity, torch.zeros(4, 3), adjoint=adjoint)


def test_the_error_for_a_class_in_place_of_an_instance_says_so():
    wrong: Any = Anderson
    with refused(TypeError, "is not an AbstractSolver: give an instance"):
        fixed_point(identity, torch.zeros(4, 3), solver=wrong)
    with refused(TypeError, "is not an AbstractAdjoint: give an instance"):
        fixed_point(identity, torch.zeros(4, 3), adjoint=Phantom)  # type: ignore[arg-type]


def test_an_adjoint_that_cannot_serve_the_solver_names_those_that_can():
    with refused(ValueError, "NewtonKrylov", "use the Implicit adjoint"):
        fixed_point(identity, torch.zeros(4, 3), solver=NewtonKrylov(), adjoint=Unrolled())


def test_an_unknown_trace_is_refused_with_the_choices():
    with refused(ValueError, "'residuals'", "'states'"):
        fixed_point(identity, torch.zeros(4, 3), trace="residual")  # type: ignore[arg-type]


def test_a_solver_takes_flat_states_and_names_fixed_point_for_others():
    with refused(ValueError, "(2, 3, 4)", "fixed_point takes any"):
        solve(Picard(), identity, torch.zeros(2, 3, 4))
    with refused(TypeError, "torch.int64", "z0.float()"):
        solve(Picard(), identity, torch.zeros(2, 3, dtype=torch.int64))
    with refused(TypeError, "z0 has dtype torch.complex64", "torch.view_as_real"):
        solve(Picard(), identity, torch.zeros(2, 3, dtype=torch.complex64))


def test_gmres_refuses_what_is_not_a_batch_of_right_hand_sides():
    with refused(TypeError, "b.float()"):
        gmres(identity, torch.ones(2, 3, dtype=torch.int64))
    with refused(ValueError, "non-empty (B, ...)"):
        gmres(identity, torch.ones(3))
    with refused(ValueError, "A v has shape (2, 2), b has (2, 3)"):
        gmres(lambda v: v[:, :2], torch.ones(2, 3))
    with refused(TypeError, "b has dtype torch.complex64", "torch.view_as_real"):
        gmres(identity, torch.ones(2, 3, dtype=torch.complex64))
    with refused(TypeError, "A v has dtype torch.complex64", "torch.view_as_real"):
        gmres(lambda v: v + 1j, torch.ones(2, 3))
    with refused(TypeError, "A v has dtype torch.int64"):
        gmres(lambda v: v.long(), torch.ones(2, 3))


# Layers


class WithExtra(DenseCell):
    def __init__(self, extra: nn.Module) -> None:
        super().__init__(4)
        self.extra = extra


@each(
    "module",
    [
        nn.Dropout(0.1),
        nn.Dropout2d(0.1),
        nn.AlphaDropout(0.1),
        nn.MultiheadAttention(4, 2, dropout=0.1),
        nn.LSTM(4, 4, num_layers=2, dropout=0.1),
        nn.TransformerEncoderLayer(4, 2),
    ],
)
def test_ordinary_dropout_in_a_cell_is_refused_with_its_name_and_the_cure(module):
    with refused(ValueError, "the cell contains", "('extra", "VariationalDropout"):
        DeepEquilibriumNetwork(WithExtra(module))


@each(
    "module", [VariationalDropout(0.1), nn.Dropout(0.0), nn.MultiheadAttention(4, 2), nn.LSTM(4, 4)]
)
def test_modules_that_draw_nothing_new_are_accepted(module):
    DeepEquilibriumNetwork(WithExtra(module))


def test_a_cell_that_is_not_a_module_is_refused_with_the_cure():
    with refused(TypeError, "the cell is a function", "use fixed_point for a plain function"):
        DeepEquilibriumNetwork(lambda z, x: z)  # type: ignore[arg-type]


def test_zeros_beside_an_explicit_network_are_refused():
    with refused(ValueError, "leave out `zeros`"):
        SkipDeepEquilibriumNetwork(DenseCell(4), nn.Linear(4, 4), zeros=Zeros([4]))


@each("network", [torch.tanh, nn.Linear])
def test_an_explicit_network_that_is_not_a_module_is_refused(network):
    # If accepted, its parameters would be missing from the layer's.
    with refused(TypeError, "nn.Module"):
        SkipDeepEquilibriumNetwork(DenseCell(4), network)
    with refused(TypeError, "nn.Module"):
        ExplicitNetwork(network)


def test_a_module_in_place_of_an_initializer_is_refused_with_the_cure():
    with refused(TypeError, "initializer", "SkipDeepEquilibriumNetwork"):
        DeepEquilibriumNetwork(DenseCell(4), initializer=nn.Linear(4, 4))  # type: ignore[arg-type]


def test_an_input_of_whole_numbers_is_refused_with_what_the_layer_needs():
    tokens = torch.ones(2, 4, dtype=torch.int64)
    with refused(TypeError, "torch.int64", "float()"):
        DeepEquilibriumNetwork(DenseCell(4))(tokens)


class _Cast(nn.Module):
    """To another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


@each("dtype", [torch.complex64, torch.int64])
def test_a_prediction_of_another_kind_of_number_is_refused(dtype):
    layer = SkipDeepEquilibriumNetwork(DenseCell(4), _Cast(dtype))
    with refused(TypeError, f"z0 has dtype {dtype}"):
        layer(torch.randn(2, 4))


# Cells that turn non-finite


@each("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda adjoint: type(adjoint).__name__)
def test_a_non_finite_sample_is_warned_of_and_marked_and_leaves_the_others_alone(adjoint, bad):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spoiled = x.clone()
    spoiled[1] = bad

    def solved(x: Tensor) -> Any:
        def f(z: Any) -> Any:
            return 0.5 * z + x

        return fixed_point(f, torch.zeros_like(x), adjoint=adjoint)

    good = solved(x)
    with pytest.warns(RuntimeWarning, match="not finite at the returned state of 1 of 3 samples"):
        found = solved(spoiled)
    assert torch.isfinite(found.value).all()
    assert found.status.tolist() == [Status.CONVERGED, Status.DIVERGED, Status.CONVERGED]
    assert torch.equal(found.value[[0, 2]], good.value[[0, 2]])
    assert "1 diverged" in found.summary()


def test_a_start_that_is_not_finite_ends_as_diverged_alone():
    def f(z: Any) -> Any:
        return 0.5 * z + 1

    z0 = torch.zeros(3, 4)
    z0[1, 2] = torch.nan
    found: Any = fixed_point(f, z0)
    assert found.status.tolist() == [Status.CONVERGED, Status.DIVERGED, Status.CONVERGED]
    assert torch.isfinite(found.value).all()


def test_a_sample_whose_backward_solve_fails_gets_the_jacobian_free_gradient_with_a_warning():
    class Poisoned(torch.autograd.Function):
        """Identity; NaN in the backward pass of sample 1."""

        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            return z.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            (g,) = grads
            return torch.where(torch.tensor([[False], [True], [False]]), torch.nan, g)

    x = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    found: Any = fixed_point(
        lambda z: 0.5 * Poisoned.apply(z) + x,
        torch.zeros(3, 2, dtype=torch.float64),
        solver=Picard(tol=1e-6),
        adjoint=Implicit(solver=GMRES(tol=1e-12)),
    )
    with pytest.warns(RuntimeWarning, match="backward solve failed for 1 of 3 samples"):
        found.value.sum().backward()
    # (I − J)⁻¹ = 2 for the good samples; the bad one falls back to 1.
    wanted = torch.tensor([[2.0], [1.0], [2.0]], dtype=torch.float64).expand(3, 2)
    torch.testing.assert_close(x.grad, wanted)
    assert found.backward.stats.status[1] == Status.DIVERGED


@each("entry", ["fixed_point", "fixed_depth"])
def test_an_f_that_writes_into_its_argument_is_refused_and_names_the_cure(entry):
    z0 = torch.ones(2, 3)
    entries: dict[str, Any] = {
        "fixed_point": fixed_point,
        "fixed_depth": partial(fixed_depth, depth=2),
    }
    with pytest.raises(ValueError, match=r"in place[^;]*torch\.relu"):
        entries[entry](lambda z: z.mul_(0.5).add_(1), z0)


def test_in_inference_mode_an_f_that_writes_into_its_argument_is_given_a_copy():
    with torch.inference_mode():
        solution = fixed_point(lambda z: z.mul_(0.5).add_(1), torch.ones(2, 3), solver=Picard())
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, torch.full((2, 3), 2.0), atol=1e-2, rtol=0)
