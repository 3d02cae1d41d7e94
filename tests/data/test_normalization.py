"""The setting ``normalization`` of the image data modules, from the command line to batches."""

import io
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from fastdeq.data import (
    Cifar10DataModule,
    DigitsDataModule,
    FashionMnistDataModule,
    ImageFolderDataModule,
    MnistDataModule,
    StoredDataModule,
    SvhnDataModule,
)
from fastdeq.data.mnist import FASHION_MNIST
from fastdeq.data.records import Records
from fastdeq.runs.identity import digest, identity
from tests.commands import SHORT, CommandLine, a_run
from tests.configurations import composed
from tests.data.cifar_svhn_files import (
    cifar_files,
    small_cifar,
    small_svhn,
    svhn_files,
    write_folder,
)
from tests.data.idx_files import published, samples, small_mnist, write_files
from tests.data.image_folders import CLASSES, noise, png, write_images

Images: TypeAlias = StoredDataModule | DigitsDataModule | ImageFolderDataModule
Make: TypeAlias = Callable[..., Images]

SETS: dict[str, tuple[type[Images], float, list[float], list[float]]] = {
    "cifar10": (Cifar10DataModule, 255, [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    "digits": (DigitsDataModule, 16, [0.304982], [0.375789]),
    "fashion_mnist": (FashionMnistDataModule, 255, [0.2860], [0.3530]),
    "image_folder": (ImageFolderDataModule, 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "mnist": (MnistDataModule, 255, [0.1307], [0.3081]),
    "svhn": (SvhnDataModule, 255, [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
}
"""Each set's data module, its greatest pixel value, and its published mean and std by channel."""
SIDE = 8  # of the samples of the image folder, whose files have this size already


@pytest.fixture(params=SETS)
def name(request) -> str:
    return str(request.param)


@pytest.fixture
def make(name, monkeypatch, tmp_path) -> Make:
    """A data module of the set with the files it needs, and settings."""
    if name == "image_folder":
        pytest.importorskip("PIL")
    monkeypatch.setenv("FASTDEQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(MnistDataModule, "source", small_mnist())
    monkeypatch.setattr(FashionMnistDataModule, "source", published(FASHION_MNIST, samples(1)))
    monkeypatch.setattr(Cifar10DataModule, "source", small_cifar())
    monkeypatch.setattr(SvhnDataModule, "source", small_svhn())
    write_files(tmp_path / "mnist", samples())
    write_files(tmp_path / "fashion_mnist", samples(1))
    write_folder(tmp_path / "cifar10", cifar_files())
    write_folder(tmp_path / "svhn", svhn_files())
    pictures = {
        f"{s}/{c}/0.png": png(noise(0, SIDE, SIDE)) for s in ("train", "val") for c in CLASSES
    }
    write_images(tmp_path / "image_folder", pictures)
    given = {} if name == "digits" else {"root": tmp_path / name}
    if name == "image_folder":
        given |= {"size": SIDE, "crop_share": 1.0, "workers": 0}
    return lambda **settings: SETS[name][0](**given, **settings)


def raw(data: Images, n: int) -> Tensor:
    """The first n training images as stored, uint8 (n, C, H, W), read without normalization."""
    train, _ = data.load()
    if isinstance(train, Records):
        image = pytest.importorskip("PIL.Image")
        files = (np.array(image.open(io.BytesIO(train.read(index)))) for index in range(n))
        return torch.stack([torch.from_numpy(file).permute(2, 0, 1) for file in files])
    return train.inputs[:n]


def scaled(name: str, images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """The formula of the documentation, in float64."""
    columns = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std))
    center, spread = columns
    return (images.double() / SETS[name][1] - center) / spread


def close(found: Tensor, expected: Tensor) -> bool:
    """Equal up to the rounding of three float32 operations on values of at most about 10."""
    return torch.allclose(found.double(), expected, rtol=0, atol=3e-6)


def test_the_published_constants_are_the_default(name, make):
    _, _, mean, std = SETS[name]
    expected = scaled(name, raw(make(), 2), mean, std)
    assert close(make().sample_batch(2).inputs, expected)
    assert close(make(normalization="published").sample_batch(2).inputs, expected)


def test_none_keeps_the_pixels_from_0_to_1(name, make):
    data = make(normalization="none")
    inputs = data.sample_batch(2).inputs
    # Subtracting 0 and dividing by 1 are exact: no tolerance.
    assert torch.equal(inputs, raw(data, 2).float() / SETS[name][1])
    assert 0 <= inputs.min() < 0.1
    assert 0.9 < inputs.max() <= 1


def test_numbers_are_for_all_channels_or_one_for_each(name, make):
    channels = len(SETS[name][2])
    mean, std = [0.5, 0.25, -1.0][:channels], [2.0, 0.5, 1.0][:channels]
    images = raw(make(), 2)
    each = make(normalization={"mean": mean, "std": std})
    assert close(each.sample_batch(2).inputs, scaled(name, images, mean, std))
    every = make(normalization={"mean": 0.5, "std": 2})
    expected = scaled(name, images, [0.5] * channels, [2.0] * channels)
    assert close(every.sample_batch(2).inputs, expected)


def test_batches_for_training_and_evaluation_are_normalized_alike(name, make):
    data, plain = (
        make(normalization=setting, batch_size=5000, eval_batch_size=5000)
        for setting in ({"mean": 0.5, "std": 0.125}, "none")
    )
    for one in (data, plain):
        one.setup()
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        (found,), (before,) = (list(getattr(one, loader)()) for one in (data, plain))
        # The same seed: the same order, crops and flips.
        assert torch.equal(found.inputs, (before.inputs - 0.5) / 0.125)


def test_the_setting_leaves_the_store_as_it_is(name, make, tmp_path):
    make(normalization="none").sample_batch()
    before = {path: path.read_bytes() for path in (tmp_path / "cache").glob("*.h5")}
    make(normalization={"mean": 0.1, "std": 0.2}).sample_batch()
    assert {path: path.read_bytes() for path in (tmp_path / "cache").glob("*.h5")} == before


CHOICES = r"^normalization must be published, none, or \{mean: NUMBERS, std: NUMBERS\}, not "
KINDS = r"\.normalization is {}, but must be a Normalization or text or a mapping$"
WRONG = [
    ("imagenet", CHOICES + "'imagenet'$"),
    (None, KINDS.format("None")),
    (True, KINDS.format("True")),
    (0.5, KINDS.format("0.5")),
    ([0.5, 0.5], KINDS.format(r"\[0.5, 0.5\]")),
    ({"mean": 0.5}, CHOICES),
    ({"mean": 0.5, "std": 0.5, "scale": 255}, CHOICES),
    ({"mean": 0.5, "std": 0}, r"^normalization\.std is 0, but must be finite and above 0$"),
    ({"mean": 0.5, "std": -0.1}, r"^normalization\.std is -0\.1, but must be finite and above 0$"),
    ({"mean": "a", "std": 1}, r"^normalization\.mean is 'a', but must be a number$"),
    (
        {"mean": 0, "std": float("nan")},
        r"^normalization\.std is nan, but must be finite ",
    ),
    (
        {"mean": 0, "std": float("inf")},
        r"^normalization\.std is inf, but must be finite ",
    ),
    ({"mean": 0, "std": [None] * 4}, r"^normalization\.std must be a number or a list of [13], "),
    ({"mean": [0.5] * 2, "std": 1}, r"one for each channel, not \[0\.5, 0\.5\]$"),
    ({"mean": [], "std": 1}, r"^normalization\.mean must be a number or a list of [13], "),
]


def test_settings_that_make_no_sense_are_refused_by_name(make):
    for setting, message in WRONG:
        with pytest.raises((TypeError, ValueError), match=message):
            make(normalization=setting)


def test_one_number_among_the_channels_that_is_wrong_is_refused(monkeypatch):
    monkeypatch.setattr(Cifar10DataModule, "source", small_cifar())
    for std, message in (([1, 0, 1], "std is 0, but"), ([1, True, 1], "std is True, but")):
        with pytest.raises((TypeError, ValueError), match=message):
            Cifar10DataModule(normalization={"mean": 0, "std": std})


# On the command line


def test_every_image_set_has_the_setting_and_it_is_part_of_the_runs_identity():
    for name in SETS:
        small = ["arch=cifar_tiny", "model=skip_mdeq", "data.size=32", "sizes.outputs=10"]
        given = [f"data={name}", *(small if name == "image_folder" else [])]
        typed = ("published", "none", "{mean: 0.5, std: 0.5}", "{mean: 0.5, std: 0.25}")
        identities = set()
        for value in typed:
            data = composed(*given, f"data.normalization={value}").data
            identities.add(digest(identity({"data": OmegaConf.to_container(data, resolve=True)})))
        assert len(identities) == len(typed), name


def test_a_run_is_trained_with_it_and_keeps_it(command: CommandLine):
    folder = a_run(command, "data.normalization={mean: [0.25], std: 0.5}")
    text = (folder / "config.yaml").read_text()
    assert "normalization:\n    mean:\n    - 0.25\n    std: 0.5\n" in text


def test_a_wrong_value_is_named_with_its_key(command: CommandLine):
    answer = command(*SHORT, "data.normalization={mean: 0.5, std: -1}")
    assert answer.err == ("error: data.normalization.std is -1, but must be finite and above 0\n")
    assert answer.files == []
