"""SVHN: 32 × 32 colour crops of house numbers, 73,257 digits for training and 26,032 for test.

The 531,131 extra ones, which are less difficult, can be added to those for training.

Y. Netzer, T. Wang, A. Coates, A. Bissacco, B. Wu, A. Y. Ng, Reading Digits in Natural Images with
Unsupervised Feature Learning, 2011. "Format 2", the cropped digits, as MATLAB 5 files.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.io import loadmat
from torch import Tensor

from fastdeq.data.cifar import Cifar10DataModule
from fastdeq.data.module import data_module
from fastdeq.data.published import Form, ImageSource, StoredDataModule, image_set
from fastdeq.data.store import ImageSet, one_line, read_content
from fastdeq.runs.files import sha256_of

_CLASSES = 10
_WANTED = "get train_32x32.mat and test_32x32.mat of SVHN's format 2 (cropped digits)"


@final
@dataclass(frozen=True, kw_only=True)
class SvhnImages(ImageSource):
    """The files of the cropped digits, for training and for test, verified by their MD5.

    ``extra``: the file of further ones for training, which comes third among ``files`` if used.
    """

    extra: Form

    def read(self, files: Sequence[Path], *, verify: bool) -> ImageSet:
        train, test, *extra = (read_cropped_digits(path) for path in files)
        if verify:
            self.verify_md5(files, self.files)
        if extra:
            train = torch.cat([train[0], extra[0][0]]), torch.cat([train[1], extra[0][1]])
        return image_set(train, test, {path: sha256_of(path) for path in files})


def read_cropped_digits(path: str | Path) -> tuple[Tensor, Tensor]:
    """Read a MATLAB 5 file of cropped digits: images uint8 (N, 3, 32, 32), labels int64 (N,).

    The file has X uint8 (32, 32, 3, N) and y (N, 1) of 1..10, where 10 stands for the digit 0.
    Raises ValueError naming the file where it cannot be opened, is damaged, of another version of
    MATLAB's format, or holds something else.
    """
    path = Path(path)
    found = _load(path)
    for name in ("X", "y"):
        if not isinstance(found.get(name), np.ndarray):
            raise ValueError(f"{path}: has no array {name}: {_WANTED}")
    pixels, labels = found["X"], found["y"].ravel()
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3):
        raise ValueError(
            f"{path}: X must be uint8 (32, 32, 3, N), not {pixels.dtype} {pixels.shape}: {_WANTED}"
        )
    count = pixels.shape[3]
    if found["y"].shape != (count, 1) or not count:
        raise ValueError(f"{path}: not a label for each image, {count}, but {found['y'].shape}")
    wrong = ~np.isin(labels, np.arange(1, _CLASSES + 1))
    if wrong.any():
        raise ValueError(f"{path}: label {labels[wrong][0]} is not one of 1..{_CLASSES}")
    images: NDArray[np.uint8] = np.ascontiguousarray(pixels.transpose(3, 2, 0, 1))
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64) % _CLASSES)


def _load(path: Path) -> dict[str, Any]:
    content = io.BytesIO(read_content(path))
    try:
        found: dict[str, Any] = loadmat(content, variable_names=("X", "y"))
    except NotImplementedError as error:  # SciPy's for HDF5
        raise ValueError(f"{path}: of MATLAB 7.3, as the full images are: {_WANTED}") from error
    except Exception as error:  # damage makes SciPy raise anything: it has no error of its own
        reason = one_line(error)
        raise ValueError(f"{path}: not a readable MATLAB 5 file ({reason}): {_WANTED}") from error
    return found


SVHN = SvhnImages.from_table("svhn")


@final
@data_module
class SvhnDataModule(StoredDataModule):
    """SVHN, digits of house numbers: batches (B, 3, 32, 32), see ``StoredDataModule``.

    ``extra``: whether the extra set is used for training too.
    """

    extra: bool = False

    source: ClassVar[SvhnImages] = SVHN
    input_shape = (3, 32, 32)
    outputs = _CLASSES
    published = Cifar10DataModule.published  # as it was published

    def chosen(self) -> ImageSource:
        if not self.extra:
            return self.source
        files = (*self.source.files, *self.source.extra)
        split = self.source.split.replace("without", "with")
        return replace(self.source, name=f"{self.source.name}_extra", files=files, split=split)
