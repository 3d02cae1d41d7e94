"""Image folders: what is read, built, verified and trained on."""

import errno
import json
import multiprocessing
import os
import shutil
import tracemalloc
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
import torch.distributed as dist

pytest.importorskip("PIL")

import h5py

from fastdeq.data import ImageFolderDataModule
from fastdeq.data.command import main
from fastdeq.data.decode import CentralCrop, decode, to_tensor
from fastdeq.data.folders import list_folder
from fastdeq.data.module import hold_out
from fastdeq.data.records import FolderSplit, ImageFolder, read_records, write_records
from fastdeq.data.store import CURE
from tests.commands import a_run
from tests.data.image_folders import (
    RUN,
    SAMPLES,
    SIDE,
    SIZE,
    TRAIN,
    VAL,
    folder,
    images,
    inputs,
    jpeg,
    noise,
    pixels_of,
    png,
    ready,
    refusal,
    stores,
    write_images,
)
from tests.data.processes import die, run_until_killed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache_aside")]


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
    assert data.metadata["classes"] == "cat, dog, eel"
    assert data.metadata["checked"] == "headers"


def test_a_folder_that_changed_has_another_store(root, tmp_path):
    folder(root).prepare_data()
    for count, change in enumerate(
        (
            lambda: (root / "val/cat/new.png").write_bytes(png(noise(1))),
            lambda: (root / "train/dog/0.png").write_bytes(png(noise(1, 41))),
            lambda: (root / "train/dog/0.png").rename(root / "train/dog/00.png"),
            lambda: (root / "train/dog/00.png").unlink(),
            lambda: [(root / s / "eel").rename(root / s / "ape") for s in ("train", "val")],
        ),
        start=2,
    ):
        change()
        folder(root).prepare_data()
        assert len(stores(tmp_path)) == count


def rewritten(path: Path) -> bytes:
    """Another image of the same size in bytes, written over the first cat's."""
    content = png(noise(1, *np.asarray(decode(path.read_bytes())).shape[:2]))
    assert len(content) == path.stat().st_size
    path.write_bytes(content)
    return content


@pytest.mark.parametrize("times", ["new", "mtime kept", "all mtimes equal"])
def test_a_file_that_changed_and_kept_its_size_is_stored_anew(root, tmp_path, times):
    if times == "all mtimes equal":  # as archives with fixed times are unpacked
        for path in root.rglob("*.*"):
            os.utime(path, ns=(0, 0))
    before, _ = folder(root).load()
    path = root / "train/cat/0.png"
    old, status = path.read_bytes(), path.stat()
    new = rewritten(path)
    if times != "new":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after, _ = folder(root).load()
    assert len(stores(tmp_path)) == 2
    assert (before.read(0), after.read(0)) == (old, new)
    for records in (before, after):
        records.close()


def test_two_files_that_were_exchanged_are_stored_anew(root, tmp_path):
    first, second = root / "train/cat/0.png", root / "train/cat/2.png"
    second.write_bytes(png(noise(1, SIDE, SIDE)))
    assert first.stat().st_size == second.stat().st_size
    folder(root).prepare_data()
    first.rename(root / "aside")
    second.rename(first)
    (root / "aside").rename(second)
    train, _ = folder(root).load()
    assert train.read(0) == png(noise(1, SIDE, SIDE))
    train.close()


def touch(root: Path) -> None:
    for path in root.rglob("*.*"):
        os.utime(path)


def copy_back(root: Path) -> None:
    """As rsync -a does: mtimes are kept, ctimes are new."""
    shutil.copytree(root, root.with_name("copy"))
    shutil.rmtree(root)
    shutil.copytree(root.with_name("copy"), root)


@pytest.mark.parametrize("change", [touch, copy_back])
def test_where_only_times_differ_the_store_is_compared_and_used_again(root, tmp_path, change):
    expected = everything(folder(root))
    (first,) = stores(tmp_path)
    change(root)
    built_anew = patch("fastdeq.data.image_folder.write_records", side_effect=AssertionError)
    with built_anew:
        assert everything(folder(root)) == expected
        with patch.object(FolderSplit, "read", side_effect=AssertionError("compared again")):
            folder(root).prepare_data()
    assert len(stores(tmp_path)) == 2
    assert all(path.samefile(first) for path in stores(tmp_path))  # takes no more of the disk


