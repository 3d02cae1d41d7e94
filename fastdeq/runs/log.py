"""The output of a run, on the console and in its log file (train.log)."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from fastdeq.runs.status import Interrupted

LOG = logging.getLogger("fastdeq")


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Write log messages and all warnings to the console, and with the time to `path`.

    The traceback of an exception is written to the file.
    """
    console, file = (
        _Console(),
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

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)
