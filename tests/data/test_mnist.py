"""MNIST and Fashion-MNIST: files in the official format, and what is wrong with them."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdeq.data import (
    FashionMnistDataModule,
    MnistDataModule,
    StoredDataModule,
    read_store,
    write_store,
)
from fastdeq.data.mnist import FASHION_MNIST, MNIST
from tests.data.idx_files import (
    TEST,
    TRAIN,
    idx,
    labels,
    loaded,
    names,
    published,
    samples,
    small_mnist,
    tree,
    write_files,
    zipped,
)

FASHION = 1  # seed of the samples that play Fashion-MNIST
NAMES = names()


@pytest.fixture(autouse=True)
def _small_sets(monkeypatch, tmp_path):
    """The samples play the official sets, the user's cache lies aside, and no proxy is used."""
    monkeypatch.setattr(MnistDataModule, "source", small_mnist())
    monkeypatch.setattr(
        FashionMnistDataModule, "source", published(FASHION_MNIST, samples(FASHION))
    )
    monkeypatch.setenv("FASTDEQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def mnist(root: Path | None, **settings) -> MnistDataModule:
    return MnistDataModule(root=root, **settings)


def refusal(data: StoredDataModule, path: Path, error: type[Exception] = ValueError) -> str:
    """What preparing the set says: one line that begins with the path; and nothing is left."""
    before = tree(path.parent)
    cache = Path(os.environ["FASTDEQ_CACHE"])
    for ask in (data.prepare_data, data.setup, data.load):
        with pytest.raises(error) as caught:  # the text is what the callers look at
            ask()
        text = str(caught.value)
        assert text.startswith(f"{path}: ")
        assert "\n" not in text
    assert not cache.exists()
    assert tree(path.parent) == before
    return text.removeprefix(f"{path}: ")


# What is read


def test_files_are_found_under_every_name_and_read_exactly(tmp_path):
    for place in [".", "mnist", "MNIST/raw"]:
        for dot in "-.":
            for compressed in [True, False]:
                folder = tmp_path / f"{place}{dot}{compressed}"
                write_files(folder / "root" / place, samples(), dot=dot, compressed=compressed)
                train, test = mnist(folder / "root").load()
                arrays = samples()
                assert np.array_equal(train.inputs[:, 0].numpy(), arrays[0]), (place, dot)
                assert np.array_equal(train.targets.numpy(), arrays[1]), (place, dot)
                assert np.array_equal(test.inputs[:, 0].numpy(), arrays[2]), (place, dot)
                assert np.array_equal(test.targets.numpy(), arrays[3]), (place, dot)


def test_names_may_be_mixed_within_a_folder(tmp_path):
    plain, compressed = names(dot=".", compressed=False), names()
    for number, array in enumerate(samples()):
        content = idx(array)
        if number % 2:
            (tmp_path / plain[number]).write_bytes(content)
        else:
            (tmp_path / compressed[number]).write_bytes(zipped(content))
    assert labels(loaded(mnist(tmp_path))) == samples()[3].tolist()


def test_two_sets_with_the_same_file_names_share_a_data_folder(tmp_path):
    write_files(tmp_path / "MNIST" / "raw", samples())
    write_files(tmp_path / "FashionMNIST" / "raw", samples(FASHION))
    assert labels(loaded(mnist(tmp_path))) == samples()[3].tolist()
    fashion = FashionMnistDataModule(root=tmp_path)
    assert labels(loaded(fashion)) == samples(FASHION)[3].tolist()


def test_a_file_compressed_anew_is_the_official_one_for_mnist(tmp_path):
    for path, array in zip(write_files(tmp_path, samples()), samples(), strict=True):
        # The same content at another time, as the header says: another MD5
        path.write_bytes(zipped(idx(array))[:4] + b"time" + zipped(idx(array))[8:])
    loaded(mnist(tmp_path))


def test_batches_are_normalized_images_with_integer_labels(tmp_path):
    write_files(tmp_path, samples())
    data = loaded(mnist(tmp_path, batch_size=8, eval_batch_size=TEST))
    (batch,) = data.test_dataloader()
    pixels = torch.from_numpy(samples()[2]).unsqueeze(1)
    # The same float32 operations in the same order: no tolerance.
    mean, std = torch.tensor(0.1307), torch.tensor(0.3081)
    assert torch.equal(batch.inputs, (pixels.float() / 255.0 - mean) / std)
    assert batch.inputs.shape[1:] == data.input_shape
    assert batch.targets.dtype == torch.int64
    assert sum(len(batch.targets) for batch in data.train_dataloader()) == TRAIN


def test_a_hold_out_is_taken_from_the_training_images(tmp_path):
    write_files(tmp_path, samples())
    data = loaded(mnist(tmp_path, validation=10))
    assert sum(len(batch.targets) for batch in data.val_dataloader()) == 10
    assert sum(len(batch.targets) for batch in data.train_dataloader()) == TRAIN - 10


def test_what_was_loaded_is_reported(tmp_path):
    write_files(tmp_path, samples())
    data = loaded(mnist(tmp_path, store=tmp_path / "store"))
    assert data.metadata["file"] == str(tmp_path / "store" / "mnist.h5")
    assert data.metadata["licence"] == MNIST.licence
    assert data.metadata["source_sha256"].split(", ")[0] == f"{NAMES[0]} {small_mnist().sha256[0]}"


# What is wrong with the files


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def of_fashion(number: int) -> bytes:
    return idx(samples(FASHION)[number])


def test_a_wrong_file_is_named_in_one_line_and_leaves_nothing(tmp_path):
    for number in range(4):
        for change, message in [
            (lambda content, _: content[:-1], "truncated: its header says"),
            (lambda content, _: content[:3], "not an IDX file"),
            (lambda content, _: flip(content), "not the official file of MNIST, the SHA-256"),
            (lambda _, number: of_fashion(number), "not the official file of MNIST, the SHA-256"),
            (lambda content, _: content + b"\0", "bytes are left over"),
            (lambda content, _: b"\0\0\x0d" + content[3:], "IDX type 0x0d is not supported"),
            (lambda *_: b"<!DOCTYPE html>", "not an IDX file: it begins with 3c 21 44 4f"),
            (lambda content, _: zipped(content)[:-1], "damaged gzip file"),
            (lambda content, _: flip(zipped(content)), "damaged gzip file"),
            (lambda content, _: zipped(flip(content)), "not the official file of MNIST"),
        ]:
            path = write_files(tmp_path / "root", samples(), compressed=False)[number]
            path.write_bytes(change(path.read_bytes(), number))
            assert message in refusal(mnist(tmp_path / "root"), path), (number, message)


def test_the_whole_of_fashion_mnist_is_not_taken_for_mnist(tmp_path):
    path = write_files(tmp_path / "root", samples(FASHION))[0]
    text = refusal(mnist(tmp_path / "root"), path)
    assert "not the official file of MNIST" in text
    assert "data.verify=false" in text


LOOKALIKES = {
    "MNIST": samples(),
    "KMNIST": samples(2),
    "EMNIST": [a.swapaxes(1, -1) if a.ndim == 3 else a for a in samples()],  # transposed
    "EMNIST's Fashion": [a.swapaxes(1, -1) if a.ndim == 3 else a for a in samples(FASHION)],
}
"""Sets of the same file names, sizes and class counts as Fashion-MNIST."""


def test_a_set_that_looks_like_fashion_mnist_is_not_taken_for_it(monkeypatch, tmp_path):
    """torchvision 406: one MNIST-like set taken for another; 8783: EMNIST is transposed."""
    for lookalike in LOOKALIKES:
        for compressed in [True, False]:
            root, cache = (tmp_path / f"{lookalike} {compressed} {name}" for name in "ab")
            monkeypatch.setenv("FASTDEQ_CACHE", str(cache))
            path = write_files(root, LOOKALIKES[lookalike], compressed=compressed)[0]
            text = refusal(FashionMnistDataModule(root=root), path)
            message = "not the official file of" if compressed else "cannot be verified, for of"
            assert text.startswith(f"{message} Fashion-MNIST")
            assert text.endswith("or take your own files as they are with data.verify=false")
            loaded(FashionMnistDataModule(root=root, verify=False))  # has a store of its own:
            assert not (cache / "fashion_mnist.h5").exists()
            with pytest.raises(FileNotFoundError, match="Fashion-MNIST is not here yet"):
                FashionMnistDataModule().prepare_data()


def test_a_transposed_set_is_not_taken_for_mnist(tmp_path):
    path = write_files(tmp_path / "root", LOOKALIKES["EMNIST"], compressed=False)[0]
    assert "not the official file of MNIST, the SHA-256" in refusal(mnist(tmp_path / "root"), path)


def test_compressed_fashion_mnist_is_verified_by_its_published_md5(tmp_path):
    paths = write_files(tmp_path / "root", samples(FASHION))
    paths[2].write_bytes(zipped(flip(of_fashion(2))))
    text = refusal(FashionMnistDataModule(root=tmp_path / "root"), paths[2])
    assert "not the official file of Fashion-MNIST, the MD5 of the file is" in text


def test_an_unpacked_file_of_fashion_mnist_is_refused_with_the_cure(tmp_path):
    for number in range(4):
        folder = tmp_path / str(number)
        path = write_files(folder / "root", samples(FASHION))[number]
        path.unlink()
        path = path.with_suffix("")
        path.write_bytes(of_fashion(number))
        assert refusal(FashionMnistDataModule(root=folder / "root"), path) == (
            "cannot be verified, for of Fashion-MNIST only the checksums of the .gz files are "
            f"published: give the official {NAMES[number]} instead, or take your own files as they "
            "are with data.verify=false"
        )


@pytest.mark.parametrize(
    ("module", "compressed", "seed"),
    [(FashionMnistDataModule, False, FASHION), (MnistDataModule, True, 2)],
)
def test_a_store_of_files_that_were_not_identified_is_refused_under_the_official_name(
    tmp_path, module, compressed, seed
):
    """Such a store of unpacked look-alikes was once made as the official Fashion-MNIST."""
    write_files(tmp_path / "root", samples(seed), compressed=compressed)
    own = loaded(module(root=tmp_path / "root", verify=False))
    images = read_store(own.metadata["file"])
    official = module.source.attributes()
    path = tmp_path / "cache" / f"{official['name']}.h5"
    write_store(path, replace(images, attributes={**images.attributes, **official}))
    title = module.source.title
    message = f"nothing shows that its files were the official ones of {title}: delete it and it is"
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message} built again")):
        module().load()


