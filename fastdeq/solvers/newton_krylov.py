"""Newton's method with matrix-free GMRES."""

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from fastdeq.autodiff import jvp, unfused_attention
from fastdeq.krylov import GMRES
from fastdeq.norms import finite
from fastdeq.settings import setting, settings
from fastdeq.solvers.base import AbstractSolver, Problem, Step
from fastdeq.solvers.line_search import norm_descent
from fastdeq.solvers.termination import Iterate


@settings
class NewtonKrylov(AbstractSolver):
    """z ← z + α d with (I − J) d = g by GMRES on Jacobian-vector products (Knoll & Keyes 2004), α
    by norm descent (Li & Fukushima 2000).

    krylov_tol: relative residual to which each linear problem is solved (the forcing term).
    krylov_steps: jvps at most in one Newton step.
    line_search_steps: shorter steps tried at most; 0 switches the search off.
    A jvp counts as one evaluation of f in the NFE; it costs about two.

    The jvps are exact, by forward-mode automatic differentiation, so f must consist of
    operations that have it. Most of PyTorch's do, and attention is computed without its fused
    kernels, which do not; a hand-written autograd.Function needs a `jvp`, and nn.LSTM on the CPU
    `torch.backends.mkldnn.flags(enabled=False)`.

    Raises (in a solve): RuntimeError in inference mode, where PyTorch drops forward-mode
    derivatives, and inside another forward-mode differentiation, which PyTorch does not nest;
    NotImplementedError for an operation without forward mode.
    """

    differentiable = False

    krylov_tol: float = setting(default=1e-2, above=0, at_most=1)
    krylov_steps: int = setting(default=20, at_least=1)
    line_search_steps: int = setting(default=2, at_least=0)

    def init(self, problem: Problem, first: Iterate) -> int:
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "NewtonKrylov needs derivatives of f, which inference mode drops: use "
                "torch.no_grad(), or Trainer(inference_mode=False)"
            )
        _check_not_nested()
        return 0

    def step(self, problem: Problem, current: Iterate, memory: int) -> tuple[Step, int]:
        linear = GMRES(
            tol=self.krylov_tol,
            max_steps=self.krylov_steps,
            per_sample=self.per_sample,
            check_every=self.check_every,
        )

        def matvec(v: Tensor) -> Tensor:
            product = v - jvp(problem.f, at, v)
            # NaN of a diverged sample would spread through a Krylov space that the batch shares.
            return torch.where(here, product, v)

        # A frozen sample has nothing to solve: with a zero right-hand side it costs no iteration.
        here = (problem.active & finite(current.residual))[:, None]
        at, right = torch.where(here, current.z, problem.hold), current.g.masked_fill(~here, 0.0)
        with unfused_attention():
            solved = linear.solve(matvec, right)
        problem.count(solved.nfe)
        slack = 1.0 / (1 + memory) ** 2
        new = norm_descent(problem, current, solved.value, slack, self.line_search_steps)
        return Step(new), memory + 1


def _check_not_nested() -> None:
    try:
        with forward_ad.dual_level():
            pass
    except RuntimeError as error:
        raise RuntimeError(
            "NewtonKrylov differentiates f in forward mode, which PyTorch does not nest: inside "
            "torch.func.jvp or torch.autograd.forward_ad use another solver"
        ) from error
