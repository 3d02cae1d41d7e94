"""Problems with their exact answers, and the solvers that are tried on them.

Every problem is in float64, seeded and small enough for dense algebra over the whole batch: its
equilibrium comes from a dense linear solve or a dense Newton iteration, its gradient from the
explicit Jacobian and `torch.linalg.solve`. Nothing here uses a solver or an adjoint of fastdeq.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

from fastdeq.flatten import Layout, map_scales
from fastdeq.notation import State
from fastdeq.settings import settings
from fastdeq.solvers import (
    AbstractSolver,
    Anderson,
    BroydenSolver,
    ContinuousSolver,
    Iterate,
    LimitedMemoryBroydenSolver,
    NewtonKrylov,
    Picard,
    ReversibleSolver,
    Step,
)
from fastdeq.solvers import Problem as Evaluations

SOLVERS: dict[str, Callable[..., AbstractSolver]] = {
    "picard": Picard,
    "picard_damped": partial(Picard, damping=0.4),
    "anderson": Anderson,
    "broyden": BroydenSolver,
    "lbroyden": LimitedMemoryBroydenSolver,
    "newton_krylov": NewtonKrylov,
    "reversible": ReversibleSolver,
    "tsit5": partial(ContinuousSolver, method="tsit5"),
    "bs3": partial(ContinuousSolver, method="bs3"),
    "vcab3": partial(ContinuousSolver, method="vcab3"),
}
CONTINUOUS = ("tsit5", "bs3", "vcab3")

# ∂f/∂z has the eigenvalue −3 in `non_contractive`, so the error triples at every plain step.
HOPELESS = {("picard", "non_contractive"), ("reversible", "non_contractive")}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """z = cell(z, x, *parameters) for a batch, and its properties.

    exact: (B, D), the equilibrium; at the rows that are not `solvable`, where no equilibrium
        exists, the start.
    solvable: (B,) bool. contractive: ‖∂f/∂z‖₂ < 1 everywhere, so that Picard iteration converges
        and the cheap gradients are descent directions.
    """

    name: str
    cell: Callable[..., State]
    x: Tensor
    parameters: tuple[Tensor, ...]
    z0: State
    exact: Tensor
    solvable: Tensor
    contractive: bool = True

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Everything that gets a gradient: the input and the parameters."""
        return (self.x, *self.parameters)

    @property
    def flat_z0(self) -> Tensor:
        return Layout.of(self.z0).flatten(self.z0)

    def f(self, z: State) -> State:
        return self.cell(z, self.x, *self.parameters)

    def flat_f(self, z: Tensor) -> Tensor:
        layout = Layout.of(self.z0)
        return layout.flatten_output(self.f(layout.unflatten(z)), z)

    def bound(self, *leaves: Tensor) -> "Problem":
        """The same problem with other values of its leaves (and an `exact` that no longer fits)."""
        return replace(self, x=leaves[0], parameters=leaves[1:])

    def rows(self, rows: Tensor) -> "Problem":
        """The problem of some of the samples."""
        z0 = map_scales(lambda scale: scale[rows], self.z0)
        return replace(
            self,
            x=self.x.detach()[rows].requires_grad_(),
            z0=z0,
            exact=self.exact[rows],
            solvable=self.solvable[rows],
        )

    def in_float32(self) -> "Problem":
        z0 = map_scales(Tensor.float, self.z0)
        leaves = [leaf.detach().float().requires_grad_() for leaf in self.leaves]
        return replace(self.bound(*leaves), z0=z0)

    @cached_property
    def jacobian(self) -> Tensor:
        """∂f/∂z at the equilibrium over the whole batch vector, (BD, BD)."""
        return dense_jacobian(self.flat_f, self.exact)

    @cached_property
    def amplification(self) -> float:
        """‖(I − J)⁻¹‖₂: how far from the equilibrium a residual of norm 1 can be."""
        eye = torch.eye(len(self.jacobian), dtype=self.jacobian.dtype)
        return float(torch.linalg.matrix_norm(torch.linalg.inv(eye - self.jacobian), ord=2))

    def gradient(self, w: Tensor) -> tuple[Tensor, ...]:
        """Of ⟨w, z*⟩ in all leaves: v = (I − Jᵀ)⁻¹ w by dense algebra, then one pull-back of f."""
        eye = torch.eye(len(self.jacobian), dtype=self.jacobian.dtype)
        v = torch.linalg.solve(eye - self.jacobian.mT, w.reshape(-1))
        return torch.autograd.grad(self.flat_f(self.exact), self.leaves, v.view_as(w))


