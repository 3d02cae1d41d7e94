"""Folders as people have them: layouts, stray files, shares held out, images that are broken."""

import logging
import os

import pytest

pytest.importorskip("PIL")

from fastdeq.data.command import main
from tests.commands import CommandLine, a_run
from tests.data.image_folders import (
    CLASSES,
    RUN,
    SAMPLES,
    TRAIN,
    VAL,
    folder,
    images,
    noise,
    png,
    refusal,
    stores,
    write_images,
)

pytestmark = pytest.mark.usefixtures("cache_aside")

CUT = png(noise(7))[:-500]  # the header is whole


def loaded(root, **settings):
    """Paths below the root, as the records name them, and labels: of train and of val."""
    data = folder(root, **settings)
    found = []
    for records in data.load():
        names = [records.file(i).removeprefix(f"{root}/") for i in range(len(records))]
        found.append((names, records.targets.tolist()))
        records.close()
    return data, *found


def renamed(contents, old, new):
    return {name.replace(old, new, 1): content for name, content in contents.items()}


def test_valid_or_test_take_the_place_of_val_in_this_order(tmp_path):
    plain = images()
    for number, (names, chosen) in enumerate(
        [(("test",), "test"), (("test", "valid"), "valid"), (("valid", "val"), "val")]
    ):
        contents = {name: one for name, one in plain.items() if name.startswith("train")}
        for name in names:
            val = {key: one for key, one in plain.items() if key.startswith("val/")}
            contents |= renamed(val, "val/", f"{name}/")
        root = write_images(tmp_path / str(number), contents)
        data, train, val = loaded(root)
        assert len(train[0]) == SAMPLES
        assert val[0][0] == f"{chosen}/cat/0.png"
        assert len(val[0]) == VAL * len(CLASSES)
        assert data.metadata["split"].startswith(f"the folder's: train for training, {chosen} for")
    (root / "val" / "dog").rename(root / "val" / "ape")
    message = (
        "val has no folder for dog, and train has no folder for ape: both need the same classes"
    )
    assert refusal(folder(root), root) == message


