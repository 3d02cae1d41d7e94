"""Source files from their mirrors, each checked by its published MD5 before it gets its name."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pooch  # type: ignore[import-untyped]

from fastdeq.data.sources import SourceFile

_TIMEOUT = 30  # seconds without an answer or without a byte


def download(files: Iterable[SourceFile], folder: Path, mirrors: Sequence[str]) -> None:
    """Fetch ``files`` into ``folder``, each from the first of ``mirrors`` that gives the right one.

    Several processes may do this at once: a file appears whole and checked, whoever is first.
    Raises OSError, in one line with every mirror's failure, for a file that none of them gives, or
    where the folder cannot be written.
    """
    made = _make_folder(folder)
    failures: dict[str, str] = {}
    try:
        for file in files:
            # A mirror that failed once is asked last: it may take its whole timeout again.
            order = sorted(mirrors, key=failures.__contains__)
            failures |= _fetch(file, folder, order)
    except BaseException:
        for empty in made:
            _remove_if_empty(empty)
        raise


def _fetch(file: SourceFile, folder: Path, mirrors: Sequence[str]) -> dict[str, str]:
    """Fetch one file; returns the failures of the mirrors that were asked in vain."""
    name, failures = file.names[0], dict[str, str]()
    for mirror in mirrors:
        bar = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=_TIMEOUT)
        known_hash = f"md5:{file.md5}"
        try:
            # Writes aside and renames: a file under its own name is whole and has its MD5.
            pooch.retrieve(mirror + name, known_hash, fname=name, path=folder, downloader=bar)
            # It came as a temporary file, for the eyes of this user alone.
            (folder / name).chmod(0o644)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            failures[mirror] = _reason(error)
        else:
            return failures
    told = "; ".join(f"{mirror} ({reason})" for mirror, reason in failures.items())
    raise OSError(
        f"{name} could not be downloaded: {told}: try again later, or get it by other means and "
        "give its folder as data.root"
    )


def _reason(error: OSError | ValueError) -> str:
    """Say why in a few words: requests' own messages name objects and run over several lines."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"{response.status_code} {response.reason}"
    if type(error) is ValueError:  # pooch's; requests' are of subclasses
        return "another MD5 than the published one"
    return getattr(error, "strerror", None) or type(error).__name__


def _make_folder(folder: Path) -> list[Path]:
    """Make ``folder`` and those above it; returns the new ones, the innermost first."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder}: cannot be made ({error.strerror}): choose another") from error
    return new


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # something else is in it
