"""L8: the signals that ask a run to stop. Imports nothing heavy: a signal may come at once."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""Of a cluster or a container, of a person's Ctrl-C, and of submitit when time is nearly up."""

_received: list[int] = []


def received() -> str | None:
    """The name of the signal that asked this process to stop, or None."""
    return signal.Signals(_received[0]).name if _received else None


@contextmanager
def listening(signals: Sequence[signal.Signals] = ASKED) -> Iterator[None]:
    """Note the first of these signals, for the run to stop after its step; at a second one, end at
    once by that signal's own effect. Outside the main thread nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _note) for number in signals}
    # Those that have come since the process was started wait until now (train.py).
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _note(number: int, frame: FrameType | None) -> None:
    """Set a flag and do nothing else: a handler may interrupt anything, a write to a file too."""
    _received.append(number)
    if len(_received) > 1:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
