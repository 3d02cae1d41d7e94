"""Run folders whose summary.json has format 1, with metrics under "figures"."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastdeq.experiment.run import read_score
from fastdeq.report import SweepTable, find_runs, make_rows, read_jobs
from fastdeq.runs.reading import FORMAT, read_run, read_summary
from tests.commands import SHORT, CommandLine, a_run
from tests.experiment.run_folders import configuration, unfinished_run, write_job

FORMAT_1: dict[str, Any] = {
    "score": {"figure": "test/accuracy", "value": 0.25},
    "figures": {
        "val/loss": 2.2135322093963623,
        "val/accuracy": 0.25,
        "train/loss": 2.4789645671844482,
        "train/seconds": 1.141548991203308,
        "test/loss": 2.2135322093963623,
        "test/accuracy": 0.25,
        "test/nfe": 8.047222137451172,
        "test/seconds": 1.7975356578826904,
    },
    "train_seconds": 6.364,
    "train_ms_per_step": None,
    "seconds_to_first_step": 6.35,
    "peak_memory_bytes": 452792320,
    "mode": "train",
    "epochs": 1,
    "steps": 2,
    "parameters": 58890,
    "seed": 1,
    "devices": 1,
    "name": "digits/skip_deq_lbroyden",
    "choices": {
        **{"sweep": "None", "experiment": "mnist_fc", "paths": "default", "logger": "csv"},
        **{"trainer": "default", "augmentation": "None", "data": "digits", "model": "skip_deq"},
        **{"callbacks": "default", "scheduler": "constant", "optimizer": "adam", "loss": "skip"},
        **{"adjoint": "implicit", "solver": "lbroyden", "task": "classification", "arch": "fc"},
    },
    "reference": {
        "source": "arXiv 2201.12240, table of MNIST, fully connected",
        "seeds": 3,
        "epochs": 25,
        "where": {"model": "skip_deq", "loss.jacobian": 0.0},
        "figures": {"test/accuracy": 0.97759, "test/nfe": 4.001, "test/seconds": 0.01},
        "deviations": {"test/accuracy": 0.0008, "test/nfe": 0.001},
        "training_minutes": 1.711,
    },
    "device": "cpu",
    "host": "vm",
    "threads": 2,
    "versions": {"fastdeq": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu"},
    "commit": None,
    "dirty": False,
    "command": "train.py model=skip_deq",
    "finished": "2026-11-26T00:16:30+00:00",
}
"""A summary as the last version with this format wrote it; some metrics and versions left out."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder of format 1."""
    made = unfinished_run(tmp_path / "run")
    (made / "config.yaml").write_text(yaml.safe_dump(configuration(seed=1)))
    (made / "summary.json").write_text(json.dumps(FORMAT_1))
    return made


def test_the_reader_gives_format_1_the_keys_of_format_2(folder: Path) -> None:
    summary = read_summary(folder)
    assert summary["metrics"] == FORMAT_1["figures"]
    assert summary["score"] == {"metric": "test/accuracy", "value": 0.25}
    assert summary["reference"]["metrics"] == FORMAT_1["reference"]["figures"]
    assert "figures" not in {*summary, *summary["reference"]}
    same = FORMAT_1.keys() - {"figures", "score", "reference"}
    assert {key: summary[key] for key in same} == {key: FORMAT_1[key] for key in same}
    assert read_score(folder) == 0.25


def test_a_report_has_the_measured_and_the_published_metrics(folder: Path) -> None:
    (run,) = find_runs([folder]).runs.values()
    assert run.metrics["training_minutes"] == pytest.approx(6.364 / 60)
    (row,) = make_rows([run])
    accuracy = row.metrics["test/accuracy"]
    assert (accuracy.mean, accuracy.published, accuracy.published_deviation) == (
        *(0.25, 0.97759, 0.0008),
    )
    assert row.verdict.text.startswith("short: 1 of 25 epochs")


def test_a_sweep_has_a_table(folder: Path, tmp_path: Path) -> None:
    write_job(tmp_path / "sweep", 0, folder, seed="1")
    table = SweepTable(read_jobs(tmp_path / "sweep")).rows()
    assert dict(zip(*table, strict=True)) == {
        **{"runs": "1", "test accuracy %": "25.00", "test loss": "2.21", "test NFE": "8.05"},
        "training s": "6.4",
    }


def test_a_run_is_done_and_other_runs_start_from_it(command: CommandLine) -> None:
    run = a_run(command, "paths.run=mine", "seed=1")
    written = json.loads((run / "summary.json").read_text())
    assert written["format"] == FORMAT
    later = {"format", "metrics", "train_time_shares"}
    assert {*written} - later == FORMAT_1.keys() - {"figures"}
    (run / "summary.json").write_text(json.dumps(FORMAT_1))
    again = command(*SHORT, "paths.run=mine", "seed=1")
    assert (again.status, "done already" in again.out) == (0, True)
    tested = command("mode=test", "from_run=mine", "paths.run=tested")
    assert tested.status == 0, tested.err
    assert read_run(command.folder / "tested").seed == 1


def test_a_summary_of_a_later_format_is_refused(folder: Path) -> None:
    (folder / "summary.json").write_text(json.dumps({**FORMAT_1, "format": 3}))
    with pytest.raises(ValueError, match=r"summary\.json has format 3"):
        read_summary(folder)
