"""Published image sets: description, search, download and verification of their files."""

import hashlib
import os
import sys
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Self

import pooch  # type: ignore[import-untyped]
from torch import Tensor

from fastdeq.data.archive import read_members
from fastdeq.data.module import InMemoryDataModule, NormalizationSetting, Samples, data_module
from fastdeq.data.store import (
    CURE,
    REQUIRED_ATTRIBUTES,
    ImageSet,
    building,
    read_content,
    read_store,
    write_store,
)
from fastdeq.runs.files import sha256_of
from fastdeq.settings import setting

_TIMEOUT = 30  # seconds without an answer or without a byte
_SOURCES = tomllib.loads(
    resources.files("fastdeq.data").joinpath("sources.toml").read_text(encoding="utf-8")
)


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file of a published set: the ``names`` it goes by, the mirrors' first, and its ``md5``.

    ``folder``: where it lies in the archive that it comes from. ``md5`` is empty where it is not
    published.
    """

    names: tuple[str, ...]
    md5: str
    folder: str = ""

    def find(self, folder: Path) -> Path | None:
        """Return the file in ``folder`` under the first of its names that is there."""
        return next((folder / name for name in self.names if (folder / name).is_file()), None)


Form = tuple[SourceFile, ...]
"""All files of a set, one way in which it is published."""


@dataclass(frozen=True, kw_only=True)
class ImageSource(ABC):
    """A published image set: what it is, where its files are, and how they are read.

    ``name``: of its store; ``place``: of the folder that its files may lie in. ``files`` and
    ``others``: the forms in which a folder may have it. sources.toml explains the rest.
    """

    name: str
    place: str
    title: str
    version: str
    source: str
    licence: str
    split: str
    files: Form
    folders: tuple[str, ...]
    mirrors: tuple[str, ...]
    others: tuple[Form, ...] = ()

    @classmethod
    def from_table(
        cls,
        name: str,
        spellings: Callable[[str], tuple[str, ...]] = lambda name: (name,),
        **fields: Any,
    ) -> Self:
        """Return a set of sources.toml; ``spellings`` gives the names that a file goes by."""

        def form(table: Mapping[str, str]) -> Form:
            paths = {PurePosixPath(key): md5 for key, md5 in table.items()}
            return tuple(
                SourceFile(names=spellings(path.name), md5=md5, folder=path.parent.name)
                for path, md5 in paths.items()
            )

        values: dict[str, Any] = {"name": name, "place": name, **fields}
        for key, value in _SOURCES[name].items():
            if isinstance(value, dict):
                value = form(value)
            elif key == "others":
                value = map(form, value)
            values[key] = value if isinstance(value, str) else tuple(value)
        return cls(**values)

    @property
    def forms(self) -> tuple[Form, ...]:
        """All forms, that of the mirrors first; an archive comes before what is in it."""
        return (self.files, *self.others)

    def form_of(self, files: Sequence[Path]) -> int:
        """Return the number of the form that ``files`` have, by the name of the first."""
        return next(i for i, form in enumerate(self.forms) if files[0].name in form[0].names)

    @abstractmethod
    def read(self, files: Sequence[Path], *, verify: bool) -> ImageSet:
        """Read ``files``, those of a form in order; with ``verify`` they must be the official ones.

        Raises ValueError naming the file and what is wrong with it.
        """

    def is_official(self, attributes: Mapping[str, str]) -> bool:
        """Return whether a store with these attributes was made from the official files."""
        return True  # unless a source knows better: no store is made before they are verified

    def attributes(self, *, verify: bool = True) -> dict[str, str]:
        """Return the attributes of a store; of files that were not verified, it says so."""
        attributes = {key: getattr(self, key) for key in REQUIRED_ATTRIBUTES}
        if not verify:
            attributes |= {
                "version": "not verified",
                "source": f"files of the user's own, in the format of {self.title}",
                "licence": "that of these files",
            }
        return attributes

    def contents(self, files: Sequence[Path], *, verify: bool) -> dict[str, bytes]:
        """Return the contents by place, of ``files`` or of what is in them, an archive.

        With ``verify``, first, raises as ``verify_md5``. Raises ValueError naming a file that
        cannot be read.
        """
        number = self.form_of(files)
        if verify:
            self.verify_md5(files, self.forms[number])
        if len(files) > 1:
            return {str(path): read_content(path) for path in files}
        unpacked = self.forms[number + 1]
        return read_members(files[0], [f"{file.folder}/{file.names[0]}" for file in unpacked])

    def find(self, root: Path, *forms: Form) -> tuple[Path, Form]:
        """Return folder and form at or beneath ``root`` that are the most complete.

        Where no file is there, these are ``root/<place>`` and the first form.
        """
        # Sets share file names: folders named after the set come before the data folder itself.
        folders = [root / self.place, *(root / folder for folder in self.folders), root]
        places = [(folder, form) for form in forms if form for folder in folders]
        return min(places, key=lambda place: len(missing_in(*place)) / len(place[1]))

    def verify_md5(self, paths: Sequence[Path], form: Sequence[SourceFile]) -> None:
        """Raise ValueError, naming file and cure, unless each path has the MD5 of its file."""
        md5 = partial(hashlib.md5, usedforsecurity=False)  # where policy forbids MD5 for security
        for path, file in zip(paths, form, strict=True):
            if not file.md5:
                archives = [one[0].names[0] for one in self.forms if len(one) == 1]
                raise self.unverifiable(path, "the archives", " or ".join(archives))
            with path.open("rb") as content:
                found = hashlib.file_digest(content, md5).hexdigest()
            if found != file.md5:
                raise self.not_official(path, "MD5 of the file", found)

    def unverifiable(self, path: Path, kind: str, official: str) -> ValueError:
        """Return the error for a file whose checksum is not published, only those of a kind."""
        return ValueError(
            f"{path}: cannot be verified, for of {self.title} only the checksums of {kind} are "
            f"published: give the official {official} instead, or take your own files as they are "
            "with data.verify=false"
        )

    def not_official(self, path: Path, kind: str, found: str) -> ValueError:
        """Return the error for a file with another checksum, of this kind, than published."""
        return ValueError(
            f"{path}: not the official file of {self.title}, the {kind} is {found}: delete it and "
            "get it again, or take your own files as they are with data.verify=false"
        )


def image_set(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    sha256: Mapping[Path, str],
    **attributes: str,
) -> ImageSet:
    """Return images and labels of both splits, with the checksums of their files as attribute."""
    attributes["source_sha256"] = ", ".join(f"{path.name} {one}" for path, one in sha256.items())
    return ImageSet(*train, *test, attributes)


def missing_in(folder: Path, form: Sequence[SourceFile]) -> list[SourceFile]:
    """Return the files that are not in ``folder``."""
    return [file for file in form if file.find(folder) is None]


def download(files: Iterable[SourceFile], folder: Path, mirrors: Sequence[str]) -> None:
    """Fetch ``files`` into ``folder``, each from the first of ``mirrors`` that gives the right one.

    Several processes may do this at once: a file appears whole and verified by its MD5. Raises
    OSError, with the failure of every mirror, for a file that none of them gives, or where the
    folder cannot be written.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]  # the innermost first
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder}: cannot be made ({error.strerror}): choose another") from error
    failures: dict[str, str] = {}
    try:
        for file in files:
            # A mirror that failed once comes last: it may take its whole timeout again.
            failures |= _fetch(file, folder, sorted(mirrors, key=failures.__contains__))
    except BaseException:
        for path in new:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise


