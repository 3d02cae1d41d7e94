"""Folders of JPEG and PNG images, train/<class>/ and val/<class>/, as ImageNet is unpacked to."""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from rich.console import Console
from rich.progress import track

from fastdeq.data.batches import Normalization
from fastdeq.data.build import CURE, building, store_folder
from fastdeq.data.checks import require_flag, require_folder, require_integer
from fastdeq.data.decode import CentralCrop, Crop, RandomCrop, decode, identify, require_pillow
from fastdeq.data.decoded import DecodedBatches
from fastdeq.data.folder import ImageFolder, list_folder
from fastdeq.data.module import AbstractDataModule
from fastdeq.data.passes import Batch
from fastdeq.data.records import RecordFile, Records, holds, read_records, write_records

_NAME = "image_folder"
_VERSION = "1"  # of the store's layout
_CHECKED = {False: "headers", True: "whole images"}  # what of the images the build looked at
_SHOWN = 10  # classes in the facts


@final
@dataclass(frozen=True, kw_only=True)
class StoredFolder:
    """The store of an image folder, ``<store>/image_folder-<fingerprint>-<times>.h5``.

    The fingerprint is that of where the folder is and of its files' names and sizes, the times that
    of their mtime and ctime: a folder that changed has another store. Where nothing but times
    differs from a store that is there, its contents are compared with the files, and if they are
    equal that store gets the new name too (a hard link).

    ``root``: the folder, or a store that was made of one, to be used as it is. ``verify``: whether
    a build decodes every image; without it, it reads their headers. ``classes``: how many there
    must be; None: any number.
    """

    root: Path | None
    store: Path
    verify: bool
    classes: int | None

    def ensure(self) -> Path:
        """Return the path of the store, built if it was missing: exclusively, and whole or not.

        Raises what ``list_folder`` does, and ValueError for another number of classes or an image
        that is none; FileNotFoundError without a root; OSError where the store cannot be written.
        """
        if self.root is None:
            raise FileNotFoundError(
                "image folders are not generated: give the one with train/ and val/, "
                "data.root=PATH (or FASTDEQ_DATA)"
            )
        if self.root.is_file():
            return self.root
        folder = list_folder(self.root, _NAME)
        self._check_classes(str(folder.root), len(folder.classes))
        stem = f"{_NAME}-{folder.fingerprint()[:12]}"
        path = self.store / f"{stem}-{folder.time_fingerprint()[:12]}.h5"
        if not path.exists():
            with building(path) as missing:
                if missing:
                    # Those of earlier versions end with the fingerprint.
                    others = sorted(self.store.glob(f"{stem}*.h5"))
                    if same := next((one for one in others if self._holds(one, folder)), None):
                        os.link(same, path)
                    else:
                        self._write(path, folder)
        return path

    def read(self, path: Path) -> RecordFile:
        """Open the store at ``path`` (``ensure``).

        Raises ValueError for one that is damaged, of something else, of another number of classes,
        or whose images were not decoded where that is asked for.
        """
        cure = "give the folder that it was made from" if path == self.root else CURE
        found = read_records(path, cure=cure)
        for key, wanted in (("name", _NAME), ("version", _VERSION)):
            if found.attributes[key] != wanted:
                told = f"its {key} is {found.attributes[key]!r}, not {wanted!r}"
                raise ValueError(f"{path}: {told}: {cure}")
        self._check_classes(str(path), len(found.classes))
        if self.verify and found.attributes.get("checked") != _CHECKED[True]:
            raise ValueError(
                f"{path}: was built without decoding its images: for data.verify=true {cure}"
            )
        return found

    def _holds(self, path: Path, folder: ImageFolder) -> bool:
        """Whether the store at ``path`` can be used and has exactly the folder's files."""
        try:
            found = self.read(path)
        except (OSError, ValueError):
            return False
        return holds(
            found, folder, watch=partial(_watch, task="comparing the store with its files")
        )

    def _write(self, path: Path, folder: ImageFolder) -> None:
        attributes = {
            "name": _NAME,
            "version": _VERSION,
            "source": str(folder.root.resolve()).encode(errors="replace").decode(),
            "licence": "that of these files",
            "split": "the folder's: train for training, val for validation and test",
            "checked": _CHECKED[self.verify],
        }
        check = _decodes if self.verify else identify
        write_records(
            path, folder, attributes, check=check, watch=partial(_watch, task="building the store")
        )

    def _check_classes(self, place: str, found: int) -> None:
        if self.classes is not None and found != self.classes:
            raise ValueError(
                f"{place}: has {found:,} classes, but sizes.outputs is {self.classes:,}: set "
                f"sizes.outputs={found}"
            )


