"""SVHN: files in MATLAB's format, by hand and by SciPy, what is wrong with them, downloads."""

import hashlib
import zlib
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from scipy.io import savemat

from fastdeq.data import SvhnDataModule, read_cropped_digits
from fastdeq.data.svhn import SVHN
from tests.data.cifar_svhn_files import (
    MAT,
    digits,
    element,
    mat,
    matrix,
    small_svhn,
    svhn_files,
    write_folder,
)
from tests.data.idx_files import mirror
from tests.data.refusals import refusal

X, Y = digits()[0]
WANTED = "get train_32x32.mat and test_32x32.mat of SVHN's format 2 (cropped digits)"


@pytest.fixture(autouse=True)
def _small_set(monkeypatch, tmp_path):
    """The digits play the official set, the user's cache lies aside, and no proxy is used."""
    monkeypatch.setattr(SvhnDataModule, "source", small_svhn())
    monkeypatch.setenv("FASTDEQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


# What is read


@pytest.mark.parametrize("place", [".", "svhn", "SVHN"])
def test_the_files_are_found_and_read_exactly(tmp_path, place):
    write_folder(tmp_path / "root" / place, svhn_files())
    for samples, (pixels, labels) in zip(
        SvhnDataModule(root=tmp_path / "root").load(), digits(), strict=True
    ):
        assert np.array_equal(samples.inputs.numpy(), pixels.transpose(3, 2, 0, 1))
        assert np.array_equal(samples.targets.numpy(), labels[:, 0] % 10)


def test_the_extra_digits_are_added_to_those_for_training_on_request(monkeypatch, tmp_path):
    (more, labels), _ = digits(7)
    content = mat(matrix(b"X", more), matrix(b"y", labels))
    folder = write_folder(tmp_path / "root", {**svhn_files(), "extra_32x32.mat": content})
    source = small_svhn()
    official = (replace(source.extra[0], md5=hashlib.md5(content).hexdigest()),)
    monkeypatch.setattr(SvhnDataModule, "source", replace(source, extra=official))
    data = SvhnDataModule(root=folder, extra=True)
    train, test = data.load()
    both = np.concatenate([X, more], axis=3).transpose(3, 2, 0, 1)
    assert np.array_equal(train.inputs.numpy(), both)
    assert train.targets.tolist() == [*(Y[:, 0] % 10).tolist(), *(labels[:, 0] % 10).tolist()]
    assert len(test) == len(SvhnDataModule(root=folder).load()[1]) == 11
    assert len(SvhnDataModule(root=folder).load()[0]) == 12
    assert data.metadata["split"].endswith("with the extra ones")
    assert sorted(path.name for path in (tmp_path / "cache").glob("*.h5")) == [
        "svhn.h5",
        "svhn_extra.h5",
    ]
    other = write_folder(tmp_path / "other", {"extra_32x32.mat": svhn_files()[MAT[1]]})
    write_folder(other, svhn_files())
    monkeypatch.setenv("FASTDEQ_CACHE", str(tmp_path / "fresh"))
    wrong = SvhnDataModule(root=other, extra=True)
    assert refusal(wrong, other / "extra_32x32.mat").startswith("not the official file of SVHN")
    (other / "extra_32x32.mat").unlink()
    assert refusal(wrong, other).startswith("extra_32x32.mat of SVHN is not there: ")


def test_one_pixel_of_a_file_by_hand_is_where_it_belongs(tmp_path):
    pixels = np.zeros((32, 32, 3, 2), dtype=np.uint8)
    content = bytearray(mat(matrix(b"X", pixels), matrix(b"y", np.array([[10], [3]], np.uint8))))
    # 128 bytes of header, a tag of 8, flags of 16, sizes of 24, the name of 16 and a tag of 8;
    # then row 5, column 7, green, of the second image, rows running fastest.
    content[128 + 8 + 16 + 24 + 16 + 8 + 5 + 32 * (7 + 32 * (1 + 3 * 1))] = 99
    (tmp_path / "by_hand.mat").write_bytes(content)
    images, labels = read_cropped_digits(tmp_path / "by_hand.mat")
    assert images.nonzero().tolist() == [[1, 1, 5, 7]]
    assert images.sum() == 99
    assert labels.tolist() == [0, 3]
    assert labels.dtype == torch.int64


def test_files_by_scipy_are_read(tmp_path):
    for compressed in [True, False]:
        savemat(tmp_path / "a.mat", {"X": X, "y": Y, "more": 1}, do_compression=compressed)
        images, labels = read_cropped_digits(tmp_path / "a.mat")
        assert np.array_equal(images.numpy(), X.transpose(3, 2, 0, 1)), compressed
        assert labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2], compressed


