"""CIFAR-10 and CIFAR-100: 32 × 32 colour images, 50,000 for training and 10,000 for test.

A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009. The "python version",
pickles, or the "binary version", records of label bytes and pixels; each in an archive or unpacked
from it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdeq.data.epoch_loader import Normalization
from fastdeq.data.module import data_module
from fastdeq.data.pickles import read_pickle
from fastdeq.data.published import ImageSource, StoredDataModule, image_set
from fastdeq.data.store import ImageSet
from fastdeq.runs.files import sha256_of

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32  # of the red plane, then the green and the blue one, each row by row
_NAMES = ("meta", ".txt")  # ends of the files that name the classes
_CLASSES = {"labels": 10, "fine_labels": 100, "coarse_labels": 20}


@final
@dataclass(frozen=True, kw_only=True)
class CifarImages(ImageSource):
    """An official archive, or the files in it, verified by their published MD5.

    ``labels``: the key of the labels in a pickle: "labels", "fine_labels" or "coarse_labels".
    """

    labels: str = "labels"

    @property
    def classes(self) -> int:
        """The number of classes."""
        return _CLASSES[self.labels]

    def read(self, files: Sequence[Path], *, verify: bool) -> ImageSet:
        contents = self.contents(files, verify=verify)  # before anything is unpickled
        batches = [one for one in contents.items() if not one[0].endswith(_NAMES)]
        lists = [one for one in contents.items() if one[0].endswith(_NAMES)]  # one, or fine, coarse
        names = lists[-1 if self.labels == "coarse_labels" else 0]
        binary = batches[0][0].endswith(".bin")
        read = self._read_records if binary else self._read_batch
        images, labels = zip(*(read(*batch) for batch in batches), strict=True)
        return image_set(
            (torch.cat(images[:-1]), torch.cat(labels[:-1])),
            (images[-1], labels[-1]),
            {path: sha256_of(path) for path in files},
            classes=", ".join(self._read_classes(*names, binary=binary)),
        )

    def _read_batch(self, place: str, content: bytes) -> tuple[Tensor, Tensor]:
        """Return images uint8 (N, 3, 32, 32) and labels int64 (N,) of one pickle."""
        batch = self._read_dict(place, content)
        pixels, labels = batch.get("data"), batch.get(self.labels)
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or not pixels.size:
            raise ValueError(f"{place}: has no images: its 'data' must be a uint8 array")
        if pixels.shape[1:] != (_PIXELS,):
            raise ValueError(f"{place}: not images of {_PIXELS} values, but {pixels.shape}")
        if not isinstance(labels, list) or len(labels) != len(pixels):
            count = len(labels) if isinstance(labels, list) else "none"
            raise ValueError(f"{place}: not a label for each image, {len(pixels)}, but {count}")
        return self._checked(place, pixels, labels)

    def _read_records(self, place: str, content: bytes) -> tuple[Tensor, Tensor]:
        """Return the same of one binary file: a label, or a coarse and a fine one, then pixels."""
        size = _PIXELS + (1 if self.labels == "labels" else 2)
        if not content or len(content) % size:
            raise ValueError(
                f"{place}: truncated, or of another set: {len(content)} bytes are not a number of "
                f"records of {size}: get it again"
            )
        records = np.frombuffer(content, np.uint8).reshape(-1, size)
        labels = records[:, int(self.labels == "fine_labels")].tolist()
        return self._checked(place, records[:, -_PIXELS:], labels)

    def _checked(
        self, place: str, pixels: NDArray[np.uint8], labels: list[Any]
    ) -> tuple[Tensor, Tensor]:
        for label in labels:
            if type(label) is not int or not 0 <= label < self.classes:
                raise ValueError(f"{place}: label {label!r} is not one of 0..{self.classes - 1}")
        images = pixels.reshape(-1, *_SHAPE).copy()
        return torch.from_numpy(images), torch.tensor(labels)

    def _read_classes(self, place: str, content: bytes, *, binary: bool) -> list[str]:
        key = self.labels.replace("labels", "label_names")
        names = content.split() if binary else self._read_dict(place, content).get(key)
        if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
            raise ValueError(f"{place}: has no list of '{key}'")
        if len(names) != self.classes:
            raise ValueError(f"{place}: not {self.classes} {key}, but {len(names)}")
        return [_text(name) for name in names]

    def _read_dict(self, place: str, content: bytes) -> Mapping[str, Any]:
        """Return the pickled dictionary; its keys are bytes if it was written by Python 2."""
        try:
            found = read_pickle(content)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{place}: not a batch of {self.title}, but a {type(found).__name__}")
        return {_text(key): value for key, value in found.items()}


def _text(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


CIFAR10 = CifarImages.from_table("cifar10")
CIFAR100 = CifarImages.from_table("cifar100", labels="fine_labels")


@final
@data_module
class Cifar10DataModule(StoredDataModule):
    """CIFAR-10: batches (B, 3, 32, 32), see ``StoredDataModule``."""

    source = CIFAR10
    input_shape = _SHAPE
    outputs = _CLASSES["labels"]
    # As published; std is the mean over images of the deviation per image, not over all pixels.
    published = Normalization(
        scale=255.0, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)
    )


@final
@data_module
class Cifar100DataModule(StoredDataModule):
    """CIFAR-100: batches (B, 3, 32, 32), see ``StoredDataModule``.

    ``labels``: "fine", of 100 classes, or "coarse", of the 20 that these are grouped in.
    """

    labels: Literal["fine", "coarse"] = "fine"

    source: ClassVar[CifarImages] = CIFAR100
    input_shape = _SHAPE
    published = Normalization(
        scale=255.0, mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761)
    )

    @property
    def outputs(self) -> int:
        """The number of classes."""
        return _CLASSES[f"{self.labels}_labels"]

    def chosen(self) -> ImageSource:
        if self.labels == "fine":
            return self.source
        return replace(self.source, name=f"{self.source.name}_coarse", labels="coarse_labels")
