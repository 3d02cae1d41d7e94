"""L4: the neural ODE baseline. Needs torchdiffeq (the extra `ode`), so nothing in fastdeq
imports this module: import `fastdeq.layers.neural_ode` itself, or use model=neural_ode."""

from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from fastdeq.clock import Stopwatch
from fastdeq.fixed_point import unsolved
from fastdeq.layers.base import AbstractCellLayer
from fastdeq.layers.call import CellCall
from fastdeq.layers.initializers import AbstractInitializer
from fastdeq.notation import State, StateMap
from fastdeq.packing import Packing
from fastdeq.solution import BackwardReport, Solution, SolveStats, Status

try:
    from torchdiffeq import odeint_adjoint
except ImportError as error:
    raise ImportError(
        "neural ODEs need torchdiffeq: pip install torchdiffeq, or 'fastdeq[ode]'"
    ) from error

Integrator: TypeAlias = Literal["dopri5", "bosh3", "dopri8", "adaptive_heun"]
"""Adaptive Runge–Kutta methods of torchdiffeq."""


class NeuralODE(AbstractCellLayer):
    """y = f(z(1), x) with dz/dt = f(z, x) and z(0) = z₀, zero by default (Chen et al. 2018, arXiv
    1806.07366, with the cell of arXiv 2201.12240, §4).

    Gradients by the continuous adjoint: the equation is integrated backwards in time together with
    its sensitivity, in constant memory, up to `tol`. One step size for the whole batch.

    cell, initializer, depth: as in `AbstractCellLayer`; the input is a tensor or a tuple of them.
    method: of torchdiffeq. tol: relative and absolute, of the local error, in both directions.
    max_steps: in either direction.

    The solution: NFE counts all evaluations of the forward integration and the last f, the same for
    all samples; status NOT_SOLVED; `residual` is ‖f(z(1)) − z(1)‖, which need not be small. Its
    `backward.stats`: steps, seconds and NFE of the integration backwards, each an evaluation of f
    and a product with its transposed Jacobian.

    Raises: as `AbstractCellLayer`; also ValueError for an unknown method, or tol or max_steps out
    of range; RuntimeError where the integration takes too many steps, or too small ones.
    """

    def __init__(
        self,
        cell: nn.Module,
        *,
        method: Integrator = "dopri5",
        tol: float = 1e-3,
        max_steps: int = 1000,
        initializer: AbstractInitializer | None = None,
        depth: int | None = None,
    ) -> None:
        super().__init__(cell, initializer, depth)
        if method not in get_args(Integrator):
            choices = ", ".join(get_args(Integrator))
            raise ValueError(f"method is {method!r}, but must be one of {choices}")
        if not tol > 0 or max_steps < 1:
            raise ValueError(f"tol ({tol}) must be above 0, max_steps ({max_steps}) at least 1")
        self.integrator, self.tol, self.max_steps = method, tol, max_steps

    def evolve(self, f: StateMap, z0: State) -> Solution:
        """Raises: RuntimeError where the integration does not reach t = 1."""
        packing = Packing.of(z0)
        flow = _Flow(f, packing)
        start = packing.pack(z0)
        times = torch.tensor([0.0, 1.0], dtype=start.dtype, device=start.device)
        # Steps that end on the times asked for: else the last one goes beyond, and what is returned
        # is an interpolation of a lower order than the method's.
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
                adjoint_params=_leaves(f),
            )
        except AssertionError as error:  # how torchdiffeq gives up
            raise RuntimeError(
                f"the ODE was not integrated to t = 1 ({error}): raise tol or max_steps, or "
                "regularize the Jacobian"
            ) from error
        watch.stop()
        z, report = path[-1], _reported(path, flow)
        steps = torch.full((len(z),), flow.steps, device=z.device)
        nfe = torch.full_like(steps, flow.evaluations + 1)  # the closing one
        solution = unsolved(packing, z0, z, flow(None, z), steps=steps, nfe=nfe)
        return replace(solution, elapsed=watch, backward=report)

    @property
    def method(self) -> dict[str, Any]:
        return {"integrator": f"{self.integrator}(tol={self.tol}, max_steps={self.max_steps})"}


class _Flow:
    """f on flat states as torchdiffeq calls it; counts evaluations and (attempted) steps, in both
    directions."""

    def __init__(self, f: StateMap, packing: Packing) -> None:
        self.f, self.packing = f, packing
        self.evaluations = self.steps = 0

    def __call__(self, t: Any, z: Tensor) -> Tensor:
        self.evaluations += 1
        return self.packing.pack_output(self.f(self.packing.unpack(z)), z)

    def callback_step(self, t: Tensor, z: Tensor, dt: Tensor) -> None:
        """Called by torchdiffeq before every step."""
        self.steps += 1

    callback_step_adjoint = callback_step


def _reported(path: Tensor, flow: _Flow) -> BackwardReport:
    """Filled in when torchdiffeq integrates back, at the gradient of the path, (T, B, D).

    Hooks on the node of that integration read the counters before and after it. They hold no
    tensor, touch no gradient and stay: a second pass reports itself.
    """
    report, node = BackwardReport(solves=False), path.grad_fn
    if node is None:
        return report
    batch, device = path.shape[1], path.device
    began: list[tuple[Stopwatch, int, int]] = []

    def begin(cotangents: Any) -> None:
        began.append((Stopwatch(device), flow.steps, flow.evaluations))

    def end(gradients: Any, cotangents: Any) -> None:
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

    node.register_prehook(begin)
    node.register_hook(end)
    return report


def _leaves(f: StateMap) -> tuple[Tensor, ...]:
    """What f depends on beside z and gets gradients: the cell's parameters and the input."""
    assert isinstance(f, CellCall)
    inputs = f.x if isinstance(f.x, tuple) else (f.x,)
    found = [*f.cell.parameters(), *(x for x in inputs if isinstance(x, Tensor))]
    return tuple(leaf for leaf in found if leaf.requires_grad)
