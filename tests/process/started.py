"""A script in a process of its own that starts at once: its signals, its terminal and its exit
status are those of ``python SCRIPT``, without the seconds of the imports.
"""

import os
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from uuid import uuid4

from tests.commands import ROOT, default_signals
from tests.processes import PROCESSES

TRAIN = ROOT / "train.py"
LIMIT = 120.0  # seconds for anything that happens at once on an idle machine


def until(condition: Callable[[], Any], limit: float = LIMIT) -> Any:
    """What the condition gives, once it gives something."""
    end = time.monotonic() + limit
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return found


@dataclass(frozen=True)
class Started:
    """A process, and what it has printed."""

    process: BaseProcess
    streams: Sequence[Path]

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def ended(self) -> bool:
        return self.process.exitcode is not None

    def status(self) -> int:
        """At its end, negative after a signal."""
        self.process.join(LIMIT)
        assert self.process.exitcode is not None, "it did not end"
        return self.process.exitcode

    def printed(self) -> tuple[str, str]:
        """To stdout and stderr."""
        _, out, err = (path.read_text(encoding="utf-8") for path in self.streams)
        return out, err


def train(folder: Path, *overrides: str) -> Started:
    """``python train.py`` with the run folder ``run``."""
    return start(folder, "paths.run=run", *overrides)


def start(folder: Path, *words: str) -> Started:
    """``python train.py WORDS``."""
    beside = folder.with_name(f"{folder.name}-{uuid4().hex}")
    streams = (Path(os.devnull), beside.with_suffix(".out"), beside.with_suffix(".err"))
    return _start(TRAIN, words, folder, streams)


def at_a_terminal(folder: Path, script: Path, *words: str) -> tuple[Started, int]:
    """As the foreground of a terminal of its own, whose other end comes with it."""
    ours, theirs = os.openpty()
    name = Path(os.ttyname(theirs))
    opened = PROCESSES.Event()
    started = _start(script, words, folder, (name, name, name), opened)
    assert opened.wait(LIMIT)
    os.close(theirs)
    return started, ours


def _start(
    script: Path, words: Sequence[str], folder: Path, streams: Sequence[Path], terminal: Any = None
) -> Started:
    given = (script, words, folder, dict(os.environ), streams, terminal)
    process = PROCESSES.Process(target=_run, args=given)
    process.start()
    return Started(process, streams)


def _run(
    script: Path,
    words: Sequence[str],
    folder: Path,
    environment: dict[str, str],
    streams: Sequence[Path],
    terminal: Any,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if terminal is not None:
        os.setsid()  # the terminal that is opened next is that of the process
    for number, (name, mode) in enumerate(zip(streams, ("r", "w", "w"), strict=True)):
        opened = os.open(name, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
        setattr(sys, ("stdin", "stdout", "stderr")[number], os.fdopen(number, mode, closefd=False))
    if terminal is not None:
        terminal.set()
    default_signals()
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")
