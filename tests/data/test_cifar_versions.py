"""CIFAR-100, fine and coarse, and the binary versions of CIFAR-10 and CIFAR-100."""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastdeq.data import Cifar10DataModule, Cifar100DataModule, StoredDataModule
from fastdeq.data.cifar import CIFAR10, CIFAR100
from tests.data.cifar_svhn_files import (
    BATCHES,
    CLASSES,
    archive,
    array,
    listed,
    pickled,
    pictures,
    string,
    write_folder,
)
from tests.data.refusals import refusal

FINE = [f"fine_{number}" for number in range(100)]
COARSE = [f"coarse_{number}" for number in range(20)]
COUNT = 7
BINARY10, BINARY100 = "cifar-10-batches-bin", "cifar-100-binary"


@pytest.fixture(autouse=True)
def _cache_aside(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTDEQ_CACHE", str(tmp_path / "cache"))


def split100(seed: int) -> tuple[NDArray[np.uint8], list[int], list[int]]:
    """Pixels (7, 3072), fine labels up to 99 and coarse ones up to 19."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (COUNT, 3072), dtype=np.uint8)
    return pixels, [99, *range(60, 66)], [19, *range(6)]


def pickles100() -> dict[str, bytes]:
    def labels(values: list[int]) -> bytes:
        return listed([b"K" + bytes([value]) for value in values])

    files = {}
    for seed, name in enumerate(("train", "test")):
        pixels, fine, coarse = split100(seed)
        entries = {b"fine_labels": labels(fine), b"coarse_labels": labels(coarse)}
        files[name] = pickled({**entries, b"data": array(pixels)})
    names = {b"fine_label_names": FINE, b"coarse_label_names": COARSE}
    texts = {key: listed([string(one.encode()) for one in value]) for key, value in names.items()}
    return {**files, "meta": pickled(texts)}


def binary100() -> dict[str, bytes]:
    """Records of a coarse and a fine label, then the pixels."""
    files = {}
    for seed, name in enumerate(("train.bin", "test.bin")):
        rows = zip(*split100(seed), strict=True)
        files[name] = b"".join(bytes([coarse, fine]) + row.tobytes() for row, fine, coarse in rows)
    lists = {"fine_label_names.txt": FINE, "coarse_label_names.txt": COARSE}
    return files | {name: "\n".join([*names, ""]).encode() for name, names in lists.items()}


def binary10() -> dict[str, bytes]:
    """Records of a label, then the pixels; the list of names ends in an empty line."""
    files = {
        f"{name}.bin": b"".join(
            bytes([label]) + row.tobytes() for row, label in zip(pixels, labels, strict=True)
        )
        for name, (pixels, labels) in zip(BATCHES, pictures(), strict=True)
    }
    return files | {"batches.meta.txt": "\n".join([*CLASSES, "", ""]).encode()}


def test_cifar100_is_read_exactly_in_every_form_fine_or_coarse(tmp_path):
    forms: dict[str, dict[str, bytes]] = {
        "cifar-100-python.tar.gz": {
            "cifar-100-python.tar.gz": archive(pickles100(), folder="cifar-100-python")
        },
        "cifar-100-python": {f"cifar-100-python/{k}": v for k, v in pickles100().items()},
        "cifar-100-binary.tar.gz": {
            "cifar100/cifar-100-binary.tar.gz": archive(binary100(), folder=BINARY100)
        },
        BINARY100: {f"cifar100/{BINARY100}/{k}": v for k, v in binary100().items()},
    }
    for form, files in forms.items():
        for name, content in files.items():
            path = tmp_path / form / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        for labels, names in {"fine": FINE, "coarse": COARSE}.items():
            data = Cifar100DataModule(
                root=tmp_path / form / "root",
                labels=labels,  # type: ignore[arg-type]
                verify=False,
            )
            for seed, samples in enumerate(data.load()):
                pixels, fine, coarse = split100(seed)
                assert np.array_equal(samples.inputs.flatten(1).numpy(), pixels), (form, seed)
                wanted = fine if labels == "fine" else coarse
                assert samples.targets.tolist() == wanted, (form, labels)
            assert data.metadata["classes"] == ", ".join(names), (form, labels)
            assert data.outputs == len(names)


def test_an_official_archive_of_cifar100_makes_a_store_for_each_kind_of_labels(
    monkeypatch, tmp_path
):
    content = archive(pickles100(), folder="cifar-100-python")
    official = (replace(CIFAR100.files[0], md5=hashlib.md5(content).hexdigest()),)
    monkeypatch.setattr(Cifar100DataModule, "source", replace(CIFAR100, files=official))
    write_folder(tmp_path / "root", {CIFAR100.files[0].names[0]: content})
    fine, coarse = (
        Cifar100DataModule(root=tmp_path / "root", labels=labels).load()[0].targets
        for labels in ("fine", "coarse")
    )
    assert fine.tolist() != coarse.tolist()
    stores = sorted(path.name for path in (tmp_path / "cache").glob("*.h5"))
    assert stores == ["cifar100.h5", "cifar100_coarse.h5"]


def test_the_binary_version_of_cifar10_is_read_exactly(monkeypatch, tmp_path):
    content = archive(binary10(), folder=BINARY10)
    forms = list(CIFAR10.others)
    forms[1] = (replace(forms[1][0], md5=hashlib.md5(content).hexdigest()),)
    monkeypatch.setattr(Cifar10DataModule, "source", replace(CIFAR10, others=tuple(forms)))
    write_folder(tmp_path / "packed", {"cifar-10-binary.tar.gz": content})
    write_folder(tmp_path / "unpacked" / "cifar10" / BINARY10, binary10())
    for place, verify in [("packed", True), ("packed", False), ("unpacked", False)]:
        data = Cifar10DataModule(root=tmp_path / place, verify=verify)
        train, test = data.load()
        pixels, labels = zip(*pictures(), strict=True)
        assert np.array_equal(train.inputs.flatten(1).numpy(), np.concatenate(pixels[:5])), place
        assert train.targets.tolist() == [label for batch in labels[:5] for label in batch]
        assert np.array_equal(test.inputs.flatten(1).numpy(), pixels[5])
        assert test.targets.tolist() == labels[5]
        assert data.metadata["classes"] == ", ".join(CLASSES)


def test_unpacked_binary_files_cannot_be_verified_and_the_cure_is_named(tmp_path):
    folder = write_folder(tmp_path / BINARY10, binary10())
    assert refusal(Cifar10DataModule(root=tmp_path), folder / "data_batch_1.bin") == (
        "cannot be verified, for of CIFAR-10 only the checksums of the archives are published: "
        "give the official cifar-10-python.tar.gz or cifar-10-binary.tar.gz instead, or take your "
        "own files as they are with data.verify=false"
    )


def change(files: dict[str, bytes], name: str, content: bytes | None) -> dict[str, bytes]:
    return {key: value for key, value in {**files, name: content}.items() if value is not None}


def test_what_is_wrong_with_the_files_is_one_line_with_the_cure(tmp_path):
    wrong10 = "truncated, or of another set: "
    train100 = binary100()["train.bin"]
    cases: list[tuple[Any, str, bytes | None, str]] = [
        ("10", "data_batch_2.bin", b"", f"{wrong10}0 bytes are not a number of records of 3073"),
        ("10", "test_batch.bin", binary10()["test_batch.bin"][:-1], wrong10),
        ("10", "test_batch.bin", train100, f"{wrong10}21518 bytes are not a number of records"),
        ("10", "test_batch.bin", bytes([10]) + bytes(3072), "label 10 is not one of 0..9"),
        ("10", "batches.meta.txt", b"cat\ndog\n", "not 10 label_names, but 2"),
        ("100", "train.bin", train100[:3073], f"{wrong10}3073 bytes are not a number of"),
        ("100", "test.bin", bytes([0, 100]) + bytes(3072), "label 100 is not one of 0..99"),
        ("100", "fine_label_names.txt", b"", "not 100 fine_label_names, but 0"),
        ("python", "meta", pickled({}), "has no list of 'fine_label_names'"),
        ("python", "train", pickled({b"data": array(split100(0)[0])}), "not a label for each"),
        ("python", "test", b"<html>", "not a readable pickle ("),
    ]
    sets: dict[str, tuple[type[StoredDataModule], str, dict[str, bytes]]] = {
        "10": (Cifar10DataModule, BINARY10, binary10()),
        "100": (Cifar100DataModule, BINARY100, binary100()),
        "python": (Cifar100DataModule, "cifar-100-python", pickles100()),
    }
    for number, (which, name, content, message) in enumerate(cases):
        module, folder, files = sets[which]
        root = tmp_path / str(number)
        write_folder(root / folder, change(files, name, content))
        data = module(root=root, verify=False)
        assert refusal(data, root / folder / name).startswith(message), (name, message)
        packed = write_folder(tmp_path / f"packed {number}", {})
        official = module.source.forms[0 if which == "python" else 2][0].names[0]
        (packed / official).write_bytes(archive(change(files, name, content), folder=folder))
        place = f"{packed / official}: {folder}/{name}"
        assert refusal(module(root=packed, verify=False), place).startswith(message), name
    root = tmp_path / "missing"
    write_folder(root / BINARY100, change(binary100(), "test.bin", None))
    text = refusal(Cifar100DataModule(root=root), root / BINARY100)
    assert text.startswith("test.bin of CIFAR-100 is not there: ")


def test_another_archive_of_cifar100_is_named_with_the_cure(tmp_path):
    name = CIFAR100.files[0].names[0]
    write_folder(tmp_path, {name: archive(pickles100(), folder="cifar-100-python")})
    text = refusal(Cifar100DataModule(root=tmp_path), tmp_path / name)
    assert text.startswith("not the official file of CIFAR-100, the MD5 of the file is ")
    assert "data.verify=false" in text


def test_the_published_archives_have_their_checksums():
    for source in (CIFAR10, CIFAR100):
        archives = [form[0] for form in source.forms if len(form) == 1]
        assert len({file.md5 for file in archives}) == 2
        assert all(len(bytes.fromhex(file.md5)) == 16 for file in archives)