Change = Callable[[list[np.ndarray]], object]


def test_files_that_do_not_fit_together_are_refused_even_unverified(tmp_path):
    for change, number, message in [
        (lambda a: a.__setitem__(0, a[0][:, :27]), 0, "not images of 28 × 28, but (30, 27, 28)"),
        (lambda a: a.__setitem__(0, a[1]), 0, "not images of 28 × 28, but (30,)"),
        (lambda a: a.__setitem__(1, a[0]), 1, "not a label for each image, 30, but (30, 28, 28)"),
        (lambda a: a.__setitem__(3, a[3][:-1]), 3, "not a label for each image, 20, but (19,)"),
        (lambda a: a[1].__setitem__(7, 10), 1, "label 10 is not one of 0..9"),
    ]:
        arrays = samples()
        change(arrays)
        path = write_files(tmp_path / "root", arrays)[number]
        assert refusal(mnist(tmp_path / "root", verify=False), path) == message, message


# What is missing


def test_a_missing_root_is_named(tmp_path):
    text = refusal(mnist(tmp_path / "nowhere"), tmp_path / "nowhere", FileNotFoundError)
    assert text == "no such folder: data.root is the folder with the files"


def test_a_root_that_is_a_file_is_named(tmp_path):
    root = tmp_path / "file"
    root.write_text("no folder")
    text = refusal(mnist(root), root, NotADirectoryError)
    assert text == "no such folder: data.root is the folder with the files"


