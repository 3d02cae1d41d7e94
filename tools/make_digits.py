"""Build fastdeq/data/digits.h5 from the copy of the UCI digits that scikit-learn ships.

    python tools/make_digits.py [--out digits.h5]

Needs scikit-learn and the `experiment` extra. The file holds the same bytes whenever it is built
with the same versions of h5py and HDF5, and the same arrays and ``sha256`` with any.
"""

import argparse
import hashlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from fastdeq.data.store import ImageSet, write_store
from fastdeq.streams import keep_streams

TEST_SAMPLES = 360
SALT = "fastdeq digits 1"
ATTRIBUTES = {
    "name": "digits",
    "version": "1",
    "source": (
        "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, 1998, "
        "UCI Machine Learning Repository, https://doi.org/10.24432/C50P49: its test set of 1797 "
        "samples, as distributed with scikit-learn (sklearn.datasets.load_digits)"
    ),
    "licence": "CC BY 4.0",
    "changes": "pixel values kept (0..16); divided into a training and a test split",
    "split": (
        f"{TEST_SAMPLES} test samples, stratified by class: each class's share of "
        f"{TEST_SAMPLES}, rounded by largest remainder (ties to the smaller digit). Within a "
        "class, the samples with the smallest SHA-256 of the text "
        f"'{SALT}:<index>', index counting scikit-learn's samples from 0, are test samples. Both "
        "splits keep scikit-learn's order. Writers are not kept apart."
    ),
}


def main() -> None:
    """Build the file that ``--out`` names; it must not exist."""
    keep_streams()
    default = Path(__file__).resolve().parent.parent / "fastdeq" / "data" / "digits.h5"
    parser = argparse.ArgumentParser(description="Build the digits data file from scikit-learn's.")
    parser.add_argument("--out", type=Path, default=default)
    out: Path = parser.parse_args().out
    checksum = write_store(out, build())
    print(f"{out}: {out.stat().st_size} bytes, sha256 of the arrays {checksum}")


def build() -> ImageSet:
    """Return scikit-learn's 1797 digits, uint8 (N, 1, 8, 8) of 0..16, split 1437 / 360."""
    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    test = torch.from_numpy(is_test(digits.target))
    return ImageSet(
        train_images=images[~test],
        train_labels=labels[~test],
        test_images=images[test],
        test_labels=labels[test],
        attributes=ATTRIBUTES,
    )


def is_test(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return the bool (N,) mask of the test samples, as ATTRIBUTES["split"] describes it."""
    mask = np.zeros(len(labels), dtype=np.bool_)
    for digit, count in enumerate(class_shares(np.bincount(labels).tolist())):
        members = np.flatnonzero(labels == digit).tolist()
        mask[sorted(members, key=rank)[:count]] = True
    return mask


def class_shares(counts: list[int]) -> list[int]:
    """Return how many of each class's samples go to the test split; they add up exactly."""
    exact = [Fraction(TEST_SAMPLES * count, sum(counts)) for count in counts]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(counts)), key=lambda i: (shares[i] - exact[i], i))
    for digit in by_remainder[: TEST_SAMPLES - sum(shares)]:
        shares[digit] += 1
    return shares


def rank(index: int) -> str:
    """Return a number that looks random but is the same on every machine and library version."""
    return hashlib.sha256(f"{SALT}:{index}".encode("ascii")).hexdigest()


if __name__ == "__main__":
    main()
