"""The store of an image set: built once and whole, by whichever process; damage never unnoticed."""

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.synchronize import Event
from pathlib import Path
from unittest.mock import patch

import h5py
import numpy as np
import pytest
import torch

from fastdeq.data import (
    ImageSet,
    MnistDataModule,
    Samples,
    StoredDataModule,
    read_store,
    write_store,
)
from fastdeq.data import published as published_module
from fastdeq.data import store as store_module
from fastdeq.data.mnist import FASHION_MNIST
from fastdeq.data.published import store_folder
from fastdeq.runs import files
from tests.data.idx_files import published, samples, small_mnist, tree, write_files
from tests.data.processes import PATIENCE, die, run_until_killed
from tests.processes import PROCESSES

BUILT = [".mnist.h5.lock", "mnist.h5"]  # what lies in the folder after any successful build


class SmallMnist(StoredDataModule):
    """MNIST, whose official files are those of ``samples()``."""

    source = small_mnist()
    input_shape = (1, 28, 28)
    outputs = 10
    published = MnistDataModule.published


class SmallFashion(SmallMnist):
    source = published(FASHION_MNIST, samples(seed=1))


def stored(folder: Path) -> SmallMnist:
    """The small MNIST, its files in ``folder``/files, its store in ``folder``/store."""
    return SmallMnist(root=folder / "files", store=folder / "store")


@pytest.fixture
def ready(tmp_path: Path) -> SmallMnist:
    """A set whose files are there and whose store is not."""
    write_files(tmp_path / "files", samples())
    return stored(tmp_path)


def build(data: SmallMnist) -> Path:
    """The path of the store, which is there now."""
    data.prepare()
    return Path(str(data.store)) / f"{data.source.name}.h5"


def holds_the_samples(splits: tuple[Samples, Samples]) -> bool:
    found = [x.numpy() for split in splits for x in (split.inputs.squeeze(1), split.targets)]
    return all(map(np.array_equal, found, samples()))


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Built once


def test_a_store_is_built_from_the_files_and_read_from_then_on(ready, tmp_path):
    path = build(ready)
    assert path == tmp_path / "store" / "mnist.h5"
    assert contents(path.parent) == BUILT
    before = path.stat()
    for file in (tmp_path / "files").iterdir():
        file.unlink()
    train, test = splits = ready.load()
    assert holds_the_samples(splits)
    assert train.inputs.dtype == test.inputs.dtype == torch.uint8
    assert train.targets.dtype == test.targets.dtype == torch.int64
    assert path.stat() == before


def test_a_store_that_is_deleted_is_built_again_with_the_same_bytes(ready):
    path = build(ready)
    first = path.read_bytes()
    path.unlink()
    assert build(ready).read_bytes() == first


