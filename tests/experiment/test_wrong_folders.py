"""Folders, images and settings that are not as they must be: one line with name and cure."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("PIL")

from fastdeq.data.command import main
from fastdeq.data.store import CURE
from tests.data.image_folders import (
    RUN,
    SAMPLES,
    folder,
    noise,
    png,
    ready,
    refusal,
    stores,
    write_images,
)

pytestmark = pytest.mark.usefixtures("cache_aside")


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
    "flat": (put("val/0.JPEG"), "val/0.JPEG", "an image outside of a class: sort the images of "),
    "other kind": (
        put("val/cat/b/a.heic"),
        "val/cat/b/a.heic",
        "not an image by its name among the ",
    ),
    "not unpacked": (
        lambda root: (drop("train", "val")(root), put("tiny.zip")(root))[1],
        ".",
        "has no folder train: unpack tiny.zip there",
    ),
    "dangling": (dangling, "val/cat/x.png", "cannot be read (No such file or directory)"),
    "text": (
        put("val/dog/x.png", b"<html>"),
        "val/dog/x.png",
        "not a readable image (not identified as JPEG, PNG, WEBP, BMP, TIFF or GIF): replace or "
        "remove it, or leave out all such images with data.skip_unreadable=true",
    ),
    "empty file": (put("val/dog/x.jpg"), "val/dog/x.jpg", "not a readable image (not "),
    "only a header": (
        put("train/eel/x.png", png(noise(0))[:20]),
        "train/eel/x.png",
        "not a readable image (",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_not_as_it_must_be_is_refused_in_one_line(root, tmp_path, case):
    change, place, message = FOLDERS[case]
    change(root)
    assert refusal(folder(root), root / place).startswith(message)
    assert not stores(tmp_path)


def test_of_many_missing_classes_the_first_are_named(tmp_path):
    contents = {f"train/{i:02}/0.png": png(noise(0)) for i in range(12)}
    root = write_images(tmp_path / "root", contents | {"val/00/0.png": png(noise(0))})
    message = "val has no folder for 01, 02, 03, 04, 05 and 6 more: both need the same classes"
    assert refusal(folder(root), root) == message


def test_a_root_that_is_missing_is_named(tmp_path):
    assert refusal(folder(tmp_path / "x"), tmp_path / "x").startswith("no such folder: data.root")
    with pytest.raises(FileNotFoundError, match=r"data\.root=PATH \(or FASTDEQ_DATA\)"):
        folder(None).prepare_data()


def test_a_file_that_is_not_a_store_is_not_a_root(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"PK")
    text = refusal(folder(tmp_path / "x.zip"), tmp_path / "x.zip")
    assert text == "an archive: unpack it, and give its folder"
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
    assert data.metadata["checked"] == "whole images"
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


def test_a_store_whose_images_were_not_decoded_is_not_taken_for_verified(root, tmp_path):
    folder(root).prepare_data()
    (path,) = stores(tmp_path)
    message = f"was built without decoding its images: for data.verify=true {CURE}"
    assert refusal(folder(root, verify=True), path) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size is 0, but must be finite and at least 1"),
        ({"workers": -1}, "workers is -1, but must be finite and at least 0"),
        ({"workers": "many"}, "workers is 'many', but must be a whole number"),
        ({"crop_share": 0}, "crop_share is 0, but must be finite and above 0 and at most 1"),
        ({"crop_share": 1.5}, "crop_share is 1.5, but must be finite and above 0 and at most 1"),
        ({"crop_area": 0.5}, "crop_area is 0.5, but must be a list, each a number"),
        ({"crop_area": [0.5]}, "crop_area must be two numbers"),
        ({"crop_area": [0.5, 0.1]}, r"crop_area must rise from above 0, not \[0\.5, 0\.1\]"),
        ({"crop_area": [0.5, 2]}, "crop_area must be at most 1"),
        ({"crop_ratio": [0, 1]}, "crop_ratio must rise from above 0"),
        ({"crop_ratio": ["a", 1]}, r"crop_ratio is \['a', 1\], but must be a list, each a number"),
        ({"flip": 2}, "flip is 2, but must be finite and at least 0 and at most 1"),
        ({"classes": 0}, "classes is 0, but must be finite and at least 1"),
        ({"verify": "yes"}, "verify is 'yes', but must be true or false"),
        ({"root": 3}, "root is 3, but must be text or a Path or None"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        folder(**{"root": None, **settings})


def test_asking_for_batches_before_setup_says_what_to_do(root):
    with pytest.raises(RuntimeError, match=r"call setup\(\) before"):
        folder(root).train_dataloader()


def test_without_pillow_the_cure_is_named(monkeypatch, capsys, root):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'image_folder needs PIL: pip install ".*\[images\]"'):
        folder(root)
    assert main(["image_folder", f"--root={root}"]) == 1
    assert capsys.readouterr().err.startswith("error: data=image_folder needs PIL: pip install")


def test_without_pillow_the_other_sets_are_there():
    # Lightning comes first: plots of torchmetrics, where matplotlib is there, import Pillow, too.
    code = "import sys, pytorch_lightning; sys.modules['PIL'] = None; "
    code += "from fastdeq.data.command import main; "
    command = [sys.executable, "-c", code + "sys.exit(main(['digits']))"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.slow
def test_a_run_that_comes_to_a_bad_image_ends_with_its_name(root, command):
    for name in ("cat", "dog", "eel"):
        put(f"train/{name}/9.png", CUT)(root)  # after those that are tried before the run
    answer = command.process(*RUN, "data.workers=1", "trainer.accelerator=cpu", f"data.root={root}")
    assert answer.status == 1
    last = answer.err.splitlines()[-1]
    assert last.startswith(f"error: {root}/train/")
    assert "9.png: not a readable image (" in last