def _fetch(file: SourceFile, folder: Path, mirrors: Sequence[str]) -> dict[str, str]:
    """Fetch one file; return the failures of the mirrors that were tried in vain."""
    name, md5, failures = file.names[0], f"md5:{file.md5}", dict[str, str]()
    bar = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=_TIMEOUT)
    for mirror in mirrors:
        try:
            # Writes aside and renames: a file under its own name is whole and has its MD5.
            pooch.retrieve(mirror + name, md5, fname=name, path=folder, downloader=bar)
            (folder / name).chmod(0o644)  # it was a temporary file, for this user alone
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            failures[mirror] = _reason(error)
        else:
            return failures
    reasons = "; ".join(f"{mirror} ({reason})" for mirror, reason in failures.items())
    raise OSError(
        f"{name} could not be downloaded: {reasons}: try again later, or get it by other means and "
        "give its folder as data.root"
    )


def _reason(error: OSError | ValueError) -> str:
    # In a few words: requests' own messages name objects and run over several lines.
    response = getattr(error, "response", None)
    if response is not None:
        return f"{response.status_code} {response.reason}"
    if type(error) is ValueError:  # pooch's; requests' are of subclasses
        return "another MD5 than the published one"
    return getattr(error, "strerror", None) or type(error).__name__


def store_folder(store: str | Path | None) -> Path:
    """Return ``store``, or where it is None the folder that the environment names.

    That is $FASTDEQ_CACHE, else $XDG_CACHE_HOME/fastdeq, else ~/.cache/fastdeq.
    """
    if store is not None:
        return given_folder("store", store)
    if cache := os.environ.get("FASTDEQ_CACHE"):
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastdeq"


def given_folder(name: str, folder: str | Path) -> Path:
    """Return the path of a folder that was given; ValueError for an empty one."""
    if not str(folder):
        raise ValueError(f"{name} is empty, but must be the path of a folder")
    return Path(folder).expanduser()


