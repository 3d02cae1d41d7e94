"""An image set's store: built once from its verified source files, read from then on."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock

from fastdeq.data.download import download
from fastdeq.data.sources import ImageSource, Publication, SourceFile, missing_in
from fastdeq.data.store import ImageSet, read_store, remove_unfinished, write_store

CURE = "delete it and it is built again"


def store_folder(store: Path | None) -> Path:
    """Return ``store``, or without it the folder that the environment says.

    That is $FASTDEQ_CACHE, else $XDG_CACHE_HOME/fastdeq, else ~/.cache/fastdeq.
    """
    if store is not None:
        return store
    if cache := os.environ.get("FASTDEQ_CACHE"):
        return Path(cache).expanduser()
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache).expanduser() / "fastdeq"
    return Path.home() / ".cache" / "fastdeq"


@dataclass(frozen=True, kw_only=True)
class StoredSet:
    """The store of an image set, ``<store>/<name>.h5``, and where it can be built from.

    ``root``: a folder that holds the source files, or has a folder with them; None: none is given.
    ``store``: the folder of the store (see ``store_folder``). ``download``: whether source files
    that are missing are fetched, into ``root`` (or a folder of the set in it), or without it into
    ``<store>/<name>``. ``verify``: whether the source files must be the official ones; if not, the
    store's name carries a checksum of their contents, so that different sets never mix.
    """

    source: ImageSource
    root: Path | None
    store: Path
    download: bool
    verify: bool

    def __post_init__(self) -> None:
        if not self.verify and self.root is None:
            raise ValueError("verify=false is for files of your own: give data.root=PATH too")
        if not self.verify and self.download:
            raise ValueError(
                "verify=false is for files of your own and download=true for the official ones: "
                "set one of them"
            )

    def ensure(self) -> Path:
        """Return the path of the store, built if it was missing.

        Building is exclusive, other processes wait for it; it leaves a whole store or none.

        Raises FileNotFoundError or NotADirectoryError for a ``root`` that is missing or no folder,
        and for source files that are; ValueError for source files that are not right; OSError where
        the store or a download cannot be written.
        """
        if self.root is not None and not self.root.is_dir():
            kind = NotADirectoryError if self.root.exists() else FileNotFoundError
            raise kind(f"{self.root}: no such folder: data.root is the folder with the files")
        path = self.store / f"{self._publication.name}.h5"
        if self.verify and path.exists():
            return path
        files = self._find_files()
        if not self.verify:
            path = path.with_stem(f"{path.stem}-{_fingerprint(files)}")
        if not path.exists():
            images = self.source.read(files, verify=self.verify)
            _build(path, replace(images, attributes={**images.attributes, **self._attributes()}))
        return path

    def read(self, path: Path) -> ImageSet:
        """Return the set in the store at ``path`` (``ensure``), verified by its own checksum.

        Raises ValueError for a store that is damaged, of another set, or, with ``verify``, made
        from files that are not known to be official.
        """
        images = read_store(path, cure=CURE)
        wanted = self._attributes()
        for key in ("name", "version"):
            if images.attributes[key] != wanted[key]:
                found = images.attributes[key]
                raise ValueError(f"{path}: its {key} is {found!r}, not {wanted[key]!r}: {CURE}")
        if self.verify and not self.source.is_official(images.attributes):
            raise ValueError(
                f"{path}: nothing shows that its files were the official ones of "
                f"{self._publication.title}: {CURE}"
            )
        return images

    @property
    def _publication(self) -> Publication:
        return self.source.publication

    def _find_files(self) -> list[Path]:
        """Return the source files in the order of their form, downloaded if need be."""
        wanted = self._publication
        form = wanted.files if self.root is None else wanted.form_in(self.root)
        if missing_in(self._folder(form), form) and self.download:
            form = wanted.files  # what the mirrors have
            download(missing_in(self._folder(form), form), self._folder(form), wanted.mirrors)
        folder = self._folder(form)
        missing = missing_in(folder, form)
        if missing and self.root is None:
            raise FileNotFoundError(
                f"{wanted.title} is not here yet: give the folder with its files, data.root=PATH "
                "(or FASTDEQ_DATA), or download it with data.download=true"
            )
        if missing:
            place = folder if folder.is_dir() else self.root
            raise FileNotFoundError(
                f"{place}: {missing[0].names[0]} of {wanted.title} is not there: give the folder "
                "that has it as data.root, or download it with data.download=true"
            )
        return [file for file in (file.find(folder) for file in form) if file is not None]

    def _folder(self, form: Sequence[SourceFile]) -> Path:
        """Return the folder in which files of this form are, or belong."""
        if self.root is None:
            return self.store / self._publication.name
        return self._publication.folder_in(self.root, form)

    def _attributes(self) -> dict[str, str]:
        """Return what the store must say of itself: a set that was not verified says so."""
        attributes = self._publication.attributes()
        if not self.verify:
            attributes |= {
                "version": "not verified",
                "source": f"files of the user's own, in the format of {self._publication.title}",
                "licence": "that of these files",
            }
        return attributes


def _fingerprint(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def _build(path: Path, images: ImageSet) -> None:
    with building(path) as missing:
        if missing:
            write_store(path, images)


@contextmanager
def building(path: Path) -> Iterator[bool]:
    """Be the only process that builds the store at ``path``; gives whether it is still missing.

    Raises OSError, with the cure, for any OSError or RuntimeError: the store cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            remove_unfinished(path)  # whoever wrote there is dead: the lock was free
            yield not path.exists()
    except (OSError, RuntimeError) as error:  # RuntimeError: h5py's on a full disk, when closing
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())
        raise OSError(
            f"{path}: cannot be written ({reason}): choose a folder for it with data.store=PATH "
            "or FASTDEQ_CACHE"
        ) from error
