"""Finished runs that are trained further (extend=RUN)."""

import csv
from pathlib import Path

import pytest
import torch

from fastdeq import experiment
from fastdeq.runs.files import is_sealed
from fastdeq.runs.folder import BEST, LAST, METRICS, SUMMARY
from fastdeq.runs.status import Interrupted

WORDS = ("model=deq", "data.batch_size=720", "trainer.accelerator=cpu", "solver.max_steps=4")
MORE = ("trainer.log_every_n_steps=1", "callbacks.failures.unconverged=null")


def run(folder: Path, *words: str) -> Path:
    return experiment.run([*WORDS, *MORE, *words, f"paths.run={folder}"]).folder


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / METRICS).open(newline="") as file:
        return list(csv.DictReader(file))


def rates(folder: Path) -> list[str]:
    return [row["step/lr"] for row in rows(folder) if row.get("step/lr")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    saved: dict[str, torch.Tensor] = torch.load(folder / LAST, weights_only=True)["state_dict"]
    return saved


def test_an_extended_run_is_a_longer_run_bit_for_bit_and_leaves_the_first_alone(
    tmp_path: Path,
) -> None:
    first = run(tmp_path / "first", "trainer.max_epochs=1")
    before = {path: path.read_bytes() for path in files(first)}
    words = [f"extend={first}", "trainer.max_epochs=3", f"paths.run={tmp_path / 'further'}"]
    further = experiment.run(words).folder
    assert {path: path.read_bytes() for path in files(first)} == before
    whole = run(tmp_path / "whole", "trainer.max_epochs=3")
    ours, expected = weights(further), weights(whole)
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    numbers = [[(row["epoch"], row["step"]) for row in rows(each)] for each in (further, whole)]
    assert numbers[0] == numbers[1]
    saved = torch.load(further / LAST, weights_only=True)["callbacks"].values()
    assert {each["best_model_path"] for each in saved if each.get("best_model_score")} == {
        str(further / BEST)
    }
    assert is_sealed(further / BEST)


def test_the_schedule_is_that_of_the_new_length_also_after_an_interruption(tmp_path: Path) -> None:
    first = run(tmp_path / "first", "trainer.max_epochs=1", "scheduler=cosine")
    whole = run(tmp_path / "whole", "trainer.max_epochs=3", "scheduler=cosine")
    words = (f"extend={first}", "trainer.max_epochs=3", f"paths.run={tmp_path / 'further'}")
    with pytest.raises(Interrupted):
        experiment.run([*words, "stop_after=1e-9"])
    further = experiment.run(words).folder
    assert rates(further)[2:] == rates(whole)[2:]
    assert rates(further)[:2] == rates(first)


def test_a_scheduler_of_torch_continues_as_it_is(tmp_path: Path) -> None:
    step = "{_target_: torch.optim.lr_scheduler.StepLR, _partial_: true, step_size: 2}"
    scheduler = f"scheduler={step}"
    first = run(tmp_path / "first", "trainer.max_epochs=1", scheduler)
    words = (f"extend={first}", "trainer.max_epochs=3", f"paths.run={tmp_path / 'further'}")
    whole = run(tmp_path / "whole", "trainer.max_epochs=3", scheduler)
    assert rates(experiment.run(words).folder) == rates(whole)


def test_a_run_that_cannot_be_extended_is_refused_with_the_reason(tmp_path: Path) -> None:
    first = run(tmp_path / "first", "trainer.max_epochs=1")
    extend = f"extend={first}"
    for words, text in (
        ([extend], "trainer.max_epochs is 1, but .* has trained 1 already"),
        ([extend, "trainer.max_epochs=2", "solver.tol=0.1"], "solver.tol is 0.005 in .* is 0.1"),
        ([extend, "trainer.max_epochs=2", "mode=test"], "leave mode, checkpoint and from_run out"),
        ([f"extend={tmp_path}"], "extend: .* is not a run folder"),
    ):
        with pytest.raises((ValueError, OSError), match=text):
            experiment.run(words)
    (first / SUMMARY).unlink()
    with pytest.raises(ValueError, match="has not finished"):
        experiment.run([extend, "trainer.max_epochs=2"])


def test_a_moved_run_keeps_its_best_checkpoint_when_it_resumes(tmp_path: Path) -> None:
    words = [*WORDS, *MORE, "trainer.max_epochs=2"]
    for _ in range(3):  # the first epoch has two steps
        with pytest.raises(Interrupted):
            experiment.run([*words, f"paths.run={tmp_path / 'a'}", "stop_after=1e-9"])
    assert (tmp_path / "a" / BEST).exists()
    (tmp_path / "a").rename(tmp_path / "b")
    folder = experiment.run([*words, f"paths.run={tmp_path / 'b'}"]).folder
    saved = torch.load(folder / LAST, weights_only=True)["callbacks"].values()
    best = [each for each in saved if each.get("best_model_score") is not None]
    assert [each["best_model_path"] for each in best] == [str(folder / BEST)]
