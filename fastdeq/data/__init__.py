"""Data sets as Lightning data modules, and the store and batches beneath them.

``fastdeq data NAME`` prepares or verifies a set and shows what it holds. Needs the extra
``experiment``. The README in this folder gives source and licence of ``digits.h5``.
"""

from fastdeq.extras import extra_for

with extra_for("fastdeq.data"):
    from fastdeq.data.augmentation import Augmentation, PadCrop, RandomFlip, ResizeCrop, Transform
    from fastdeq.data.cifar import Cifar10DataModule, Cifar100DataModule
    from fastdeq.data.digits import DigitsDataModule, read_digits
    from fastdeq.data.epoch_loader import Batch, Batches, EpochLoader, Normalization
    from fastdeq.data.image_folder import ImageFolderDataModule
    from fastdeq.data.mnist import (
        EmnistDataModule,
        FashionMnistDataModule,
        KmnistDataModule,
        MnistDataModule,
        QmnistDataModule,
        read_idx,
    )
    from fastdeq.data.module import InMemoryDataModule, Samples
    from fastdeq.data.polynomial import PolynomialDataModule, polynomial
    from fastdeq.data.published import StoredDataModule
    from fastdeq.data.store import ImageSet, read_store, write_store
    from fastdeq.data.svhn import SvhnDataModule, read_cropped_digits

__all__ = [
    "Augmentation",
    "Batch",
    "Batches",
    "Cifar10DataModule",
    "Cifar100DataModule",
    "DigitsDataModule",
    "EmnistDataModule",
    "EpochLoader",
    "FashionMnistDataModule",
    "ImageFolderDataModule",
    "ImageSet",
    "InMemoryDataModule",
    "KmnistDataModule",
    "MnistDataModule",
    "Normalization",
    "PadCrop",
    "PolynomialDataModule",
    "QmnistDataModule",
    "RandomFlip",
    "ResizeCrop",
    "Samples",
    "StoredDataModule",
    "SvhnDataModule",
    "Transform",
    "polynomial",
    "read_cropped_digits",
    "read_digits",
    "read_idx",
    "read_store",
    "write_store",
]
