"""Image folders: what is read, built, decoded, drawn and refused, by how many processes ever."""

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("PIL")

import h5py
from PIL import Image

from fastdeq.data import Batch, ImageFolderDataModule, Passes
from fastdeq.data import decode as decode_module
from fastdeq.data.build import CURE
from fastdeq.data.command import main
from fastdeq.data.decode import CentralCrop, RandomCrop, decode, to_tensor
from fastdeq.data.folder import FolderSplit, ImageFolder, list_folder
from fastdeq.data.module import hold_out
from fastdeq.data.records import read_records, write_records
from tests.commands import a_run
from tests.folders import (
    CLASSES,
    SIDE,
    TRAIN,
    VAL,
    Pixels,
    images,
    jpeg,
    noise,
    png,
    write_images,
)
from tests.test_store import PROCESSES, die, run_until_killed

SIZE = 32
SAMPLES = TRAIN * len(CLASSES)


@pytest.fixture(autouse=True)
def _cache_aside(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTDEQ_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_images(tmp_path / "root")


def folder(root: Path | None, **settings: Any) -> ImageFolderDataModule:
    defaults = {"size": SIZE, "workers": 0, "batch_size": 5, "eval_batch_size": 4}
    return ImageFolderDataModule(root=root, **(defaults | settings))


def ready(root: Path, *, rank: int = 0, ranks: int = 1, **settings: Any) -> ImageFolderDataModule:
    data = folder(root, **settings)
    strategy = Mock(root_device=torch.device("cpu"))
    data.trainer = Mock(strategy=strategy, global_rank=rank, world_size=ranks, overfit_batches=0)
    data.setup()
    return data


def pixels_of(batch: Batch) -> Tensor:
    """What was there before the normalization, as uint8."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return ((batch.inputs * std + mean) * 255).round().to(torch.uint8)


def inputs(batches: Passes) -> Tensor:
    return torch.cat([batch.inputs for batch in batches])


def decoded(content: bytes) -> Pixels:
    return np.asarray(decode(content))


def stores(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*.h5"))


# What is read


def test_the_middle_of_a_png_is_read_exactly_where_nothing_is_resized(tmp_path):
    pixels = {
        f"{split}/a/0.png": noise(seed, 40, 51) for seed, split in enumerate(("train", "val"))
    }
    root = write_images(tmp_path / "root", {name: png(x) for name, x in pixels.items()})
    data = ready(root, crop_share=SIZE / 40)
    (batch,) = data.test_dataloader()
    # 8 rows and 19 columns too many; of the odd one half a column is rounded to the even 10.
    expected = pixels["val/a/0.png"][4:36, 10:42].transpose(2, 0, 1)
    assert np.array_equal(pixels_of(batch)[0].numpy(), expected)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    # The same float32 operations in the same order: no tolerance.
    wanted = (torch.tensor(expected).float() / 255.0 - mean) / std
    assert torch.equal(batch.inputs[0], wanted)


def test_the_shorter_side_is_resized_until_the_square_is_its_share():
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :], 80, axis=0)
    image = decode(png(ramp, "grey"))
    found = np.asarray(CentralCrop(size=28, share=0.875).apply(image, np.random.default_rng()))
    # 64 columns become 32, each the mean of a symmetric window around 2 j + 0.5; 28 are kept.
    expected = 2 * np.arange(2, 30) + 0.5
    assert found.shape == (28, 28, 3)
    assert np.abs(found - expected[None, :, None]).max() <= 0.5


@pytest.mark.parametrize(("size", "shorter"), [(224, 256), (32, 37), (299, 342)])
def test_the_default_share_is_the_published_one(size, shorter):
    crop = CentralCrop(size=size)
    assert round(size / crop.share) == shorter


def test_a_jpeg_is_read_with_its_loss(tmp_path):
    ramp = np.stack(np.broadcast_arrays(*np.ogrid[:40, :48], 128), axis=-1).astype(np.uint8)
    # Smooth: at quality 95, without subsampling, the loss is the rounding of a few coefficients.
    found = decoded(jpeg(ramp, quality=95, subsampling=0)).astype(int)
    assert np.abs(found - ramp).max() <= 4


def test_labels_count_the_classes_by_name_and_batches_hold_every_image_once(root):
    data = ready(root)
    assert data.outputs == 3
    assert data.input_shape == (3, SIZE, SIZE)
    targets = torch.cat([batch.targets for batch in data.test_dataloader()])
    assert targets.tolist() == [label for label in range(3) for _ in range(VAL)]
    assert targets.dtype == torch.int64
    batches = list(data.train_dataloader())
    assert [len(batch.targets) for batch in batches] == [5, 5, 5, 5, 4]
    assert torch.cat([b.targets for b in batches]).bincount().tolist() == [TRAIN] * 3
    expected = [
        to_tensor(CentralCrop(size=SIZE).apply(decode(content), np.random.default_rng()))
        for name, content in sorted(images().items())
        if name.startswith("val/")
    ]
    found = torch.cat([pixels_of(batch) for batch in data.test_dataloader()])
    assert torch.equal(found, torch.stack(expected))


def test_a_folder_of_the_sets_name_is_found_below_a_data_folder(tmp_path):
    write_images(tmp_path / "data" / "image_folder")
    assert len(folder(tmp_path / "data").load()[0]) == SAMPLES


def test_what_is_hidden_or_beside_the_classes_is_left_out(root):
    (root / "train" / "cat" / "._0.png").write_bytes(b"a resource fork")
    (root / "val" / ".DS_Store").write_bytes(b"")
    (root / "train" / "n01440764.tar").write_bytes(b"what the class came from")
    (root / "test").mkdir()
    train, test = folder(root).load()
    assert (len(train), len(test)) == (SAMPLES, VAL * 3)


def test_endings_of_either_case_are_images_and_the_content_says_of_which_kind(tmp_path):
    pixels = noise(0)
    contents = {
        "train/a/0.JPEG": png(pixels),
        "train/a/1.PNG": jpeg(pixels),
        "val/a/2.Jpg": png(pixels),
    }
    assert len(folder(write_images(tmp_path / "root", contents)).load()[0]) == 2


def test_held_out_images_validate_with_their_middle_and_do_not_train(root):
    data = ready(root, validation=7)
    mask = hold_out(SAMPLES, 7)
    labels = torch.arange(3).repeat_interleave(TRAIN)
    whole = inputs(ready(root).val_dataloader())
    held_out = torch.cat([batch.targets for batch in data.val_dataloader()])
    assert held_out.tolist() == labels[mask].tolist()
    trained = torch.cat([batch.targets for batch in data.train_dataloader()])
    assert sorted(trained.tolist()) == labels[~mask].tolist()
    assert torch.equal(inputs(data.test_dataloader()), whole)
    first = data.sample_batch(SAMPLES).inputs
    stored = data._splits["train"]
    assert len(first) == len(stored) == SAMPLES - 7


def test_under_overfit_batches_every_epoch_is_the_same_middle_of_the_images(root):
    data = ready(root)
    data.trainer.overfit_batches = 1  # type: ignore[union-attr]
    batches = data.train_dataloader()
    assert torch.equal(inputs(batches), inputs(batches))
    assert torch.equal(inputs(batches), data.sample_batch(SAMPLES).inputs)


# Kinds of images

GREY = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
OPAQUE = np.array([0, 128, 255], np.uint8)


def test_grey_images_get_three_equal_channels():
    assert np.array_equal(decoded(png(GREY, "grey")), np.stack([GREY] * 3, -1))


def test_of_sixteen_bits_the_upper_eight_are_kept():
    wide = GREY.astype(np.uint16) * 256 + 99
    assert np.array_equal(decoded(png(wide, "grey")), np.stack([GREY] * 3, -1))
    colours = np.stack([wide, wide + 256, wide], -1)
    assert np.array_equal(decoded(png(colours)), np.stack([GREY, GREY + 1, GREY], -1))


def test_palettes_are_looked_up():
    palette = bytes([1, 2, 3, 200, 100, 50])
    indices = np.array([[0, 1], [1, 0]], np.uint8)
    found = decoded(png(indices, "palette", before={b"PLTE": palette}))
    assert np.array_equal(found, np.frombuffer(palette, np.uint8).reshape(2, 3)[indices])


def test_what_is_transparent_is_laid_on_white():
    colour = np.tile(np.array([10, 20, 30], np.uint8), (1, 3, 1))
    found = decoded(png(np.concatenate([colour, OPAQUE[None, :, None]], -1), "rgba")).astype(int)
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[0, 2].tolist() == [10, 20, 30]
    half = 255 + (np.array([10, 20, 30]) - 255) * 128 / 255
    assert np.abs(found[0, 1] - half).max() <= 1  # rounded to integers
    grey = np.stack([np.full((1, 3), 10, np.uint8), OPAQUE[None]], -1)
    assert decoded(png(grey, "grey+alpha"))[0, [0, 2]].tolist() == [[255] * 3, [10] * 3]


def test_a_colour_of_a_palette_can_be_transparent():
    chunks = {b"PLTE": bytes([1, 2, 3, 200, 100, 50]), b"tRNS": bytes([0])}
    found = decoded(png(np.array([[0, 1]], np.uint8), "palette", before=chunks))
    assert found.tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_cmyk_is_converted():
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[..., 1] = 255  # magenta alone: no green is left
    found = decoded(jpeg(ink, "CMYK", quality=95)).astype(int)
    assert np.abs(found - [255, 0, 255]).max() <= 3  # the loss of a constant image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_metadata_say(orientation):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255  # the upper left corner is white
    # Where row 0 and column 0 of the stored image are to be seen (EXIF 2.3, tag 274).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    found = decoded(jpeg(np.ascontiguousarray(stored), quality=95, exif=exif))
    assert found.shape == upright.shape
    assert np.array_equal(found > 127, upright > 127)


def test_metadata_that_cannot_be_read_say_nothing():
    broken = b"Exif\0\0II*\0" + struct.pack("<IHHHII", 8, 9, 0x112, 3, 2**31, 2**31 - 1)
    assert decoded(jpeg(noise(0), exif=broken)).shape == (SIDE, SIDE, 3)


# The store


def test_the_folder_becomes_one_file_which_is_used_from_then_on(root, tmp_path):
    folder(root).prepare_data()
    (path,) = stores(tmp_path)
    first = path.read_bytes()
    with patch.object(FolderSplit, "read", side_effect=AssertionError("read again")):
        folder(root).prepare_data()
        assert len(folder(root).load()[0]) == SAMPLES
    path.unlink()
    folder(root).prepare_data()
    assert path.read_bytes() == first
    assert sorted(p.name for p in path.parent.iterdir()) == [f".{path.name}.lock", path.name]


def test_the_contents_are_the_files_and_the_store_says_what_it_is(root, tmp_path):
    train, val = folder(root).load()
    files = sorted(images().items())
    found = [records.read(i) for records in (train, val) for i in range(len(records))]
    assert found == [content for _, content in files]
    places = [records.file(i) for records in (train, val) for i in range(len(records))]
    assert places == [str(root / name) for name, _ in files]
    for records in (train, val):
        records.close()
    (path,) = stores(tmp_path)
    with h5py.File(path) as file:
        assert file["train/bytes"][: file["train/offsets"][1]].tobytes() == files[0][1]
        assert file["classes"][:].tobytes() == b"cat\0dog\0eel\0"
        assert file.attrs["source"].decode() == str(root)
    data = folder(root)
    data.load()
    assert data.facts["classes"] == "cat, dog, eel"
    assert data.facts["checked"] == "headers"


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "val/cat/new.png").write_bytes(png(noise(1))),
        lambda root: (root / "train/dog/0.png").unlink(),
        lambda root: (root / "train/dog/0.png").write_bytes(png(noise(1, 41))),
        lambda root: (root / "train/dog/0.png").rename(root / "train/dog/00.png"),
        lambda root: [(root / s / "eel").rename(root / s / "ape") for s in ("train", "val")],
    ],
)
def test_a_folder_that_changed_has_another_store(root, tmp_path, change):
    folder(root).prepare_data()
    change(root)
    folder(root).prepare_data()
    assert len(stores(tmp_path)) == 2


def test_equal_folders_in_two_places_do_not_share_a_store(root, tmp_path):
    shutil.copytree(root, tmp_path / "other")
    for place in (root, tmp_path / "other"):
        folder(place).prepare_data()
    assert len(stores(tmp_path)) == 2


def test_the_file_alone_is_enough(root, tmp_path):
    expected = inputs(ready(root).train_dataloader())
    (path,) = stores(tmp_path)
    moved = path.rename(tmp_path / "moved.h5")
    shutil.rmtree(root)
    assert torch.equal(inputs(ready(moved).train_dataloader()), expected)
    assert not stores(tmp_path)


def test_names_need_not_be_unicode(tmp_path):
    contents = {f"{split}/a/\udcff.png": png(noise(0))[:60] for split in ("train", "val")}
    root = write_images(tmp_path / "root", contents)
    train, _ = folder(root).load()
    assert train.file(0) == str(root / "train/a/\udcff.png")


def test_one_image_at_a_time_is_in_memory_while_the_store_is_built(tmp_path):
    size, count = 100_000, 60
    split = Mock(
        spec=FolderSplit,
        folder=tmp_path,
        names=[f"a/{i}" for i in range(count)],
        sizes=np.full(count, size),
        labels=np.zeros(count, np.int64),
        read=lambda number: bytes([number]) * size,
    )
    listed = ImageFolder(root=tmp_path, classes=["a"], splits={"train": split, "val": split})
    said = dict.fromkeys(("name", "version", "source", "licence", "split"), "x")
    tracemalloc.start()
    try:
        write_records(tmp_path / "x.h5", listed, said, check=lambda _: None, watch=iter)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 * size  # of 120 that are written
    assert read_records(tmp_path / "x.h5").val.read(59) == bytes([59]) * size


# Broken off


def build_until_killed(root: Path, number: int, place: Path) -> None:
    read = FolderSplit.read

    def mortal(self: FolderSplit, index: int) -> bytes:
        return die() if index == number else read(self, index)  # type: ignore[func-returns-value,return-value]

    with patch.object(FolderSplit, "read", mortal):
        folder(root, store=place).prepare_data()


@pytest.mark.parametrize("number", [0, 20])
def test_a_killed_build_leaves_no_store_and_the_next_one_cleans_up(root, tmp_path, number):
    place = tmp_path / "cache"
    run_until_killed(build_until_killed, root, number, place)
    assert not stores(tmp_path)
    assert len(list(place.glob(".*.tmp"))) == 1
    assert len(folder(root).load()[0]) == SAMPLES
    assert len(stores(tmp_path)) == 1
    assert not list(place.glob(".*.tmp"))


def test_a_full_disk_leaves_no_store_and_says_what_to_do(root, tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        patch.object(h5py.Group, "create_dataset", side_effect=full),
        pytest.raises(OSError, match=r"cannot be written \(No space left.*data\.store=PATH"),
    ):
        folder(root).prepare_data()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_file_that_changes_while_it_is_read_is_named(root):
    listed = list_folder(root, "image_folder")
    path = root / "train/cat/0.png"
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match=r"0\.png: has 5 bytes, and had .* start again"):
        listed.splits["train"].read(0)
    path.unlink()
    with pytest.raises(ValueError, match=r"0\.png: cannot be read \(No such file"):
        listed.splits["train"].read(0)


# Damaged


def refusal(data: ImageFolderDataModule, place: Path) -> str:
    """What preparing says: one line that begins with the place; nothing half-made stays."""
    with pytest.raises((ValueError, OSError)) as caught:
        data.load()
    text = str(caught.value)
    assert text.startswith(f"{place}: ")
    assert "\n" not in text
    cache = Path(os.environ["FASTDEQ_CACHE"])
    assert not list(cache.glob(".*.tmp"))
    return text.removeprefix(f"{place}: ")


def test_a_store_truncated_anywhere_is_refused_with_the_cure(root, tmp_path):
    folder(root).prepare_data()
    (path,) = stores(tmp_path)
    content = path.read_bytes()
    for kept in [*range(0, len(content), 9973), len(content) - 1]:
        path.write_bytes(content[:kept])
        assert refusal(folder(root), path).endswith(CURE), kept


def test_a_flipped_bit_never_changes_what_is_read(root, tmp_path):
    data = folder(root)
    expected = everything(data)
    (path,) = stores(tmp_path)
    content, noticed = path.read_bytes(), 0
    bits = range(0, 8 * len(content), 10007)  # prime: every region and every bit
    for bit in bits:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = everything(folder(root))
        except ValueError as error:
            noticed += str(error).startswith(f"{path}: ")
        else:
            assert found == expected, bit
    # The rest falls into bytes that the format leaves unused.
    assert noticed > 0.9 * len(bits)


def everything(data: ImageFolderDataModule) -> list[object]:
    return [
        (records.read(i), int(records.targets[i]), records.file(i))
        for records in data.load()
        for i in range(len(records))
    ]


def damage_an_image(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        begin = file["train/offsets"][TRAIN]  # the first dog
        file["train/bytes"][begin + 100] ^= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_in_one_line_when_it_is_read(root, tmp_path, workers):
    folder(root).prepare_data()
    (path,) = stores(tmp_path)
    damage_an_image(path)
    data = ready(root, workers=workers)
    with pytest.raises(ValueError, match="damaged") as caught:
        list(data.train_dataloader())
    wanted = f"{path}: its copy of {root}/train/dog/0.png is damaged: {CURE}"
    assert str(caught.value) == wanted
    data.teardown()


def write_other_layout(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["weights"] = np.zeros(3)


def write_other_label(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["val/labels"][0] = 2


def write_other_version(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = np.bytes_(b"0")


def write_other_type(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["train/crc32"]
        file["train/crc32"] = np.zeros(SAMPLES)


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (lambda path: path.write_text("<html>"), "not a readable HDF5 file"),
        (write_other_layout, "dataset train/offsets is missing"),
        (write_other_type, "train/crc32 must be <u4 with 1 axis, not <f8"),
        (write_other_label, "the data do not match their sha256"),
        (write_other_version, "its version is '0', not '1'"),
    ],
)
def test_a_file_that_is_not_the_store_is_refused_with_the_cure(root, tmp_path, write, told):
    folder(root).prepare_data()
    (path,) = stores(tmp_path)
    write(path)
    assert told in (text := refusal(folder(root), path))
    assert text.endswith(CURE)


# What is wrong with the folder


def drop(*names: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for name in names:
            shutil.rmtree(root / name)

    return change


def put(name: str, content: bytes = b"") -> Callable[[Path], None]:
    return lambda root: (write_images(root, {name: content}), None)[1]


def empty_class(root: Path) -> None:
    drop("train/dog")(root)
    (root / "train/dog").mkdir()


def dangling(root: Path) -> None:
    (root / "val/cat/x.png").symlink_to(root / "nowhere")


def bare(root: Path) -> None:
    drop("train")(root)
    (root / "train").mkdir()


FOLDERS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no train": (
        drop("train"),
        ".",
        "has no folder train: data.root is the folder with train/ and",
    ),
    "no val": (drop("val"), ".", "has no folder val: data.root is the folder with train/ and val/"),
    "neither": (drop("train", "val"), ".", "has no folder train: "),
    "only in train": (
        drop("val/dog"),
        ".",
        "val has no folder for dog: both need the same classes",
    ),
    "only in val": (
        drop("train/cat", "train/eel"),
        ".",
        "train has no folder for cat, eel: both need the same classes",
    ),
    "on both sides": (
        drop("train/cat", "val/eel"),
        ".",
        "val has no folder for eel, and train has no folder for cat: both need the same classes",
    ),
    "no classes": (bare, "train", "has no images: it must have a folder of them for each class"),
    "empty class": (empty_class, "train/dog", "has no images: add some, or remove this class"),
    "flat": (put("val/0.JPEG"), "val/0.JPEG", "an image that is in no class: sort the images of "),
    "nested": (put("val/cat/a/0.png"), "val/cat/a", "a folder among the images of a class"),
    "other kind": (put("val/cat/a.gif"), "val/cat/a.gif", "no image by its name among the images"),
    "dangling": (dangling, "val/cat/x.png", "cannot be read (No such file or directory)"),
    "text": (
        put("val/dog/x.png", b"<html>"),
        "val/dog/x.png",
        "not a readable image (neither JPEG nor PNG): replace or remove it",
    ),
    "empty file": (put("val/dog/x.jpg"), "val/dog/x.jpg", "not a readable image (neither JPEG"),
    "only a header": (
        put("train/eel/x.png", png(noise(0))[:20]),
        "train/eel/x.png",
        "not a readable image (",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_not_as_it_must_be_is_refused_in_one_line(root, tmp_path, case):
    change, place, told = FOLDERS[case]
    change(root)
    assert refusal(folder(root), root / place).startswith(told)
    assert not stores(tmp_path)


def test_of_many_missing_classes_the_first_are_named(tmp_path):
    contents = {f"train/{i:02}/0.png": png(noise(0)) for i in range(12)}
    root = write_images(tmp_path / "root", contents | {"val/00/0.png": png(noise(0))})
    told = "val has no folder for 01, 02, 03, 04, 05 and 6 more: both need the same classes"
    assert refusal(folder(root), root) == told


def test_a_root_that_is_missing_is_named(tmp_path):
    assert refusal(folder(tmp_path / "x"), tmp_path / "x").startswith("no such folder: data.root")
    with pytest.raises(FileNotFoundError, match=r"data\.root=PATH \(or FASTDEQ_DATA\)"):
        folder(None).prepare_data()


def test_a_file_that_is_no_store_is_no_root(tmp_path):
    (tmp_path / "x.h5").write_text("<html>")
    text = refusal(folder(tmp_path / "x.h5"), tmp_path / "x.h5")
    assert text.endswith("give the folder that it was made from")


def test_another_number_of_classes_is_refused_with_the_cure_before_anything_is_built(
    root, tmp_path
):
    text = refusal(folder(root, classes=1000), root)
    assert text == "has 3 classes, but sizes.outputs is 1,000: set sizes.outputs=3"
    assert not stores(tmp_path)
    assert folder(root, classes=3).outputs == 3
    folder(root).prepare_data()
    (path,) = stores(tmp_path)
    assert refusal(folder(path, classes=2), path).endswith("set sizes.outputs=3")


CUT = png(noise(7))[:-500]  # the header is whole


def test_with_verify_an_image_is_decoded_before_it_gets_into_the_store(root, tmp_path):
    put("train/eel/x.png", CUT)(root)
    text = refusal(folder(root, verify=True), root / "train/eel/x.png")
    assert text.startswith("not a readable image (")
    assert not stores(tmp_path)
    (root / "train/eel/x.png").unlink()
    data = folder(root, verify=True)
    data.load()
    assert data.facts["checked"] == "whole images"
    assert len(folder(root).load()[0]) == SAMPLES  # which asks for less


@pytest.mark.parametrize("workers", [0, 2])
def test_without_it_an_image_that_cannot_be_decoded_is_named_when_it_is_read(root, workers):
    put("train/eel/x.png", CUT)(root)
    data = ready(root, workers=workers)
    with pytest.raises(ValueError, match="not a readable image") as caught:
        list(data.train_dataloader())
    text = str(caught.value)
    assert text.startswith(f"{root}/train/eel/x.png: not a readable image (")
    assert "data.verify=true" in text
    assert "\n" not in text
    data.teardown()


def test_a_store_whose_images_were_not_decoded_does_not_pass_for_verified(root, tmp_path):
    folder(root).prepare_data()
    (path,) = stores(tmp_path)
    told = f"was built without decoding its images: for data.verify=true {CURE}"
    assert refusal(folder(root, verify=True), path) == told


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"size": 0}, "size must be an integer of at least 1, not 0"),
        ({"workers": -1}, "workers must be an integer of at least 0, not -1"),
        ({"workers": "many"}, "workers must be an integer"),
        ({"crop_share": 0}, "crop_share must be above 0 and at most 1, not 0"),
        ({"crop_share": 1.5}, "crop_share must be above 0 and at most 1"),
        ({"crop_area": 0.5}, "crop_area must be two numbers"),
        ({"crop_area": [0.5, 0.1]}, r"crop_area must rise from above 0, not \[0\.5, 0\.1\]"),
        ({"crop_area": [0.5, 2]}, "crop_area must be at most 1"),
        ({"crop_ratio": [0, 1]}, "crop_ratio must rise from above 0"),
        ({"crop_ratio": ["a", 1]}, "crop_ratio must be a finite number, not 'a'"),
        ({"flip": 2}, "flip must be from 0 to 1, not 2"),
        ({"classes": 0}, "classes must be an integer of at least 1, not 0"),
        ({"verify": "yes"}, "verify must be true or false, not 'yes'"),
        ({"root": 3}, "root must be the path of a folder, not 3"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(settings, told):
    with pytest.raises(ValueError, match=told):
        folder(**{"root": None, **settings})


def test_asking_for_batches_before_setup_says_what_to_do(root):
    with pytest.raises(RuntimeError, match=r"call setup\(\) before"):
        folder(root).train_dataloader()


def test_without_pillow_the_cure_is_named(monkeypatch, capsys, root):
    monkeypatch.setattr(decode_module, "_HAS_PILLOW", False)
    with pytest.raises(ImportError, match=r"pip install pillow, or 'fastdeq\[images\]'"):
        folder(root)
    assert main(["image_folder", f"root={root}"]) == 1
    assert capsys.readouterr().err.startswith("error: image folders need Pillow: pip install")


def test_without_pillow_the_other_sets_are_there():
    code = "import sys; sys.modules['PIL'] = None; from fastdeq.data.command import main; "
    command = [sys.executable, "-c", code + "sys.exit(main(['digits']))"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


# Random crops


def boxes(crop: RandomCrop, width: int, height: int, count: int = 4000) -> Pixels:
    random = np.random.default_rng(0)
    return np.array([crop.draw(width, height, random) for _ in range(count)])


def test_the_area_of_a_crop_is_uniform_and_its_shape_log_uniform():
    # In a square, parts of half its area at most fit whatever their ratio: none is drawn again.
    crop, side = RandomCrop(size=32, area=(0.08, 0.5)), 1000
    left, top, right, bottom = boxes(crop, side, side).T
    area = (right - left) * (bottom - top) / side**2
    shape = np.log((right - left) / (bottom - top))
    for found, low, high in ((area, 0.08, 0.5), (shape, np.log(3 / 4), np.log(4 / 3))):
        uniform = (found - low) / (high - low)
        assert uniform.min() > -0.02  # rounding to a pixel of 1000 moves the area by 0.5 %
        assert uniform.max() < 1.02
        # Kolmogorov and Smirnov's distance at 1 % for 4000 draws
        steps = np.arange(len(found)) / len(found)
        assert np.abs(np.sort(uniform) - steps).max() < 1.63 / np.sqrt(len(found))
    assert abs(np.corrcoef(area, shape)[0, 1]) < 5 / np.sqrt(len(area))


def test_the_place_of_a_crop_is_uniform_up_to_the_edges():
    crop = RandomCrop(size=32, area=(0.25, 0.25), ratio=(1, 1))
    left, top, right, bottom = boxes(crop, 10, 10).T
    assert set((right - left).tolist()) == set((bottom - top).tolist()) == {5}
    counts = np.bincount(6 * left + top, minlength=36)
    expected = len(left) / 36
    # Chi-squared with 35 degrees of freedom: 66.6 is its 0.1 % point.
    assert ((counts - expected) ** 2 / expected).sum() < 66.6


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 500), (500, 3), (640, 480), (32, 32)])
def test_a_crop_lies_within_the_image(width, height):
    left, top, right, bottom = boxes(RandomCrop(size=32), width, height, 500).T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= width).all()
    assert (bottom <= height).all()
    assert (right > left).all()
    assert (bottom > top).all()


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [(1000, 100, (433, 0, 566, 100)), (100, 1000, (0, 433, 100, 566)), (90, 100, (0, 0, 90, 100))],
)
def test_where_no_part_fits_it_is_the_largest_in_the_centre(width, height, box):
    assert RandomCrop(size=32)._central(width, height) == box


def test_a_part_of_the_whole_area_of_a_wide_image_is_the_central_one():
    # Of 10 : 1, the whole area never fits into a ratio of 4 / 3 at most.
    assert (
        boxes(RandomCrop(size=32, area=(1, 1)), 1000, 100, 3).tolist() == [[433, 0, 566, 100]] * 3
    )


@pytest.mark.parametrize(("flip", "least", "most"), [(0, 0, 0), (1, 400, 400), (0.25, 57, 143)])
def test_the_share_of_mirrored_images_is_as_set(flip, least, most):
    pixels = noise(0, 8, 8)
    crop = RandomCrop(size=8, area=(1, 1), ratio=(1, 1), flip=flip)
    random, image = np.random.default_rng(0), Image.fromarray(pixels)
    found = [np.asarray(crop.apply(image, random)) for _ in range(400)]
    mirrored = [np.array_equal(one, pixels[:, ::-1]) for one in found]
    plain = [np.array_equal(one, pixels) for one in found]
    assert sum(mirrored) + sum(plain) == 400
    assert least <= sum(mirrored) <= most  # 100 ± 5 standard deviations of 8.7


# The order, and what each sample gets


def test_the_numbers_do_not_depend_on_the_workers(root):
    expected = [inputs(batches) for batches in loaders(ready(root, seed=3))]
    for workers in (1, 2):
        data = ready(root, seed=3, workers=workers)
        found = [inputs(batches) for batches in loaders(data)]
        assert all(map(torch.equal, found, expected)), workers
        data.teardown()


def loaders(data: ImageFolderDataModule) -> Sequence[Passes]:
    """The training batches twice, for two epochs."""
    train = data.train_dataloader()
    return train, train, data.val_dataloader()


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_the_parts_of_all_ranks_are_the_batch_of_one(root, ranks):
    several = [ready(root, rank=rank, ranks=ranks) for rank in range(ranks)]
    for kind in ("train_dataloader", "test_dataloader"):
        alone = list(getattr(ready(root), kind)())
        parts = [list(getattr(data, kind)()) for data in several]
        assert {len(part) for part in parts} == {len(alone)}
        for whole, *part in zip(alone, *parts, strict=True):
            counted = [one for one in part if one.weight > 0]
            assert torch.equal(torch.cat([one.inputs for one in counted]), whole.inputs)
            assert torch.equal(torch.cat([one.targets for one in counted]), whole.targets)
            means = [one.weight * one.inputs.mean().item() for one in part]
            # Float32 means of some thousand values of order 1
            assert sum(means) / ranks == pytest.approx(whole.inputs.mean().item(), abs=1e-5)


def test_epochs_and_seeds_differ_in_order_and_crops(root):
    data = ready(root, seed=1)
    batches = data.train_dataloader()
    first, second = ([(b.inputs, b.targets) for b in batches] for _ in range(2))
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
    for batch in (*first, *second):
        assert len({tuple(one.flatten()[:64].tolist()) for one in batch[0]}) == len(batch[0])
    batches.set_epoch(0)
    assert torch.equal(inputs(batches), torch.cat([a for a, _ in first]))
    assert not torch.equal(inputs(ready(root, seed=2).train_dataloader()), inputs(batches))


def test_a_samples_crop_is_that_of_its_place_whatever_the_batch_size(root):
    small, large = (inputs(ready(root, batch_size=b).train_dataloader()) for b in (5, SAMPLES))
    assert torch.equal(small, large)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seen", [1, 3, 5, 7])
def test_a_restored_module_goes_on_with_exactly_the_batches_not_yet_given(root, workers, seen):
    whole, broken_off, resumed = (ready(root, workers=workers) for _ in range(3))
    expected = two_epochs(whole)
    batches = broken_off.train_dataloader()
    # Two passes in a row, of 5 batches each; the workers are up to four batches ahead.
    given = (batch.inputs for _ in range(2) for batch in batches)
    before = [next(given) for _ in range(seen)]
    resumed.load_state_dict(broken_off.state_dict())
    again = resumed.train_dataloader()
    after = [batch.inputs for batch in again]
    if seen < 5:
        after += [batch.inputs for batch in again]
    assert len(before + after) == len(expected)
    assert all(map(torch.equal, before + after, expected))
    for data in (whole, broken_off, resumed):
        data.teardown()


def two_epochs(data: ImageFolderDataModule) -> list[Tensor]:
    batches = data.train_dataloader()
    return [batch.inputs for _ in range(2) for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_that_is_given_up_leaves_the_next_one_alone(root, workers):
    expected = two_epochs(ready(root))[5:]
    data = ready(root, workers=workers)
    batches = data.train_dataloader()
    next(iter(batches))
    found = [batch.inputs for batch in batches]
    assert all(map(torch.equal, found, expected))
    data.teardown()


def test_workers_stay_from_pass_to_pass_and_end_with_the_module(root):
    data = ready(root, workers=2)
    batches = data.val_dataloader()
    pids = []
    for _ in range(2):
        list(batches)
        pids.append(children())
    assert pids[0] == pids[1]
    assert len(pids[0]) == 2
    next(iter(batches))
    data.teardown()
    assert not children()
    assert len(inputs(batches)) == VAL * 3  # with new ones
    data.teardown()


def children() -> set[int | None]:
    """The workers that run."""
    return {process.pid for process in multiprocessing.active_children()}


def test_no_random_numbers_of_others_are_drawn(root):
    data = ready(root, workers=1)
    torch.manual_seed(5)
    np.random.seed(5)
    before = (torch.get_rng_state(), np.random.rand())
    np.random.seed(5)
    inputs(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.rand() == before[1]
    data.teardown()


def test_records_are_read_by_processes_that_were_forked_or_started_anew(root):
    records, _ = folder(root).load()
    expected = records.read(3)  # the file is open here from now on
    assert pickle.loads(pickle.dumps(records)).read(3) == expected
    with PROCESSES.Pool(1) as pool:
        assert pool.apply(records.read, (3,)) == expected
    pid = os.fork()
    if pid == 0:
        os._exit(0 if records.read(3) == expected else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert records.read(3) == expected


def test_a_sample_batch_is_the_middle_of_the_first_images(root):
    data = folder(root)
    found = data.sample_batch(3)
    whole = middles_of_cats(root)[:3]
    assert torch.equal(pixels_of(found), whole)
    assert found.targets.tolist() == [0, 0, 0]


def middles_of_cats(root: Path) -> Tensor:
    files = sorted((root / "train" / "cat").iterdir())
    crop = CentralCrop(size=SIZE)
    made = [crop.apply(decode(f.read_bytes()), np.random.default_rng()) for f in files]
    return torch.stack([to_tensor(one) for one in made])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_gets_the_same_images(root, workers):
    expected = inputs(ready(root).train_dataloader())
    data = ready(root, workers=workers)
    data._device = torch.device("cuda")
    found = inputs(data.train_dataloader())
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected)
    data.teardown()


# On the command line


def test_the_command_prepares_and_shows_a_folder(root, capsys, tmp_path):
    assert main(["image_folder", f"root={root}", "size=32", "classes=3"]) == 0
    printed = capsys.readouterr()
    (path,) = stores(tmp_path)
    shown = {line[:14].strip(): line[14:] for line in printed.out.splitlines()}
    assert shown["file"] == f"{path} ({path.stat().st_size:,} bytes)"
    assert shown["train"] == "24 samples of 3 × 32 × 32"
    assert shown["per class"] == "5 5 5"  # of the test split, which comes last
    assert shown["classes"] == "cat, dog, eel"
    assert shown["source"] == str(root)
    assert printed.err == ""


def test_of_many_classes_the_command_shows_the_range(tmp_path, capsys):
    contents = {
        f"{split}/{i:02}/0.png": png(noise(0)) for i in range(30) for split in ("train", "val")
    }
    root = write_images(tmp_path / "root", contents | {"val/07/1.png": png(noise(0))})
    assert main(["image_folder", f"root={root}"]) == 0
    shown = {line[:14].strip(): line[14:] for line in capsys.readouterr().out.splitlines()}
    assert shown["per class"] == "1 to 2, in 30 classes"
    assert shown["classes"] == "00, 01, 02, 03, 04, 05, 06, 07, 08, 09 and 20 more"


SMALL = ("data=image_folder", "arch=cifar_tiny", "model=skip_mdeq", "data.size=32")
RUN = (*SMALL, "sizes.outputs=3", "data.batch_size=6", "solver.max_steps=3", "data.workers=0")


def figures(run: Path) -> dict[str, float]:
    found = json.loads((run / "summary.json").read_text())["figures"]
    return {name: value for name, value in found.items() if "seconds" not in name}


def test_a_run_has_the_same_figures_whoever_decodes(root, command):
    alone, helped = (
        a_run(command, *RUN, f"data.root={root}", w) for w in ("seed=0", "data.workers=2")
    )
    assert figures(alone) == figures(helped)
    assert not children()


def test_a_run_that_comes_to_a_bad_image_ends_with_its_name(root, command):
    for name in ("cat", "dog", "eel"):
        put(f"train/{name}/9.png", CUT)(root)  # after those that are tried before the run
    answer = command.process(*RUN, "data.workers=1", "trainer.accelerator=cpu", f"data.root={root}")
    assert answer.status == 1
    last = answer.err.splitlines()[-1]
    assert last.startswith(f"error: {root}/train/")
    assert "9.png: not a readable image (" in last


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_one_and_two_processes_have_the_same_figures(root, command):
    # No batch statistics: of these, each process would have its part's.
    dense = ("arch=fc", "model=skip_deq", "data.size=8", "sizes.features=192")
    short = ("data.eval_batch_size=7", "trainer.max_epochs=1", "trainer.accelerator=cpu")
    shared = (*RUN, *dense, *short, f"data.root={root}")
    runs = []
    for chosen in ((), ("trainer=ddp_cpu", "trainer.devices=2", "data.workers=1")):
        before = set(command.folder.rglob("summary.json"))
        answer = command.process(*shared, *chosen)
        assert answer.status == 0, answer.err
        (added,) = set(command.folder.rglob("summary.json")) - before
        runs.append(figures(added.parent))
    alone, together = runs
    assert set(alone) == set(together)
    for name, value in alone.items():
        # Counts are equal; what is averaged was added up in another order, in float32.
        exact = name.endswith("accuracy")
        assert together[name] == pytest.approx(value, rel=0 if exact else 2e-3, abs=1e-7), name