def test_a_share_of_train_is_held_out_by_seed_and_recorded(tmp_path):
    contents = {name: one for name, one in images().items() if name.startswith("train/")}
    root = write_images(tmp_path / "root", contents)
    assert "data.test_share=0.1 holds out a share of train/" in refusal(folder(root), root)
    splits = {}
    for seed in (0, 1):
        data, (train, _), (val, labels) = loaded(root, test_share=0.25, test_seed=seed)
        assert labels == [label for label in range(len(CLASSES)) for _ in range(TRAIN // 4)]
        assert sorted(train + val) == sorted(contents)
        assert data.metadata["split"].startswith("a share of 0.25 of each class of train for ")
        assert f"SHA-256 of '{seed} <name>'" in data.metadata["split"]
        assert loaded(root, test_share=0.25, test_seed=seed)[2][0] == val
        splits[seed] = val
    # By sha256sum: the smallest two of the eight digests of "0 cat/0.png", "0 cat/1.JPEG", ...
    assert splits[0][:2] == ["train/cat/0.png", "train/cat/6.png"]
    assert splits[0] != splits[1]
    assert len(stores(tmp_path)) == 2
    assert len(loaded(root, test_share=0.01)[2][0]) == len(CLASSES)  # at least one of each
    for path in (root / "train/dog").iterdir():
        if path.name != "0.png":
            path.unlink()
    text = refusal(folder(root, test_share=0.1), root / "train/dog")
    assert text == "has one image, and none to hold out: add some"


def tiny_imagenet(root):
    """Three classes in its layout: boxes, images one folder deeper, a test split without labels."""
    contents = {}
    for name, content in images().items():
        split, label, file = name.split("/")
        if split == "train":
            contents[f"train/{label}/images/{label}_{file}"] = content
        else:
            contents[f"val/images/{label}_{file}"] = content
    for label in CLASSES:
        contents[f"train/{label}/{label}_boxes.txt"] = b"cat_0.png\t0\t0\t62\t62\n"
    lines = [f"{CLASSES[i % 3]}_{i // 3}.{'JPEG' if i // 3 % 2 else 'png'}" for i in range(15)]
    texts = [f"{line}\t{line.split('_')[0]}\t0\t32\t44\t62\n" for line in lines]
    contents["val/val_annotations.txt"] = "".join(texts).encode()
    contents |= {"test/images/test_0.JPEG": b"x", "wnids.txt": b"cat\n", "words.txt": b"cat\tpet\n"}
    return write_images(root, contents)


def test_tiny_imagenet_is_read_as_it_is_unpacked(tmp_path):
    root = tiny_imagenet(tmp_path / "root")
    _, (train, labels), (val, targets) = loaded(root)
    assert labels == [label for label in range(3) for _ in range(TRAIN)]
    assert train[0] == "train/cat/images/cat_0.png"
    assert targets == [label for label in range(3) for _ in range(VAL)]
    assert val == [
        f"val/images/{name}_{number}.{'JPEG' if number % 2 else 'png'}"
        for name in CLASSES
        for number in range(VAL)
    ]


def test_annotations_that_do_not_fit_are_refused_in_one_line(tmp_path):
    root = tiny_imagenet(tmp_path / "root")
    place = root / "val/val_annotations.txt"
    text = place.read_text()
    first = root / "val/images/cat_0.png"
    for change, at, message in [
        (
            text.replace("cat_0.png", "other.png"),
            first,
            f"{place} has no line for it: correct that",
        ),
        (text.replace("\tcat\t", "\tape\t"), first, f"{place} has class ape for it, which train"),
        (text + "more.png\tcat\t0\n", place, f"more.png is not in {root / 'val/images'}: add it"),
        ("", first, f"{place} has no line for it"),
    ]:
        place.write_text(change)
        assert refusal(folder(root), at).startswith(message), message
    # Another class of an image, where neither names nor their order change, makes another store.
    place.write_text(text)
    before = loaded(root)[2]
    place.write_text(text.replace("cat_4.png\tcat", "cat_4.png\tdog"))
    after = loaded(root)[2]
    assert before[0] == after[0]
    assert (before[1][VAL - 1], after[1][VAL - 1]) == (0, 1)


def test_nested_folders_are_read_and_stray_files_skipped(tmp_path):
    contents = {**images(), "train/dog/a/b/0.png": png(noise(1)), "train/dog/a.png": png(noise(2))}
    stray = ("train/Thumbs.db", "train/cat/Thumbs.db", "train/cat/.DS_Store", "val/eel/desktop.ini")
    notes = ("train/cat/labels.csv", "__MACOSX/train/cat/._0.png", "train/__MACOSX/cat/._0.png")
    root = write_images(tmp_path / "root", contents | dict.fromkeys((*stray, *notes), b"x"))
    _, (train, labels), _ = loaded(root)
    assert sorted(train) == sorted(name for name in contents if name.startswith("train/"))
    assert labels.count(CLASSES.index("dog")) == TRAIN + 2
    dogs = [name for name in train if "/dog/" in name]
    assert dogs[-2:] == ["train/dog/a/b/0.png", "train/dog/a.png"]  # a folder's place is its name's


def test_links_to_class_folders_are_followed_and_others_refused(root):
    (root / "train/cat").rename(root / "pets")
    os.symlink(root / "pets", root / "train/cat")
    assert len(loaded(root)[1][0]) == SAMPLES
    os.symlink(root / "pets", root / "pets/again")  # a circle
    assert refusal(folder(root), root / "train/cat/again").startswith("not an image by its name")


# Images that are broken


def test_broken_images_are_left_out_on_request_and_reported(tmp_path, caplog, capsys):
    broken = {
        "train/eel/x.png": CUT,
        "train/cat/0.jpg": b"<html>",
        "val/dog/empty.gif": b"",
        "val/dog/text.webp": b"RIFF",
    }
    root = write_images(tmp_path / "root", images() | broken)
    text = refusal(folder(root), root / "train/cat/0.jpg")
    assert text.endswith("or leave out all such images with data.skip_unreadable=true")
    with caplog.at_level(logging.WARNING):
        data, (train, _), (val, _) = loaded(root, skip_unreadable=True)
    assert sorted(train + val) == sorted(images())
    listed = "train/cat/0.jpg, train/eel/x.png, val/dog/empty.gif, val/dog/text.webp"
    assert data.metadata["skipped"] == f"4 unreadable images: {listed}"
    assert data.metadata["checked"] == "whole images"
    (path,) = stores(tmp_path)
    assert caplog.messages == [f"{path}: skipped 4 unreadable images: {listed}"]
    # Such a store is not taken for that of the whole folder.
    assert refusal(folder(root), root / "train/cat/0.jpg").startswith("not a readable image")
    assert main(["image_folder", f"--root={root}", "--skip-unreadable"]) == 0
    assert f"skipped       4 unreadable images: {listed}" in capsys.readouterr().out
    for one in (root / "val/dog").iterdir():
        one.write_bytes(b"")
    text = refusal(folder(root, skip_unreadable=True), root / "val/dog")
    assert text == "has no readable images: add some, or remove this class"


def test_without_broken_images_nothing_is_reported(root, tmp_path, caplog):
    data, (train, _), _ = loaded(root, skip_unreadable=True)
    assert len(train) == SAMPLES
    assert "skipped" not in data.metadata
    assert not caplog.messages
    folder(root).prepare_data()  # the same files: the store gets a second name
    assert len({path.stat().st_ino for path in stores(tmp_path)}) == 1


def test_a_run_on_such_a_folder_trains(command: CommandLine, tmp_path):
    contents = {name: one for name, one in images().items() if name.startswith("train/")}
    root = write_images(tmp_path / "root", contents | {"train/eel/x.png": CUT})
    words = ("data.test_share=0.25", "data.skip_unreadable=true", f"data.root={root}")
    dense = ("arch=fc", "model=skip_deq", "data.size=8", "sizes.features=192", "trainer=one_batch")
    run = a_run(command, *RUN, *words, *dense)
    assert "test_share: 0.25" in (run / "config.yaml").read_text()
    assert "skipped 1 unreadable images: train/eel/x.png" in (run / "train.log").read_text()
