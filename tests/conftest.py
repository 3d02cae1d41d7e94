"""What holds for every test."""

import logging
import os
from collections import Counter

# The tests' tensors are small: threads that wait for each other are most of their time, above all
# where several tests run beside each other. Before torch is imported; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.commands import CommandLine
from tests.data.image_folders import write_images
from tests.processes import start_ranks


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same random state, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What fastdeq logs."""
    found: list[str] = []

    class Into(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger, handler = logging.getLogger("fastdeq"), Into()
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture
def cache_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's cache is a folder of the test."""
    monkeypatch.setenv("FASTDEQ_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small folder of images, train/<class>/ and val/<class>/."""
    return write_images(tmp_path / "root")


@pytest.fixture
def command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> CommandLine:
    """``command("model=deq")`` runs ``python train.py model=deq`` in a folder of its own."""
    for name in ("FASTDEQ_DATA", "FASTDEQ_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("fastdeq.experiment.launch.spawn", start_ranks)
    (tmp_path / "here").mkdir()
    return CommandLine(tmp_path / "here", capsys, monkeypatch)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests come first: the workers then end at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: -slow[item.path])
