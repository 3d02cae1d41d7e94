"""The shipped digits: what is in the file, what is noticed when it is damaged, how they train."""

import shutil
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from fastdeq.data import (
    Batch,
    DigitsDataModule,
    ImageSet,
    read_digits,
    read_store,
    write_store,
)


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return read_digits()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    path = tmp_path / "digits.h5"
    with resources.as_file(resources.files("fastdeq.data").joinpath("digits.h5")) as source:
        shutil.copyfile(source, path)
    return path


def equal(one: ImageSet, other: ImageSet) -> bool:
    names = ("train_images", "train_labels", "test_images", "test_labels")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


# What is in the file


def test_the_set_has_1797_samples_split_1437_to_360(digits):
    assert digits.train_images.shape == (1437, 1, 8, 8)
    assert digits.test_images.shape == (360, 1, 8, 8)
    assert digits.train_labels.shape == (1437,)
    assert digits.test_labels.shape == (360,)
    assert digits.train_images.dtype == digits.test_images.dtype == torch.uint8
    assert digits.train_labels.dtype == digits.test_labels.dtype == torch.int64


def test_pixels_span_0_to_16(digits):
    for images in (digits.train_images, digits.test_images):
        assert images.min() == 0
        assert images.max() == 16


def test_every_class_has_its_share_of_the_test_split(digits):
    train, test = digits.train_labels.bincount(), digits.test_labels.bincount()
    # The class counts of the published set
    assert (train + test).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    share = (train + test).double() * 360 / 1797
    assert ((test - share).abs() < 1).all()


def test_no_image_is_in_both_splits_unless_it_is_twice_in_the_source(digits):
    train = {bytes(image.flatten().tolist()) for image in digits.train_images}
    test = {bytes(image.flatten().tolist()) for image in digits.test_images}
    assert not train & test


def test_the_file_says_where_it_comes_from(digits):
    assert "10.24432/C50P49" in digits.attributes["source"]
    assert digits.attributes["licence"] == "CC BY 4.0"
    assert digits.attributes["sha256"] == (
        "942b80c7b0bc35d1236d3a4f5fffda2d8159349e604a4855131f9c0e89553a9d"
    )


def test_the_file_equals_what_the_tool_builds_from_scikit_learn(digits):
    pytest.importorskip("sklearn")
    from tools.make_digits import ATTRIBUTES, build

    assert equal(digits, build())
    assert {**ATTRIBUTES, "sha256": digits.attributes["sha256"]} == digits.attributes


def test_normalization_constants_are_those_of_the_training_split(digits):
    pixels = digits.train_images.double() / DigitsDataModule.published.scale
    # The constants are written with six decimals.
    assert pixels.mean().item() == pytest.approx(DigitsDataModule.published.mean[0], abs=5e-7)
    assert pixels.std(correction=0).item() == pytest.approx(
        DigitsDataModule.published.std[0], abs=5e-7
    )


# Damage


def test_a_flipped_byte_never_changes_the_data_unnoticed(copy, digits):
    content = copy.read_bytes()
    noticed = 0
    positions = range(0, len(content), 331)  # prime, so that every region of the file is visited
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        copy.write_bytes(damaged)
        try:
            read = read_store(copy)
        except ValueError:
            noticed += 1
        else:
            assert equal(read, digits)
            assert read.attributes == digits.attributes
    # The rest falls into bytes that the format leaves unused.
    assert noticed > 0.8 * len(positions)


@pytest.mark.parametrize("kept", [0, 100, 20_000, -1])
def test_a_truncated_file_is_refused_with_its_name_and_the_cure(copy, kept):
    copy.write_bytes(copy.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"digits\.h5: not a readable HDF5 file .*: buy another"):
        read_store(copy, cure="buy another")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.h5: no such image set: delete it"):
        read_store(tmp_path / "nothing.h5")


def test_data_that_do_not_match_their_checksum_are_refused(copy):
    h5py = pytest.importorskip("h5py")
    with h5py.File(copy, "r+") as file:
        file["test/labels"][0] = (file["test/labels"][0] + 1) % 10
    with pytest.raises(ValueError, match="do not match their sha256"):
        read_store(copy)


def test_a_missing_dataset_is_named(copy):
    h5py = pytest.importorskip("h5py")
    with h5py.File(copy, "r+") as file:
        del file["train/labels"]
    with pytest.raises(ValueError, match="dataset train/labels is missing"):
        read_store(copy)


def test_another_set_in_place_of_the_shipped_one_is_refused(monkeypatch, tmp_path, digits):
    others = replace(digits, test_images=digits.test_images.transpose(2, 3))
    write_store(tmp_path / "digits.h5", others)
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    with pytest.raises(ValueError, match=r"digits\.h5: not the digits that come with fastdeq"):
        read_digits()


# Writing


def test_what_is_written_is_read_back_and_always_the_same_bytes(tmp_path, digits):
    for name in ("a.h5", "b.h5"):
        assert write_store(tmp_path / name, digits) == digits.attributes["sha256"]
    assert equal(read_store(tmp_path / "a.h5"), digits)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "b.h5"]


