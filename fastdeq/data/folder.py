"""A folder of images in classes, train/<class>/ and val/<class>/, as it lies on the disk."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "val")
_EXTENSIONS = (".jpg", ".jpeg", ".png")
_SHOWN = 5  # names in a message


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderSplit:
    """The images of one split, by class and name: ``names`` as "class/file".

    ``sizes`` int64 (N,), in bytes; ``times`` int64 (N, 2), of the last change of the content and of
    the file's status (mtime and ctime), in nanoseconds; ``labels`` int64 (N,), the classes' places
    in their order.
    """

    folder: Path
    names: Sequence[str]
    sizes: NDArray[np.int64]
    times: NDArray[np.int64]
    labels: NDArray[np.int64]

    def read(self, index: int) -> bytes:
        """Return the content of the file at ``index``.

        Raises ValueError where it cannot be read or has another size than when it was listed.
        """
        path = self.folder / self.names[index]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
        if len(content) != self.sizes[index]:
            raise ValueError(
                f"{path}: has {len(content)} bytes, and had {self.sizes[index]} a moment ago: wait "
                "until nothing is written there any more, and start again"
            )
        return content


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageFolder:
    """A folder of images: its ``classes`` in the order of their names, and its ``splits``."""

    root: Path
    classes: Sequence[str]
    splits: Mapping[str, FolderSplit]

    def fingerprint(self) -> str:
        """Return the SHA-256 of where the folder is and of its files' names and sizes."""
        digest = hashlib.sha256(os.fsencode(self.root.resolve()) + b"\0")
        for name, split in self.splits.items():
            for file, size in zip(split.names, split.sizes.tolist(), strict=True):
                digest.update(os.fsencode(f"{name}/{file}\0{size}\n"))
        return digest.hexdigest()

    def time_fingerprint(self) -> str:
        """Return the SHA-256 of the files' times; equal ones mean that no file was written since.

        A content can change and keep its size, and even its mtime (archives with fixed times, a
        copy that preserves them); the system sets ctime whenever anything of a file changes.
        """
        digest = hashlib.sha256()
        for split in self.splits.values():
            digest.update(split.times.astype("<i8").tobytes())
        return digest.hexdigest()


def list_folder(root: Path, name: str) -> ImageFolder:
    """List the images in ``root``, or in its folder of this ``name`` if that has the splits.

    Below train/ and val/ each folder is a class, each file in it an image by its ending (.jpg,
    .jpeg or .png, of either case). Left out are names that begin with a dot, everywhere, and beside
    the class folders files that are no images by their ending (archives that these came from).

    Raises FileNotFoundError or NotADirectoryError where ``root``, train/ or val/ is missing or no
    folder. ValueError where a split has no classes, or images that lie in none; where the two
    splits' classes differ; where a class has no images, or has anything but images in it.
    """
    root = _find(root, name)
    classes = {split: _classes(root / split) for split in SPLITS}
    if classes["train"] != classes["val"]:
        raise ValueError(f"{root}: {_difference(*(classes[split] for split in SPLITS))}")
    splits = {split: _list_split(root / split, classes[split]) for split in SPLITS}
    return ImageFolder(root=root, classes=classes["train"], splits=splits)


def _find(root: Path, name: str) -> Path:
    if not root.is_dir():
        kind = NotADirectoryError if root.exists() else FileNotFoundError
        raise kind(f"{root}: no such folder: data.root is the folder with train/ and val/")
    places = [root, root / name]
    found = next((place for place in places if any((place / s).is_dir() for s in SPLITS)), root)
    for split in SPLITS:
        if not (found / split).is_dir():
            raise FileNotFoundError(
                f"{found}: has no folder {split}: data.root is the folder with train/ and val/, "
                "which have a folder of images for each class"
            )
    return found


def _classes(folder: Path) -> list[str]:
    classes = []
    for entry in _entries(folder):
        if entry.is_dir():
            classes.append(entry.name)
        elif _is_image(entry.name):
            raise ValueError(
                f"{entry.path}: an image that is in no class: sort the images of {folder} into a "
                "folder for each class"
            )
    if not classes:
        raise ValueError(f"{folder}: has no images: it must have a folder of them for each class")
    return classes


def _difference(train: Sequence[str], val: Sequence[str]) -> str:
    parts = [
        f"val has no folder for {_some(missing)}"
        if split == "val"
        else f"train has no folder for {_some(missing)}"
        for split, missing in (
            ("val", [name for name in train if name not in set(val)]),
            ("train", [name for name in val if name not in set(train)]),
        )
        if missing
    ]
    return f"{', and '.join(parts)}: both need the same classes"


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _list_split(folder: Path, classes: Sequence[str]) -> FolderSplit:
    names: list[str] = []
    statuses: list[os.stat_result] = []
    counts = []
    for name in classes:
        before = len(names)
        for entry in _entries(folder / name):
            names.append(f"{name}/{entry.name}")
            statuses.append(_status(entry))
        counts.append(len(names) - before)
        if not counts[-1]:
            raise ValueError(f"{folder / name}: has no images: add some, or remove this class")
    return FolderSplit(
        folder=folder,
        names=names,
        sizes=np.array([status.st_size for status in statuses], dtype=np.int64),
        times=np.array([(s.st_mtime_ns, s.st_ctime_ns) for s in statuses], dtype=np.int64),
        labels=np.repeat(np.arange(len(classes), dtype=np.int64), counts),
    )


def _status(entry: "os.DirEntry[str]") -> os.stat_result:
    """Return the status of an image's file; ValueError for anything else in a class's folder."""
    if not _is_image(entry.name) or entry.is_dir():
        kind = "a folder" if entry.is_dir() else "no image by its name"
        raise ValueError(
            f"{entry.path}: {kind} among the images of a class, which end in "
            f"{', '.join(_EXTENSIONS)}: remove it"
        )
    try:
        return entry.stat()
    except OSError as error:  # a link to nowhere
        raise ValueError(f"{entry.path}: cannot be read ({error.strerror})") from error


def _entries(folder: Path) -> Iterator["os.DirEntry[str]"]:
    """Yield what is in a folder by name, without what is hidden."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror})") from error
    yield from sorted(visible, key=lambda entry: entry.name)


def _is_image(name: str) -> bool:
    return name.lower().endswith(_EXTENSIONS)
