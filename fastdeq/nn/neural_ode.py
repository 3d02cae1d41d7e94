"""The neural ODE baseline. Needs torchdiffeq (the extra `ode`), so nothing in fastdeq
imports this module: import `fastdeq.nn.neural_ode` itself, or use model=neural_ode."""

from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from fastdeq._fixed_point import unsolved
from fastdeq.adjoints.once import differentiable_once
from fastdeq.autocast import Precision
from fastdeq.autodiff import carries_tangent, edges_behind
from fastdeq.extras import extra_for
from fastdeq.flatten import Layout
from fastdeq.nn.base import AbstractCellLayer
from fastdeq.nn.call import CellCall
from fastdeq.nn.initializers import AbstractInitializer
from fastdeq.nn.inputs import tensors_in
from fastdeq.notation import State, StateMap
from fastdeq.solution import BackwardReport, Solution, SolveStats, Status, TraceKind
from fastdeq.timer import Stopwatch

with extra_for("fastdeq.nn.neural_ode"):
    from torchdiffeq import odeint_adjoint

Integrator: TypeAlias = Literal["dopri5", "bosh3", "dopri8", "adaptive_heun"]
"""Adaptive Runge–Kutta methods of torchdiffeq."""

_ONCE = (
    "a NeuralODE can be differentiated once, not twice: use UnrolledNetwork, or a "
    "DeepEquilibriumNetwork with the Unrolled adjoint, where a second derivative is needed"
)