@final
class ImageFolderDataModule(AbstractDataModule):
    """Batches of the images in a folder, float32 (B, 3, size, size) normalized, labels int64 (B,).

    Labels count the class folders in the order of their names. The test split is val/. The images'
    files, still encoded, become one HDF5 file (see ``StoredFolder``, whose arguments ``root``,
    ``store``, ``verify`` and ``classes`` are), and ``workers`` processes of each rank decode them
    (see ``DecodedBatches``). RGB, turned upright: see ``decode``.

    Training images are random crops (``RandomCrop``: ``crop_area``, ``crop_ratio``, ``flip``), all
    others central ones (``CentralCrop``: ``crop_share``). ``normalization``: see
    ``Normalization.configured``. Where ``classes`` is None, ``outputs`` is
    known once the set was loaded.

    Raises ImportError, with the cure, without Pillow; ValueError for arguments of another type or
    out of range; ``prepare_data`` and ``setup`` raise what ``StoredFolder`` does.
    """

    # Of ImageNet's training images, as published with its models
    normalization: Normalization = Normalization(
        scale=255.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )

    def __init__(
        self,
        *,
        root: str | Path | None = None,
        store: str | Path | None = None,
        verify: bool = False,
        classes: int | None = None,
        size: int = 224,
        crop_share: float = 0.875,
        crop_area: Sequence[float] = (0.08, 1.0),
        crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        workers: int = 4,
        batch_size: int = 256,
        eval_batch_size: int = 256,
        seed: int = 0,
        validation: int = 0,
        normalization: str | Mapping[str, Any] = "published",
    ) -> None:
        require_pillow()
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            validation=validation,
        )
        self.normalization = self.normalization.configured(normalization)
        area, ratio = _range("crop_area", crop_area), _range("crop_ratio", crop_ratio)
        self._random = RandomCrop(size=size, area=area, ratio=ratio, flip=flip)
        self._central = CentralCrop(size=size, share=crop_share)
        self.input_shape = (3, size, size)
        if classes is not None:
            self.outputs = require_integer("classes", classes, minimum=1)
        self.workers = require_integer("workers", workers, minimum=0)
        self._stored = StoredFolder(
            root=require_folder("root", root),
            store=store_folder(require_folder("store", store)),
            verify=require_flag("verify", verify),
            classes=classes,
        )
        self._path: Path | None = None
        self._open: list[DecodedBatches] = []

    def prepare(self) -> None:
        """Build the store if it is missing."""
        self._path = self._stored.ensure()

    def load(self) -> tuple[Records, Records]:
        """Open and verify the store; build it if it is missing. Training and test records."""
        path = self._path or self._stored.ensure()
        found = self._stored.read(path)
        self.outputs = len(found.classes)
        more = len(found.classes) - _SHOWN
        names = ", ".join(found.classes[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
        self.facts = {"file": str(path), "classes": names, **found.attributes}
        return found.train, found.val

    def teardown(self, stage: str | None = None) -> None:
        """End the workers."""
        for batches in self._open:
            batches.close()
        self._open = []

    def _training(self, *, overfit: bool) -> DecodedBatches:
        return self._batches(
            "train",
            self._central if overfit else self._random,
            batch_size=self.batch_size,
            shuffle=not overfit,
            seed=self.seed,
        )

    def _evaluation(self, split: str) -> DecodedBatches:
        return self._batches(split, self._central, batch_size=self.eval_batch_size)

    def _first(self, n: int) -> Batch:
        records = self._splits["train"]
        first = records[torch.arange(len(records)) < n]
        batches = DecodedBatches(
            first,
            crop=self._central,
            normalization=self.normalization,
            device=torch.device("cpu"),
            workers=0,
            batch_size=n,
        )
        batch = next(iter(batches))
        batches.close()
        return batch

    def _batches(self, split: str, crop: Crop, **settings: Any) -> DecodedBatches:
        if not self._splits:
            raise RuntimeError("call setup() before asking for batches (a Trainer does so itself)")
        made = DecodedBatches(
            self._splits[split],
            crop=crop,
            normalization=self.normalization,
            device=self._device,
            workers=self.workers,
            rank=self._rank,
            ranks=self._ranks,
            **settings,
        )
        self._open.append(made)
        return made


def _range(name: str, values: object) -> tuple[float, float]:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != 2:
        raise ValueError(f"{name} must be two numbers, the least and the greatest, not {values!r}")
    return values[0], values[1]


def _decodes(content: bytes) -> None:
    decode(content)


def _watch(numbers: range, *, task: str) -> Iterable[int]:
    """Pass the numbers on, with a bar where a person watches."""
    return track(
        numbers,
        description=task,
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
