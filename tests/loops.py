"""One claim about many cases, as one test."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch


def each(names: str, values: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run the test for every value; where some fail, fail once with all of them.

    The counterpart of `pytest.mark.parametrize`, for cases that are not claims of their own. Every
    case starts from the same random state. Several loops may be stacked; fixtures are shared.

    names: one argument, or several separated by commas; then a value is a tuple of as many.
    """
    arguments, cases = [name.strip() for name in names.split(",")], list(values)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def loop(**fixtures: Any) -> None:
            failures: list[BaseException] = []
            for value in cases:
                given = (value,) if len(arguments) == 1 else value
                case = dict(zip(arguments, given, strict=True))
                torch.manual_seed(0)
                try:
                    test(**fixtures, **case)
                except (Exception, BaseExceptionGroup, pytest.fail.Exception) as error:
                    error.add_note("in the case " + _shown(case))
                    failures.append(error)
            if failures:
                raise BaseExceptionGroup(f"{len(failures)} of {len(cases)} cases fail", failures)

        assert cases, "a loop over nothing would pass"
        whole = inspect.signature(test)
        left = [p for name, p in whole.parameters.items() if name not in arguments]
        loop.__signature__ = whole.replace(parameters=left)  # type: ignore[attr-defined]
        return loop

    return decorate


def _shown(case: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {getattr(v, '__name__', repr(v))}" for name, v in case.items())
