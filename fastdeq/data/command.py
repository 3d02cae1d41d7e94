"""The command ``python -m fastdeq.data``: prepare or verify a set, and show what it holds."""

import difflib
import inspect
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdeq.data.cifar10 import Cifar10DataModule
from fastdeq.data.digits import DigitsDataModule
from fastdeq.data.image_folder import ImageFolderDataModule
from fastdeq.data.mnist import FashionMnistDataModule, MnistDataModule
from fastdeq.data.module import InMemoryDataModule, Samples
from fastdeq.data.polynomial import PolynomialDataModule
from fastdeq.data.store import Records
from fastdeq.data.svhn import SvhnDataModule

SETS: dict[str, type[InMemoryDataModule | ImageFolderDataModule]] = {
    "cifar10": Cifar10DataModule,
    "digits": DigitsDataModule,
    "fashion_mnist": FashionMnistDataModule,
    "image_folder": ImageFolderDataModule,
    "mnist": MnistDataModule,
    "polynomial": PolynomialDataModule,
    "svhn": SvhnDataModule,
}
"""The data sets by the name that the command knows them by."""

_SHOWN = 20  # classes, in one line


class UsageError(Exception):
    """A command line that cannot be understood; its text is one line."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0, 1 for an error in the data, 2 for the usage."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(usage())
        return 0 if arguments else 2
    try:
        name, settings = parse(arguments)
        data = _make(name, settings)
        data.prepare_data()
        train, test = data.load()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for title, text in describe(name, data, train, test):
        print(f"{title:<14}{text}")
    return 0


def usage() -> str:
    """Return the text of --help."""
    return (
        "usage: python -m fastdeq.data NAME [key=value ...]\n\n"
        "Prepares a data set, or verifies it where it is ready, and shows what it holds.\n"
        f"NAME: {', '.join(SETS)}.\n"
        "Keys are those of conf/data/NAME.yaml, among them root (the folder with the source\n"
        "files, $FASTDEQ_DATA if not given), store (the folder to keep the set in),\n"
        "download=true and verify=false."
    )


def parse(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the set's name and its constructor's arguments; raises UsageError."""
    name, *rest = arguments
    if name not in SETS:
        raise UsageError(_unknown("data set", name, SETS))
    defaults = {
        # None alone does not say that a number is meant.
        key: 0 if parameter.annotation == int | None else parameter.default
        for key, parameter in inspect.signature(SETS[name]).parameters.items()
    }
    settings: dict[str, Any] = {}
    for argument in rest:
        key, equals, text = argument.partition("=")
        key = key.removeprefix("data.")  # as it is written for train.py, and in error messages
        if key not in defaults:
            raise UsageError(_unknown(f"key of {name}", key, defaults))
        if not equals:
            raise UsageError(f"{key} has no value: write {key}=VALUE")
        settings[key] = _value(key, text, defaults[key])
    if "root" in defaults and (root := os.environ.get("FASTDEQ_DATA")):
        settings.setdefault("root", root)
    return name, settings


def describe(
    name: str,
    data: InMemoryDataModule | ImageFolderDataModule,
    train: Samples | Records,
    test: Samples | Records,
) -> Iterable[tuple[str, str]]:
    """Yield lines, as title and text, of what a set holds."""
    yield "set", name
    metadata = dict(data.metadata)
    if file := metadata.pop("file", None):
        size = f" ({Path(file).stat().st_size:,} bytes)" if Path(file).is_file() else ""
        yield "file", file + size
    for title, samples in (("train", train), ("test", test)):
        shape = " × ".join(map(str, data.input_shape))
        yield title, f"{len(samples):,} samples of {shape}"
        if samples.targets.dtype == torch.int64:
            counts = samples.targets.bincount(minlength=data.outputs).tolist()
            yield "  per class", _counts(counts)
        elif isinstance(samples, Samples):
            yield "  inputs", _range(samples.inputs)
            yield "  targets", _range(samples.targets)
    if data.normalizer is not None and isinstance(train, Samples):
        constants, (mean, std) = data.normalizer, pixel_statistics(train.inputs)
        scaled = [[value / constants.scale for value in values] for values in (mean, std)]
        after = f"(training pixels / {constants.scale:g}; normalized with"
        yield "mean", f"{_numbers(scaled[0])} {after} {_numbers(constants.mean)})"
        yield "std", f"{_numbers(scaled[1])} {after} {_numbers(constants.std)})"
    for title, text in metadata.items():
        if title != "name":
            yield title, text


def pixel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation (N in the divisor) of each channel of uint8 (N, C, ...).

    From counts of the 256 values: exact, and without the pixels in float64.
    """
    values = torch.arange(256, dtype=torch.float64)
    means, stds = [], []
    for channel in images.unbind(1):
        share = channel.flatten().bincount(minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        means.append(mean.item())
        stds.append((share * (values - mean).square()).sum().sqrt().item())
    return means, stds


def _make(name: str, settings: dict[str, Any]) -> InMemoryDataModule | ImageFolderDataModule:
    try:
        return SETS[name](**settings)
    except (TypeError, ValueError) as error:  # wrong, out of range, or not to be combined
        raise UsageError(str(error)) from None


def _value(key: str, text: str, default: object) -> object:
    """Read ``text`` as a value of the type of the key's default; without one it is a path."""
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise UsageError(f"{key} must be true or false, not {text!r}")
        return text.lower() == "true"
    if isinstance(default, str):
        return text
    if isinstance(default, int | float):
        try:
            return type(default)(text)
        except ValueError:
            kind = "an integer" if isinstance(default, int) else "a number"
            raise UsageError(f"{key} must be {kind}, not {text!r}") from None
    return None if text.lower() in ("", "null", "none") else text


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    cure = f"did you mean {nearest[0]}?" if nearest else f"choose from {', '.join(known)}"
    return f"unknown {what} {name!r}: {cure}"


def _counts(counts: Sequence[int]) -> str:
    if len(counts) > _SHOWN:
        return f"{min(counts):,} to {max(counts):,}, in {len(counts):,} classes"
    return " ".join(map(str, counts))


def _range(values: Tensor) -> str:
    return f"{values.min().item():.6g} to {values.max().item():.6g}"


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.6f}" for value in values)
