"""mode=curve: one checkpoint within several budgets of evaluations of f."""

import json
from pathlib import Path

import pytest

from fastdeq import experiment
from fastdeq.report.records import read_records
from fastdeq.runs.reading import read_summary
from tests.configurations import composed

SHORT = (
    *("trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.accelerator=cpu"),
    "data.eval_batch_size=128",
)


def a_run(folder: Path, *words: str) -> Path:
    return experiment.run_config(composed(*SHORT, f"paths.run={folder}", *words))


def curve(run: Path, *words: str) -> list[experiment.Point]:
    return experiment.curve(composed(*SHORT, *words, "mode=curve", f"checkpoint={run}/last.ckpt"))


def test_a_budget_is_never_exceeded_and_a_large_one_gives_the_test_metrics(tmp_path, capsys):
    run = a_run(tmp_path / "run", "model=skip_deq")
    points = curve(run, "model=skip_deq", "nfe=[64,0,1,2,4,6]")
    assert [point.budget for point in points] == [0, 1, 2, 4, 6, 64]
    assert [point.how for point in points[:3]] == ["explicit", "unrolled", "unrolled"]
    assert points[-1].how.startswith("max_steps=")
    assert all(point.metrics["nfe"] <= point.budget for point in points)
    metrics = read_summary(run)["metrics"]
    for name in ("nfe", "accuracy", "loss", "unconverged"):
        assert points[-1].metrics[name] == pytest.approx(metrics[f"test/{name}"], rel=1e-5), name
    assert points[0].metrics["accuracy"] == pytest.approx(metrics["test/explicit_accuracy"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-7].split()[:3] == ["0", "explicit", "0.00"]
    assert printed[-1].startswith(f"see {run}/last.curve.json")
    content = json.loads((run / "last.curve.json").read_text())
    assert content["metric"] == "accuracy"
    assert [point["budget"] for point in content["points"]] == [0, 1, 2, 4, 6, 64]


def test_curves_of_several_runs_are_drawn_in_one_plot(tmp_path, capsys):
    plots = pytest.importorskip("fastdeq.report.plots")
    for model in ("deq", "skip_deq"):
        folder = a_run(tmp_path / model, f"model={model}")
        curve(folder, f"model={model}", "nfe=[0,2,8]")
    assert "0 evaluations: this model makes no explicit prediction" in capsys.readouterr().out
    records, _ = read_records([tmp_path])
    (axis,) = plots.draw("curve", records).axes
    assert [list(line.get_xdata()) for line in axis.lines] == [[2, 8], [0, 2, 8]]


def test_solvers_with_several_evaluations_per_step_keep_the_budget(tmp_path):
    words = ("experiment=dynamics", "data.samples=32")  # BS3: three evaluations per step
    run = a_run(tmp_path / "run", *words)
    for point in curve(run, *words, "nfe=[5,9,20]"):
        assert point.metrics["nfe"] <= point.budget
        assert point.how.startswith("max_steps=")


def test_what_has_no_curve_is_refused_in_one_line(tmp_path):
    run = a_run(tmp_path / "run", "model=explicit")
    for words, message in (
        (
            ["model=explicit"],
            "mode=curve limits the steps of one solver, but a UnrolledNetwork has",
        ),
        (["model=skip_deq"], "holds another model than this configuration"),
        (["model=explicit", "nfe=[-1]"], "nfe is \\[-1\\], but must list numbers of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            curve(run, *words)
    with pytest.raises(ValueError, match="mode=curve needs weights: give checkpoint=PATH"):
        experiment.curve(composed(*SHORT, "mode=curve"))
