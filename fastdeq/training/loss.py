"""The weighted regularizers of the loss."""

import random
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastdeq.adjoints import AbstractAdjoint
from fastdeq.adjoints.states import check_closing, chosen_steps
from fastdeq.nn import AbstractSolvingModule, DeepEquilibriumNetwork
from fastdeq.regularizers import CorrectionWeights, correction_loss, residual_loss, skip_loss
from fastdeq.settings import setting, settings
from fastdeq.solution import Solution


@settings
class LossWeights:
    """Weights of the terms that are added to the task's loss; a term of weight 0 is not computed.

    skip: λ_skip, of Σ_scales mean|z₀ − z*|. jacobian: λ_jac, of the estimate of ‖J‖²_F / D.
    residual: λ_res, of ‖z − f(z, x)‖. correction: λ_cor, of the task's loss of states on the way.
        See `fastdeq.regularizers`.
    jacobian_probability: the share of steps that add the Jacobian's term, drawn at random.
    jacobian_until: the optimizer step from which the Jacobian's term is left out; None: never.
    correction_states, correction_adjoint: `states` (None: 3) and `states_adjoint` of `fixed_point`.
    correction_weights: of these states, see `fastdeq.regularizers.correction_loss`; None:
        "exponential".
    """

    skip: float = setting(default=0.0, at_least=0)
    jacobian: float = setting(default=0.0, at_least=0)
    residual: float = setting(default=0.0, at_least=0)
    jacobian_probability: float = setting(default=1.0, above=0, at_most=1)
    jacobian_until: int | None = setting(default=None, at_least=0)
    correction: float | None = setting(default=None, at_least=0)
    correction_states: int | list[int] | None = setting(default=None)
    correction_weights: CorrectionWeights | None = setting(default=None)
    correction_adjoint: AbstractAdjoint | None = setting(default=None)

    def check(self, model: AbstractSolvingModule) -> None:
        """Refuse terms that a model does not have.

        Raises: TypeError or ValueError with the key to change.
        """
        if self.skip and not model.predicts:
            raise ValueError(
                "the skip loss would draw z* to zero in a model that predicts nothing: use a skip "
                "model (model=skip_deq), or no skip loss (loss.skip=0)"
            )
        if not self.correction:
            return
        layer, *others = model.equilibria
        if others or not isinstance(layer, DeepEquilibriumNetwork):
            name = "a model of several equilibria" if others else type(layer).__name__
            raise ValueError(
                f"the correction loss takes the states of one solver, and {name} has none: use "
                "loss.correction=0"
            )
        try:
            fewest = layer.solver.max_steps if layer.steps is None else layer.steps.least
            chosen_steps(self._states, fewest)
            check_closing(self.correction_adjoint, layer.adjoint)
        except (TypeError, ValueError) as error:
            key = f"loss.correction_{error}".replace(
                "correction_states_adjoint", "correction_adjoint"
            )
            raise type(error)(key) from error

    def wants_jacobian(self, step: int, seed: int) -> bool:
        """Whether this optimizer step adds the Jacobian's term.

        A draw from (seed, step) alone: all processes agree, and a resumed run repeats it.
        """
        over = self.jacobian_until is not None and step >= self.jacobian_until
        if not self.jacobian or over:
            return False
        return random.Random(f"{seed} {step}").random() < self.jacobian_probability

    @property
    def states(self) -> dict[str, Any]:
        """The options of a call that returns the states of the correction's term, if it has one."""
        if not self.correction:
            return {}
        return {"states": self._states, "states_adjoint": self.correction_adjoint}

    @property
    def _states(self) -> int | list[int]:
        return 3 if self.correction_states is None else self.correction_states

    def parts(
        self, solution: Solution, task: Callable[[Any], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The weighted terms by name, each a scalar.

        task: the task's loss of a state, for the correction's term.
        """
        parts = {}
        if self.skip:
            parts["skip"] = self.skip * skip_loss(solution)
        if self.jacobian and solution.jacobian_loss is not None:
            parts["jacobian"] = self.jacobian * solution.jacobian_loss
        if self.residual:
            parts["residual"] = self.residual * residual_loss(solution)
        if self.correction and task is not None and solution.states:
            weights = self.correction_weights or "exponential"
            loss = correction_loss(task, solution, weights=weights)
            parts["correction"] = self.correction * loss
        return parts
