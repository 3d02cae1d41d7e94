"""torchdeq's DEQ: a map and a start ↦ states with gradients, and statistics."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastdeq._fixed_point import flat_map
from fastdeq.adjoints import Implicit
from fastdeq.compat.torchdeq.arguments import Arguments, make_solver, read
from fastdeq.compat.torchdeq.dropout import reset_dropout
from fastdeq.compat.torchdeq.losses import power_method
from fastdeq.compat.torchdeq.norm import reset_norm
from fastdeq.flatten import Layout
from fastdeq.norms import sample_norm
from fastdeq.notation import FlatMap
from fastdeq.solution import BackwardReport, SolveResult, SolveStats, Status
from fastdeq.solvers import solve

Writer: TypeAlias = Callable[[dict[str, Tensor]], None]
Info: TypeAlias = dict[str, Tensor]
"""Statistics: abs_lowest, rel_lowest, nstep and sradius, (B,), and abs_trace, rel_trace, (B, N)."""


class _Map:
    """f on flat states, which records the residuals of its evaluations without a graph."""

    def __init__(self, f: Callable[..., Any], z0: Any, *, record: bool) -> None:
        self._record = record
        self._list = not isinstance(z0, Tensor)
        self.layout = Layout.of(tuple(z0) if self._list else z0, "z_init")
        self._flat = flat_map(self._of_list(f) if self._list else f, self.layout)
        self.z0 = self.layout.flatten(tuple(z0) if self._list else z0)
        self.residuals: list[tuple[Tensor, Tensor]] = []  # absolute and relative

    @staticmethod
    def _of_list(f: Callable[..., Any]) -> Callable[[Any], Any]:
        return lambda z: tuple(f(*z))

    def __call__(self, z: Tensor) -> Tensor:
        output = self._flat(z)
        if self._record and not torch.is_grad_enabled():
            residual = sample_norm(output - z)
            self.residuals.append((residual, residual / (sample_norm(output) + 1e-9)))
        return output

    def state(self, z: Tensor) -> Any:
        found = self.layout.unflatten(z)
        return list(found) if self._list else found

    def info(self) -> Info:
        if not self.residuals:
            names = ("abs_lowest", "rel_lowest", "abs_trace", "rel_trace", "nstep", "sradius")
            return {name: torch.tensor([-1.0]) for name in names}
        trace = [torch.stack(each, dim=1) for each in zip(*self.residuals, strict=True)]
        lowest = [each.amin(dim=1) for each in trace]
        steps = trace[0].argmin(dim=1) + 1
        return {
            "abs_lowest": lowest[0],
            "rel_lowest": lowest[1],
            "abs_trace": trace[0],
            "rel_trace": trace[1],
            "nstep": steps.to(trace[0].dtype),
            "sradius": torch.full_like(lowest[0][:1], -1),
        }


class _DEQ(nn.Module, ABC):
    """f and z_init ↦ (states, info), as torchdeq.

    args: a Namespace, a dictionary or None; options by keyword take precedence (see `Arguments`).
    In training there is one state for each of `n_states` or `indexing`, and at the end: of the
    solve's iterates, each with a phantom gradient of `grad` steps damped by `tau`, the last with
    the implicit gradient where `ift` (or `hook_ift`) is given. In evaluation it is z* alone,
    without a gradient.

    Raises: TypeError for unknown arguments, TypeError or ValueError for their values.
    """

    core: str

    def __init__(self, args: Any = None, **options: Any) -> None:
        super().__init__()
        self.arguments: Arguments = read(args, {**options, "core": self.core})
        a = self.arguments
        self.f_max_iter, self.eval_f_max_iter = a.f_max_iter, a.evaluations_in_eval

    def forward(
        self,
        func: Callable[..., Any],
        z_init: Any,
        solver_kwargs: Mapping[str, Any] | None = None,
        sradius_mode: bool = False,
        backward_writer: Writer | None = None,
    ) -> tuple[list[Any], Info]:
        """(states, info). func: z ↦ f(z), or (z₁, …) ↦ [f₁, …] where z_init is a list or tuple.

        solver_kwargs: options of the solver for this call, and `f_max_iter`. sradius_mode: in
        evaluation, estimate the spectral radius as info["sradius"]. backward_writer: called in the
        backward pass with the statistics of the implicit gradient's solve.

        Raises: as `fastdeq.fixed_point`, and TypeError or ValueError for solver_kwargs.
        """
        options = dict(solver_kwargs or {})
        usual = self.f_max_iter if self.training else self.eval_f_max_iter
        most = int(options.pop("f_max_iter", usual))
        f = _Map(func, z_init, record=not self.arguments.no_stat)
        if self.training:
            states = self.states(f, self.arguments.places(most), options, backward_writer)
            return [f.state(z) for z in states], f.info()
        z = self._solved(f, f.z0, [most], options)[0]
        info = f.info()
        if sradius_mode:
            info["sradius"] = _spectral_radius(f, z)
        return [f.state(z)], info

    @abstractmethod
    def states(
        self,
        f: _Map,
        places: list[int],
        options: Mapping[str, Any],
        writer: Writer | None,
    ) -> list[Tensor]:
        """The states of a training step, flat and with gradients."""

    @torch.no_grad()
    def _solved(
        self, f: _Map, z0: Tensor, places: Sequence[int], options: Mapping[str, Any]
    ) -> list[Tensor]:
        """The iterates of one solve at the given evaluations, the last of which is its result."""
        a = self.arguments
        solver = make_solver(a.f_solver, places[-1], a.f_tol, a.f_stop_mode, options)
        shift = 0 if a.f_solver == "broyden" else 1  # the others return f at their iterate
        z0 = z0.detach()
        steps = [place - shift for place in places[:-1]]
        if solver is None:
            found = [z0]
        else:
            result = solve(solver, f, z0, states=[step for step in steps if step])
            found = [*([z0] if 0 in steps else []), *result.states, result.value]
        # These evaluations repeat those of the solver, which does not return them.
        tau = 1.0 if a.f_solver in ("anderson", "broyden") else options.get("tau", 1.0)
        return [z + tau * (f(z) - z) for z in found] if shift else found

    def _closed(
        self, f: _Map, z: Tensor, k: int, last: bool, writer: Writer | None
    ) -> list[Tensor]:
        """A state of the trajectory with its gradient; several, with sup_gap or sup_loc."""
        a = self.arguments
        if last and a.implicit:
            return [self._implicit(f, z, writer)]
        grads = a.grads
        steps = grads[0] if len(grads) == 1 else grads[k]
        outputs = []
        for i in range(1, steps + 1):
            z = f(z) if a.tau == 1 else a.tau * f(z) + (1 - a.tau) * z
            chosen = i % a.sup_gap == 0 if a.sup_gap > 0 else i in (a.sup_loc or ())
            if chosen:
                outputs.append(z)
        return outputs if a.sup_gap > 0 else [*outputs, z]

    def _implicit(self, f: _Map, z: Tensor, writer: Writer | None) -> Tensor:
        a = self.arguments
        solver = make_solver(a.b_solver, a.b_max_iter, a.b_tol, a.b_stop_mode, {})
        if solver is None:  # one evaluation from v = 0 leaves v = w
            return f(z)
        report: list[BackwardReport] = []
        closing = f if writer is None else _reporting(f, writer, report)
        found = Implicit(solver=solver).close(closing, _unsolved(z))
        report.append(found.backward)
        return found.value


def _reporting(f: FlatMap, writer: Writer, report: list[BackwardReport]) -> FlatMap:
    """f, whose output calls `writer` when the solve of a backward pass has ended."""
    seen: list[SolveStats] = []

    def hook(v: Tensor) -> None:
        stats = report[0].stats  # None in the products of the solve itself
        if stats is not None and stats not in seen:
            seen.append(stats)
            writer(
                {
                    "abs_lowest": stats.residual,
                    "rel_lowest": stats.relative_residual,
                    "nstep": stats.steps,
                }
            )

    def reporting(z: Tensor) -> Tensor:
        output = f(z)
        if output.requires_grad:
            output.register_hook(hook)
        return output

    return reporting


def _unsolved(z: Tensor) -> SolveResult:
    """The record of a state that the adjoint is to close."""
    none = torch.zeros_like(z[:, 0])
    count = none.long()
    return SolveResult(
        value=z,
        residual=none,
        relative_residual=none,
        steps=count,
        nfe=count,
        status=torch.full_like(count, int(Status.NOT_SOLVED)),
    )


def _spectral_radius(f: FlatMap, z: Tensor) -> Tensor:
    with torch.enable_grad():
        at = z.detach().requires_grad_()
        return power_method(f(at), at)[1]


class DEQSliced(_DEQ):
    """Solves of f_max_iter / n_states evaluations in turn, each from the state before."""

    core = "sliced"

    def states(
        self, f: _Map, places: list[int], options: Mapping[str, Any], writer: Writer | None
    ) -> list[Tensor]:
        outputs, z, before = [], f.z0, 0
        for k, place in enumerate(places):
            z = self._solved(f, z, [place - before], options)[0]
            outputs += self._closed(f, z, k, place == places[-1], writer)
            z, before = outputs[-1], place
        return outputs


class DEQIndexing(_DEQ):
    """One solve, and states of it after some evaluations."""

    core = "indexing"

    def states(
        self, f: _Map, places: list[int], options: Mapping[str, Any], writer: Writer | None
    ) -> list[Tensor]:
        found = self._solved(f, f.z0, places, options)
        last = len(found) - 1
        return [
            output
            for k, z in enumerate(found)
            for output in self._closed(f, z, k, k == last, writer)
        ]


def get_deq(args: Any = None, **options: Any) -> DEQSliced | DEQIndexing:
    """A DEQ of the core that the arguments name, by default "sliced".

    Raises: as the DEQ.
    """
    core = read(args, options).core
    return (DEQSliced if core == "sliced" else DEQIndexing)(args, **options)


def reset_deq(model: nn.Module) -> None:
    """Compute normalized weights again, and let variational dropouts draw new masks: to be called
    before every training step."""
    reset_norm(model)
    reset_dropout(model)