@settings
class Scripted(AbstractSolver):
    """A stub that follows a script: script[step][sample] fills the entries of the sample's state.

    Row 0 is the start, which the caller passes as z0. What the script proposes is evaluated like
    any solver's step.
    gives_up_at: the step at which it reports that no sample can continue.
    """

    takes_one_evaluation = True

    script: tuple[tuple[float, ...], ...]
    gives_up_at: int | None = None

    def init(self, problem: Evaluations, first: Iterate) -> int:
        return 1

    def step(self, problem: Evaluations, current: Iterate, memory: int) -> tuple[Step, int]:
        row = torch.tensor(self.script[memory], dtype=current.z.dtype)[:, None]
        stalled = torch.full_like(problem.active, memory == self.gives_up_at)
        return Step(problem.evaluate(row.expand_as(current.z)), stalled), memory + 1


def dense_jacobian(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Of a map of (B, D) tensors, as one (BD, BD) matrix."""
    whole = torch.autograd.functional.jacobian(f, z)
    assert isinstance(whole, Tensor)
    return whole.reshape(z.numel(), z.numel()).detach()


def dense_newton(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """z = f(z) to rounding: 50 steps at most of Newton's method on the whole batch vector."""
    eye = torch.eye(z.numel(), dtype=z.dtype)
    for _ in range(50):
        g = (f(z) - z).detach()
        step = torch.linalg.solve(eye - dense_jacobian(f, z), g.reshape(-1)).view_as(z)
        z = z + step
        if float(step.norm()) <= 1e-15 * float(z.norm()):
            break
    residual = (f(z) - z).detach()
    assert float(residual.norm()) <= 1e-13 * float(z.norm()), "the oracle itself must be exact"
    return z


def _numbers(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return partial(torch.randn, generator=generator, dtype=torch.float64)


def _leaf(values: Tensor) -> Tensor:
    return values.detach().clone().requires_grad_()


def _made(
    name: str, cell: Callable[..., State], z0: State, x: Tensor, *parameters: Tensor, **flags: Any
) -> Problem:
    """Fill in the equilibrium by dense Newton (one step of which solves a linear problem)."""
    solvable = flags.pop("solvable", torch.ones(len(x), dtype=torch.bool))
    flat = Layout.of(z0).flatten(z0)
    leaves = [_leaf(leaf) for leaf in (x, *parameters)]
    problem = Problem(
        name=name,
        cell=cell,
        x=leaves[0],
        parameters=tuple(leaves[1:]),
        z0=z0,
        exact=flat,
        solvable=solvable,
        **flags,
    )
    part = problem.rows(solvable)
    exact = flat.clone()
    exact[solvable] = dense_newton(part.flat_f, part.flat_z0)
    return replace(problem, exact=exact)


def _affine(z: Tensor, x: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
    return z @ w.mT + x @ u.mT + b


def _tanh(z: Tensor, x: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(_affine(z, x, w, u, b))


def _log_input(z: Tensor, x: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(_affine(z, torch.log(x), w, u, b))


def _two_scales(
    z: tuple[Tensor, Tensor], x: Tensor, mix: Tensor, down: Tensor, up: Tensor, low: Tensor
) -> tuple[Tensor, Tensor]:
    image, vector = z
    channels = torch.einsum("oi,bihw->bohw", mix, image) + (vector @ up.mT)[:, :, None, None]
    pooled = image.mean(dim=(2, 3)) @ down.mT + vector @ low.mT
    return torch.tanh(channels + x[:, :, None, None]), torch.sin(pooled + x[:, :1])


def _of_norm(matrix: Tensor, norm: float) -> Tensor:
    scaled: Tensor = norm * matrix / torch.linalg.matrix_norm(matrix, ord=2)
    return scaled


def _with_eigenvalues(seed: int, eigenvalues: Tensor) -> Tensor:
    """A symmetric matrix with these eigenvalues: its norm is its spectral radius."""
    basis: Tensor = torch.linalg.qr(_numbers(seed)(len(eigenvalues), len(eigenvalues)))[0]
    return basis @ torch.diag(eigenvalues) @ basis.mT


def _spread(batch: int) -> Tensor:
    """Inputs of very different size, so that samples need different numbers of steps."""
    return torch.linspace(0.1, 4.0, batch, dtype=torch.float64)[:, None]


def linear(batch: int = 5) -> Problem:
    """z = Wz + Ux + b with a nonsymmetric W, ‖W‖₂ = 0.7."""
    n = _numbers(1)
    w, u, b = _of_norm(n(8, 8), 0.7), n(8, 3), n(8)
    return _made("linear", _affine, 0.1 * n(batch, 8), _spread(batch) * n(batch, 3), w, u, b)


def tanh(batch: int = 5) -> Problem:
    """z = tanh(Wz + Ux + b), ‖W‖₂ = 0.8: large inputs saturate and converge at once."""
    n = _numbers(2)
    w, u, b = _of_norm(n(8, 8), 0.8), n(8, 3), 0.3 * n(8)
    return _made("tanh", _tanh, 0.1 * n(batch, 8), _spread(batch) * n(batch, 3), w, u, b)


def two_scale(batch: int = 4) -> Problem:
    """An image (B, 3, 2, 2) and a vector (B, 4) that feed into each other, contractive."""
    n = _numbers(3)
    # ‖∂f/∂z‖₂ ≤ 0.4 + 0.4 + 0.1 · 2 + 0.3 · 0.5 … < 1, `up` counted √4 times for its 4 pixels.
    weights = (
        _of_norm(n(3, 3), 0.4),
        _of_norm(n(4, 3), 0.3),
        _of_norm(n(3, 4), 0.1),
        _of_norm(n(4, 4), 0.4),
    )
    z0 = (0.1 * n(batch, 3, 2, 2), 0.1 * n(batch, 4))
    return _made("two_scale", _two_scales, z0, _spread(batch) * n(batch, 3), *weights)


def nearly_singular(batch: int = 4) -> Problem:
    """z = Wz + Ux + b, spectral radius 0.98.

    (I − J)⁻¹ amplifies by 50; Picard gains 2 % per step.
    """
    n = _numbers(4)
    eigenvalues = torch.tensor([0.98, 0.9, 0.5, 0.1, -0.3, -0.7], dtype=torch.float64)
    w, u, b = _with_eigenvalues(5, eigenvalues), n(6, 3), n(6)
    return _made("nearly_singular", _affine, n(batch, 6), _spread(batch) * n(batch, 3), w, u, b)


def non_contractive(batch: int = 4) -> Problem:
    """z = Wz + Ux + b with eigenvalues of W in [−3, 0.5]: Picard iteration diverges, the flow
    dz/dt = f(z) − z converges, its eigenvalues being in [−4, −0.5]."""
    n = _numbers(6)
    eigenvalues = torch.tensor([-3.0, -2.2, -1.1, -0.4, 0.1, 0.5], dtype=torch.float64)
    w, u, b = _with_eigenvalues(7, eigenvalues), n(6, 3), n(6)
    x = _spread(batch) * n(batch, 3)
    return _made("non_contractive", _affine, n(batch, 6), x, w, u, b, contractive=False)


def nan_for_one_sample(batch: int = 5) -> Problem:
    """z = tanh(Wz + U log x + b) where sample 2 has a negative input, so that f is NaN there."""
    n = _numbers(8)
    w, u, b = _of_norm(n(8, 8), 0.8), n(8, 3), 0.3 * n(8)
    x = _spread(batch) * n(batch, 3).exp()
    x[2, 0] = -1.0
    solvable = torch.arange(batch) != 2
    return _made("nan_for_one_sample", _log_input, n(batch, 8), x, w, u, b, solvable=solvable)


FACTORIES: dict[str, Callable[..., Problem]] = {
    factory.__name__: factory
    for factory in (linear, tanh, two_scale, nearly_singular, non_contractive, nan_for_one_sample)
}


@cache
def problem_named(name: str) -> Problem:
    """Made once per session; tests differentiate with `autograd.grad`, which leaves no `.grad`."""
    return FACTORIES[name]()
