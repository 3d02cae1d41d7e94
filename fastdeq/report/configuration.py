"""The labels of runs, and the settings in which runs with the same label differ."""

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from fastdeq.runs.identity import Leaf, without_seeds
from fastdeq.runs.reading import Run

MODELS = {
    "DEQ": ("deq",),
    "Skip DEQ": ("skip_deq",),
    "Skip Reg. DEQ": ("skip_reg_deq",),
    "Multiscale DEQ": ("mdeq",),
    "Multiscale Skip DEQ": ("skip_mdeq",),
    "Multiscale Skip Reg. DEQ": ("skip_reg_mdeq",),
    "Neural ODE": ("neural_ode",),
    "Explicit": ("explicit",),
    "Residual": ("residual",),
}
"""Names of the models, each kind in the published order, and their choices of conf/model."""

CONTINUOUS = ("bs3", "tsit5", "vcab3")
"""Choices of conf/solver that integrate to the steady state."""

NONE = "–"


@dataclass(frozen=True, kw_only=True)
class Label:
    """The columns that name a row; continuous is None if nothing is solved."""

    experiment: str
    model: str
    solver: str
    continuous: bool | None
    jacobian: bool

    def order(self) -> tuple[Hashable, ...]:
        """The published order: by model, discrete first, then without regularization."""
        names = list(MODELS)
        place = names.index(self.model) if self.model in names else len(names)
        return self.experiment, place, self.model, bool(self.continuous), self.jacobian, self.solver


def label(run: Run) -> Label:
    """The label of the row that a run belongs to."""
    model, solver = run.choices["model"], run.choices["solver"]
    named = [name for name, choices in MODELS.items() if model in choices]
    continuous: bool | None = solver in CONTINUOUS
    if model == "neural_ode":  # the configured solver is not used
        solver, continuous = str(run.settings.get("model.ode.method", NONE)), True
    elif model in ("explicit", "residual"):
        solver, continuous = NONE, None
    return Label(
        experiment=_experiment(run),
        model=named[0] if named else model,
        solver=solver,
        continuous=continuous,
        jacobian=_number(run.settings.get("loss.jacobian")) > 0,
    )


def _experiment(run: Run) -> str:
    """The choice of the experiment, or without one the part of the run's name before the model."""
    chosen = run.choices.get("experiment", "None")
    name = str(run.summary.get("name", ""))
    return chosen if chosen != "None" else name.rpartition("/")[0] or name


def _number(value: Leaf) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def differences(runs: Sequence[Run]) -> list[str]:
    """For each of some runs with the same label, the settings in which they differ, as key=value
    separated by blanks. Runs of different identity get different texts.

    A setting that follows from another one (an interpolation, or the choice of a group) is not
    listed again.
    """
    values = [without_seeds(run.identity) for run in runs]
    keys = {key for settings in values for key in settings}
    columns = {key: tuple(settings.get(key, NONE) for settings in values) for key in keys}
    varied = sorted((key for key in keys if len(set(columns[key])) > 1), key=_rank)
    shown: dict[str, tuple[str, ...]] = {}
    for place, key in enumerate(varied):
        column = columns[key]
        if key == "name" and _determines(list(zip(*shown.values(), strict=True)), column):
            continue
        if _is_copy(key, column, {earlier: columns[earlier] for earlier in varied[:place]}):
            continue
        group = _FROM.get(_node(key), _node(key))
        choice = tuple(run.choices.get(group, "None") for run in runs)
        if len(set(choice)) > 1 and _determines(choice, column):
            shown[group] = choice
        else:
            shown[key] = tuple(_text(run.settings, key) for run in runs)
    return [
        " ".join(f"{key}={texts[place]}" for key, texts in shown.items())
        for place in range(len(runs))
    ]


_ORDER = ("data", "sizes", "loss", "arch", "solver", "adjoint")
_LAST = ("model", "task", "name")  # these follow from the others

_FROM = {"sizes": "data", "task": "data"}
"""Nodes that the choice of another group sets."""


def _node(key: str) -> str:
    return key.split(".")[0].split("[")[0]


def _rank(key: str) -> tuple[int, int, str]:
    """The place of a key in the settings: keys that others follow from first, outer keys first."""
    node = _node(key)
    if node in _LAST:
        return len(_ORDER) + 1 + _LAST.index(node), key.count("."), key
    return _ORDER.index(node) if node in _ORDER else len(_ORDER), key.count("."), key


def _is_copy(key: str, column: tuple[Leaf, ...], earlier: Mapping[str, tuple[Leaf, ...]]) -> bool:
    # model and task are made of the groups, and so are the layers of an arch of its widths.
    made = key.startswith(("model.", "task.")) or (key.startswith("arch.") and key.count(".") > 1)
    return made and column in earlier.values()


def _determines(one: Sequence[Hashable], other: Sequence[Hashable]) -> bool:
    """Whether rows with equal entries in `one` have equal entries in `other`."""
    return len(set(zip(one, other, strict=True))) == len(set(one)) if one else False


def _text(settings: Mapping[str, Leaf], key: str) -> str:
    """The value in the form of an override."""
    if key not in settings:
        return NONE
    value = settings[key]
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
