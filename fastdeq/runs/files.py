"""Files that are complete or absent: atomic writes, and SHA-256 seals beside them."""

import glob
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_ASIDE = ".{name}.{random}.tmp"


@contextmanager
def atomic_path(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yields a temporary path. When the block ends, its file is flushed to the disk and renamed to
    `path`; after an exception `path` is unchanged.

    replace: False keeps an existing file.

    Raises: FileExistsError with replace=False if `path` exists; OSError of the disk.
    """
    aside = path.with_name(_ASIDE.format(name=path.name, random=secrets.token_hex(8)))
    try:
        yield aside
        flush(aside)
        if replace:
            aside.replace(path)
        else:
            _link(aside, path)
        flush(path.parent)
    finally:
        with suppress(OSError):  # of a disk that has become read-only
            aside.unlink(missing_ok=True)


def _link(aside: Path, path: Path) -> None:
    """Unlike a rename, a link never replaces a file."""
    try:
        path.hardlink_to(aside)
    except FileExistsError:
        raise FileExistsError(f"{path}: exists already: delete it or choose another name") from None


@contextmanager
def sealed_path(path: Path) -> Iterator[Path]:
    """`atomic_path` with a seal, for a file that only one process at a time writes. Removes files
    that a killed process has left.
    """
    remove_leftovers(path)
    with atomic_path(path) as aside:
        yield aside
        flush(aside)
        sha256 = sha256_of(aside)
        # No seal for a moment, rather than the old file's seal beside the new file.
        seal_of(path).unlink(missing_ok=True)
    write_text(seal_of(path), f"{sha256}  {path.name}\n")


def remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed in `atomic_path` have left beside `path`; to be called
    only while no process writes it.
    """
    for aside in path.parent.glob(_ASIDE.format(name=glob.escape(path.name), random="*")):
        aside.unlink(missing_ok=True)


def remove_sealed(path: Path) -> None:
    """Remove a file and its seal."""
    for each in (path, seal_of(path)):
        each.unlink(missing_ok=True)


def seal_of(path: Path) -> Path:
    """The path of a file's SHA-256, in the form that `sha256sum --check` reads."""
    return path.with_name(f"{path.name}.sha256")


def is_sealed(path: Path) -> bool:
    """Whether the file exists and matches its seal."""
    try:
        noted = seal_of(path).read_text(encoding="utf-8").split()
        return bool(noted) and noted[0] == sha256_of(path)
    except (OSError, UnicodeDecodeError):
        return False


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 atomically; characters that UTF-8 cannot encode (bytes of a path) are escaped."""
    with atomic_path(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def flush(path: Path) -> None:
    """Flush a file's content, or the renames in a folder, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
