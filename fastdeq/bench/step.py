"""The training step that is compared: of a configuration, or of a user's own function."""

import inspect
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastdeq import DeepEquilibriumNetwork, fixed_point
from fastdeq.adjoints import AbstractAdjoint, JacobianFree
from fastdeq.autocast import Precision, in_bf16
from fastdeq.autodiff import edges_behind
from fastdeq.experiment.parts import Parts
from fastdeq.flatten import scales_of
from fastdeq.notation import State, StateMap
from fastdeq.solution import Solution
from fastdeq.solvers import AbstractSolver, Picard

Forward: TypeAlias = Callable[
    [AbstractSolver, AbstractAdjoint, Precision | None], tuple[Tensor, Solution]
]


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """A forward pass with any solver, adjoint and precision, to be followed by a backward pass.

    forward: returns the loss and the solution. parameters: what the loss is differentiated for.
    autocast: makes the context of the forward pass.
    """

    forward: Forward
    parameters: Sequence[Tensor]
    autocast: Callable[[], AbstractContextManager[Any]]

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return self.parameters[0].device


def configured_step(parts: Parts) -> TrainingStep:
    """The model, the batch and the loss of a configuration.

    Raises: ValueError for a model without a solver, or with another one.
    """
    layer = parts.task.model.equilibrium
    if not isinstance(layer, DeepEquilibriumNetwork):
        raise ValueError(
            f"the model has a {type(layer).__name__}, without a solver and an adjoint to compare: "
            "choose model=deq, skip_deq, mdeq or skip_mdeq"
        )

    def forward(
        solver: AbstractSolver, adjoint: AbstractAdjoint, precision: Precision | None
    ) -> tuple[Tensor, Solution]:
        layer.solver, layer.adjoint, layer.precision = solver, adjoint, precision
        loss, solution, _ = parts.task.evaluate(parts.batch, 0)
        return loss, solution

    parameters = [each for each in parts.task.parameters() if each.requires_grad]
    return TrainingStep(forward=forward, parameters=parameters, autocast=parts.autocast)


def own_step(path: str, per_sample: bool) -> TrainingStep:
    """The step of `package.module:function`, a function without arguments. It returns (cell, x),
    with a module that is called as cell(z, x), or (f, z0), with a function that is called as f(z).
    The loss is a fixed linear function of z*. per_sample: of the solvers.

    Raises: ValueError that says what is wrong with the function or its result.
    """
    found = _called(path)
    if not isinstance(found, tuple) or len(found) != 2 or not callable(found[0]):
        raise ValueError(
            f"{path} returns {_described(found)}, but must return (cell, x), a module and its "
            "input, or (f, z0), a function of the state and its start"
        )
    solve = _of_cell(*found) if isinstance(found[0], nn.Module) else _of_function(*found)
    parameters = _parameters(path, solve, per_sample)

    def forward(
        solver: AbstractSolver, adjoint: AbstractAdjoint, precision: Precision | None
    ) -> tuple[Tensor, Solution]:
        solution = solve(solver, adjoint, precision)
        return _loss(solution.value), solution

    return TrainingStep(forward=forward, parameters=parameters, autocast=nullcontext)


_Solve: TypeAlias = Callable[[AbstractSolver, AbstractAdjoint, Precision | None], Solution]


def _called(path: str) -> object:
    sys.path.insert(0, os.getcwd())  # as python -m has it
    try:
        function = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} cannot be imported: {error}") from error
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise ValueError(f"{path} is of type {type(function).__name__}, but must be a function")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ValueError(f"{path} must be a function without arguments: {error}") from error
    try:
        return function()
    except Exception as error:
        raise ValueError(f"{path} raises {type(error).__name__}: {error}") from error


def _described(found: object) -> str:
    if isinstance(found, tuple):
        return f"({', '.join(type(each).__name__ for each in found)})"
    return f"one {type(found).__name__}"


def _of_cell(cell: nn.Module, x: Any) -> _Solve:
    def solve(
        solver: AbstractSolver, adjoint: AbstractAdjoint, precision: Precision | None
    ) -> Solution:
        layer = DeepEquilibriumNetwork(cell, solver=solver, adjoint=adjoint, precision=precision)
        solution: Solution = layer(x)[1]
        return solution

    return solve


def _of_function(f: StateMap, z0: State) -> _Solve:
    def solve(
        solver: AbstractSolver, adjoint: AbstractAdjoint, precision: Precision | None
    ) -> Solution:
        used = f if precision is None else lambda z: in_bf16(f, z)
        return fixed_point(used, z0, solver=solver, adjoint=adjoint)

    return solve


def _parameters(path: str, solve: _Solve, per_sample: bool) -> list[Tensor]:
    """What f depends on and can be trained, found behind one evaluation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solution = solve(Picard(max_steps=1, per_sample=per_sample), JacobianFree(), None)
    scales = scales_of(solution.value)
    if not all(bool(torch.isfinite(scale).all()) for scale in (*scales, solution.residual)):
        raise ValueError(f"f of {path} is not finite at its start: look for NaN in its input")
    leaves = {
        id(node.variable): node.variable
        for scale in scales
        for node, _ in edges_behind(scale)
        if hasattr(node, "variable")
    }
    if not leaves:
        raise ValueError(
            f"f of {path} depends on no tensor that requires a gradient, so that there are no "
            "gradients to compare: give parameters, or an input with requires_grad=True"
        )
    return list(leaves.values())


def _loss(z: State) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.stack(
        [
            (z * torch.randn(z.shape, generator=draw, dtype=z.dtype).to(z.device)).mean()
            for z in scales_of(z)
        ]
    ).sum()
