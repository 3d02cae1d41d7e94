"""Folders of JPEG and PNG images, train/<class>/ and val/<class>/, as ImageNet is unpacked to."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np

from fastdeq.data.decode import (
    CentralCrop,
    DecodedBatches,
    RandomCrop,
    decode,
    identify,
    require_pillow,
)
from fastdeq.data.epoch_loader import Normalization
from fastdeq.data.module import AbstractDataModule, NormalizationSetting, data_module
from fastdeq.data.published import existing_folder, given_folder, store_folder
from fastdeq.data.store import (
    CURE,
    SPLITS,
    FolderSplit,
    ImageFolder,
    RecordFile,
    Records,
    building,
    read_records,
    write_records,
)
from fastdeq.settings import setting

_ATTRIBUTES = {"name": "image_folder", "version": "1"}  # the version of the layout of the store
_CHECKED = {False: "headers", True: "whole images"}  # what the build has read of the images
_EXTENSIONS = (".jpg", ".jpeg", ".png")
_NAMES_SHOWN = 5  # in a message
_CLASSES_SHOWN = 10  # in the metadata


@final
@data_module
class ImageFolderDataModule(AbstractDataModule):
    """Batches of the images in a folder, float32 (B, 3, size, size) normalized, labels int64 (B,).

    Labels count the class folders in the order of their names. The test split is val/. The image
    files, still encoded, become one HDF5 file in ``store`` (see ``store_folder``); docs/data.md
    describes when it is built again.

    ``root``: the folder, or a store that was made of one, to be used as it is. ``verify``: whether
    a build decodes every image; without it, it reads their headers. ``classes``: how many there
    must be; None: any number, and ``outputs`` is known once the set was loaded. ``workers``: see
    ``DecodedBatches``. ``normalization``: see ``Normalization.configured``. Training images are
    random crops (``RandomCrop``: ``crop_area``, ``crop_ratio``, ``flip``), all others central ones
    (``CentralCrop``: ``crop_share``).

    Raises ImportError, with the cure, without Pillow. ``prepare_data`` and ``setup`` raise what
    ``list_folder`` raises; FileNotFoundError without a root; ValueError for another number of
    classes, for a file that is not an image, and for a store that is damaged, of another version
    or, with ``verify``, made without decoding; OSError where the store cannot be written.
    """

    root: str | Path | None = None
    store: str | Path | None = None
    verify: bool = False
    classes: int | None = setting(default=None, at_least=1)
    size: int = setting(default=224, at_least=1)
    crop_share: float = setting(default=0.875, above=0, at_most=1)
    crop_area: Sequence[float] = (0.08, 1.0)
    crop_ratio: Sequence[float] = (3 / 4, 4 / 3)
    flip: float = setting(default=0.5, at_least=0, at_most=1)
    workers: int = setting(default=4, at_least=0)
    batch_size: int = setting(default=256, at_least=1)
    eval_batch_size: int = setting(default=256, at_least=1)
    normalization: NormalizationSetting = "published"

    # Of ImageNet's training images, as published with its models
    published = Normalization(scale=255.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    def __post_init__(self) -> None:
        require_pillow()
        super().__post_init__()
        area, ratio = (_pair(name, getattr(self, name)) for name in ("crop_area", "crop_ratio"))
        self._random = RandomCrop(size=self.size, area=area, ratio=ratio, flip=self.flip)
        self._central = CentralCrop(size=self.size, share=self.crop_share)
        self._root = None if self.root is None else given_folder("root", self.root)
        self._store = store_folder(self.store)
        self._outputs = self.classes
        self._path: Path | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample, (3, size, size)."""
        return 3, self.size, self.size

    @property
    def outputs(self) -> int:
        """The number of classes; AttributeError where it is not known yet."""
        if self._outputs is None:
            raise AttributeError("outputs is known once the set was loaded, or give classes")
        return self._outputs

    def prepare(self) -> None:
        self._path = self._ensure()

    def load(self) -> tuple[Records, Records]:
        path = self._path or self._ensure()
        found = self._read(path)
        self._outputs = len(found.classes)
        names = _some(found.classes, _CLASSES_SHOWN)
        self.metadata = {"file": str(path), "classes": names, **found.attributes}
        return found.train, found.val

    def _loader(self, split: Records, *, random: bool, **settings: Any) -> DecodedBatches:
        assert self.normalizer is not None  # `normalization` cannot be None
        settings |= {"normalization": self.normalizer, "shuffle": random}
        return DecodedBatches(split, crop=self._random if random else self._central, **settings)

    def _ensure(self) -> Path:
        """Return the path of the store, built if it was missing: exclusively, and whole or not."""
        if self._root is None:
            raise FileNotFoundError(
                "image folders are not generated: give the one with train/ and val/, "
                "data.root=PATH (or FASTDEQ_DATA)"
            )
        if self._root.is_file():
            return self._root
        folder = list_folder(self._root, _ATTRIBUTES["name"])
        self._check_classes(folder.root, len(folder.classes))
        files, times = fingerprints(folder)
        stem = f"{_ATTRIBUTES['name']}-{files[:12]}"
        path = self._store / f"{stem}-{times[:12]}.h5"
        if not path.exists():
            with building(path) as missing:
                if missing:
                    # Those of earlier versions end with the fingerprint.
                    others = sorted(self._store.glob(f"{stem}*.h5"))
                    if same := next((one for one in others if self._holds(one, folder)), None):
                        os.link(same, path)
                    else:
                        self._write(path, folder)
        return path

    def _read(self, path: Path) -> RecordFile:
        cure = "give the folder that it was made from" if path == self._root else CURE
        found = read_records(path, cure=cure, wanted=_ATTRIBUTES)
        self._check_classes(path, len(found.classes))
        if self.verify and found.attributes.get("checked") != _CHECKED[True]:
            raise ValueError(
                f"{path}: was built without decoding its images: for data.verify=true {cure}"
            )
        return found

    def _holds(self, path: Path, folder: ImageFolder) -> bool:
        """Return whether the store at ``path`` can be used and has exactly the folder's files."""
        try:
            found = self._read(path)
        except (OSError, ValueError):
            return False
        records = {"train": found.train, "val": found.val}
        return all(records[name].holds(split) for name, split in folder.splits.items())

    def _write(self, path: Path, folder: ImageFolder) -> None:
        attributes = {
            **_ATTRIBUTES,
            "source": str(folder.root.resolve()).encode(errors="replace").decode(),
            "licence": "that of these files",
            "split": "the folder's: train for training, val for validation and test",
            "checked": _CHECKED[self.verify],
        }
        write_records(path, folder, attributes, check=decode if self.verify else identify)

    def _check_classes(self, place: Path, found: int) -> None:
        if self.classes is not None and found != self.classes:
            raise ValueError(
                f"{place}: has {found:,} classes, but sizes.outputs is {self.classes:,}: set "
                f"sizes.outputs={found}"
            )