def test_an_existing_file_is_never_overwritten(tmp_path, digits):
    path = tmp_path / "mine.h5"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match=r"mine\.h5: exists already"):
        write_store(path, digits)
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def test_sets_that_do_not_fit_the_layout_are_not_written(tmp_path, digits):
    cases: list[tuple[dict[str, Any], str]] = [
        ({"test_labels": torch.zeros(3, dtype=torch.int64)}, "test has 360 images and 3 labels"),
        ({"train_images": torch.zeros(1437, 1, 8, 8)}, "train/images must be uint8 with 4 axes"),
        ({"test_labels": torch.full((360,), 256)}, "test/labels must be uint8"),
        ({"attributes": {"name": "digits"}}, "attributes are missing: version, source"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            write_store(tmp_path / "new.h5", replace(digits, **change))
        assert not list(tmp_path.iterdir()), message


# The data module


class Recorder(pl.LightningModule):
    """Trains one weight and keeps the labels of every training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        torch.nn.init.zeros_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)
        self.seen: list[Tensor] = []

    def training_step(self, batch: Batch, index: int) -> Tensor:
        self.seen.append(batch.targets.cpu())
        return torch.nn.functional.cross_entropy(self.layer(batch.inputs.flatten(1)), batch.targets)

    def validation_step(self, batch: Batch, index: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class SaveEverywhere(pl.Callback):
    """Saves a checkpoint after every step, every validation and every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        trainer.save_checkpoint(self.folder / f"step{trainer.global_step}.ckpt")

    def on_validation_end(self, trainer: pl.Trainer, *_: object) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"validated{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: object) -> None:
        trainer.save_checkpoint(self.folder / f"epoch{trainer.global_step}.ckpt")


def trainer(folder: Path, **settings) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **settings,
    )


def test_batches_have_the_documented_shapes_types_and_scale():
    data = DigitsDataModule(batch_size=64, eval_batch_size=100)
    data.setup("fit")
    inputs, labels, weight = next(iter(data.train_dataloader()))
    assert weight == 1.0
    assert inputs.shape == (64, *data.input_shape)
    assert inputs.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert labels.max() < data.outputs
    everything = torch.cat([batch.inputs for batch in data.train_dataloader()])
    # 92,000 values of six-decimal constants in float32
    assert everything.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert everything.std().item() == pytest.approx(1.0, abs=1e-4)


def test_validation_and_test_are_the_test_split_in_stored_order(digits):
    data = DigitsDataModule(eval_batch_size=100)
    data.setup("test")
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert torch.equal(torch.cat([batch.targets for batch in loader]), digits.test_labels)


def test_asking_for_batches_before_setup_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"call setup\(\)"):
        DigitsDataModule().train_dataloader()


def test_settings_that_are_not_integers_are_refused_by_name():
    for name in ["batch_size", "eval_batch_size", "seed", "validation"]:
        settings: dict[str, Any] = {name: "abc"}
        with pytest.raises(TypeError, match=rf"^DigitsDataModule\.{name} is 'abc', but"):
            DigitsDataModule(**settings)


# Lightning's advice on a run this short and on checkpoints saved in the middle of an epoch
@pytest.mark.filterwarnings("ignore::pytorch_lightning.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 12}])
def test_a_run_resumed_anywhere_sees_exactly_the_batches_not_yet_seen(tmp_path, length):
    # Four batches per epoch: every step is a place to be cut off, and so is the end of an epoch.
    def data() -> DigitsDataModule:
        return DigitsDataModule(batch_size=360, seed=3)

    whole = Recorder()
    trainer(tmp_path, **length, callbacks=[SaveEverywhere(tmp_path)]).fit(whole, data())
    places = {"step3": 3, "step4": 4, "validated4": 4, "epoch4": 4, "step5": 5}
    for name, step in places.items():
        resumed = Recorder()
        trainer(tmp_path, **length).fit(resumed, data(), ckpt_path=tmp_path / f"{name}.ckpt")
        assert len(resumed.seen) == 12 - step, name
        expected = whole.seen[step:]
        assert all(map(torch.equal, resumed.seen, expected)), name
        assert torch.equal(resumed.layer.weight, whole.layer.weight), name


@pytest.mark.filterwarnings("ignore::pytorch_lightning.utilities.warnings.PossibleUserWarning")
def test_epochs_cut_short_by_lightning_still_differ(tmp_path):
    module = Recorder()
    settings = {"max_epochs": 2, "limit_train_batches": 2}
    trainer(tmp_path, **settings).fit(module, DigitsDataModule(batch_size=64))
    assert len(module.seen) == 4
    assert not torch.equal(module.seen[0], module.seen[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore::pytorch_lightning.utilities.warnings.PossibleUserWarning")
def test_on_a_gpu_the_batches_lie_there_without_a_transfer(tmp_path):
    data = DigitsDataModule(batch_size=64)
    trainer(tmp_path, accelerator="gpu", devices=1, max_steps=2).fit(Recorder(), data)
    inputs, labels, _ = next(iter(data.train_dataloader()))
    assert inputs.is_cuda
    assert labels.is_cuda
