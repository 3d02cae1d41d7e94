"""L6: the regularizers' part of the loss."""

from torch import Tensor

from fastdeq.regularizers import residual_loss, skip_loss
from fastdeq.settings import setting, settings
from fastdeq.solution import Solution


@settings
class LossWeights:
    """Weights of what is added to the task's loss; a weight of 0 is not even computed.

    skip: λ_skip, of Σ_scales mean|z₀ − z*|. jacobian: λ_jac, of the estimate of ‖J‖²_F / D.
    residual: λ_res, of ‖z − f(z, x)‖. See `fastdeq.regularizers`.
    """

    skip: float = setting(default=0.0, at_least=0)
    jacobian: float = setting(default=0.0, at_least=0)
    residual: float = setting(default=0.0, at_least=0)

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
