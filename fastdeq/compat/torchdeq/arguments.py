"""torchdeq's arguments: from keywords, a dictionary, or the options of a command line."""

import difflib
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from fastdeq.settings import setting, settings
from fastdeq.solvers import AbstractSolver, Anderson, LimitedMemoryBroydenSolver, Picard

SolverName: TypeAlias = Literal[
    "fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden"
]
StopMode: TypeAlias = Literal["abs", "rel"]

_NORM: dict[str, Any] = {
    "norm_type": "weight_norm",
    "norm_no_scale": False,
    "norm_clip": False,
    "norm_clip_value": 1.0,
    "norm_target_norm": 1.0,
    "sn_n_power_iters": 1,
}
_TRAINING: dict[str, Any] = {
    "gamma": 0.8,
    "jac_loss_weight": 0.0,
    "jac_loss_freq": 0.0,
    "jac_incremental": 0,
    "sradius_mode": False,
}
"""Options that the program itself reads and hands on."""


@settings
class Arguments:
    """What a DEQ is built from; names and defaults are torchdeq's."""

    core: Literal["sliced", "indexing"] = "sliced"
    f_solver: SolverName = "fixed_point_iter"
    b_solver: SolverName = "fixed_point_iter"
    no_stat: bool | None = None
    f_max_iter: int = setting(default=40, at_least=1)
    b_max_iter: int = setting(default=40, at_least=1)
    f_tol: float = setting(default=1e-3, above=0)
    b_tol: float = setting(default=1e-6, above=0)
    f_stop_mode: StopMode = "abs"
    b_stop_mode: StopMode = "abs"
    eval_factor: float = setting(default=1.0, above=0)
    eval_f_max_iter: int = setting(default=0, at_least=0)
    ift: bool = False
    hook_ift: bool = False
    grad: int | tuple[int, ...] = 1
    tau: float = setting(default=1.0, above=0, at_most=1)
    sup_gap: int = -1
    sup_loc: tuple[int, ...] | None = None
    n_states: int = setting(default=1, at_least=1)
    indexing: tuple[int, ...] | None = None

    def validate(self) -> None:
        if any(steps < 1 for steps in self.grads):
            raise ValueError(f"grad is {self.grad}, but must be steps of at least 1")
        marks = list(self.indexing or ())
        if marks != sorted(set(marks)) or any(not 0 < i < self.f_max_iter for i in marks):
            raise ValueError(
                f"indexing is {marks}, but must ascend between 0 and f_max_iter={self.f_max_iter}"
            )
        count = len(self.places(self.f_max_iter))
        if len(self.grads) not in (1, count):
            raise ValueError(
                f"grad has {len(self.grads)} numbers, but must have one, or one for each of the "
                f"{count} states"
            )

    @property
    def grads(self) -> tuple[int, ...]:
        """Steps of the phantom gradient: one number, or one per state."""
        return (self.grad,) if isinstance(self.grad, int) else tuple(self.grad)

    @property
    def implicit(self) -> bool:
        """Whether the last state has the implicit gradient."""
        return self.ift or self.hook_ift

    @property
    def evaluations_in_eval(self) -> int:
        """f_max_iter outside of training."""
        return self.eval_f_max_iter or int(self.f_max_iter * self.eval_factor)

    def places(self, f_max_iter: int) -> list[int]:
        """The numbers of the evaluations at which states are taken, of f_max_iter."""
        if self.n_states == 1:
            return [*(self.indexing or ()), f_max_iter]
        if self.core == "sliced":
            return [(k + 1) * (f_max_iter // self.n_states) for k in range(self.n_states)]
        count = min(f_max_iter, self.n_states)
        return [f_max_iter - (count - k - 1) * (f_max_iter // count) for k in range(count)]


def read(args: Any, given: Mapping[str, Any]) -> Arguments:
    """The arguments of a DEQ.

    args: a Namespace, whose other options are the program's own; or a mapping, whose names must be
        torchdeq's, as those of `given`.

    Raises: TypeError for another type and for an unknown name, with the nearest one; TypeError or
    ValueError for a value.
    """
    names = [*Arguments.__dataclass_fields__]
    known = {*names, *_NORM, *_TRAINING}
    if isinstance(args, Namespace):
        args = {name: value for name, value in vars(args).items() if name in known}
    if not isinstance(args, Mapping | None):
        raise TypeError(
            f"args is a {type(args).__name__}: give an argparse.Namespace or a dictionary"
        )
    found = {**(args or {}), **given}
    check_names(found, known)
    lists = ("grad", "indexing", "sup_loc")
    values: dict[str, Any] = {
        name: tuple(value) if name in lists and isinstance(value, Sequence) else value
        for name, value in found.items()
        if name in names
    }
    return Arguments(**values)


def check_names(found: Mapping[str, Any], known: set[str]) -> None:
    """Raises: TypeError for a name that is not known."""
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(sorted(known))}"
            raise TypeError(f"torchdeq has no argument '{name}': {hint}")


def norm_options(args: Any) -> dict[str, Any]:
    """The options of `apply_norm` that are in a Namespace or a mapping.

    Raises: as `read`.
    """
    read(args, {})
    options = vars(args) if isinstance(args, Namespace) else args or {}
    return {name: options[name] for name in _NORM if name in options}


def make_solver(
    name: SolverName, max_iter: int, tol: float, stop_mode: StopMode, given: Mapping[str, Any]
) -> AbstractSolver | None:
    """The solver that evaluates f at most `max_iter` times before the evaluation that closes; None
    where that one is all. given: the solver's own options, `solver_kwargs`.

    Raises: TypeError for options that it does not have, ValueError for those without a counterpart.
    """
    options = dict(given)
    fields: dict[str, Any] = {
        "tol": options.pop("tol", tol),
        "termination": f"{options.pop('stop_mode', stop_mode)}_deq_best",
        "max_steps": max_iter if name == "broyden" else max_iter - 1,
    }
    if not fields["max_steps"]:
        return None
    own = {"anderson": {"m", "lam", "tau"}, "broyden": {"LBFGS_thres", "ls"}}.get(name, {"tau"})
    check_names(options, {*own, "return_final"})
    _check_counterparts(options)
    if options.get("return_final") or name == "simple_fixed_point_iter":
        fields |= {"min_steps": fields["max_steps"], "termination": "abs_deq_default"}
    if name == "broyden":
        return LimitedMemoryBroydenSolver(memory=options.get("LBFGS_thres") or max_iter, **fields)
    fields["damping"] = options.get("tau", 1.0)
    if name == "anderson":
        return Anderson(memory=options.get("m", 6) - 1, **fields)
    return Picard(**fields)


def _check_counterparts(options: Mapping[str, Any]) -> None:
    if options.get("ls"):
        raise ValueError(
            "ls=True (a line search) is not supported: leave it out, or use "
            "fastdeq.solvers.BroydenSolver with fastdeq.fixed_point"
        )
    if "lam" in options:
        raise ValueError(
            "lam has no counterpart: the ridge of fastdeq's Anderson is relative; leave it out"
        )


def add_deq_args(parser: ArgumentParser) -> None:
    """Add torchdeq's options to a parser."""
    fields = Arguments.__dataclass_fields__
    defaults = {name: field.default for name, field in fields.items() if name != "no_stat"}
    defaults |= {"indexing": [], "sup_loc": [], "grad": [1]}
    for name, default in {**defaults, **_NORM, **_TRAINING}.items():
        if default is False:
            parser.add_argument(f"--{name}", action="store_true")
        elif isinstance(default, list):
            parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default)
