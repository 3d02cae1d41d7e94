"""What a published set that cannot be prepared reports."""

import os
from pathlib import Path

import pytest

from fastdeq.data.published import StoredDataModule


def refusal(data: StoredDataModule, place: Path | str) -> str:
    """The error of preparing the set, without `place`, which it begins with: one line. Nothing is
    built in the cache.
    """
    before = _cached()
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        data.prepare_data()
    text = str(caught.value)
    assert text.startswith(f"{place}: ")
    assert "\n" not in text
    assert _cached() == before
    return text.removeprefix(f"{place}: ")


def _cached() -> list[Path]:
    cache = Path(os.environ["FASTDEQ_CACHE"])
    return sorted((cache, *cache.rglob("*"))) if cache.exists() else []
