"""``python train.py ...`` as a person types it, in this process or in one of its own."""

import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastdeq.experiment.signals import STOP_SIGNALS

ROOT = Path(__file__).parents[1]
SHORT = (
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_test_batches=1",
    "trainer.accelerator=cpu",
    "model=skip_deq",
)
"""Two steps of training, well below a second; what comes after them has the last word."""


@dataclass(frozen=True)
class Answer:
    """What a command left: its exit status, what it printed, and the files in its folder."""

    status: int
    out: str
    err: str
    files: list[Path]


@dataclass(frozen=True)
class CommandLine:
    """Runs train.py in ``folder``, where ``outputs`` comes to lie."""

    folder: Path
    capture: pytest.CaptureFixture[str]
    patch: pytest.MonkeyPatch

    def __call__(self, *arguments: str) -> Answer:
        """In this process: no start of Python and torch for each of many commands."""
        self.patch.chdir(self.folder)
        self.patch.setattr(sys, "argv", [str(ROOT / "train.py"), *arguments])
        self.capture.readouterr()
        status = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            status = int(end.code or 0)
        printed = self.capture.readouterr()
        return Answer(status, printed.out, printed.err, self._files())

    def process(self, *arguments: str) -> Answer:
        """In a process of its own, as a shell does."""
        ended = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        return Answer(ended.returncode, ended.stdout, ended.stderr, self._files())

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


def default_signals() -> None:
    """In a child process: as a terminal starts it, whatever the tests run under (`nohup`, `&`)."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def a_run(command: CommandLine, *arguments: str) -> Path:
    """Train shortly and return the run's folder."""
    answer = command(*SHORT, *arguments)
    assert answer.status == 0, answer.err
    return next(path.parent for path in answer.files if path.name == "summary.json")


def refused(answer: Answer, *parts: str) -> None:
    """One line on stderr that holds all parts; no file, no folder."""
    assert answer.status == 1
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1, answer.err
    for part in parts:
        assert part in answer.err
    assert answer.files == []
