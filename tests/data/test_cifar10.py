"""CIFAR-10: the archive and the files in it, what is wrong with them, downloads."""

import gzip
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdeq.data import Cifar10DataModule, read_store
from fastdeq.data.cifar import CIFAR10
from tests.data.cifar_svhn_files import (
    ARCHIVE,
    BATCHES,
    CLASSES,
    COUNT,
    FOLDER,
    META,
    archive,
    array,
    batch,
    cifar_files,
    listed,
    meta,
    pickled,
    pictures,
    small_cifar,
    string,
    write_folder,
)
from tests.data.idx_files import mirror, tree
from tests.data.refusals import refusal

OTHER = 1  # seed of pictures that are not the official ones


@pytest.fixture(autouse=True)
def _small_set(monkeypatch, tmp_path):
    """The pictures play the official set, the user's cache lies aside, and no proxy is used."""
    monkeypatch.setattr(Cifar10DataModule, "source", small_cifar())
    monkeypatch.setenv("FASTDEQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def cifar(root: Path | None, **settings) -> Cifar10DataModule:
    return Cifar10DataModule(root=root, **settings)


def write_archive(folder: Path, content: bytes) -> Path:
    return write_folder(folder, {ARCHIVE: content}) / ARCHIVE


def holds_the_pictures(data: Cifar10DataModule, seed: int = 0) -> bool:
    pixels, labels = zip(*pictures(seed), strict=True)
    train, test = data.load()
    return (
        np.array_equal(train.inputs.flatten(1).numpy(), np.concatenate(pixels[:5]))
        and train.targets.tolist() == [label for batch in labels[:5] for label in batch]
        and np.array_equal(test.inputs.flatten(1).numpy(), pixels[5])
        and test.targets.tolist() == labels[5]
    )


# What is read


@pytest.mark.parametrize("place", [".", "cifar10"])
def test_the_archive_is_found_and_read_exactly_without_unpacking_it(tmp_path, place):
    write_archive(tmp_path / "root" / place, archive(cifar_files()))
    before = tree(tmp_path / "root")
    assert holds_the_pictures(cifar(tmp_path / "root"))
    assert tree(tmp_path / "root") == before


@pytest.mark.parametrize("place", [".", FOLDER, "cifar10", f"cifar10/{FOLDER}"])
def test_the_unpacked_files_are_found_and_read_exactly(tmp_path, place):
    write_folder(tmp_path / "root" / place, cifar_files())
    assert holds_the_pictures(cifar(tmp_path / "root"))


def test_the_planes_are_red_green_and_blue_row_by_row(tmp_path):
    write_archive(tmp_path, archive(cifar_files()))
    train, _ = cifar(tmp_path).load()
    pixels, _ = pictures()[0]
    assert train.inputs.shape == (5 * COUNT, 3, 32, 32)
    assert train.inputs[1, 2, 3, 4] == pixels[1, 2 * 1024 + 3 * 32 + 4]


def test_whole_files_come_before_an_archive_that_is_not_there_and_after_one_that_is(tmp_path):
    write_folder(tmp_path / FOLDER, cifar_files(OTHER))
    assert holds_the_pictures(cifar(tmp_path, verify=False), OTHER)
    write_archive(tmp_path, archive(cifar_files()))
    assert holds_the_pictures(cifar(tmp_path))


def test_files_written_by_python_3_are_read(tmp_path):
    files = cifar_files()
    for name, (pixels, labels) in zip(BATCHES, pictures(), strict=True):
        files[name] = pickle.dumps({b"data": pixels, b"labels": labels})
    files[META] = pickle.dumps({"label_names": CLASSES})
    write_folder(tmp_path / "root", files)
    data = cifar(tmp_path / "root", verify=False)
    assert holds_the_pictures(data)
    assert data.metadata["classes"] == ", ".join(CLASSES)
    assert data.metadata["version"] == "not verified"


def test_batches_are_normalized_as_published(tmp_path):
    write_archive(tmp_path, archive(cifar_files()))
    data = cifar(tmp_path, eval_batch_size=COUNT)
    data.setup()
    (found,) = data.test_dataloader()
    pixels = torch.from_numpy(pictures()[5][0].reshape(-1, 3, 32, 32))
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
    std = torch.tensor([0.2023, 0.1994, 0.2010]).view(3, 1, 1)
    # The same float32 operations in the same order: no tolerance.
    assert torch.equal(found.inputs, (pixels.float() / 255.0 - mean) / std)
    assert found.inputs.shape[1:] == data.input_shape


# What is not official


def test_another_archive_is_named_with_the_cure(tmp_path):
    path = write_archive(tmp_path / "root", archive(cifar_files(OTHER)))
    text = refusal(cifar(tmp_path / "root"), str(path))
    assert text.startswith("not the official file of CIFAR-10, the MD5 of the file is ")
    assert "data.verify=false" in text
    assert holds_the_pictures(cifar(tmp_path / "root", verify=False), OTHER)


def test_another_file_is_named_with_the_cure(tmp_path):
    for name in [*BATCHES, META]:
        files = cifar_files() | {name: {**cifar_files(OTHER), META: meta(CLASSES[::-1])}[name]}
        folder = write_folder(tmp_path / "root" / FOLDER, files)
        assert "data.verify=false" in refusal(cifar(tmp_path / "root"), str(folder / name)), name


def test_a_pickle_is_verified_before_it_is_read(tmp_path):
    folder = write_folder(tmp_path / "root", cifar_files() | {"test_batch": b"cos\nsystem\n."})
    place = str(folder / "test_batch")
    assert refusal(cifar(folder), place).startswith("not the official file")
    text = refusal(cifar(folder, verify=False), place)
    assert text == "it asks for os.system, which is not part of such a file: not read"


# What is wrong with the files, official or not

PIXELS, LABELS = pictures()[0]


def test_a_wrong_file_is_named_in_one_line(tmp_path):
    for name, content, message in [
        ("data_batch_2", b"<html>", "not a readable pickle ("),
        ("data_batch_2", b"", "not a readable pickle ("),
        ("data_batch_2", batch(PIXELS, LABELS)[:-50], "not a readable pickle ("),
        ("data_batch_2", pickle.dumps([1]), "not a batch of CIFAR-10, but a list"),
        ("data_batch_2", pickled({b"labels": listed([])}), "has no images: its 'data' must be"),
        (
            "test_batch",
            pickled({b"data": array(PIXELS)}),
            "not a label for each image, 4, but none",
        ),
        ("test_batch", batch(PIXELS[:, :1024], LABELS), "not images of 3072 values, but (4, 1024)"),
        ("test_batch", batch(PIXELS, LABELS[:3]), "not a label for each image, 4, but 3"),
        ("test_batch", batch(PIXELS, [0, 1, 2, 10]), "label 10 is not one of 0..9"),
        ("test_batch", batch(PIXELS[:0], []), "has no images"),
        (META, meta(CLASSES[:9]), "not 10 label_names, but 9"),
        (META, pickled({b"num_vis": string(b"3072")}), "has no list of 'label_names'"),
    ]:
        for packed in [True, False]:
            files = cifar_files() | {name: content}
            root = tmp_path / f"{packed}"
            if packed:
                place = f"{write_archive(root, archive(files))}: {FOLDER}/{name}"
            else:
                place = str(write_folder(root, files) / name)
            assert refusal(cifar(root, verify=False), place).startswith(message), (name, message)


def test_a_member_that_is_missing_is_named_with_its_archive(tmp_path):
    for name in [*BATCHES, META]:
        files = {key: content for key, content in cifar_files().items() if key != name}
        path = write_archive(tmp_path / "root", archive(files))
        text = refusal(cifar(tmp_path / "root", verify=False), str(path))
        assert text == f"{FOLDER}/{name} is not in this archive: get it again", name


def test_a_truncated_archive_is_named(tmp_path):
    for share in [0.0, 0.001, 0.3, 0.8]:
        for plain in [True, False]:
            content = archive(cifar_files())
            content = gzip.decompress(content) if plain else content
            path = write_archive(tmp_path / "root", content[: int(share * len(content))])
            refusal(cifar(tmp_path / "root", verify=False), str(path))


def test_an_archive_of_something_else_is_named(tmp_path):
    path = write_archive(tmp_path / "root", b"<html>no such page</html>")
    assert "damaged archive" in refusal(cifar(tmp_path / "root", verify=False), str(path))
    path.write_bytes(archive(cifar_files(), folder="../cifar-10-batches-py"))
    assert "is not in this archive" in refusal(cifar(tmp_path / "root", verify=False), str(path))


def test_a_member_that_is_a_link_is_not_followed(tmp_path):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        link = tarfile.TarInfo(f"{FOLDER}/data_batch_1")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    path = write_archive(tmp_path / "root", content.getvalue())
    text = refusal(cifar(tmp_path / "root", verify=False), str(path))
    assert text.startswith(f"{FOLDER}/data_batch_1 is not in this archive")


def test_a_file_that_is_missing_is_named_with_its_folder(tmp_path):
    for name in [*BATCHES, META]:
        folder = write_folder(tmp_path / "root" / FOLDER, cifar_files())
        (folder / name).unlink()
        text = refusal(cifar(tmp_path / "root"), str(folder))
        assert text.startswith(f"{name} of CIFAR-10 is not there: "), name


def test_in_an_empty_root_the_archive_is_missed(tmp_path):
    (tmp_path / "root").mkdir()
    text = refusal(cifar(tmp_path / "root"), str(tmp_path / "root"))
    assert text.startswith(f"{ARCHIVE} of CIFAR-10 is not there: ")


# Downloads


@pytest.mark.parametrize("partial", [True, False])
def test_the_archive_is_downloaded_also_where_unpacked_files_are_incomplete(
    monkeypatch, tmp_path, partial
):
    root = tmp_path / "root"
    root.mkdir()
    if partial:
        files = cifar_files()
        del files["data_batch_3"]
        write_folder(root / FOLDER, files)
    with mirror({ARCHIVE: archive(cifar_files())}) as (address, requested):
        monkeypatch.setattr(Cifar10DataModule, "source", small_cifar(mirrors=[address]))
        assert holds_the_pictures(cifar(root, download=True))
        assert holds_the_pictures(cifar(root, download=True))
    assert requested == [ARCHIVE]
    assert (root / "cifar10" / ARCHIVE).is_file()


def test_unpacked_files_that_are_whole_are_not_downloaded(monkeypatch, tmp_path):
    write_folder(tmp_path / "root", cifar_files())
    with mirror({}) as (address, requested):
        monkeypatch.setattr(Cifar10DataModule, "source", small_cifar(mirrors=[address]))
        assert holds_the_pictures(cifar(tmp_path / "root", download=True))
    assert not requested


# The published set itself


def test_every_published_file_has_its_checksum():
    files = [*CIFAR10.files, *CIFAR10.others[0]]
    assert [file.names[0] for file in files] == [ARCHIVE, *BATCHES, META]
    assert len({file.md5 for file in files}) == len(files)
    assert all(len(bytes.fromhex(file.md5)) == 16 for file in files)
    assert len(CIFAR10.mirrors) >= 2
    assert all(address.endswith("/") for address in CIFAR10.mirrors)


def _has_cifar() -> bool:
    root = Path(os.environ.get("FASTDEQ_DATA") or "/nowhere")
    folder, form = CIFAR10.find(root, *CIFAR10.forms)
    return all(file.find(folder) for file in form)


@pytest.mark.slow
@pytest.mark.skipif(not _has_cifar(), reason="no CIFAR-10 in FASTDEQ_DATA")
def test_the_real_cifar10_has_the_published_size_and_mean(monkeypatch, tmp_path):
    monkeypatch.setattr(Cifar10DataModule, "source", CIFAR10)
    data = cifar(Path(os.environ["FASTDEQ_DATA"]), store=tmp_path, verify=False)
    data.load()
    images = read_store(data.metadata["file"])
    assert images.train_images.shape == (50_000, 3, 32, 32)
    assert images.test_images.shape == (10_000, 3, 32, 32)
    assert images.train_labels.bincount().tolist() == [5000] * 10
    assert images.test_labels.bincount().tolist() == [1000] * 10
    means = images.train_images.double().mean((0, 2, 3)) / 255
    # Published with four decimals
    assert means.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-5)
