"""Checkpoint files are whole or not there: damage at many places, a full disk, a read-only one."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdeq import experiment
from fastdeq.runs.files import is_sealed, seal_of
from fastdeq.runs.folder import BEFORE, LAST, RESUME
from fastdeq.runs.status import Interrupted
from fastdeq.training import SealedCheckpointIO
from tests.commands import SHORT, CommandLine
from tests.comparisons import assert_same
from tests.configurations import composed

CONTENT: dict[str, Any] = {"weights": torch.arange(2000.0), "step": 7, "name": "fastdeq"}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "here" / "state.ckpt"
    SealedCheckpointIO().save_checkpoint(CONTENT, path)
    return path


def test_what_was_saved_comes_back_and_its_seal_is_one_that_sha256sum_reads(saved: Path) -> None:
    loaded = SealedCheckpointIO().load_checkpoint(saved)
    assert torch.equal(loaded["weights"], CONTENT["weights"])
    assert is_sealed(saved)
    assert sorted(path.name for path in saved.parent.iterdir()) == [
        "state.ckpt",
        "state.ckpt.sha256",
    ]
    checked = subprocess.run(
        ["sha256sum", "--check", "--quiet", seal_of(saved).name], cwd=saved.parent, check=False
    )
    assert checked.returncode == 0


def test_every_flipped_bit_and_every_cut_is_seen(saved: Path) -> None:
    whole = saved.read_bytes()
    positions = np.random.default_rng(0).choice(len(whole), size=100, replace=False)
    for position in map(int, [0, len(whole) - 1, *positions]):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << (position % 8)
        for content in (bytes(flipped), whole[:position], whole + b"\0"):
            saved.write_bytes(content)
            assert not is_sealed(saved), position
    saved.write_bytes(whole)
    assert is_sealed(saved)


def test_a_damaged_seal_seals_nothing(saved: Path) -> None:
    text = seal_of(saved).read_bytes()
    for content in (b"", b"\xff\xfe", text[:10], b"0" * 64, text.replace(text[:1], b"x", 1)):
        seal_of(saved).write_bytes(content)
        assert not is_sealed(saved)


def test_a_checkpoint_that_runs_code_is_not_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"weights": Trap()}, tmp_path / "trap.ckpt")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        SealedCheckpointIO().load_checkpoint(tmp_path / "trap.ckpt")
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no disk can be mounted here: that needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_on_a_full_disk_the_checkpoint_before_stays(disk: Path) -> None:
    path = disk / "state.ckpt"
    SealedCheckpointIO().save_checkpoint(CONTENT, path)
    before = path.read_bytes()
    with pytest.raises(OSError, match="free some space"):
        SealedCheckpointIO().save_checkpoint({"weights": torch.zeros(1 << 22)}, path)
    assert path.read_bytes() == before
    assert is_sealed(path)
    assert sorted(each.name for each in disk.iterdir()) == ["state.ckpt", "state.ckpt.sha256"]


def test_on_a_read_only_disk_the_checkpoint_before_stays(disk: Path) -> None:
    path = disk / "state.ckpt"
    SealedCheckpointIO().save_checkpoint(CONTENT, path)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(OSError, match=r"state\.ckpt.*intact"):
        SealedCheckpointIO().save_checkpoint(CONTENT, path)
    assert is_sealed(path)


@pytest.mark.slow
def test_a_run_on_a_disk_that_fills_up_ends_in_a_line_and_resumes_later(
    command: CommandLine, disk: Path
) -> None:
    short = ("model=deq", "trainer.max_epochs=3", "data.batch_size=360", "trainer.accelerator=cpu")
    assert command(*short, "paths.run=whole").status == 0
    words = (*short, f"paths.run={disk / 'run'}")
    assert command(*words, "stop_after=1e-9").status == 75
    rest = os.statvfs(disk)
    filler = disk / "in the way"
    filler.write_bytes(b"\0" * (rest.f_bavail * rest.f_frsize - 100_000))
    answer = command(*words)
    assert answer.status == 1
    (line,) = answer.err.splitlines()
    assert "no checkpoint can be written" in line or "No space left" in line
    assert is_sealed(disk / "run" / RESUME) or is_sealed(disk / "run" / LAST)
    filler.unlink()
    again = command(*words)
    assert again.status == 0, again.err
    assert_same(command.folder / "whole", disk / "run")


def test_a_read_only_place_is_refused_before_training(command: CommandLine, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    answer = command(*SHORT, f"paths.outputs={disk}")
    assert answer.status == 1
    (line,) = answer.err.splitlines()
    assert "paths.outputs" in line
    assert "Read-only file system" in line


STATES = ("model=deq", "trainer.accelerator=cpu", "data.batch_size=720", "trainer.max_epochs=2")


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run that has stopped twice: it has a state, and the one before."""
    folder = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(Interrupted):
            experiment.run_config(composed(*STATES, f"paths.run={folder}", "stop_after=1e-9"))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    return experiment.run_config(composed(*STATES, f"paths.run={folder}"))


@pytest.mark.parametrize("fraction", [i / 8 for i in range(9)])
def test_a_state_damaged_anywhere_is_skipped(
    stopped: Path, whole: Path, fraction: float, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stopped / RESUME
    content = bytearray(path.read_bytes())
    content[min(int(fraction * len(content)), len(content) - 1)] ^= 0x10
    path.write_bytes(content)
    experiment.run_config(composed(*STATES, f"paths.run={stopped}"))
    warning = f"warning: {path} is damaged: resuming from {BEFORE}"
    assert warning in capsys.readouterr().out.splitlines()
    assert warning in (stopped / "train.log").read_text()
    assert_same(whole, stopped)
