"""``python patient.py ARGUMENTS`` is ``python ARGUMENTS``, and lets SIGUSR1 and SIGUSR2 wait.

A job may be preempted in its first second. The signal would end Python, which takes some seconds
to load torch and has nobody to listen before; so it waits, through the exec, until the run listens
(`fastdeq.experiment.signals`). To be started as a file: as a module it would load torch first.
"""

import os
import signal
import sys

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
