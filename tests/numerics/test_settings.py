"""Settings refuse what is misspelt, mistyped or out of range, and the error names what is right."""

import copy
import dataclasses
import inspect
import pickle
from typing import Any, get_type_hints

import pytest
import torch

import fastdeq
from fastdeq import GMRES, adjoints, solvers
from fastdeq.adjoints import AbstractAdjoint, Implicit, Phantom
from fastdeq.settings import brief
from fastdeq.solvers import (
    AbstractSolver,
    Anderson,
    BroydenSolver,
    ContinuousSolver,
    LimitedMemoryBroydenSolver,
    NewtonKrylov,
    Picard,
)
from tests.loops import each


def public_settings() -> list[Any]:
    """Every concrete solver and adjoint, and GMRES: new ones are included automatically."""
    found: list[Any] = [GMRES]
    bases: tuple[Any, ...] = ((solvers, AbstractSolver), (adjoints, AbstractAdjoint))
    for module, base in bases:
        members = [getattr(module, name) for name in module.__all__]
        found += [
            kind
            for kind in members
            if isinstance(kind, type) and issubclass(kind, base) and not inspect.isabstract(kind)
        ]
    return found


ALL = public_settings()
NAMES: dict[str, Any] = {kind.__name__: kind for kind in ALL}
NUMBERS = (float, int, float | None, int | None)


def fields_of(*hints: Any) -> list[Any]:
    """(class, field name) wherever the field's type is one of `hints`."""
    return [
        (kind, name)
        for kind in ALL
        for name, hint in get_type_hints(kind).items()
        if hint in hints and name in {field.name for field in dataclasses.fields(kind)}
    ]


every_kind = each("kind", ALL)
every_number = each("kind, name", fields_of(*NUMBERS))


def test_brief_shows_what_differs_from_the_defaults_and_means_the_same():
    assert brief(Anderson()) == "Anderson()"
    assert brief(Anderson(tol=0.5, termination="abs")) == "Anderson(tol=0.5, termination='abs')"
    assert brief(Implicit(solver=GMRES(max_steps=3))) == "Implicit(solver=GMRES(max_steps=3))"
    assert [brief(other) for other in (3, "rk4(tol=1)", None)] == ["3", "rk4(tol=1)", "None"]
    for kind in ALL:
        assert eval(brief(kind()), dict(NAMES)) == kind()


def test_the_list_of_settings_is_complete():
    assert len(ALL) >= 11
    assert {GMRES, Picard, Anderson, Implicit, Phantom, ContinuousSolver} <= set(ALL)


# Names


@each(
    "kind, given, nearest",
    [
        (Picard, "dampin", "damping"),
        (Anderson, "memmory", "memory"),
        (BroydenSolver, "linesearch_steps", "line_search_steps"),
        (LimitedMemoryBroydenSolver, "max_step", "max_steps"),
        (NewtonKrylov, "krylov_tolerance", "krylov_tol"),
        (ContinuousSolver, "methods", "method"),
        (ContinuousSolver, "persample", "per_sample"),
        (Implicit, "solvers", "solver"),
        (Phantom, "step", "steps"),
        (GMRES, "toll", "tol"),
    ],
)
def test_a_misspelt_field_is_refused_with_the_nearest_name(kind, given, nearest):
    with pytest.raises(TypeError, match=f"has no field '{given}'; did you mean '{nearest}'"):
        kind(**{given: 1})


@every_kind
def test_an_unknown_field_is_refused_with_the_list_of_fields(kind):
    with pytest.raises(TypeError, match="has no field 'qqqq'; its fields are") as refusal:
        kind(qqqq=1)
    assert all(field.name in str(refusal.value) for field in dataclasses.fields(kind))


@every_kind
def test_positional_arguments_are_refused(kind):
    with pytest.raises(TypeError, match=f"{kind.__name__} takes keyword arguments only"):
        kind(1e-3)


# Types


@every_number
@each("value", ["abc", "1e-3", [1], True])
def test_what_is_not_a_number_is_refused(kind, name, value):
    with pytest.raises(TypeError, match=rf"{kind.__name__}\.{name} is .*must be a (whole )?number"):
        kind(**{name: value})


@each("kind, name", fields_of(int, int | None))
def test_a_fraction_is_refused_where_a_whole_number_is_needed(kind, name):
    with pytest.raises(TypeError, match="must be a whole number"):
        kind(**{name: 2.5})


@each("kind, name", fields_of(bool))
@each("value", [1, 0, "true", None])
def test_a_switch_is_true_or_false(kind, name, value):
    with pytest.raises(TypeError, match=rf"{name} is .*must be true or false"):
        kind(**{name: value})


@each("kind, name", fields_of(float, int))
def test_none_is_refused_where_a_number_is_needed(kind, name):
    with pytest.raises(TypeError, match=rf"{name} is None"):
        kind(**{name: None})


def alone(name: str) -> dict[str, Any]:
    """The other fields that a single `abstol` needs."""
    return {"termination": "norm"} if name == "abstol" else {}


@every_number
def test_a_whole_number_is_taken_where_a_number_is_wanted(kind, name):
    assert getattr(kind(**{name: 1}, **alone(name)), name) == 1


