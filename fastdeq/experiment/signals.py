"""The signals that request a stop. Imports nothing heavy, since a signal may come at once."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

REPEATED = (signal.SIGHUP, signal.SIGXCPU)
"""Signals that come more than once. SIGHUP: a terminal or connection closes, and kernel and shell
both send it (Lightning issue 1455). SIGXCPU: a limit of CPU seconds (`ulimit -S -t`) is reached; it
comes every second until the hard limit kills the process.
"""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, *REPEATED)
"""Stop requests: of a cluster or container, Ctrl-C, of batch systems and submitit before the time
limit, and the two above. SIGQUIT (Ctrl-\\) still ends a run at once.
"""

_received: list[int] = []


def received() -> str | None:
    """The name of the signal that requested a stop, or None."""
    return signal.Signals(_received[0]).name if _received else None


@contextmanager
def listening(
    signals: Sequence[signal.Signals] = STOP_SIGNALS, *, patient: bool = False
) -> Iterator[None]:
    """Record the first of these signals, so that the run stops after its step; a second one has its
    default effect and ends the process at once. Those of `REPEATED` never count as a second one.
    Ignored signals (`nohup`) stay ignored. Outside the main thread nothing changes.

    patient: no signal ends this process at once; for a process that its parent ends.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, _note if patient or number in REPEATED else _note_or_end)
        for number in signals
        if signal.getsignal(number) != signal.SIG_IGN
    }
    # Signals since the start of the process have been blocked until now (fastdeq.cli).
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _note(number: int, frame: FrameType | None) -> None:
    """Only set a flag: a handler may interrupt anything, such as a write to a file."""
    _received.append(number)


def _note_or_end(number: int, frame: FrameType | None) -> None:
    _note(number, frame)
    if sum(each not in REPEATED for each in _received) > 1:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
