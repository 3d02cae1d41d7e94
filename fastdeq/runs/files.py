"""Files that are complete or absent: atomic writes, and SHA-256 seals beside them."""

import hashlib
import os
from pathlib import Path


def seal_of(path: Path) -> Path:
    """Where a file's SHA-256 stands, in the form that `sha256sum --check` reads."""
    return path.with_name(f"{path.name}.sha256")


def is_sealed(path: Path) -> bool:
    """Whether the file is exactly what was written: it is there, with a seal that fits."""
    try:
        noted = seal_of(path).read_text(encoding="utf-8").split()
        return bool(noted) and noted[0] == sha256_of(path)
    except (OSError, UnicodeDecodeError):
        return False


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def write_atomic(path: Path, text: str) -> None:
    """Write aside, flush and rename: a reader sees the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def flush_folder(folder: Path) -> None:
    """Let the renames themselves reach the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
