"""Which files of a folder are images, of which class and of which split."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fastdeq.data.published import existing_folder
from fastdeq.data.records import SPLITS, FolderSplit, ImageFolder
from fastdeq.data.store import read_content

VAL = ("val", "valid", "test")
"""The folders that the split val may be in; the first one that is there has it."""

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_STRAY = {"thumbs.db", "desktop.ini", "__macosx"}  # of file managers, beside hidden ones
_NOTES = (".txt", ".csv", ".tsv", ".json", ".xml", ".md")  # about images
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
_ANNOTATIONS = "val_annotations.txt"  # of Tiny-ImageNet
_NAMES_SHOWN = 5  # in a message
_WANTED = (
    "data.root is the folder with train/ and val/, which have a folder of images for each class "
    "(without val/, data.test_share=0.1 holds out a share of train/)"
)


def fingerprints(folder: ImageFolder) -> tuple[str, str]:
    """Return two SHA-256: of place, names and sizes of the files, and of their times.

    A content can change and keep its size, and even its mtime (archives with fixed times, a copy
    that preserves them); the system sets ctime whenever anything of a file changes.
    """
    files, times = hashlib.sha256(os.fsencode(folder.root.resolve()) + b"\0"), hashlib.sha256()
    for name, split in folder.splits.items():
        name = name if split.folder.name == name else f"{name} {split.folder.name}"
        for file, size in zip(split.names, split.sizes.tolist(), strict=True):
            files.update(os.fsencode(f"{name}/{file}\0{size}\n"))
        if not split.names[0].startswith(f"{folder.classes[split.labels[0]]}/"):  # annotated
            files.update(split.labels.astype("<i8").tobytes())
        times.update(split.times.astype("<i8").tobytes())
    return files.hexdigest(), times.hexdigest()


def list_folder(root: Path, name: str, *, share: float = 0, seed: int = 0) -> ImageFolder:
    """List the images in ``root``, or in its folder of this ``name`` if that has the splits.

    The split val is a ``share`` of each class of train/, chosen by ``seed``; with 0, the folder
    val/, or where it is missing valid/ or test/. docs/data.md says what counts as an image.

    Raises FileNotFoundError or NotADirectoryError where ``root`` or a split is missing or not a
    folder, ValueError for a folder of another form.
    """
    root = _find(existing_folder(root, "train/ and val/"), name, () if share else VAL)
    classes = _classes(root / "train")
    if share:
        train, val = _divide(_list_split(root / "train", classes), classes, share, seed)
        return ImageFolder(root=root, classes=classes, splits={"train": train, "val": val})
    folder = next(root / one for one in VAL if (root / one).is_dir())
    annotated = "images" not in classes and (folder / "images").is_dir()
    annotated = annotated and (folder / _ANNOTATIONS).is_file()
    if not annotated and (others := _classes(folder)) != classes:
        raise ValueError(f"{root}: {_difference(folder.name, classes, others)}")
    train = _list_split(root / "train", classes)
    val = _list_annotated(folder, classes) if annotated else _list_split(folder, classes)
    return ImageFolder(root=root, classes=classes, splits={"train": train, "val": val})


def _find(root: Path, name: str, val: Sequence[str]) -> Path:
    places = (root, root / name)
    found = next((place for place in places if any((place / s).is_dir() for s in SPLITS)), root)
    for folders in (("train",), val):
        if folders and not any((found / one).is_dir() for one in folders):
            archives = [one.name for one in _entries(found) if one.name.endswith(ARCHIVES)]
            cure = f"unpack {archives[0]} there" if archives else _WANTED
            raise FileNotFoundError(f"{found}: has no folder {folders[0]}: {cure}")
    return found


def _classes(folder: Path) -> list[str]:
    classes = []
    for entry in _entries(folder):
        if entry.is_dir():
            classes.append(entry.name)
        elif _is_image(entry.name):
            raise ValueError(
                f"{entry.path}: an image outside of a class: sort the images of {folder} into a "
                "folder for each class"
            )
    if not classes:
        raise ValueError(f"{folder}: has no images: it must have a folder of them for each class")
    return classes


def _difference(name: str, train: Sequence[str], val: Sequence[str]) -> str:
    parts = [
        f"{split} has no folder for {some(sorted(missing))}"
        for split, missing in ((name, {*train} - {*val}), ("train", {*val} - {*train}))
        if missing
    ]
    return f"{', and '.join(parts)}: both need the same classes"


def some(names: Sequence[str], shown: int = _NAMES_SHOWN) -> str:
    """Return the first names, and how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more:,} more" if more > 0 else "")


