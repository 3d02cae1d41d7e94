"""The command ``fastdeq data``: prepare or verify a data set, and show what it holds."""

import argparse
import inspect
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdeq.commands import Parser, UsageError, exit_status, typed
from fastdeq.data.cifar import Cifar10DataModule, Cifar100DataModule
from fastdeq.data.digits import DigitsDataModule
from fastdeq.data.image_folder import ImageFolderDataModule
from fastdeq.data.mnist import (
    EmnistDataModule,
    FashionMnistDataModule,
    KmnistDataModule,
    MnistDataModule,
    QmnistDataModule,
)
from fastdeq.data.module import AbstractDataModule, Samples
from fastdeq.data.polynomial import PolynomialDataModule
from fastdeq.data.svhn import SvhnDataModule

SETS: dict[str, type[AbstractDataModule]] = {
    "cifar10": Cifar10DataModule,
    "cifar100": Cifar100DataModule,
    "digits": DigitsDataModule,
    "emnist": EmnistDataModule,
    "fashion_mnist": FashionMnistDataModule,
    "image_folder": ImageFolderDataModule,
    "kmnist": KmnistDataModule,
    "mnist": MnistDataModule,
    "polynomial": PolynomialDataModule,
    "qmnist": QmnistDataModule,
    "svhn": SvhnDataModule,
}
"""The data sets by their names in conf/data."""

_SHOWN = 20  # classes, in one line
_HELP = {
    "root": "folder with the source files (default: $FASTDEQ_DATA)",
    "store": "folder that keeps the prepared set (default: the user's cache)",
    "download": "download the source files where they are missing",
    "verify": "compare the source files with the published ones",
    "split": "balanced, byclass, bymerge, digits, letters or mnist (default: balanced)",
    "labels": "fine or coarse (default: fine)",
    "extra": "add the extra digits to those for training",
    "skip_unreadable": "leave out and report images that cannot be decoded",
    "test_share": "share of train/ that is held out for test (default: 0, the folder val/ is)",
}


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0, 1 for an error in the data, 2 for the usage."""
    return exit_status(lambda: _prepare(arguments), OSError, ValueError, ImportError)


def _prepare(arguments: Sequence[str]) -> int:
    name, settings = parse(arguments)
    try:
        data = SETS[name](**settings)
    except (TypeError, ValueError) as error:  # wrong, out of range, or not to be combined
        raise UsageError(str(error)) from None
    data.prepare_data()
    train, test = data.load()
    for title, text in describe(name, data, train, test):
        print(f"{title:<14}{text}")
    return 0


def parser() -> Parser:
    """A subparser for each data set, with an option for each setting of its data module."""
    command = typed("data")
    made = Parser(
        prog=command,
        description="Prepare a data set, or verify it where it is ready, and show what it holds.",
        examples=f"  {command} digits\n  {command} mnist --root PATH\n  {command} mnist --help",
    )
    sets = made.add_subparsers(
        dest="data_set",
        metavar="NAME",
        help=f"{', '.join(SETS)}; NAME --help lists its options",
        required=True,
    )
    for name, module in SETS.items():
        text = (
            f"The options are keys of conf/data/{name}.yaml, which explains them; data.KEY=VALUE,"
        )
        one = sets.add_parser(name, description=f"{text}\nas training takes it, is understood too.")
        for key, parameter in inspect.signature(module).parameters.items():
            _add_option(one, key, parameter)
    return made


def parse(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the set's name and its constructor's arguments; raises UsageError."""
    settings = vars(parser().parse_args([_as_option(word) for word in arguments]))
    name = settings.pop("data_set")
    has_root = "root" in inspect.signature(SETS[name]).parameters
    if has_root and (root := os.environ.get("FASTDEQ_DATA")):
        settings.setdefault("root", root)
    return name, settings


def _add_option(parser: argparse.ArgumentParser, key: str, parameter: inspect.Parameter) -> None:
    """Of a number, a text, a path or a switch; a range or a mapping is for training alone."""
    default, text = parameter.default, _HELP.get(key)
    if isinstance(default, bool):
        text = text and f"{text} (default: {default})"
        options: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
    elif default is None or isinstance(default, int | float | str):
        text = text or f"default: {default}"
        of_none = int if parameter.annotation == int | None else str
        metavar = {"root": "PATH", "store": "FOLDER"}.get(key, "VALUE")
        options = {"type": of_none if default is None else type(default), "metavar": metavar}
    else:
        return
    flag = f"--{key.replace('_', '-')}"
    parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **options)


def _as_option(word: str) -> str:
    """`data.root=PATH`, as it is written for training and in messages, as `--root=PATH`."""
    if not word.startswith("data."):
        return word
    key, _, text = word.removeprefix("data.").partition("=")
    name = key.replace("_", "-")
    if text.lower() in ("true", "false"):
        return f"--{name}" if text.lower() == "true" else f"--no-{name}"
    return f"--{name}={text}"


def describe(
    name: str, data: AbstractDataModule, train: Any, test: Any
) -> Iterable[tuple[str, str]]:
    """Yield lines, as title and text, of what a set holds; ``train``, ``test`` as from ``load``."""
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
    counts = [channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]
    shares = torch.stack(counts).double() / images[:, 0].numel()  # (C, 256)
    mean = shares @ values
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt()
    return mean.tolist(), std.tolist()


def _counts(counts: Sequence[int]) -> str:
    if len(counts) > _SHOWN:
        return f"{min(counts):,} to {max(counts):,}, in {len(counts):,} classes"
    return " ".join(map(str, counts))


def _range(values: Tensor) -> str:
    return f"{values.min().item():.6g} to {values.max().item():.6g}"


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.6f}" for value in values)
