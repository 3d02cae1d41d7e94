"""What an image set is published as, and the search for its files."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastdeq.data.store import ImageSet


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file of a published set: the ``names`` it goes by, the mirrors' first, and its ``md5``."""

    names: tuple[str, ...]
    md5: str

    def find(self, folder: Path) -> Path | None:
        """Return the file in ``folder`` under the first of its names that is there."""
        return next((folder / name for name in self.names if (folder / name).is_file()), None)


@dataclass(frozen=True, kw_only=True)
class Publication:
    """An image set as published.

    ``name``: of its store. ``version``, ``source``, ``licence``, ``split``: the store's attributes.
    ``files``: the form in which the mirrors have it. ``unpacked``: the files that come out of these
    where they are an archive, a second form of the set. ``folders``: where files of either form may
    lie beneath a data folder. ``mirrors``: addresses that a file's first name is appended to.
    """

    name: str
    title: str
    version: str
    source: str
    licence: str
    split: str
    files: tuple[SourceFile, ...]
    folders: tuple[str, ...]
    mirrors: tuple[str, ...]
    unpacked: tuple[SourceFile, ...] = ()

    def attributes(self) -> dict[str, str]:
        """Return what a store must say of itself."""
        keys = ("name", "version", "source", "licence", "split")
        return {key: getattr(self, key) for key in keys}

    def form_in(self, root: Path) -> tuple[SourceFile, ...]:
        """Return the form that is at or beneath ``root``: the more complete one, else ``files``."""
        forms = [form for form in (self.files, self.unpacked) if form]
        return min(
            forms, key=lambda form: len(missing_in(self.folder_in(root, form), form)) / len(form)
        )

    def folder_in(self, root: Path, form: Sequence[SourceFile]) -> Path:
        """Return the folder at or beneath ``root`` that holds the most of the form's files.

        Where none holds any, that is ``root/<name>``. Sets share file names, so that the folders
        named after the set come first, and a data folder that has them is not taken for the set.
        """
        folders = [root / self.name, *(root / folder for folder in self.folders), root]
        return min(folders, key=lambda folder: len(missing_in(folder, form)))

    def verify_md5(self, path: Path, file: SourceFile) -> None:
        """Raise ValueError, naming file and cure, unless ``path`` has the MD5 of ``file``."""
        md5 = partial(hashlib.md5, usedforsecurity=False)  # where policy forbids MD5 for security
        with path.open("rb") as content:
            found = hashlib.file_digest(content, md5).hexdigest()
        if found != file.md5:
            raise self.not_official(path, "MD5 of the file", found)

    def not_official(self, path: Path, kind: str, found: str) -> ValueError:
        """Return the error for a file that has another checksum, of this kind, than published."""
        return ValueError(
            f"{path}: not the official file of {self.title}, the {kind} is {found}: delete it and "
            "get it again, or take your own files as they are with data.verify=false"
        )


def missing_in(folder: Path, form: Sequence[SourceFile]) -> list[SourceFile]:
    """Return which of the files are not in ``folder``."""
    return [file for file in form if file.find(folder) is None]


class ImageSource(ABC):
    """A published image set that can be read: how its files are checked, and what is in them."""

    publication: Publication

    @abstractmethod
    def read(self, files: Sequence[Path], *, verify: bool) -> ImageSet:
        """Read ``files``, one for each of a form of the publication and in their order.

        With ``verify`` they must be the official ones. Raises ValueError naming the file and what
        is wrong with it.
        """

    def is_official(self, attributes: Mapping[str, str]) -> bool:
        """Return whether a store with these attributes was made from the official files."""
        return True  # unless a source knows better: no store is made before they are verified
