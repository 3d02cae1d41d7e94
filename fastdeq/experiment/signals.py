"""The signals that ask a run to stop. Imports nothing heavy: a signal may come at once."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

REPEATED = (signal.SIGHUP, signal.SIGXCPU)
"""Of a terminal or connection that is closed: kernel and shell both send it (Lightning issue 1455).
Of a limit of CPU seconds (`ulimit -S -t`): again every second, until the hard limit kills.
"""

ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, *REPEATED)
"""Of a cluster or a container, of a person's Ctrl-C, of batch systems and submitit when time is
nearly up, and the two above. SIGQUIT (Ctrl-\\) still ends a run at once.
"""

_received: list[int] = []


def received() -> str | None:
    """The name of the signal that asked this process to stop, or None."""
    return signal.Signals(_received[0]).name if _received else None


@contextmanager
def listening(
    signals: Sequence[signal.Signals] = ASKED, *, patient: bool = False
) -> Iterator[None]:
    """Note the first of these signals, for the run to stop after its step; at a second one, end at
    once by that signal's own effect. Those of `REPEATED` never count as a second one. Signals that
    are ignored (`nohup`) stay ignored. Outside the main thread nothing is changed.

    patient: no signal ends this process at once; for one whose parent does that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, _note if patient or number in REPEATED else _note_or_end)
        for number in signals
        if signal.getsignal(number) != signal.SIG_IGN
    }
    # Those that have come since the process was started wait until now (fastdeq.cli).
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _note(number: int, frame: FrameType | None) -> None:
    """Set a flag and do nothing else: a handler may interrupt anything, a write to a file too."""
    _received.append(number)


def _note_or_end(number: int, frame: FrameType | None) -> None:
    _note(number, frame)
    if sum(each not in REPEATED for each in _received) > 1:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