def test_the_store_says_what_it_is(ready):
    ready.load()
    attributes, info = ready.metadata, ready.source
    for key in ("name", "version", "source", "licence", "split"):
        assert attributes[key] == getattr(info, key)
    checksums = ", ".join(
        f"{file.names[0]} {checksum}"
        for file, checksum in zip(info.files, ready.source.sha256, strict=True)
    )
    assert attributes["source_sha256"] == checksums


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"FASTDEQ_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"FASTDEQ_CACHE": "~/a"}, Path.home() / "a"),
        ({"FASTDEQ_CACHE": "", "XDG_CACHE_HOME": "/b"}, Path("/b/fastdeq")),
        ({}, Path.home() / ".cache/fastdeq"),
    ],
)
def test_the_folder_of_the_store_is_given_or_found_in_the_environment(
    monkeypatch, variables, folder
):
    for name in ("FASTDEQ_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert store_folder(None) == folder
    assert store_folder(Path("given")) == Path("given")


# Broken off


def die_at_the_third_dataset(group: h5py.Group, *arguments: object, **settings: object) -> object:
    if len(group) == 1 and len(group["train"]) == 2:
        group.file.flush()  # so that what was written lies in the file
        die()
    return CREATE_DATASET(group, *arguments, **settings)


CREATE_DATASET = h5py.Group.create_dataset

PLACES: dict[str, tuple[object, str, Callable[..., object]]] = {
    "before the file is opened": (published_module, "write_store", die),
    "in the middle of writing": (h5py.Group, "create_dataset", die_at_the_third_dataset),
    "before the file has its name": (Path, "hardlink_to", die),
}


def build_until_killed(place: str, folder: Path) -> None:
    owner, name, replacement = PLACES[place]
    with patch.object(owner, name, replacement):
        stored(folder).prepare()


def die_after_naming(folder: Path) -> None:
    flush = files.flush
    with patch.object(files, "flush", lambda path: die() if path.is_dir() else flush(path)):
        stored(folder).prepare()


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_killed_build_leaves_no_store_and_the_next_one_cleans_up(ready, tmp_path, place):
    run_until_killed(build_until_killed, place, tmp_path)
    left = contents(tmp_path / "store")
    assert "mnist.h5" not in left
    assert len([name for name in left if name.endswith(".tmp")]) == (place != next(iter(PLACES)))
    assert holds_the_samples(ready.load())
    assert contents(tmp_path / "store") == BUILT


def test_a_build_killed_in_the_middle_leaves_a_file_that_is_refused(ready, tmp_path):
    run_until_killed(build_until_killed, "in the middle of writing", tmp_path)
    (left,) = (tmp_path / "store").glob(".mnist.h5.*.tmp")
    assert left.stat().st_size > 1000  # bytes: it was the middle
    with pytest.raises(ValueError, match="delete it and make it again"):
        read_store(left)


def test_a_build_killed_after_the_store_has_its_name_leaves_it_whole(ready, tmp_path):
    run_until_killed(die_after_naming, tmp_path)
    assert (tmp_path / "store" / "mnist.h5").is_file()
    assert holds_the_samples(ready.load())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (RuntimeError("Can't decrement id ref count\n  (unable to close)"), "unable to close"),
        (KeyboardInterrupt(), None),
    ],
)
def test_a_build_that_fails_leaves_no_file_and_says_what_to_do(ready, tmp_path, error, message):
    with patch.object(h5py.Group, "create_dataset", side_effect=error):
        if message is None:
            with pytest.raises(KeyboardInterrupt):
                build(ready)
        else:
            with pytest.raises(OSError, match=message) as caught:
                build(ready)
            text = str(caught.value)
            assert text.startswith(f"{tmp_path / 'store' / 'mnist.h5'}: cannot be written (")
            assert "data.store=PATH or FASTDEQ_CACHE" in text
            assert "\n" not in text
    assert contents(tmp_path / "store") == [".mnist.h5.lock"]
    assert holds_the_samples(ready.load())


def test_a_folder_that_cannot_be_made_is_named_with_the_cure(ready, tmp_path):
    (tmp_path / "store").write_text("in the way")
    with pytest.raises(OSError, match=r"store/mnist\.h5: cannot be written \(.*data\.store=PATH"):
        build(ready)
    assert (tmp_path / "store").read_text() == "in the way"


# Two at once


def build_and_wait(folder: Path, writing: Event, resume: Event) -> None:
    def slowly(path: Path, images: ImageSet) -> str:
        writing.set()
        assert resume.wait(PATIENCE)
        return write_store(path, images)

    with patch.object(published_module, "write_store", slowly):
        stored(folder).prepare()


def build_second(folder: Path, at_the_lock: Event) -> None:
    def announced(path: Path) -> AbstractContextManager[bool]:
        at_the_lock.set()
        return store_module.building(path)

    with (
        patch.object(published_module, "building", announced),
        patch.object(published_module, "write_store", side_effect=AssertionError("written twice")),
    ):
        assert holds_the_samples(stored(folder).load())


def test_of_two_processes_at_once_one_builds_and_both_have_the_whole_store(ready, tmp_path):
    writing, at_the_lock, resume = (PROCESSES.Event() for _ in range(3))
    first = PROCESSES.Process(target=build_and_wait, args=(tmp_path, writing, resume))
    second = PROCESSES.Process(target=build_second, args=(tmp_path, at_the_lock))
    first.start()
    assert writing.wait(PATIENCE)
    second.start()
    assert at_the_lock.wait(PATIENCE)  # it saw no store, and goes for the lock that first holds
    resume.set()
    for process in (first, second):
        process.join(PATIENCE)
        assert process.exitcode == 0
    assert contents(tmp_path / "store") == BUILT
    assert holds_the_samples(ready.load())


