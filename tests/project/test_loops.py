"""A loop over cases fails where one of them does, and names each that does."""

import pytest
import torch

from tests.loops import each


def test_a_failing_case_fails_the_test_and_is_named():
    tried = []

    @each("number", [1, 2, 3, 4])
    def loop(number):
        tried.append(number)
        assert number % 2, "even"

    with pytest.raises(BaseExceptionGroup, match="2 of 4 cases fail") as failure:
        loop()
    assert tried == [1, 2, 3, 4]
    notes = [error.__notes__ for error in failure.value.exceptions]
    assert notes == [["in the case number = 2"], ["in the case number = 4"]]


def test_a_refusal_that_does_not_come_fails_the_test():
    @each("error, text", [(ValueError, "1"), (ValueError, "x")])
    @each("kind", [int])
    def loop(error, text, kind):
        with pytest.raises(error):
            kind(text)

    with pytest.raises(BaseExceptionGroup, match="1 of 2 cases fail"):
        loop()


def test_every_case_starts_from_the_same_random_state():
    drawn = []

    @each("case", range(3))
    def loop(case):
        drawn.append(float(torch.rand(())))

    loop()
    assert len(set(drawn)) == 1


def test_a_loop_over_nothing_is_refused():
    with pytest.raises(AssertionError, match="loop over nothing"):
        each("case", [])(lambda case: None)
