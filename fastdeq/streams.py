"""Standard streams on which printing cannot fail.

A run must not end because a terminal cannot show a character or is closed, a reader has exited
(`| head -1`, a dead `tee`), or a disk is full (wandb issues 1757 and 6201).
"""

import io
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from select import select
from typing import Any, NoReturn, TextIO


def keep_streams() -> None:
    """Replace `sys.stdout` and `sys.stderr` by streams whose writes never fail.

    Characters without an encoding are replaced; what cannot be written is dropped. A stream that
    was closed when the process started becomes the null device. A stream without a file descriptor,
    as in tests and notebooks, is unchanged. A second call changes nothing.
    """
    # A file that is opened later must not get the descriptor of a closed stream: libraries and
    # child processes would write into it.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)


def check_written() -> None:
    """Call at the end of a command whose result is its output.

    Raises: OSError where some of it could not be written. A reader that has exited is not an error.
    """
    sys.stdout.flush()
    raw = _raw(sys.stdout)
    if isinstance(raw, _Lasting) and raw.error is not None:
        raise OSError(f"stdout cannot be written ({raw.error.strerror}): the output is incomplete")


def terminal_width() -> int | None:
    """The columns of the terminal that stdout is; None if it is not one."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def run_command(
    main: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None
) -> NoReturn:
    """Call `main`, and exit with the status that it returns, or with 1 where its output could not
    be written.

    arguments: those of the process if not given.
    """
    keep_streams()
    status = main(sys.argv[1:] if arguments is None else arguments)
    try:
        check_written()
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        status = status or 1
    sys.exit(status)


class _Lasting(io.RawIOBase):
    """A file whose `write` never fails; it keeps the first error, except a broken pipe.

    stream: the owner of the file, kept because it closes the file when it is collected.
    """

    def __init__(self, file: io.FileIO, stream: TextIO) -> None:
        self._file, self._stream, self.name = file, stream, file.name
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            while (count := self._file.write(data)) is None:  # a full pipe that does not block
                select([], [self._file], [])
        except OSError as error:
            if self.error is None and not isinstance(error, BrokenPipeError):
                self.error = error
            return len(data)
        return count

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def isatty(self) -> bool:
        return self._file.isatty()


def _lasting(stream: TextIO | None) -> TextIO:
    if stream is None:  # closed
        return open(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8", closefd=False)
    raw = _raw(stream)
    if not isinstance(raw, io.FileIO):
        return stream
    with suppress(OSError):
        stream.flush()
    assert isinstance(stream, io.TextIOWrapper)
    lasting = _Lasting(raw, stream)
    return io.TextIOWrapper(
        lasting if raw is stream.buffer else io.BufferedWriter(lasting),  # none with python -u
        encoding=stream.encoding,
        errors="replace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _raw(stream: TextIO) -> Any:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)