def test_what_another_process_writes_beside_is_left_alone(ready, tmp_path):
    # Another set's unfinished file, in the same folder: its writer may be at work.
    (tmp_path / "store").mkdir()
    other = tmp_path / "store" / ".mnist-0123456789ab.h5.00.tmp"
    other.write_text("half")
    build(ready)
    assert other.read_text() == "half"


# Damaged


def refusal(data: SmallMnist, path: Path) -> str:
    """What reading the store says: one line with the file's name and the cure."""
    with pytest.raises(ValueError, match=r"delete it and it is built again$") as caught:
        data.load()
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text


def test_a_store_truncated_anywhere_is_refused_with_the_cure(ready):
    path = build(ready)
    content = path.read_bytes()
    for kept in [*range(0, len(content), 997), len(content) - 1]:
        path.write_bytes(content[:kept])
        assert "not a readable HDF5 file" in refusal(ready, path), kept


def test_a_flipped_bit_never_changes_what_is_read(ready):
    path = build(ready)
    content, whole = path.read_bytes(), read_store(path)
    noticed, bits = 0, range(0, 8 * len(content), 1009)  # prime: every region and every bit
    for bit in bits:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert holds_the_samples(ready.load()), bit
            assert read_store(path).attributes == whole.attributes, bit
        except ValueError as error:
            noticed += str(error).startswith(f"{path}: ")
    # The rest falls into bytes that the format leaves unused.
    assert noticed > 0.8 * len(bits)


def write_text(path: Path) -> None:
    path.write_text("<!DOCTYPE html>")


def write_other_layout(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["weights"] = np.zeros(3)


def write_group_as_dataset(path: Path) -> None:
    with h5py.File(path, "w") as file:
        for name in store_module.IMAGES:
            file.create_group(name)


def write_without_checksum(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file.attrs["sha256"]


def write_other_label(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["test/labels"][0] = (file["test/labels"][0] + 1) % 10


def test_a_file_that_is_not_the_store_is_refused_with_the_cure(ready):
    for write, message in [
        (write_text, "not a readable HDF5 file"),
        (write_other_layout, "dataset train/images is missing"),
        (write_group_as_dataset, "train/images must be uint8 with 4 axes"),
        (write_without_checksum, "the data do not match their sha256"),
        (write_other_label, "the data do not match their sha256"),
    ]:
        path = build(ready)
        write(path)
        assert message in refusal(ready, path), message
        path.unlink()  # as the message says
        assert holds_the_samples(ready.load()), message


def test_the_store_of_another_set_is_refused_with_the_cure(ready, tmp_path):
    write_files(tmp_path / "fashion", samples(seed=1))
    fashion = SmallFashion(root=tmp_path / "fashion", store=tmp_path / "store")
    path = tmp_path / "store" / "mnist.h5"
    build(fashion).rename(path)
    assert "its name is 'fashion_mnist', not 'mnist'" in refusal(ready, path)


def test_reading_leaves_no_trace_beside_the_store(ready, tmp_path):
    build(ready)
    before = tree(tmp_path)
    ready.load()
    assert tree(tmp_path) == before


# Locks and permissions


@pytest.mark.skipif("HDF5_USE_FILE_LOCKING" in os.environ, reason="HDF5's locks are set outside")
def test_reading_does_not_depend_on_locks(ready):
    # On network file systems without locks HDF5 fails as it does here, where another has the lock.
    path = build(ready)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert holds_the_samples(ready.load())


@pytest.mark.skipif("HDF5_USE_FILE_LOCKING" in os.environ, reason="HDF5's locks are set outside")
def test_a_failing_lock_names_the_variable_that_turns_locks_off(ready, monkeypatch):
    path = build(ready)
    monkeypatch.setattr(store_module, "_LOCKING", True)  # as the environment can decide
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="unable to lock file") as caught:
            ready.load()
    assert str(caught.value).endswith(": set HDF5_USE_FILE_LOCKING=FALSE in the environment")
    assert "\n" not in str(caught.value)


def test_a_store_that_may_not_be_read_is_not_to_be_deleted(ready):
    build(ready)
    denied = PermissionError(errno.EACCES, "Permission denied")
    with (
        patch.object(h5py, "File", side_effect=denied),
        pytest.raises(ValueError, match=r"Permission denied.*ask its owner for the permission"),
    ):
        ready.load()
