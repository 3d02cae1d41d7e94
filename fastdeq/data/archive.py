"""Archives, whose members are read into memory: nothing is written."""

import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

GZIP = b"\x1f\x8b"
"""What a gzip file begins with."""


def is_gzip(path: Path) -> bool:
    """Return whether the file begins as gzip does, whatever its name says."""
    with path.open("rb") as file:
        return file.read(2) == GZIP


def read_members(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Return the contents of members of a tar or zip archive, by archive and name.

    Raises ValueError naming the archive where it is damaged or has no member of a name.
    """
    read = _of_zip if path.suffix == ".zip" else _of_tar
    try:
        found = dict(read(path, names))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged archive ({error}): get it again") from error
    except OSError as error:  # gzip's own too, which have no number
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{path}: {missing[0]} is not in this archive: get it again")
    return {f"{path}: {name}": found[name] for name in names}


def _of_tar(path: Path, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path, "r:gz" if is_gzip(path) else "r:") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None and (name := str(PurePosixPath(member.name))) in names:
                content = file.read()
                if len(content) < member.size:
                    raise EOFError(f"{name} is truncated")
                yield name, content


def _of_zip(path: Path, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for name in set(names) & set(archive.namelist()):
            yield name, archive.read(name)
