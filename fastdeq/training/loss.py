"""The weighted regularizers of the loss."""

import random

from torch import Tensor

from fastdeq.regularizers import residual_loss, skip_loss
from fastdeq.settings import setting, settings
from fastdeq.solution import Solution


@settings
class LossWeights:
    """Weights of the terms that are added to the task's loss; a term of weight 0 is not computed.

    skip: λ_skip, of Σ_scales mean|z₀ − z*|. jacobian: λ_jac, of the estimate of ‖J‖²_F / D.
    residual: λ_res, of ‖z − f(z, x)‖. See `fastdeq.regularizers`.
    jacobian_probability: the share of steps that add the Jacobian's term, drawn at random.
    jacobian_until: the optimizer step from which the Jacobian's term is left out; None: never.
    """

    skip: float = setting(default=0.0, at_least=0)
    jacobian: float = setting(default=0.0, at_least=0)
    residual: float = setting(default=0.0, at_least=0)
    jacobian_probability: float = setting(default=1.0, above=0, at_most=1)
    jacobian_until: int | None = setting(default=None, at_least=0)

    def wants_jacobian(self, step: int, seed: int) -> bool:
        """Whether this optimizer step adds the Jacobian's term.

        A draw from (seed, step) alone: all processes agree, and a resumed run repeats it.
        """
        over = self.jacobian_until is not None and step >= self.jacobian_until
        if not self.jacobian or over:
            return False
        return random.Random(f"{seed} {step}").random() < self.jacobian_probability

    def parts(self, solution: Solution) -> dict[str, Tensor]:
        """The weighted terms by name, each a scalar."""
        parts = {}
        if self.skip:
            parts["skip"] = self.skip * skip_loss(solution)
        if self.jacobian and solution.jacobian_loss is not None:
            parts["jacobian"] = self.jacobian * solution.jacobian_loss
        if self.residual:
            parts["residual"] = self.residual * residual_loss(solution)
        return parts
