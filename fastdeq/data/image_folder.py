"""Folders of images, train/<class>/ and val/<class>/, as ImageNet is unpacked to."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
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
from fastdeq.data.folders import ARCHIVES, check_classes, fingerprints, list_folder, some
from fastdeq.data.module import AbstractDataModule, NormalizationSetting, data_module
from fastdeq.data.published import given_folder, store_folder
from fastdeq.data.records import (
    ImageFolder,
    RecordFile,
    Records,
    read_records,
    shown,
    write_records,
)
from fastdeq.data.store import CURE, building
from fastdeq.settings import setting

_ATTRIBUTES = {"name": "image_folder", "version": "1"}  # the version of the layout of the store
_CHECKED = {False: "headers", True: "whole images"}  # what the build has read of the images
_CLASSES_SHOWN = 10  # in the metadata
_SKIPPED_SHOWN = 200  # likewise; HDF5 keeps at most 64 KiB of an attribute

_log = logging.getLogger("fastdeq")


@final
@data_module
class ImageFolderDataModule(AbstractDataModule):
    """Batches of the images in a folder, float32 (B, 3, size, size) normalized, labels int64 (B,).

    Labels count the class folders in the order of their names. The test split is val/, valid/ or
    test/, or with ``test_share`` that share of each class of train/, chosen by ``test_seed``. The
    image files, still encoded, become one HDF5 file in ``store`` (see ``store_folder``);
    docs/data.md describes when it is built again.

    ``root``: the folder, or a store that was made of one, to be used as it is. ``verify``: whether
    a build decodes every image; without it, it reads their headers. ``skip_unreadable``: whether a
    build decodes every image, and leaves out and reports those that cannot be. ``classes``: how
    many there must be; None: any number, and ``outputs`` is known once the set was loaded.
    ``workers``: see ``DecodedBatches``. ``normalization``: see ``Normalization.configured``.
    Training images are random crops (``RandomCrop``: ``crop_area``, ``crop_ratio``, ``flip``), all
    others central ones (``CentralCrop``: ``crop_share``).

    Raises ImportError, with the cure, without Pillow. ``prepare_data`` and ``setup`` raise what
    ``list_folder`` raises; FileNotFoundError without a root; ValueError for another number of
    classes, for a file that is not an image, and for a store that is damaged, of another version
    or, with ``verify``, made without decoding; OSError where the store cannot be written.
    """

    root: str | Path | None = None
    store: str | Path | None = None
    verify: bool = False
    skip_unreadable: bool = False
    test_share: float = setting(default=0.0, at_least=0, at_most=0.9)
    test_seed: int = setting(default=0, at_least=0)
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
        names = some(found.classes, _CLASSES_SHOWN)
        self.metadata = {"file": str(path), "classes": names, **found.attributes}
        if skipped := found.attributes.get("skipped"):
            _log.warning("%s: skipped %s", path, skipped)
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
            if self._root.name.endswith(ARCHIVES):
                raise ValueError(f"{self._root}: an archive: unpack it, and give its folder")
            return self._root
        folder = list_folder(
            self._root, _ATTRIBUTES["name"], share=self.test_share, seed=self.test_seed
        )
        self._check_classes(folder.root, len(folder.classes))
        files, times = fingerprints(folder)
        stem = f"{_ATTRIBUTES['name']}-{files[:12]}" + "-skip" * self.skip_unreadable
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
        name = folder.splits["val"].folder.name
        split = f"the folder's: train for training, {name} for validation and test"
        if self.test_share:
            split = (
                f"a share of {self.test_share:g} of each class of train for validation and test, "
                f"by the SHA-256 of '{self.test_seed} <name>'; the rest for training"
            )
        attributes = {
            **_ATTRIBUTES,
            "source": str(folder.root.resolve()).encode(errors="replace").decode(),
            "licence": "that of these files",
            "split": split,
            "checked": _CHECKED[self.verify or self.skip_unreadable],
        }
        if name != "val":
            attributes["val"] = name
        if self.skip_unreadable:
            folder, skipped = _without_unreadable(folder)
            if skipped:
                listed = some(skipped, _SKIPPED_SHOWN).encode(errors="replace").decode()
                attributes["skipped"] = f"{len(skipped):,} unreadable images: {listed}"
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


def _without_unreadable(folder: ImageFolder) -> tuple[ImageFolder, list[str]]:
    """Return the folder without the images that cannot be decoded, and the names of these."""
    splits, skipped = {}, []
    for name, split in folder.splits.items():
        kept = np.ones(len(split.names), dtype=bool)
        for number in shown(len(kept), "looking for unreadable images"):
            content = split.read(number)
            try:
                decode(content)
            except ValueError:
                kept[number] = False
                skipped.append(f"{split.folder.name}/{split.names[number]}")
        splits[name] = split.chosen(kept)
        check_classes(splits[name], folder.classes, "readable ")
    return replace(folder, splits=splits), skipped
