"""Processes of the tests' own: started quickly, killed in the middle of their work."""

import os
import signal
from collections.abc import Callable

from tests.processes import PROCESSES

PATIENCE = 60  # seconds until a process that hangs fails its test


def die(*_: object, **__: object) -> None:
    """Kill this process, as an administrator or a full memory does."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_until_killed(target: Callable[..., None], *arguments: object) -> None:
    """Call ``target`` in a process of its own, which must kill itself."""
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