class NeuralODE(AbstractCellLayer):
    """y = f(z(1), x) with dz/dt = f(z, x) and z(0) = z₀, zero by default (Chen et al. 2018, arXiv
    1806.07366, with the cell of arXiv 2201.12240, §4).

    Gradients by the continuous adjoint: the equation is integrated backwards in time together with
    its sensitivity, in constant memory, up to `tol`. One step size for the whole batch.

    Differentiable once, in reverse mode: the continuous adjoint's gradient has no derivative.

    cell, initializer, precision: as in `AbstractCellLayer`; gradients reach the tensors of the
        input in nested mappings, lists and tuples.
    method: of torchdiffeq. tol: relative and absolute, of the local error, in both directions.
    max_steps: in either direction.

    The solution: NFE counts all evaluations of the forward integration and the last f, the same for
    all samples; status NOT_SOLVED; `residual` is ‖f(z(1)) − z(1)‖, which need not be small. Its
    `backward.stats`: steps, seconds and NFE of the integration backwards, each an evaluation of f
    and a vjp.

    Raises: as `AbstractCellLayer`; also ValueError for an unknown method, tol or max_steps out of
    range, and an input whose tensors depend on each other or on the cell's parameters; RuntimeError
    where the integration takes too many steps, or too small ones, in forward-mode differentiation,
    and where its gradient is differentiated again.
    """

    def __init__(
        self,
        cell: nn.Module,
        *,
        method: Integrator = "dopri5",
        tol: float = 1e-3,
        max_steps: int = 1000,
        initializer: AbstractInitializer | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(cell, initializer, precision)
        if method not in get_args(Integrator):
            choices = ", ".join(get_args(Integrator))
            raise ValueError(f"method is {method!r}, but must be one of {choices}")
        if not tol > 0 or max_steps < 1:
            raise ValueError(f"tol ({tol}) must be above 0, max_steps ({max_steps}) at least 1")
        self.integrator, self.tol, self.max_steps = method, tol, max_steps

    def solve(self, f: StateMap, z0: State, trace: TraceKind | None) -> Solution:
        """Raises: as the class."""
        layout = Layout.of(z0)
        flow = _Flow(f, layout)
        start = layout.flatten(z0)
        leaves = _leaves(f)
        _check_mode(start, *leaves)
        _check_independent(leaves)
        times = torch.tensor([0.0, 1.0], dtype=start.dtype, device=start.device)
        # Steps that end at the given times: else the last one ends beyond them, and the result is
        # an interpolation of a lower order than the method's.
        forward, backward = (
            {"max_num_steps": self.max_steps, "step_t": end} for end in (times[1:], times[:1])
        )
        watch = Stopwatch(start.device)
        try:
            path: Tensor = odeint_adjoint(
                flow,
                start,
                times,
                rtol=self.tol,
                atol=self.tol,
                method=self.integrator,
                options=forward,
                adjoint_options=backward,
                adjoint_params=tuple(leaf for leaf in leaves if leaf.requires_grad),
            )
        except AssertionError as error:  # how torchdiffeq reports a failure
            raise RuntimeError(
                f"the ODE was not integrated to t = 1 ({error}): raise tol or max_steps, or "
                "regularize the Jacobian"
            ) from error
        watch.stop()
        z, report = path[-1], _reported(path, flow, (start, *leaves))
        steps = torch.full((len(z),), flow.steps, device=z.device)
        nfe = torch.full_like(steps, flow.evaluations + 1)  # the closing one
        solution = unsolved(layout, z0, z, flow(None, z), steps=steps, nfe=nfe)
        return replace(solution, elapsed=watch, backward=report)

    @property
    def settings(self) -> dict[str, Any]:
        return {"integrator": f"{self.integrator}(tol={self.tol}, max_steps={self.max_steps})"}


class _Flow:
    """f on flat states as torchdiffeq calls it; counts evaluations and (attempted) steps, in both
    directions."""

    def __init__(self, f: StateMap, layout: Layout) -> None:
        self.f, self.layout = f, layout
        self.evaluations = self.steps = 0

    def __call__(self, t: Any, z: Tensor) -> Tensor:
        self.evaluations += 1
        return self.layout.flatten_output(self.f(self.layout.unflatten(z)), z)

    def callback_step(self, t: Tensor, z: Tensor, dt: Tensor) -> None:
        """Called by torchdiffeq before every step."""
        self.steps += 1

    callback_step_adjoint = callback_step


def _reported(path: Tensor, flow: _Flow, inputs: tuple[Tensor, ...]) -> BackwardReport:
    """Filled in when torchdiffeq integrates back, at the gradient of the path, (T, B, D).

    Hooks on the node of that integration read the counters before and after it, and make its
    gradients raise when they are differentiated: torchdiffeq returns them without a graph. They
    reference no tensor that depends on the path, and stay: a second pass is reported again.

    inputs: everything that the path depends on.
    """
    report, node = BackwardReport(solves=False), path.grad_fn
    if node is None:
        return report
    batch, device = path.shape[1], path.device
    began: list[tuple[Stopwatch, int, int]] = []

    def begin(cotangents: Any) -> None:
        began.append((Stopwatch(device), flow.steps, flow.evaluations))

    def end(gradients: Any, cotangents: Any) -> Any:
        watch, steps, evaluations = began.pop()
        unknown = torch.full((batch,), torch.nan, device=device)
        report.stats = SolveStats(
            residual=unknown,
            relative_residual=unknown,
            steps=torch.full((batch,), flow.steps - steps, device=device),
            nfe=torch.full((batch,), flow.evaluations - evaluations, device=device),
            status=torch.full((batch,), int(Status.NOT_SOLVED), device=device),
            elapsed=watch.stop(),
        )
        return tuple(g if g is None else differentiable_once(g, inputs, _ONCE) for g in gradients)

    node.register_prehook(begin)
    node.register_hook(end)
    return report


def _leaves(f: StateMap) -> tuple[Tensor, ...]:
    """What f depends on besides z, each once: parameters of the cell and tensors of the input."""
    assert isinstance(f, CellCall)
    found = (*f.cell.parameters(), *tensors_in(f.x))
    return tuple({id(each): each for each in found}.values())


def _check_independent(leaves: tuple[Tensor, ...]) -> None:
    """Refuse inputs made from parameters of the cell or from each other: torchdiffeq takes partial
    derivatives along the whole graph, which would count those paths twice."""
    own = {id(leaf) for leaf in leaves}
    made = {(leaf.grad_fn, leaf.output_nr) for leaf in leaves}
    for leaf in leaves:
        for edge in edges_behind(leaf):
            if edge in made or id(getattr(edge[0], "variable", None)) in own:
                raise ValueError(
                    "tensors in the input of a NeuralODE depend on each other, or on parameters of "
                    "the cell, which its adjoint would count twice: give independent tensors, and "
                    "compute the others in the cell"
                )


def _check_mode(*inputs: Tensor) -> None:
    if any(carries_tangent(each) for each in inputs):
        raise RuntimeError(
            "forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad) do not pass "
            "through a NeuralODE: use reverse mode"
        )