def test_a_store_of_an_earlier_version_is_compared_before_it_is_used(root, tmp_path):
    folder(root).prepare_data()
    (path,) = stores(tmp_path)
    old = path.rename(path.with_stem(path.stem.rpartition("-")[0]))
    folder(root).prepare_data()
    assert path.samefile(old)
    path.unlink()
    content = rewritten(root / "train/cat/0.png")
    train, _ = folder(root).load()
    assert train.read(0) == content
    train.close()


def test_a_store_that_is_damaged_or_not_verified_is_not_used_again(root, tmp_path):
    folder(root).prepare_data()
    (first,) = stores(tmp_path)
    touch(root)
    folder(root, verify=True).load()  # and not refused for its images that were not decoded
    (second,) = set(stores(tmp_path)) - {first}
    assert not second.samefile(first)
    for path in (first, second):
        damage_an_image(path)
    touch(root)
    assert everything(folder(root))
    (third,) = set(stores(tmp_path)) - {first, second}
    assert not third.samefile(first)
    assert not third.samefile(second)


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
        times=np.zeros((count, 2), np.int64),
        labels=np.zeros(count, np.int64),
        read=lambda number: bytes([number]) * size,
    )
    listed = ImageFolder(root=tmp_path, classes=["a"], splits={"train": split, "val": split})
    said = dict.fromkeys(("name", "version", "source", "licence", "split"), "x")
    tracemalloc.start()
    try:
        write_records(tmp_path / "x.h5", listed, said, check=lambda _: None)
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


def test_a_file_that_is_not_the_store_is_refused_with_the_cure(root, tmp_path):
    for write, message in [
        (lambda path: path.write_text("<html>"), "not a readable HDF5 file"),
        (write_other_layout, "dataset train/offsets is missing"),
        (write_other_type, "train/crc32 must be <u4 with 1 axes, not float64"),
        (write_other_label, "the data do not match their sha256"),
        (write_other_version, "its version is '0', not '1'"),
    ]:
        folder(root).prepare_data()
        (path,) = stores(tmp_path)
        write(path)
        assert message in (text := refusal(folder(root), path)), message
        assert text.endswith(CURE), message
        path.unlink()


# On the command line


def test_the_command_prepares_and_shows_a_folder(root, capsys, tmp_path):
    assert main(["image_folder", f"--root={root}", "--size=32", "--classes=3"]) == 0
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
    assert main(["image_folder", f"--root={root}"]) == 0
    shown = {line[:14].strip(): line[14:] for line in capsys.readouterr().out.splitlines()}
    assert shown["per class"] == "1 to 2, in 30 classes"
    assert shown["classes"] == "00, 01, 02, 03, 04, 05, 06, 07, 08, 09 and 20 more"


def metrics(run: Path) -> dict[str, float]:
    found = json.loads((run / "summary.json").read_text())["metrics"]
    return {name: value for name, value in found.items() if "seconds" not in name}


@pytest.mark.slow
def test_a_run_has_the_same_metrics_whoever_decodes(root, command):
    alone, helped = (
        a_run(command, *RUN, f"data.root={root}", w) for w in ("seed=0", "data.workers=2")
    )
    assert metrics(alone) == metrics(helped)
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_one_and_two_processes_have_the_same_metrics(root, command):
    # No batch statistics: of these, each process would have its part's.
    dense = ("arch=fc", "model=skip_deq", "data.size=8", "sizes.features=192")
    short = ("data.eval_batch_size=7", "trainer.max_epochs=1", "trainer.accelerator=cpu")
    shared = (*RUN, *dense, *short, f"data.root={root}")
    runs = []
    for chosen in ((), ("trainer=ddp_cpu", "trainer.devices=2", "data.workers=1")):
        before = set(command.folder.rglob("summary.json"))
        answer = command(*shared, *chosen)
        assert answer.status == 0, answer.err
        (added,) = set(command.folder.rglob("summary.json")) - before
        runs.append(metrics(added.parent))
    alone, together = runs
    assert set(alone) == set(together)
    for name, value in alone.items():
        # Counts are equal; what is averaged was added up in another order, in float32.
        exact = name.endswith("accuracy")
        if name.endswith("spectral_radius"):  # of the samples of the first process
            continue
        assert together[name] == pytest.approx(value, rel=0 if exact else 2e-3, abs=1e-7), name