def existing_folder(root: Path, holds: str) -> Path:
    """Return ``root``; FileNotFoundError or NotADirectoryError where it is missing or a file."""
    if not root.is_dir():
        kind = NotADirectoryError if root.exists() else FileNotFoundError
        raise kind(f"{root}: no such folder: data.root is the folder with {holds}")
    return root


@data_module
class StoredDataModule(InMemoryDataModule):
    """Batches of a published image set, float32 (B, C, H, W) normalized, labels int64 (B,).

    The set is kept in a store, ``<store>/<name>.h5``, which is built once from its source files.

    ``root``: a folder that has the source files, or a folder with them; None: no such folder.
    ``store``: the folder of the store (see ``store_folder``). ``download``: whether source files
    that are missing are fetched, into ``root`` (or a folder of the set in it), or without it into
    ``<store>/<name>``. ``verify``: whether the source files must be the official ones; if not, the
    name of the store has a checksum of their contents, so that different sets never mix.
    ``normalization``: see ``Normalization.configured``.

    A subclass is final and defines ``source`` and ``published`` too, and where a setting of its own
    chooses among variants of the set, ``chosen``.

    Raises ValueError for ``verify=False`` without a ``root`` or with ``download``. ``prepare_data``
    and ``setup`` raise FileNotFoundError or NotADirectoryError for a ``root`` or source files that
    are missing; ValueError for source files or a store that are damaged or not the official ones;
    OSError where the store or a download cannot be written.
    """

    root: str | Path | None = None
    store: str | Path | None = None
    download: bool = False
    verify: bool = True
    batch_size: int = setting(default=128, at_least=1)
    eval_batch_size: int = setting(default=1000, at_least=1)
    normalization: NormalizationSetting = "published"

    source: ClassVar[ImageSource]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._root = None if self.root is None else given_folder("root", self.root)
        self._store, self._source = store_folder(self.store), self.chosen()
        if not self.verify and self.root is None:
            raise ValueError("verify=false is for files of your own: give data.root=PATH too")
        if not self.verify and self.download:
            raise ValueError(
                "verify=false is for files of your own and download=true for the official ones: "
                "set one of them"
            )

    def chosen(self) -> ImageSource:
        """Return the variant of ``source`` that the settings choose."""
        return self.source

    def prepare(self) -> None:
        self._ensure()

    def load(self) -> tuple[Samples, Samples]:
        path = self._ensure()
        images = read_store(path, cure=CURE, wanted=self._source.attributes(verify=self.verify))
        if self.verify and not self._source.is_official(images.attributes):
            raise ValueError(
                f"{path}: nothing shows that its files were the official ones of "
                f"{self._source.title}: {CURE}"
            )
        return self._from_images(images, str(path))

    def _ensure(self) -> Path:
        """Return the path of the store, built if it was missing (see ``building``)."""
        if self._root is not None:
            existing_folder(self._root, "the files")
        path = self._store / f"{self._source.name}.h5"
        if self.verify and path.exists():
            return path
        files = self._find_files()
        if not self.verify:
            checksums = b"".join(bytes.fromhex(sha256_of(file)) for file in files)
            path = path.with_stem(f"{path.stem}-{hashlib.sha256(checksums).hexdigest()[:12]}")
        if not path.exists():
            images = self._source.read(files, verify=self.verify)
            own = self._source.attributes(verify=self.verify)
            with building(path) as missing:
                if missing:
                    write_store(path, replace(images, attributes={**images.attributes, **own}))
        return path

    def _find_files(self) -> list[Path]:
        """Return the source files in the order of their form, downloaded if necessary."""
        wanted = self._source
        folder, form = self._find(*wanted.forms)
        if missing_in(folder, form) and self.download:
            folder, form = self._find(wanted.files)  # the form that the mirrors have
            download(missing_in(folder, form), folder, wanted.mirrors)
        missing = missing_in(folder, form)
        if missing and self._root is None:
            raise FileNotFoundError(
                f"{wanted.title} is not here yet: give the folder with its files, data.root=PATH "
                "(or FASTDEQ_DATA), or download it with data.download=true"
            )
        if missing:
            place = folder if folder.is_dir() else self._root
            raise FileNotFoundError(
                f"{place}: {missing[0].names[0]} of {wanted.title} is not there: give the folder "
                "that has it as data.root, or download it with data.download=true"
            )
        return [file for file in (file.find(folder) for file in form) if file is not None]

    def _find(self, *forms: Form) -> tuple[Path, Form]:
        if self._root is None:
            return self._store / self._source.place, self._source.files
        return self._source.find(self._root, *forms)
