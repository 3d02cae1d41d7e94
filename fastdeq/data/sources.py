"""What an image set is published as, and the search for its files."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
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
    ``folders``: where its files may lie beneath a data folder. ``mirrors``: addresses that a file's
    first name is appended to.
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

    def attributes(self) -> dict[str, str]:
        """Return what a store must say of itself."""
        keys = ("name", "version", "source", "licence", "split")
        return {key: getattr(self, key) for key in keys}

    def folder_in(self, root: Path) -> Path:
        """Return the folder at or beneath ``root`` that holds the most of the files.

        Where none holds any, that is ``root/<name>``. Sets share file names, so that the folders
        named after the set come first, and a data folder that has them is not taken for the set.
        """
        folders = [root / self.name, *(root / folder for folder in self.folders), root]
        return max(folders, key=lambda folder: len(self.files) - len(self.missing_in(folder)))

    def missing_in(self, folder: Path) -> list[SourceFile]:
        """Return the files that are not in ``folder``."""
        return [file for file in self.files if file.find(folder) is None]


class ImageSource(ABC):
    """A published image set that can be read: how its files are checked, and what is in them."""

    publication: Publication

    @abstractmethod
    def read(self, files: Sequence[Path], *, verify: bool) -> ImageSet:
        """Read ``files``, one for each of the publication's and in their order.

        With ``verify`` they must be the official ones. Raises ValueError naming the file and what
        is wrong with it.
        """
