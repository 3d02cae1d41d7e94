"""Atomic files, seals, and the run lock."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdeq.runs.files import (
    atomic_path,
    is_sealed,
    remove_sealed,
    seal_of,
    sealed_path,
    write_json,
    write_text,
)
from fastdeq.runs.lock import run_lock
from fastdeq.runs.status import created


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def copy_half(path: Path, aside: Path) -> None:
    aside.write_bytes(path.read_bytes()[:1])
    raise RuntimeError("halfway")


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with atomic_path(path) as aside:
        aside.write_text("new")
        assert not path.exists()
    assert (path.read_text(), names(tmp_path)) == ("new", ["a"])


def test_an_exception_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with sealed_path(path) as aside:
        aside.write_text("old")
    before = names(tmp_path)
    for writer in (atomic_path, sealed_path):
        with pytest.raises(RuntimeError, match="halfway"), writer(path) as aside:
            copy_half(path, aside)
        assert (path.read_text(), is_sealed(path), names(tmp_path)) == ("old", True, before)


def test_without_replace_a_file_that_exists_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for text in ("first", "second"):
        try:
            with atomic_path(path, replace=False) as aside:
                aside.write_text(text)
        except FileExistsError:
            assert text == "second"
    assert (path.read_text(), names(tmp_path)) == ("first", ["a"])


def test_a_seal_matches_only_its_file_and_is_removed_with_it(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with sealed_path(path) as aside:
        aside.write_bytes(b"content")
    assert is_sealed(path)
    check = ["sha256sum", "--check", "--quiet", seal_of(path).name]
    subprocess.run(check, cwd=tmp_path, check=True)
    path.write_bytes(b"contents")
    assert not is_sealed(path)
    remove_sealed(path)
    assert names(tmp_path) == []


def test_what_a_killed_process_has_left_is_removed_by_the_next_sealed_write(tmp_path: Path) -> None:
    path = tmp_path / "a[1]"
    killed = (
        "import os, sys, pathlib; from fastdeq.runs.files import atomic_path\n"
        "with atomic_path(pathlib.Path(sys.argv[1])) as aside:\n"
        "    aside.write_text('ne'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", killed, str(path)], check=False)
    assert len(names(tmp_path)) == 1
    with sealed_path(path) as aside:
        aside.write_text("new")
    assert names(tmp_path) == ["a[1]", "a[1].sha256"]


def test_text_is_utf8_with_foreign_bytes_escaped_and_json_ends_in_a_line(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "Σ " + os.fsdecode(b"\xff"))
    assert (tmp_path / "a").read_text(encoding="utf-8") == "Σ \\udcff"
    write_json(tmp_path / "b", {"Σ": [1]})
    assert (tmp_path / "b").read_text(encoding="utf-8") == '{\n  "Σ": [\n    1\n  ]\n}\n'


def test_a_second_process_is_refused_the_run_lock_until_the_first_ends(tmp_path: Path) -> None:
    created(tmp_path, "0" * 12)
    with run_lock(tmp_path), pytest.raises(BlockingIOError, match="is in use"), run_lock(tmp_path):
        pass
    with run_lock(tmp_path):
        pass
