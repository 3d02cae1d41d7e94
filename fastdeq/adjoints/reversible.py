"""Backpropagation through a reversible solver, whose states are reconstructed instead of kept."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from fastdeq.adjoints.base import AbstractAdjoint, Equilibrium, solve_without_graph
from fastdeq.adjoints.once import differentiable_once
from fastdeq.autodiff import carries_tangent
from fastdeq.notation import FlatMap
from fastdeq.rows import BatchMap
from fastdeq.settings import settings
from fastdeq.solution import Recording, SolveResult, Status
from fastdeq.solvers import AbstractSolver, ReversibleSolver
from fastdeq.solvers.loop import solve_with_memory
from fastdeq.solvers.reversible import Pairs, image
from fastdeq.solvers.termination import Iterate
from fastdeq.transforms import transformed

_ONCE = (
    "the Reversible adjoint can be differentiated once, not twice: use Implicit(order=2), or the "
    "Unrolled adjoint"
)


@settings
class Reversible(AbstractAdjoint):
    """The gradient of the iteration itself, as `Unrolled`, in memory that does not grow with the
    states of the steps: the backward pass runs the steps of `ReversibleSolver` backwards,
    a_{n−1} = (a_{n+1} − β f(a_n)) / (1 − β) (arXiv 2509.12917).

    Exact to the rounding of the reconstruction, which grows with every step backwards; it is
    compared with the pairs that the solver keeps (`keep_every`) and with z0. Memory: one evaluation
    of f, the kept pairs, and for each step a mask of the batch and the nodes of autograd's graph,
    without their tensors. Each evaluation of the solve is made again in the backward pass.

    A sample that diverged gets the Jacobian-free gradient. Differentiable once.

    Raises: ValueError for another solver than `ReversibleSolver`, and for one with damping=1. Warns
    (RuntimeWarning) in the backward pass where a state is not reconstructed to half of its digits.
    """

    def check(self, solver: AbstractSolver) -> None:
        """Refuse a solver whose steps cannot be run backwards."""
        if not isinstance(solver, ReversibleSolver):
            raise ValueError(
                f"the Reversible adjoint cannot run {type(solver).__name__} backwards: use the "
                "ReversibleSolver (solver=reversible) with it, or another adjoint"
            )
        if solver.damping == 1:
            raise ValueError(
                "the Reversible adjoint cannot run a solver with damping=1 backwards: use a "
                "damping below 1, or another adjoint"
            )

    def equilibrium(
        self, f: FlatMap, z0: Tensor, solver: AbstractSolver, record: Recording
    ) -> Equilibrium:
        if transformed():
            raise RuntimeError(
                "the Reversible adjoint does not work within transforms of torch.func: use the "
                "Unrolled adjoint, or reverse mode by torch.autograd"
            )
        if not torch.is_grad_enabled():
            return self.close(f, solve_without_graph(f, z0, solver, record))
        assert isinstance(solver, ReversibleSolver)
        tape = _Tape(f, solver)
        forward, pairs = solve_with_memory(solver, tape.map(), z0, record)
        tape.finish(forward, pairs)
        return self.close(f, forward)

    def close(self, f: FlatMap, forward: SolveResult) -> Equilibrium:
        lost = (forward.status == Status.DIVERGED)[:, None]
        z = torch.where(lost, forward.value.detach(), forward.value)
        output = f(z)
        value: Tensor = _Once.apply(output)  # type: ignore[no-untyped-call]
        return Equilibrium(value, output - z, forward)


class _Once(torch.autograd.Function):
    """The identity, whose gradient cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.save_for_backward(output)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        (w,) = cotangents
        return differentiable_once(w, (w, *ctx.saved_tensors), _ONCE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        raise RuntimeError(
            "the Reversible adjoint has no forward mode: use the Unrolled adjoint, or reverse mode"
        )


class _Tape:
    """f without the tensors that autograd saves of it: they are computed again where the backward
    pass needs them, at the reconstructed argument.

    The arguments a_n of the evaluations are z0 = a_0, then y and z of every step in turn: a_{2k−1}
    and a_{2k} of step k. A sample that has ended is evaluated at its final state.
    """

    def __init__(self, f: FlatMap, solver: ReversibleSolver) -> None:
        self._f, self._solver, self._count = f, solver, 0

    def map(self) -> FlatMap:
        """The map that the solver evaluates. (An attribute would be a reference cycle, which keeps
        the pairs alive.)"""
        if not isinstance(self._f, BatchMap):
            return self
        restrict = self._f.restrict
        return BatchMap(self, lambda rows: lambda z: self._recorded(restrict(rows), z, rows))

    def __call__(self, z: Tensor) -> Tensor:
        return self._recorded(self._f, z, None)

    def _recorded(self, f: FlatMap, z: Tensor, rows: Tensor | None) -> Tensor:
        n, given, requires_grad = self._count, [z], z.requires_grad
        self._count += 1
        if not n:
            self._z0 = z.detach()

        def evaluated() -> Tensor:
            if given:  # the first time; the graph must not keep the argument
                return f(given.pop())
            whole = self._argument(n)
            at = (whole if rows is None else whole[rows]).detach().requires_grad_(requires_grad)
            output = f(at)
            self._undo(whole, output.detach(), rows)
            return output

        with set_checkpoint_early_stop(False):
            output: Tensor = checkpoint(evaluated, use_reentrant=False, preserve_rng_state=False)
        if carries_tangent(output):
            raise RuntimeError(
                "forward-mode derivatives do not pass through the Reversible adjoint: use the "
                "Unrolled adjoint, or reverse mode"
            )
        return output

    def finish(self, result: SolveResult, pairs: Pairs) -> None:
        """The solve has ended."""
        sound = result.status != Status.DIVERGED
        self._active = [torch.ones_like(sound), *pairs.active]
        self._active = [active & sound for active in self._active]
        self._hold, self._end = result.value.detach(), (pairs.y.detach(), pairs.z.detach())
        self._kept = {**pairs.kept, len(pairs.active): self._end}
        self._rewind()

    def _rewind(self) -> None:
        """Begin a backward pass, at the last state."""
        self._n = 2 * (len(self._active) - 1)
        # a_n and a_{n+1}. Until it comes to the last argument of a sample, `_at` is that argument.
        self._at = self._ahead = self._end[1]
        self._warned = False

    @torch.no_grad()
    def _argument(self, n: int) -> Tensor:
        """What f was evaluated at, (B, D)."""
        if n > self._n:
            self._rewind()
        while n < self._n:  # evaluations of which nothing was saved
            at = self._shown()
            self._undo(at, self._f(at), None)
        return self._shown()

    def _shown(self) -> Tensor:
        if not self._n:
            return self._z0.clone()
        rows = self._active[(self._n + 1) // 2][:, None]
        return torch.where(rows, self._at.to(self._hold.dtype), self._hold)

    @torch.no_grad()
    def _undo(self, at: Tensor, output: Tensor, rows: Tensor | None) -> None:
        """Go from a_n to a_{n−1}. output: f at a_n, of all samples or of those in `rows`."""
        if rows is not None:
            output = torch.zeros_like(at).index_copy(0, rows, output)
        n, step = self._n, self._n // 2
        self._n = n - 1
        if not n:
            return
        on = self._active[step + 1] if step + 1 < len(self._active) else self._active[0] & False
        before = self._solver.unrelaxed(self._ahead, image(Iterate(at, output - at)))
        keep = on[:, None]
        before = torch.where(keep, before, self._at)
        ahead = torch.where(keep, self._at, self._ahead)
        if n % 2 == 0:  # the pair of a step is complete: take the true one where it is known
            ended = self._active[step] & ~on
            if step in self._kept:
                ended = self._active[step]
            y, z = self._kept.get(step, self._end)
            before = torch.where(ended[:, None], y, before)
            ahead = torch.where(ended[:, None], z, ahead)
        self._at, self._ahead = before, ahead
        if n == 1:
            self._compare(before, self._z0.double(), on)
        elif n % 2 and step in self._kept:  # a_{n−1} is the z of a kept pair
            self._compare(before, self._kept[step][1], on)
            self._at = torch.where(keep, self._kept[step][1], before)

    def _compare(self, found: Tensor, expected: Tensor, rows: Tensor) -> None:
        """Warn where a state is not reconstructed. Waits for the device, once for a kept pair."""
        error = (found - expected).masked_fill(~rows[:, None], 0.0).abs().amax()
        scale = self._hold.abs().amax().double() + expected.abs().amax()
        if self._warned:
            return
        if not bool(error <= torch.finfo(self._hold.dtype).eps ** 0.5 * scale):
            self._warned = True
            warnings.warn(
                "the Reversible adjoint did not reconstruct the states of the solve (an error of "
                f"{float(error / scale):.0e}), so the gradient is not exact: keep more of them "
                "with a smaller keep_every of the solver, or use a smaller damping",
                RuntimeWarning,
                stacklevel=2,
            )