def _list_split(folder: Path, classes: Sequence[str]) -> FolderSplit:
    found = [
        (label, image, status)
        for label, name in enumerate(classes)
        for image, status in _images(folder, name)
    ]
    return _split(folder, classes, found)


def _list_annotated(folder: Path, classes: Sequence[str]) -> FolderSplit:
    """List images/, where a file has a line for each: its name, its class and more, with tabs."""
    place = folder / _ANNOTATIONS
    lines = [line.split("\t") for line in read_content(place).decode(errors="replace").splitlines()]
    named = {one[0]: one[1] for one in lines if len(one) > 1}
    numbers = {name: label for label, name in enumerate(classes)}
    found = []
    for image, status in _images(folder, "images"):
        name = named.pop(Path(image).name, None)
        if name not in numbers:
            problem = f"{place} has class {name} for it, which train lacks"
            problem = problem if name else f"{place} has no line for it"
            raise ValueError(f"{folder / image}: {problem}: correct that, or remove it")
        found.append((numbers[name], image, status))
    if named:
        raise ValueError(f"{place}: {next(iter(named))} is not in {folder / 'images'}: add it")
    return _split(folder, classes, sorted(found, key=lambda one: one[:2]))


def _split(
    folder: Path, classes: Sequence[str], found: Sequence[tuple[int, str, os.stat_result]]
) -> FolderSplit:
    split = FolderSplit(
        folder=folder,
        names=[name for _, name, _ in found],
        sizes=np.array([status.st_size for *_, status in found], dtype=np.int64),
        times=np.array([(s.st_mtime_ns, s.st_ctime_ns) for *_, s in found], dtype=np.int64),
        labels=np.array([label for label, *_ in found], dtype=np.int64),
    )
    check_classes(split, classes)
    return split


def check_classes(split: FolderSplit, classes: Sequence[str], kind: str = "") -> None:
    """Raise ValueError for a class without images; ``kind``: of the images that are meant."""
    counts = np.bincount(split.labels, minlength=len(classes))
    for name, number in zip(classes, counts, strict=True):
        if not number:
            raise ValueError(
                f"{split.folder / name}: has no {kind}images: add some, or remove this class"
            )


def _divide(
    split: FolderSplit, classes: Sequence[str], share: float, seed: int
) -> tuple[FolderSplit, FolderSplit]:
    """Return the rest, and of each class the share whose SHA-256 of "<seed> <name>" is smallest."""
    keys = [hashlib.sha256(os.fsencode(f"{seed} {name}")).digest() for name in split.names]
    held_out = np.zeros(len(keys), dtype=bool)
    for label, name in enumerate(classes):
        first, last = np.searchsorted(split.labels, (label, label + 1))
        if last - first < 2:
            raise ValueError(
                f"{split.folder / name}: has one image, and none to hold out: add some"
            )
        number = min(max(1, round(share * (last - first))), last - first - 1)
        held_out[sorted(range(first, last), key=keys.__getitem__)[:number]] = True
    return split.chosen(~held_out), split.chosen(held_out)


def _images(folder: Path, name: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the images in a folder of ``folder``, and in those within, with their status."""
    for entry in _entries(folder / name):
        if entry.is_dir(follow_symlinks=False):  # links may lead in a circle
            yield from _images(folder, f"{name}/{entry.name}")
        elif _is_image(entry.name):
            yield f"{name}/{entry.name}", _status(entry)
        elif not entry.name.lower().endswith(_NOTES):
            raise ValueError(
                f"{entry.path}: not an image by its name among the images of a class, which end in "
                f"{', '.join(_EXTENSIONS)}: remove it"
            )


def _status(entry: "os.DirEntry[str]") -> os.stat_result:
    try:
        return entry.stat()
    except OSError as error:  # a link to nowhere
        raise ValueError(f"{entry.path}: cannot be read ({error.strerror})") from error


def _entries(folder: Path) -> Iterator["os.DirEntry[str]"]:
    """Yield the entries of a folder by name, without hidden ones and those of file managers."""
    try:
        with os.scandir(folder) as entries:
            visible = [one for one in entries if not _is_stray(one.name)]
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror})") from error
    yield from sorted(visible, key=lambda entry: entry.name)


def _is_stray(name: str) -> bool:
    return name.startswith(".") or name.lower() in _STRAY


def _is_image(name: str) -> bool:
    return name.lower().endswith(_EXTENSIONS)
