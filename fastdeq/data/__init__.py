"""Data sets as Lightning data modules, and the store and batches beneath them.

``digits.h5`` holds the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin and
C. Kaynak, 1998, UCI Machine Learning Repository, https://doi.org/10.24432/C50P49) as distributed
with scikit-learn, under CC BY 4.0; the README in this folder says how it was made.

Needs the ``experiment`` extra: ``pip install "fastdeq[experiment]"``.
"""

from fastdeq.data.batches import Batches, Normalization
from fastdeq.data.digits import DigitsDataModule, read_digits
from fastdeq.data.store import ImageSet, read_store, write_store

__all__ = [
    "Batches",
    "DigitsDataModule",
    "ImageSet",
    "Normalization",
    "read_digits",
    "read_store",
    "write_store",
]