def _pair(name: str, values: Sequence[float]) -> tuple[float, float]:
    if len(values) != 2:
        raise ValueError(f"{name} must be two numbers, the least and the greatest, not {values!r}")
    return values[0], values[1]


def fingerprints(folder: ImageFolder) -> tuple[str, str]:
    """Return two SHA-256: of place, names and sizes of the files, and of their times.

    A content can change and keep its size, and even its mtime (archives with fixed times, a copy
    that preserves them); the system sets ctime whenever anything of a file changes.
    """
    files, times = hashlib.sha256(os.fsencode(folder.root.resolve()) + b"\0"), hashlib.sha256()
    for name, split in folder.splits.items():
        for file, size in zip(split.names, split.sizes.tolist(), strict=True):
            files.update(os.fsencode(f"{name}/{file}\0{size}\n"))
        times.update(split.times.astype("<i8").tobytes())
    return files.hexdigest(), times.hexdigest()


def list_folder(root: Path, name: str) -> ImageFolder:
    """List the images in ``root``, or in its folder of this ``name`` if that has the splits.

    docs/data.md says what counts as an image. Raises FileNotFoundError or NotADirectoryError where
    ``root``, train/ or val/ is missing or not a folder, ValueError for a folder of another form.
    """
    root = _find(existing_folder(root, "train/ and val/"), name)
    classes = {split: _classes(root / split) for split in SPLITS}
    if classes["train"] != classes["val"]:
        raise ValueError(f"{root}: {_difference(*(classes[split] for split in SPLITS))}")
    splits = {split: _list_split(root / split, classes[split]) for split in SPLITS}
    return ImageFolder(root=root, classes=classes["train"], splits=splits)


def _find(root: Path, name: str) -> Path:
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
                f"{entry.path}: an image outside of a class: sort the images of {folder} into a "
                "folder for each class"
            )
    if not classes:
        raise ValueError(f"{folder}: has no images: it must have a folder of them for each class")
    return classes


def _difference(train: Sequence[str], val: Sequence[str]) -> str:
    parts = [
        f"{split} has no folder for {_some(sorted(missing))}"
        for split, missing in (("val", {*train} - {*val}), ("train", {*val} - {*train}))
        if missing
    ]
    return f"{', and '.join(parts)}: both need the same classes"


def _some(names: Sequence[str], shown: int = _NAMES_SHOWN) -> str:
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more:,} more" if more > 0 else "")


def _list_split(folder: Path, classes: Sequence[str]) -> FolderSplit:
    found = [
        (f"{name}/{entry.name}", label, _status(entry))
        for label, name in enumerate(classes)
        for entry in _entries(folder / name)
    ]
    labels = np.array([label for _, label, _ in found], dtype=np.int64)
    for label, count in enumerate(np.bincount(labels, minlength=len(classes))):
        if not count:
            raise ValueError(
                f"{folder / classes[label]}: has no images: add some, or remove this class"
            )
    return FolderSplit(
        folder=folder,
        names=[name for name, _, _ in found],
        sizes=np.array([status.st_size for _, _, status in found], dtype=np.int64),
        times=np.array([(s.st_mtime_ns, s.st_ctime_ns) for _, _, s in found], dtype=np.int64),
        labels=labels,
    )


def _status(entry: "os.DirEntry[str]") -> os.stat_result:
    """Return the status of an image file; ValueError for anything else in the folder of a class."""
    if not _is_image(entry.name) or entry.is_dir():
        kind = "a folder" if entry.is_dir() else "not an image by its name"
        raise ValueError(
            f"{entry.path}: {kind} among the images of a class, which end in "
            f"{', '.join(_EXTENSIONS)}: remove it"
        )
    try:
        return entry.stat()
    except OSError as error:  # a link to nowhere
        raise ValueError(f"{entry.path}: cannot be read ({error.strerror})") from error


def _entries(folder: Path) -> Iterator["os.DirEntry[str]"]:
    """Yield the entries of a folder by name, without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror})") from error
    yield from sorted(visible, key=lambda entry: entry.name)


def _is_image(name: str) -> bool:
    return name.lower().endswith(_EXTENSIONS)
