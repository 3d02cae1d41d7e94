"""MNIST's files from its mirrors: servers on this machine, some of which fail."""

import pytest

from fastdeq.data import MnistDataModule
from tests.data.idx_files import (
    idx,
    labels,
    loaded,
    mirror,
    names,
    samples,
    small_mnist,
    tree,
    write_files,
    zipped,
)

pytestmark = pytest.mark.usefixtures("cache_aside")

NAMES = names()
OFFICIAL = dict(zip(NAMES, (zipped(idx(array)) for array in samples()), strict=True))
WRONG = dict(zip(NAMES, (zipped(idx(array)) for array in samples(1)), strict=True))


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def with_mirrors(monkeypatch, *mirrors: str) -> None:
    """The samples play the official set, to be had there."""
    monkeypatch.setattr(MnistDataModule, "source", small_mnist(mirrors=mirrors))


def test_files_are_downloaded_once_checked_and_read(monkeypatch, tmp_path):
    with mirror(OFFICIAL) as (address, requested):
        with_mirrors(monkeypatch, address)
        assert labels(loaded(MnistDataModule(root=None, download=True))) == samples()[3].tolist()
        assert requested == NAMES
        (tmp_path / "cache" / "mnist.h5").unlink()
        loaded(
            MnistDataModule(root=None, download=True)
        )  # built again from the files that are there
        assert requested == NAMES
    assert tree(tmp_path / "cache" / "mnist") == OFFICIAL
    assert loaded(MnistDataModule(root=None))  # and without leave to download


def test_into_a_given_root_only_what_is_missing_is_downloaded(monkeypatch, tmp_path):
    folder = tmp_path / "root" / "MNIST" / "raw"
    write_files(folder, samples(), dot=".", compressed=False)[2].unlink()
    with mirror(OFFICIAL) as (address, requested):
        with_mirrors(monkeypatch, address)
        loaded(MnistDataModule(root=tmp_path / "root", download=True))
    assert requested == [NAMES[2]]
    assert (folder / NAMES[2]).read_bytes() == OFFICIAL[NAMES[2]]
    assert not (tmp_path / "cache" / "mnist").exists()


def test_an_empty_root_gets_a_folder_of_the_sets_name(monkeypatch, tmp_path):
    (tmp_path / "root").mkdir()
    with mirror(OFFICIAL) as (address, _):
        with_mirrors(monkeypatch, address)
        loaded(MnistDataModule(root=tmp_path / "root", download=True))
    assert tree(tmp_path / "root" / "mnist") == OFFICIAL


def test_downloaded_files_can_be_read_by_others(monkeypatch, tmp_path):
    with mirror(OFFICIAL) as (address, _):
        with_mirrors(monkeypatch, address)
        loaded(MnistDataModule(root=None, download=True))
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "cache" / "mnist").iterdir()}
    assert modes == {0o644}


@pytest.mark.parametrize(
    "bad",
    [WRONG, {}, {name: content[:-9] for name, content in OFFICIAL.items()}],
    ids=["wrong", "missing", "cut"],
)
def test_a_mirror_that_fails_is_followed_by_the_next_and_tried_last(monkeypatch, tmp_path, bad):
    with mirror(bad) as (first, first_requested), mirror(OFFICIAL) as (second, second_requested):
        with_mirrors(monkeypatch, first, second)
        assert labels(loaded(MnistDataModule(root=None, download=True))) == samples()[3].tolist()
    assert first_requested == NAMES[:1]
    assert second_requested == NAMES
    assert tree(tmp_path / "cache" / "mnist") == OFFICIAL


def test_a_mirror_that_does_not_answer_is_followed_by_the_next(monkeypatch, tmp_path):
    with mirror({}) as (gone, _):
        pass  # its port is closed now
    with mirror(OFFICIAL) as (address, _):
        with_mirrors(monkeypatch, gone, address)
        loaded(MnistDataModule(root=None, download=True))
    assert tree(tmp_path / "cache" / "mnist") == OFFICIAL


def test_a_mirror_that_hangs_up_is_followed_by_the_next(monkeypatch, tmp_path):
    with mirror(OFFICIAL, lost=9) as (short, _), mirror(OFFICIAL) as (address, _):
        with_mirrors(monkeypatch, short, address)
        loaded(MnistDataModule(root=None, download=True))
    assert tree(tmp_path / "cache" / "mnist") == OFFICIAL


def test_when_all_mirrors_fail_each_one_is_reported_with_its_reason(monkeypatch, tmp_path):
    with mirror({}) as (gone, _):
        pass
    with mirror(WRONG) as (wrong, _), mirror({}) as (empty, _):
        with_mirrors(monkeypatch, wrong, empty, gone)
        with pytest.raises(OSError, match="could not be downloaded") as caught:
            MnistDataModule(root=None, download=True).prepare_data()
    text = str(caught.value)
    assert text.startswith(f"{NAMES[0]} could not be downloaded: ")
    assert "\n" not in text
    assert f"{wrong} (another MD5 than the published one)" in text
    assert f"{empty} (404 Not Found)" in text
    assert f"{gone} (ConnectionError)" in text
    assert "data.root" in text
    assert not list(tmp_path.iterdir())


def test_a_download_that_fails_later_keeps_the_files_that_are_whole(monkeypatch, tmp_path):
    with mirror({name: OFFICIAL[name] for name in NAMES[:2]}) as (address, _):
        with_mirrors(monkeypatch, address)
        with pytest.raises(OSError, match=rf"^{NAMES[2]} could not be downloaded"):
            MnistDataModule(root=None, download=True).prepare_data()
    files = tree(tmp_path / "cache")
    assert files == {"mnist/": b"", **{f"mnist/{name}": OFFICIAL[name] for name in NAMES[:2]}}


def test_nothing_is_downloaded_without_leave(monkeypatch, tmp_path):
    with mirror(OFFICIAL) as (address, requested):
        with_mirrors(monkeypatch, address)
        with pytest.raises(FileNotFoundError, match=r"download it with data\.download=true"):
            MnistDataModule(root=None).prepare_data()
    assert not requested


def test_a_folder_that_cannot_be_made_is_named_before_anything_is_requested(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with mirror(OFFICIAL) as (address, requested):
        with_mirrors(monkeypatch, address)
        with pytest.raises(OSError, match=r"cache/mnist: cannot be made \(.*\): choose another$"):
            MnistDataModule(root=None, download=True).prepare_data()
    assert not requested
