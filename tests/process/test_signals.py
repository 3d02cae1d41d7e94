"""Which signals request a stop, which end it at once, and which it leaves ignored.

Real processes are in test_survival.py; here the handlers are called in this one.
"""

import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from fastdeq.experiment import signals
from fastdeq.experiment.signals import REPEATED, STOP_SIGNALS, listening, received
from tests.commands import default_signals
from tests.processes import PROCESSES

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _none_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process: none has come, and each has its usual effect."""
    monkeypatch.setattr(signals, "_received", [])
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_ends_nothing(number: signal.Signals) -> None:
    with listening():
        signal.raise_signal(number)
        assert received() == number.name
    assert signal.getsignal(number) == signal.SIG_DFL


def test_the_signals_are_those_that_would_end_a_run_and_can_be_caught() -> None:
    assert {number.name for number in STOP_SIGNALS} == {
        *("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    }


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_what_is_ignored_at_the_start_stays_ignored(number: signal.Signals) -> None:
    # `nohup` ignores SIGHUP, a shell script's background job SIGINT.
    signal.signal(number, signal.SIG_IGN)
    with listening():
        signal.raise_signal(number)
        assert received() is None
    assert signal.getsignal(number) == signal.SIG_IGN


@pytest.mark.parametrize("number", REPEATED)
def test_a_terminal_that_closes_or_a_spent_limit_may_say_so_many_times(
    number: signal.Signals,
) -> None:
    # Lightning issue 1455. A login shell passes the kernel's SIGHUP on to its jobs; systemd sends
    # SIGTERM and SIGHUP together.
    with listening():
        for each in (number, number, signal.SIGTERM, number):
            signal.raise_signal(each)
        assert received() == number.name


def test_a_process_with_a_parent_that_ends_it_is_patient() -> None:
    with listening(patient=True):
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert received() == "SIGTERM"


def raise_in_turn(numbers: list[signal.Signals], here: Connection) -> None:
    default_signals()
    with listening():
        for number in numbers:
            here.send(number)
            signal.raise_signal(number)
    here.send("still here")


@pytest.mark.parametrize("last", [signal.SIGTERM, signal.SIGUSR1])
def test_a_second_signal_ends_the_process_at_once_by_its_own_effect(last: signal.Signals) -> None:
    numbers = [signal.SIGHUP, signal.SIGTERM, last]
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=raise_in_turn, args=(numbers, theirs))
    process.start()
    theirs.close()
    process.join()
    assert process.exitcode == -last
    assert [ours.recv() for _ in numbers] == numbers
    with pytest.raises(EOFError):
        ours.recv()
