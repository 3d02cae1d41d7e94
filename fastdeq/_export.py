"""Models with a fixed number of solver steps, for deployment by torch.export."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._pytree import tree_leaves, tree_map

from fastdeq._fixed_point import flat_map, unsolved
from fastdeq.flatten import Layout
from fastdeq.nn import DeepEquilibriumNetwork
from fastdeq.notation import State, StateMap
from fastdeq.settings import check_value
from fastdeq.solution import Solution
from fastdeq.solvers import (
    Anderson,
    LimitedMemoryBroydenSolver,
    Picard,
    ReversibleSolver,
)
from fastdeq.solvers.fixed import iterate

_STEPS_OF_FIXED_SHAPE = (Picard, Anderson, LimitedMemoryBroydenSolver, ReversibleSolver)


def export(
    model: nn.Module | Callable[[Any], Any], example: Any, *, steps: int | None = None
) -> ExportedProgram:
    """The model in evaluation mode as an `ExportedProgram`, x ↦ prediction, whose equilibrium
    layers take exactly `steps` steps.

    model: returns (prediction, solution), as `DEQChain` and the equilibrium layers, or the
        prediction alone. Or the method `model.explicit`: the prediction without a solve.
    example: an input of at least two samples. The batch size is dynamic where the model lets it
        be; all other sizes are those of the example.
    steps: K; None takes the `max_steps` of each layer's solver.

    The prediction equals that of the model with `max_steps` = K to rounding: a sample that meets
    the tolerance earlier keeps that state, others their best one. (A sample that would stall
    continues instead.) `torch.onnx.export(program)` takes it where the solver is Picard or
    ReversibleSolver.

    Raises: TypeError for a model that is not a module; ValueError for steps below 1, for fewer than
        two samples, for a layer whose solver decides on the host (use Picard, Anderson or
        LimitedMemoryBroydenSolver), and for control flow that depends on values of tensors.
    """
    module = model.__self__ if inspect.ismethod(model) else model
    if not isinstance(module, nn.Module):
        raise TypeError(f"export takes an nn.Module or its method `explicit`, not {model!r}")
    if steps is not None:
        check_value("steps", steps, int, {"at least": 1})
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    if not tensors or any(tensor.ndim == 0 or tensor.shape[0] < 2 for tensor in tensors):
        raise ValueError(
            "the example needs at least two samples, along the first axis of each of its tensors: "
            "torch.export takes a batch of one for a constant"
        )
    layers = [each for each in module.modules() if isinstance(each, DeepEquilibriumNetwork)]
    if module is model:  # `explicit` does not solve
        for layer in layers:
            _check_solver(layer)
    sizes = tree_map(lambda leaf: {0: Dim.AUTO} if isinstance(leaf, Tensor) else None, example)
    wrapper = _Prediction(module, model)
    # With gradients on, histories are not written in place: the program is differentiable, too.
    with _evaluating(module), _fixed_steps(layers, steps), torch.enable_grad():
        try:
            return torch.export.export(wrapper, (example,), dynamic_shapes=(sizes,), strict=False)
        except GuardOnDataDependentSymNode as error:
            raise ValueError(
                "the model's control flow depends on values of tensors, which an exported program "
                f"cannot: use torch.where in place of `if` ({str(error).splitlines()[0]})"
            ) from error


class _Prediction(nn.Module):
    """The prediction of a model that also returns a solution."""

    def __init__(self, module: nn.Module, call: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model = module
        self._call = [call]  # not registered as a module again

    def forward(self, x: Any) -> Any:
        found = self._call[0](x)
        solved = isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Solution)
        return found[0] if solved else found


def _check_solver(layer: DeepEquilibriumNetwork) -> None:
    if not isinstance(layer.solver, _STEPS_OF_FIXED_SHAPE):
        raise ValueError(
            f"export cannot trace {type(layer.solver).__name__}, which decides on the host: build "
            "the layer with Picard, Anderson or LimitedMemoryBroydenSolver"
        )
    if getattr(layer.solver, "history", None) is not None:
        raise ValueError(
            f"export keeps histories in the dtype of the states: leave "
            f"{type(layer.solver).__name__}.history out"
        )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training


@contextmanager
def _fixed_steps(layers: list[DeepEquilibriumNetwork], steps: int | None) -> Iterator[None]:
    """Within, the layers take a fixed number of steps."""
    try:
        for layer in layers:
            vars(layer)["solve"] = _solving(layer, steps)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("solve", None)


def _solving(layer: DeepEquilibriumNetwork, steps: int | None) -> Callable[..., Solution]:
    solver = layer.solver_of_call()
    count = solver.max_steps if steps is None else steps

    def solve(f: StateMap, z0: State, *_: Any, **__: Any) -> Solution:
        layout = Layout.of(z0)
        flat_f = flat_map(f, layout)
        z = iterate(solver, flat_f, layout.flatten(z0), count)
        taken = torch.full((z.shape[0],), count, device=z.device)
        return unsolved(layout, z0, z, flat_f(z), steps=taken, nfe=taken + 2)

    return solve
