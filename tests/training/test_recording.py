"""`RecordEquilibria`: what it writes, what it costs the training (nothing), and what is refused."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from fastdeq import experiment
from fastdeq.runs.folder import recording_file
from fastdeq.runs.reading import read_summary
from fastdeq.runs.recorded import (
    BatchRecord,
    RecordedSolves,
    SolveRecord,
    read_recording,
    write_recording,
)
from fastdeq.solution import Status
from fastdeq.training import RecordEquilibria
from tests.configurations import composed
from tests.loops import each

SHORT = (
    *("trainer.max_epochs=2", "trainer.limit_train_batches=2", "trainer.limit_val_batches=2"),
    *("trainer.limit_test_batches=2", "trainer.accelerator=cpu", "data.eval_batch_size=16"),
)


def run(folder: Path, *words: str) -> Path:
    return experiment.run_config(composed(*SHORT, f"paths.run={folder}", *words))


def a_solve(**others: Any) -> SolveRecord:
    numbers = np.array([3, 4])
    share = np.array([1e-3, 2e-3], dtype=np.float32)
    return SolveRecord(
        nfe=numbers,
        steps=numbers,
        status=numbers * 0,
        residual=share,
        relative_residual=share,
        **others,
    )


def a_recording() -> RecordedSolves:
    traced = np.ones((5, 2), dtype=np.float32)
    batch = BatchRecord(forward=a_solve(residuals=traced), spectral_radius=traced[0])
    return RecordedSolves(
        stage="val",
        epoch=3,
        step=60,
        nfe=np.array([3, 4]),
        status=np.array([0, 1]),
        relative_residual=np.array([1e-3, 1.0]),
        batches={0: batch, 7: batch},
    )


def test_a_file_holds_what_was_written(tmp_path):
    path = tmp_path / "recorded" / "epoch_0003.h5"
    write_recording(path, a_recording())
    found: Any = read_recording(path)
    assert (found.stage, found.epoch, found.step) == ("val", 3, 60)
    assert found.status.tolist() == [0, 1]
    assert list(found.batches) == [0, 7]
    assert found.batches[7].forward.residuals.shape == (5, 2)
    assert found.batches[7].backward is None
    assert found.batches[7].forward.states is None


def test_a_file_of_another_layout_is_refused_in_one_line(tmp_path):
    foreign, newer, text = (tmp_path / name for name in ("digits.h5", "newer.h5", "text.h5"))
    with h5py.File(foreign, "w") as file:
        file["images"] = [1, 2]
    write_recording(newer, a_recording())
    with h5py.File(newer, "a") as file:
        file.attrs["version"] = 2
    text.write_text("not HDF5")
    for path in (foreign, newer, text):
        with pytest.raises(ValueError, match="holds no equilibria that fastdeq") as error:
            read_recording(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_recording(tmp_path / "missing.h5")


def test_a_run_records_its_solves_forward_and_backward_with_the_states(tmp_path, lines):
    words = ("model=skip_deq", "+callbacks.record.states=true", "+callbacks.record.keep=all")
    folder = run(tmp_path / "run", *words, "+callbacks.record.samples=8")
    (said,) = [line for line in lines if line.startswith("recording")]
    files = [recording_file(folder, epoch) for epoch in (0, 1, None)]
    assert all(path.stat().st_size < float(said.split()[1]) * 1e6 + 2e5 for path in files)
    found: Any = read_recording(files[2])
    assert found.nfe.shape == found.status.shape == (32,)  # of both batches
    assert found.nfe.mean() == pytest.approx(read_summary(folder)["metrics"]["test/nfe"])
    (batch,) = found.batches.values()
    forward, backward = batch.forward, batch.backward
    assert batch.inputs.shape == (8, 1, 8, 8)
    assert forward.states.shape == (*forward.residuals.shape, 128)
    assert forward.residuals.shape == (forward.steps.max() + 1, 8)
    assert (forward.nfe == found.nfe[:8]).all()
    assert forward.norm == pytest.approx(np.linalg.norm(forward.value, axis=1))
    assert (forward.status == Status.CONVERGED).all()
    assert backward.residuals.shape == (backward.steps.max() + 1, 8)
    assert backward.value.shape == (8, 128)
    radius = read_summary(folder)["metrics"]["test/spectral_radius"]
    assert radius == pytest.approx(batch.spectral_radius.mean())
    assert 0 < radius < 10


def test_recording_changes_nothing_of_the_training(tmp_path):
    words = ("model=skip_deq", "loss.jacobian=1")  # which draws random numbers
    recorded, plain = run(tmp_path / "a", *words), run(tmp_path / "b", *words, "~callbacks.record")
    assert not (plain / "recorded").exists()
    one, other = (
        torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (recorded, plain)
    )
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_only_the_newest_epoch_is_kept_unless_all_are_asked_for(tmp_path):
    folder = run(tmp_path / "run", "model=deq")
    assert sorted(path.name for path in folder.glob("recorded/*")) == ["epoch_0001.h5", "test.h5"]


def test_a_model_without_a_solver_records_its_statistics_alone(tmp_path):
    folder = run(tmp_path / "run", "model=explicit")
    found = read_recording(recording_file(folder, None))
    assert not found.batches
    assert (found.status == Status.NOT_SOLVED).all()


@each(
    "settings, message",
    [
        ({"batches": [-1]}, "RecordEquilibria.batches is \\[-1\\]"),
        ({"samples": 0}, "RecordEquilibria.samples is"),
        ({"every": 0}, "RecordEquilibria.every is"),
        ({"keep": "some"}, "RecordEquilibria.keep is 'some'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RecordEquilibria(**settings)