def test_a_missing_file_is_named_with_its_folder(tmp_path):
    for number in range(4):
        place = tmp_path / str(number)
        folder = place / "root" / "MNIST" / "raw"
        write_files(folder, samples(), dot=".")[number].unlink()
        text = refusal(mnist(place / "root"), folder, FileNotFoundError)
        assert text.startswith(f"{NAMES[number]} of MNIST is not there: "), number
        assert "data.download=true" in text, number


def test_an_empty_root_is_named(tmp_path):
    (tmp_path / "root").mkdir()
    text = refusal(mnist(tmp_path / "root"), tmp_path / "root", FileNotFoundError)
    assert text.startswith(f"{NAMES[0]} of MNIST is not there")


def test_without_a_root_the_choices_are_reported(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        mnist(None).prepare_data()
    assert str(caught.value) == (
        "MNIST is not here yet: give the folder with its files, data.root=PATH (or FASTDEQ_DATA), "
        "or download it with data.download=true"
    )
    assert not list(tmp_path.iterdir())


# Files of the user's own


def test_files_of_ones_own_never_mix_with_the_official_ones(tmp_path):
    sets = {seed: tmp_path / f"files{seed}" for seed in (0, 2, 3)}
    for seed, root in sets.items():
        write_files(root, samples(seed))
    official = loaded(mnist(sets[0]))
    own = {seed: loaded(mnist(sets[seed], verify=False)) for seed in (2, 3)}
    stores = sorted(path.name for path in (tmp_path / "cache").glob("*.h5"))
    assert len(stores) == 3
    assert stores[-1] == "mnist.h5"
    for seed, data in {0: official, **own}.items():
        assert labels(data) == samples(seed)[3].tolist()
    assert official.metadata["version"] == "1998"
    for data in own.values():
        assert data.metadata["version"] == "not verified"
        assert data.metadata["source"] == "files of the user's own, in the format of MNIST"
        assert data.metadata["licence"] == "that of these files"
    # And again, from the stores
    assert labels(loaded(mnist(sets[0]))) == samples(0)[3].tolist()
    assert labels(loaded(mnist(sets[3], verify=False))) == samples(3)[3].tolist()


def test_even_the_official_files_are_marked_when_they_were_not_verified(tmp_path):
    write_files(tmp_path / "root", samples())
    data = loaded(mnist(tmp_path / "root", verify=False))
    assert Path(data.metadata["file"]).name != "mnist.h5"
    assert data.metadata["version"] == "not verified"


def test_a_store_that_was_not_verified_is_refused_under_the_official_name(tmp_path):
    write_files(tmp_path / "root", samples(2))
    data = loaded(mnist(tmp_path / "root", verify=False))
    Path(data.metadata["file"]).rename(tmp_path / "cache" / "mnist.h5")
    with pytest.raises(ValueError, match=r"its version is 'not verified', not '1998': delete it"):
        mnist(tmp_path / "root").load()


def test_settings_that_make_no_sense_are_refused_by_name():
    cases: list[tuple[dict[str, Any], str]] = [
        ({"verify": False}, "verify=false is for files of your own: give data.root=PATH too"),
        ({"verify": False, "root": ".", "download": True}, "set one of them"),
        ({"verify": "no"}, "MnistDataModule.verify is 'no', but must be true or false"),
        ({"download": 1}, "MnistDataModule.download is 1, but must be true or false"),
        ({"root": 3}, "MnistDataModule.root is 3, but must be text or a Path or None"),
        ({"store": ""}, "store is empty, but must be the path of a folder"),
        ({"batch_size": 0}, "MnistDataModule.batch_size is 0, but must be finite and at least 1"),
    ]
    for settings, message in cases:
        with pytest.raises((TypeError, ValueError), match=message):
            MnistDataModule(**settings)


# The published sets themselves


def test_every_published_file_has_its_checksums_and_two_mirrors():
    for source in (MNIST, FASHION_MNIST):
        assert [file.names[0] for file in source.files] == NAMES
        assert len({file.md5 for file in source.files}) == 4
        assert all(len(bytes.fromhex(file.md5)) == 16 for file in source.files)
        assert len(source.mirrors) >= 2
        assert all(address.endswith("/") for address in source.mirrors)
    assert all(len(bytes.fromhex(checksum)) == 32 for checksum in MNIST.sha256)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("FASTDEQ_DATA"), reason="FASTDEQ_DATA is not set")
def test_the_real_mnist_has_the_published_size_mean_and_std(monkeypatch, tmp_path):
    monkeypatch.setattr(MnistDataModule, "source", MNIST)
    data = loaded(mnist(Path(os.environ["FASTDEQ_DATA"]), store=tmp_path))
    images = read_store(tmp_path / "mnist.h5")
    assert images.train_images.shape == (60_000, 1, 28, 28)
    assert images.test_images.shape == (10_000, 1, 28, 28)
    pixels = images.train_images.double() / 255
    # Published with four decimals
    assert pixels.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert pixels.std().item() == pytest.approx(0.3081, abs=5e-5)
    # The class counts of the published set
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert images.train_labels.bincount().tolist() == counts
    assert len(data.train_dataloader()) == 469  # of 128


def test_a_set_under_another_name_has_its_own_store(monkeypatch, tmp_path):
    monkeypatch.setattr(MnistDataModule, "source", replace(small_mnist(), name="kmnist"))
    write_files(tmp_path / "root", samples())
    loaded(mnist(tmp_path / "root"))
    assert (tmp_path / "cache" / "kmnist.h5").is_file()