def test_compressed_matrices_by_hand_are_read(tmp_path):
    packed = [zlib.compress(matrix(*pair)) for pair in ((b"X", X), (b"y", Y))]
    tagged = [len(one).to_bytes(4, "little") + one for one in packed]
    (tmp_path / "a.mat").write_bytes(mat(*(b"\x0f\0\0\0" + one for one in tagged)))
    images, _ = read_cropped_digits(tmp_path / "a.mat")
    assert np.array_equal(images.numpy(), X.transpose(3, 2, 0, 1))


def test_batches_are_normalized_as_published(tmp_path):
    write_folder(tmp_path, svhn_files())
    data = SvhnDataModule(root=tmp_path)
    data.setup()
    (batch,) = data.test_dataloader()
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
    std = torch.tensor([0.2023, 0.1994, 0.2010]).view(3, 1, 1)
    pixels = torch.from_numpy(digits()[1][0].transpose(3, 2, 0, 1).copy())
    # The same float32 operations in the same order: no tolerance.
    assert torch.equal(batch.inputs, (pixels.float() / 255.0 - mean) / std)
    assert batch.inputs.shape[1:] == data.input_shape


# What is wrong with the files


def test_a_wrong_file_is_named_in_one_line(tmp_path):
    for content, message in [
        (mat(matrix(b"X", X)), f"has no array y: {WANTED}"),
        (mat(matrix(b"digitStruct", Y)), f"has no array X: {WANTED}"),
        (mat(matrix(b"X", X[:31]), matrix(b"y", Y)), "X must be uint8 (32, 32, 3, N), not uint8 ("),
        (mat(matrix(b"X", Y), matrix(b"y", Y)), "X must be uint8 (32, 32, 3, N), not uint8 (12, "),
        (mat(matrix(b"X", X), matrix(b"y", Y[1:])), "not a label for each image, 12, but (11, 1)"),
        (mat(matrix(b"X", X), matrix(b"y", Y.T)), "not a label for each image, 12, but (1, 12)"),
        (mat(matrix(b"X", X), matrix(b"y", Y - 1)), "label 0 is not one of 1..10"),
        (mat(matrix(b"X", X), matrix(b"y", Y + 1)), "label 11 is not one of 1..10"),
        (mat(matrix(b"X", X), matrix(b"y", Y), version=0x0200), "of MATLAB 7.3, as the full "),
        (mat(matrix(b"X", X), matrix(b"y", Y))[:2000], "not a readable MATLAB 5 file ("),
        (mat(element(15, b"no zlib"), b"") + bytes(9), "not a readable MATLAB 5 file ("),
        (b"<!DOCTYPE html><html>" * 20, "not a readable MATLAB 5 file ("),
        (b"", "not a readable MATLAB 5 file ("),
    ]:
        for name in MAT:
            for verify in [True, False]:
                folder = write_folder(tmp_path / "root", svhn_files() | {name: content})
                assert refusal(
                    SvhnDataModule(root=folder, verify=verify), folder / name
                ).startswith(message), (name, message)


def test_a_real_hdf5_file_is_refused(tmp_path):
    folder = write_folder(tmp_path / "root", svhn_files())
    with h5py.File(folder / MAT[1], "w", userblock_size=512) as file:
        file.create_group("digitStruct")
    with (folder / MAT[1]).open("r+b") as raw:  # MATLAB's header stands before HDF5's
        raw.write(mat(version=0x0200))
    text = refusal(SvhnDataModule(root=folder), folder / MAT[1])
    assert text == f"of MATLAB 7.3, as the full images are: {WANTED}"


@pytest.mark.parametrize("number", [0, 1])
def test_a_file_that_is_not_official_is_named_with_the_cure(tmp_path, number):
    files = svhn_files() | {MAT[number]: svhn_files(1)[MAT[number]]}
    folder = write_folder(tmp_path / "root", files)
    text = refusal(SvhnDataModule(root=folder), folder / MAT[number])
    assert text.startswith("not the official file of SVHN, the MD5 of the file is ")
    assert "data.verify=false" in text
    train, test = SvhnDataModule(root=folder, verify=False).load()
    assert (len(train), len(test)) == (12, 11)


def test_a_missing_file_is_named_with_its_folder(tmp_path):
    for name in MAT:
        place = tmp_path / name
        folder = write_folder(place / "root" / "SVHN", svhn_files())
        (folder / name).unlink()
        text = refusal(SvhnDataModule(root=place / "root"), folder)
        assert text.startswith(f"{name} of SVHN is not there: "), name


def test_the_files_are_downloaded(monkeypatch, tmp_path):
    with mirror(svhn_files()) as (address, requested):
        monkeypatch.setattr(SvhnDataModule, "source", small_svhn(mirrors=[address]))
        train, _ = SvhnDataModule(download=True).load()
    assert len(train) == 12
    assert requested == list(MAT)


def test_every_published_file_has_its_checksum():
    files = [*SVHN.files, *SVHN.extra]
    assert [file.names for file in files] == [(name,) for name in (*MAT, "extra_32x32.mat")]
    assert all(len(bytes.fromhex(file.md5)) == 16 for file in files)
    assert all(address.endswith("/") for address in SVHN.mirrors)
