"""The output of a run, on the console and in its log file (train.log)."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from fastdeq.runs.status import Interrupted
from fastdeq.streams import terminal_width

LOG = logging.getLogger("fastdeq")


@contextmanager
def logging_to(path: Path, prefix: str = "") -> Iterator[None]:
    """Write log messages and all warnings to the console, and with the time to `path`.

    The traceback of an exception is written to the file.

    prefix: of every line on the console, which other runs may share.
    """
    console, file = (
        _Console(prefix),
        logging.FileHandler(path, encoding="utf-8", errors="backslashreplace"),
    )
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    LOG.addHandler(console)
    LOG.addHandler(file)
    shown, warnings.showwarning = warnings.showwarning, _log_warning
    try:
        yield
    except Interrupted as pause:
        LOG.info("%s", pause)
        raise
    except BaseException:
        record = (LOG.name, logging.ERROR, __file__, 0, "the run failed", (), sys.exc_info())
        file.handle(LOG.makeRecord(*record))
        raise
    finally:
        warnings.showwarning = shown
        LOG.removeHandler(console)
        LOG.removeHandler(file)
        file.close()


def log_fitted(text: str, fit: Callable[[int], str | None]) -> None:
    """Log a text; on a terminal print what `fit` returns for its width instead (None: nothing)."""
    LOG.info("%s", text, extra={"fit": fit})


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    LOG.warning("warning: %s (%s:%d)", message, Path(filename).name, lineno)


class _Console(logging.Handler):
    """Prints to the current stdout, which a progress bar replaces."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def emit(self, record: logging.LogRecord) -> None:
        fit, width = getattr(record, "fit", None), terminal_width()
        text = self.format(record)
        if fit is not None and width is not None:
            text = fit(width - len(self.prefix))
        if text is not None:
            print(prefixed(text, self.prefix), flush=True)


def prefixed(text: str, prefix: str) -> str:
    """The text with a prefix before each of its lines."""
    return "\n".join(f"{prefix}{line}" for line in text.split("\n")) if prefix else text
