"""KMNIST, QMNIST and EMNIST: what differs from MNIST's files, and what is wrong with them."""

import hashlib
import io
import string
import struct
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastdeq.data import (
    EmnistDataModule,
    KmnistDataModule,
    QmnistDataModule,
    read_idx,
)
from fastdeq.data.mnist import EMNIST, KMNIST, QMNIST
from tests.commands import SHORT, CommandLine, a_run
from tests.data.idx_files import TEST, TRAIN, idx, mirror, published, samples, write_files, zipped
from tests.data.refusals import refusal

SPLITS = {"balanced": 47, "byclass": 62, "bymerge": 47, "digits": 10, "letters": 26, "mnist": 10}
STEMS = ("train-images-idx3", "train-labels-idx1", "test-images-idx3", "test-labels-idx1")


@pytest.fixture(autouse=True)
def _cache_aside(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTDEQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


# KMNIST


def test_kmnist_is_read_from_its_own_folder_beside_mnists_files_of_the_same_names(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(KmnistDataModule, "source", published(KMNIST, samples(3)))
    write_files(tmp_path / "MNIST" / "raw", samples())
    write_files(tmp_path / "KMNIST" / "raw", samples(3))
    train, test = KmnistDataModule(root=tmp_path).load()
    assert np.array_equal(train.inputs[:, 0].numpy(), samples(3)[0])
    assert test.targets.tolist() == samples(3)[3].tolist()


# QMNIST


def int32(values: NDArray[Any]) -> bytes:
    """IDX of type 0x0c: big-endian."""
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 0x0C, values.ndim, *values.shape)
    return header + values.astype(">i4").tobytes()


def qmnist_files(columns: int = 8) -> dict[str, bytes]:
    """Of MNIST's small samples, whose labels become the first column."""
    contents = []
    for array in samples():
        if array.ndim == 1:
            rows = np.full((len(array), columns), 70_000) + np.arange(columns)
            rows[:, 0] = array
            contents.append(zipped(int32(rows)))
        else:
            contents.append(zipped(idx(array)))
    return {file.names[0]: one for file, one in zip(QMNIST.files, contents, strict=True)}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_idx_files_of_int32_are_read(tmp_path):
    values = np.array([[0, 1, -1], [255, 70_000, -(2**31)]])
    (tmp_path / "a").write_bytes(int32(values))
    found = read_idx(tmp_path / "a").values
    assert found.tolist() == values.tolist()
    assert found.dtype == np.int32
    (tmp_path / "a").write_bytes(int32(values)[:-1])
    with pytest.raises(ValueError, match="header says 2 × 3 × 4 = 24 bytes of data, found 23"):
        read_idx(tmp_path / "a")


def test_qmnists_labels_are_the_first_of_eight_columns(monkeypatch, tmp_path):
    files = qmnist_files()
    md5 = [hashlib.md5(content).hexdigest() for content in files.values()]
    official = tuple(replace(one, md5=m) for one, m in zip(QMNIST.files, md5, strict=True))
    monkeypatch.setattr(QmnistDataModule, "source", replace(QMNIST, files=official))
    write(tmp_path / "QMNIST" / "raw", files)
    train, test = QmnistDataModule(root=tmp_path).load()
    assert (len(train), len(test)) == (TRAIN, TEST)
    assert train.targets.tolist() == samples()[1].tolist()
    assert np.array_equal(test.inputs[:, 0].numpy(), samples()[2])
    folder = write(tmp_path / "other", qmnist_files(7))
    text = refusal(QmnistDataModule(root=folder, verify=False), folder / QMNIST.files[1].names[0])
    assert text == "not a label for each image, 30, but (30, 7)"


# EMNIST


def emnist_files(split: str) -> dict[str, bytes]:
    """The four files, of 70 and 65 images stored transposed; letters count from 1."""
    random, contents = np.random.default_rng(0), []
    for count in (70, 65):
        upright = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        contents.append(idx(np.ascontiguousarray(upright.transpose(0, 2, 1))))
        contents.append(idx((classes(split, count) + (split == "letters")).astype(np.uint8)))
    names = [f"emnist-{split}-{stem}-ubyte.gz" for stem in STEMS]
    return {name: zipped(one) for name, one in zip(names, contents, strict=True)}


def classes(split: str, count: int) -> NDArray[Any]:
    return np.arange(count) % SPLITS[split]


def archived(*splits: str) -> bytes:
    into = io.BytesIO()
    with zipfile.ZipFile(into, "w") as archive:
        for split in splits:
            for name, content in emnist_files(split).items():
                archive.writestr(zipfile.ZipInfo(f"gzip/{name}"), content)
    return into.getvalue()


def emnist(root: Path, split: str, **settings: Any) -> EmnistDataModule:
    return EmnistDataModule(root=root, split=split, **settings)  # type: ignore[arg-type]


def test_every_split_of_emnist_is_read_upright_with_labels_from_0(monkeypatch, tmp_path):
    content = archived(*SPLITS)
    zipped_up = (replace(EMNIST.files[0], md5=hashlib.md5(content).hexdigest()),)
    monkeypatch.setattr(EmnistDataModule, "source", replace(EMNIST, files=zipped_up))
    write(tmp_path / "root" / "emnist", {"gzip.zip": content})
    for split, count in SPLITS.items():
        write(unpacked := tmp_path / split / "EMNIST" / "raw", emnist_files(split))
        for data in (
            emnist(tmp_path / "root", split),
            emnist(unpacked.parents[1], split, verify=False),
        ):
            train, test = data.load()
            first = np.random.default_rng(0).integers(0, 256, (70, 28, 28), dtype=np.uint8)
            assert np.array_equal(train.inputs[:, 0].numpy(), first), split
            assert train.targets.tolist() == classes(split, 70).tolist(), split
            assert test.targets.tolist() == classes(split, 65).tolist(), split
            assert data.outputs == count, split
        assert data.metadata["classes"].count(", ") == count - 1
    stores = {path.name for path in (tmp_path / "cache").glob("*.h5")}
    assert {f"emnist_{split}.h5" for split in SPLITS} < stores


def test_the_names_of_emnists_classes_are_those_of_its_mapping(tmp_path):
    # The first, a merged and the last ones, as the mapping files of the publication have them
    for split, names in [
        ("byclass", {0: "0", 10: "A", 35: "Z", 36: "a", 61: "z"}),
        ("balanced", {10: "A", 35: "Z", 36: "a", 37: "b", 38: "d", 43: "n", 46: "t"}),
        ("letters", {0: "A", 25: "Z"}),
        ("digits", dict(enumerate(string.digits))),
    ]:
        characters = emnist(tmp_path, split).chosen().characters  # type: ignore[attr-defined]
        assert {label: characters[label] for label in names} == names, split


def test_emnist_is_downloaded_once_for_all_splits(monkeypatch, tmp_path):
    content = archived("letters", "digits")
    official = (replace(EMNIST.files[0], md5=hashlib.md5(content).hexdigest()),)
    root = tmp_path / "root"
    root.mkdir()
    assert refusal(emnist(root, "digits"), root).startswith("gzip.zip of EMNIST is not there: ")
    with mirror({"gzip.zip": content}) as (address, requested):
        source = replace(EMNIST, files=official, mirrors=(address,))
        monkeypatch.setattr(EmnistDataModule, "source", source)
        for split in ("letters", "digits"):
            assert len(emnist(root, split, download=True).load()[0]) == 70
    assert requested == ["gzip.zip"]
    assert (root / "emnist" / "gzip.zip").is_file()


def test_one_pixel_of_emnist_is_where_it_belongs(tmp_path):
    files = emnist_files("mnist")
    pixels = np.zeros((2, 28, 28), np.uint8)
    content = bytearray(idx(pixels))
    content[16 + 28 * 5 + 3] = 99  # the fourth value of the sixth column of the first image
    name, labels = list(files)[:2]
    files |= {name: zipped(bytes(content)), labels: zipped(idx(np.array([4, 2], np.uint8)))}
    train, _ = emnist(write(tmp_path, files), "mnist", verify=False).load()
    assert train.inputs.nonzero().tolist() == [[0, 0, 3, 5]]


def test_what_is_wrong_with_emnists_files_is_one_line_with_the_cure(tmp_path):
    root, files = tmp_path / "root", emnist_files("letters")
    write(root / "gzip", files)
    first, second, *_ = files
    for change, message in [
        (
            {},
            "cannot be verified, for of EMNIST only the checksums of the archives are published: ",
        ),
        ({first: b"", "verify": b"no"}, "not an IDX file: it begins with nothing"),
        ({first: files[first][:-9], "verify": b"no"}, "damaged gzip file"),
    ]:
        verify = not change.pop("verify", b"")
        write(root / "gzip", change)
        assert refusal(emnist(root, "letters", verify=verify), root / "gzip" / first).startswith(
            message
        ), message
    write(root / "gzip", files | {second: zipped(idx(np.arange(70, dtype=np.uint8) % 26))})
    text = refusal(emnist(root, "letters", verify=False), root / "gzip" / second)
    assert text == "label 0 is not one of 1..26"
    (root / "gzip" / second).unlink()
    text = refusal(emnist(root, "letters", verify=False), root / "gzip")
    assert text.startswith(f"{second} of EMNIST is not there: give the folder that has it")


def test_what_is_wrong_with_emnists_archive_is_one_line_with_the_cure(tmp_path):
    place = tmp_path / "gzip.zip"
    for content, verify, message in [
        (archived("digits"), True, "not the official file of EMNIST, the MD5 of the file is "),
        (archived("digits")[:-30], False, "damaged archive (File is not a zip file): get it again"),
        (b"<html>", False, "damaged archive (File is not a zip file): get it again"),
        (
            archived("digits"),
            False,
            "gzip/emnist-letters-train-images-idx3-ubyte.gz is not in this archive: get it again",
        ),
    ]:
        place.write_bytes(content)
        assert refusal(emnist(tmp_path, "letters", verify=verify), place).startswith(message)
    damaged = bytearray(archived("letters"))
    damaged[5000] ^= 1  # within the first images
    place.write_bytes(damaged)
    assert "damaged archive (Bad CRC-32" in refusal(
        emnist(tmp_path, "letters", verify=False), place
    )


def test_a_run_takes_the_number_of_classes_from_the_split(command: CommandLine, tmp_path):
    write(tmp_path / "root" / "gzip", emnist_files("letters"))
    words = ("data=emnist", f"data.root={tmp_path / 'root'}", "data.verify=false")
    run = a_run(command, *words, "data.split=letters", "trainer=one_batch")
    assert "outputs: 26\n" in (run / "config.yaml").read_text()
    answer = command(*SHORT, *words, "data.split=letter")
    assert answer.err.startswith("error: data.split is 'letter', but must be one of 'balanced', ")
    assert answer.err.count("\n") == 1


def test_the_published_checksums_and_addresses_are_there():
    for source, count in [(KMNIST, 4), (QMNIST, 4), (EMNIST, 1)]:
        assert len({file.md5 for file in source.files}) == count
        assert all(len(bytes.fromhex(file.md5)) == 16 for file in source.files)
        assert all(address.endswith("/") for address in source.mirrors)
