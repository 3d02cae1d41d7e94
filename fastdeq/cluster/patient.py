"""``python patient.py ARGUMENTS`` is ``python ARGUMENTS`` with SIGUSR1 and SIGUSR2 blocked.

A job may be preempted in its first second, and the signal would end Python while it still loads
torch. The signals stay blocked through the exec, until the run handles them
(`fastdeq.experiment.signals`). Must be started as a file: as a module it would load torch first.
"""

import os
import signal
import sys

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