@each(
    "fields",
    [
        {"abstol": 1e-9},
        {"abstol": 1e-9, "termination": "rel"},
        {"reltol": 1e-9, "termination": "abs"},
    ],
)
def test_a_tolerance_that_the_mode_would_ignore_is_refused_with_the_cure(fields):
    with pytest.raises(ValueError, match=r"no effect.*give (reltol|abstol) or tol"):
        Picard(**fields)


def test_both_tolerances_may_be_given_for_any_mode():
    assert Picard(abstol=1e-9, reltol=1e-6).rule.threshold == 1e-6


@each("value", ["gmres", GMRES, None, Phantom()])
def test_the_linear_solver_of_an_adjoint_is_an_instance(value):
    with pytest.raises(TypeError, match=r"Implicit\.solver .*GMRES or .*AbstractSolver"):
        Implicit(solver=value)


@each("value", ["rel_best", "ABS", 3, None])
def test_an_unknown_termination_mode_is_refused_with_the_choices(value):
    with pytest.raises(TypeError, match=r"Picard\.termination") as refusal:
        Picard(termination=value)
    for mode in ("abs", "rel", "abs_norm", "rel_norm", "norm", "abs_deq_best", "rel_deq_default"):
        assert repr(mode) in str(refusal.value)


def test_an_unknown_method_is_refused_with_the_choices():
    with pytest.raises(TypeError, match="'tsit5', 'bs3', 'vcab3'"):
        ContinuousSolver(method="rk4")  # type: ignore[arg-type]


# Ranges


@every_number
@each("value", [-1, float("nan"), float("inf"), -float("inf")])
def test_no_number_may_be_negative_or_not_finite(kind, name, value):
    whole = get_type_hints(kind)[name] in (int, int | None)
    if whole and isinstance(value, float):
        with pytest.raises(TypeError, match="must be a whole number"):
            kind(**{name: value})
    else:
        with pytest.raises(ValueError, match=rf"{kind.__name__}\.{name} is .*must be finite"):
            kind(**{name: value})


OUT_OF_RANGE = [
    *((kind, "tol", 0, "above 0") for kind in ALL if hasattr(kind, "tol")),
    *((kind, "max_steps", 0, "at least 1") for kind in ALL if hasattr(kind, "max_steps")),
    *((kind, "check_every", 0, "at least 1") for kind in ALL if hasattr(kind, "check_every")),
    *((kind, "damping", 0, "above 0 and at most 1") for kind in (Picard, Anderson, Phantom)),
    *((kind, "damping", 2, "above 0 and at most 1") for kind in (Picard, Anderson, Phantom)),
    *((kind, "memory", 0, "at least 1") for kind in (Anderson, LimitedMemoryBroydenSolver)),
    (Anderson, "ridge", -1e-9, "at least 0"),
    (BroydenSolver, "max_dim", 0, "at least 1"),
    (NewtonKrylov, "krylov_tol", 0, "above 0 and at most 1"),
    (NewtonKrylov, "krylov_tol", 1.5, "above 0 and at most 1"),
    (NewtonKrylov, "krylov_steps", 0, "at least 1"),
    (ContinuousSolver, "ode_tol", 0, "above 0"),
    (ContinuousSolver, "first_step", 0.0, "above 0"),
    (ContinuousSolver, "min_step", 0, "above 0"),
    (Phantom, "steps", 0, "at least 1"),
    (GMRES, "restart", 0, "at least 1"),
]


@each("kind, name, value, bound", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_with_the_bound(kind, name, value, bound):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.{name} is {value!r}.*{bound}$"):
        kind(**{name: value})


@each(
    "kind, name, value",
    [
        (Picard, "damping", 1),
        (Anderson, "ridge", 0),
        (Picard, "abstol", 0.0),
        (GMRES, "tol", 1e-300),
    ],
)
def test_the_bounds_themselves_are_allowed_where_they_say_so(kind, name, value):
    assert getattr(kind(**{name: value}, **alone(name)), name) == value


# Records


@every_kind
def test_settings_are_frozen(kind):
    record = kind()
    for name in (*(field.name for field in dataclasses.fields(kind)), "new"):
        with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
            setattr(record, name, 1)


@every_kind
def test_equal_settings_are_equal_and_hash_alike(kind):
    assert kind() == kind()
    assert hash(kind()) == hash(kind())
    assert len({kind(), kind()}) == 1


@every_number
def test_settings_that_differ_in_one_number_are_different(kind, name):
    one, other = kind(**{name: 1}, **alone(name)), kind(**alone(name))
    assert (one == other) == (getattr(other, name) == 1)


@each("record", [*(kind() for kind in ALL), Implicit(solver=Anderson(tol=1e-9, memory=2))])
def test_repr_pickle_and_copies_give_equal_settings(record):
    assert eval(repr(record), NAMES) == record
    assert pickle.loads(pickle.dumps(record)) == record
    assert copy.deepcopy(record) == record
    assert dataclasses.replace(record) == record


def test_a_replaced_field_is_checked_like_a_new_one():
    with pytest.raises(ValueError, match=r"Picard\.tol"):
        dataclasses.replace(Picard(), tol=-1.0)


@each("kind", [AbstractSolver, AbstractAdjoint])
def test_what_all_methods_share_cannot_be_built(kind):
    with pytest.raises(TypeError, match="abstract"):
        kind()


def test_gmres_called_as_a_function_checks_its_settings_too():
    with pytest.raises(ValueError, match=r"GMRES\.tol"):
        fastdeq.gmres(lambda v: v, torch.ones(2, 3), tol=0.0)
