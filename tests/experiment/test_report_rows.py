"""Rows of a report: seeds are averaged, configurations never, and no two rows look the same."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from fastdeq.report.rows import Row, make_rows
from fastdeq.report.runs import find_runs
from fastdeq.runs.reading import read_run
from tests.experiment.run_folders import unfinished_run, write_job, write_run


def rows(folder: Path, *runs: dict[str, Any]) -> list[Row]:
    """Rows of runs that differ as said; their seeds are 0, 1, ... unless they say so."""
    made = []
    for seed, run in enumerate(runs):
        settings = {"seed": seed, **run.get("settings", {})}
        made.append(write_run(folder / f"run{seed}", **{**run, "settings": settings}))
    return make_rows(read_run(run) for run in made)


def with_settings(**settings: Any) -> dict[str, Any]:
    return {"settings": {key.replace("__", "."): value for key, value in settings.items()}}


# Groups


@pytest.mark.parametrize(
    "other",
    [
        with_settings(paths__outputs="/scratch", data__root="/elsewhere"),
        with_settings(from_run="outputs/a", reference={"rows": [1]}),
        with_settings(trainer__accelerator="gpu", trainer__devices=2, trainer__strategy={"a": 1}),
        with_settings(logger__wandb={"mode": "offline"}, trainer__log_every_n_steps=50),
        with_settings(data__augmentation=[], trainer__gradient_clip_val=None),
        with_settings(loss__jacobian=0, skip_weight=5),
        {"choices": {"sweep": "mnist_fc", "trainer": "ddp"}},
        {"commit": None, "dirty": True, "host": "other"},
    ],
)
def test_runs_that_differ_in_seed_place_and_device_alone_share_a_row(tmp_path, other):
    (row,) = rows(tmp_path, {}, other)
    assert [run.seed for run in row.runs] == [0, 1]
    assert row.settings == ""


@pytest.mark.parametrize(
    ("other", "settings"),
    [
        (with_settings(solver__tol=0.5), ("solver.tol=0.005", "solver.tol=0.5")),
        (with_settings(skip_weight=1.0, loss__skip=1.0), ("loss.skip=5.0", "loss.skip=1.0")),
        (with_settings(loss__residual=1.0), ("loss.residual=0.0", "loss.residual=1.0")),
        (
            with_settings(arch__width=64, arch__cell__width=64),
            ("arch.width=128", "arch.width=64"),
        ),
        (
            with_settings(trainer__limit_test_batches=1),  # one batch; 1.0 is all of them
            ("trainer.limit_test_batches=1.0", "trainer.limit_test_batches=1"),
        ),
        (
            with_settings(trainer__gradient_clip_val=1.0),
            ("trainer.gradient_clip_val=–", "trainer.gradient_clip_val=1.0"),
        ),
        (with_settings(checkpoint="a.ckpt"), ("checkpoint=null", "checkpoint=a.ckpt")),
        (with_settings(name="mine"), ("name=mnist_fc/deq_lbroyden", "name=mine")),
        (
            with_settings(solver__tol=0.5, optimizer__lr=0.5),
            ("solver.tol=0.005 optimizer.lr=0.001", "solver.tol=0.5 optimizer.lr=0.5"),
        ),
        (
            {
                **with_settings(data__batch_size=64, sizes__features=3072),
                "choices": {"data": "cifar10"},
            },
            ("data=mnist", "data=cifar10"),
        ),
    ],
)
def test_what_else_differs_is_named_once_where_it_was_set(tmp_path, other, settings):
    first = with_settings(loss__skip=5.0) if "skip_weight" in other["settings"] else {}
    made = rows(tmp_path, first, other)
    assert {row.runs[0].seed: row.settings for row in made} == dict(enumerate(settings))


def test_a_choice_does_not_hide_what_was_set_beside_it(tmp_path):
    made = rows(
        tmp_path,
        with_settings(),
        {**with_settings(data__batch_size=64), "choices": {"data": "svhn"}},
        {**with_settings(data__batch_size=16), "choices": {"data": "svhn"}},
    )
    assert {row.settings for row in made} == {f"data.batch_size={size}" for size in (32, 64, 16)}


def test_no_two_rows_look_the_same(tmp_path):
    """All combinations of settings with equal values, which could pass for copies of each other."""
    grid = itertools.product((0.5, 0.25), (0.5, 0.25), (0.5, 0.25), ("deq", "mdeq"))
    runs = [
        {
            **with_settings(solver__tol=tol, optimizer__lr=rate, arch__scale__deep=deep),
            "choices": {"model": model},
        }
        for tol, rate, deep, model in grid
    ]
    made = rows(tmp_path, *runs)
    assert len(made) == 16  # deq and mdeq have the same settings here, and other names
    assert len({(row.label.model, row.settings) for row in made}) == 16
    assert len({row.settings for row in made}) == 8


def test_settings_distinguish_only_rows_of_the_same_label(tmp_path):
    skip = {"choices": {"model": "skip_deq"}, **with_settings(skip_weight=1.0)}
    assert [row.settings for row in rows(tmp_path, {}, skip)] == ["", ""]


def test_another_number_of_parameters_is_another_row(tmp_path):
    made = rows(tmp_path, {}, {"parameters": 151050})
    assert [row.parameters for row in made] == [134538, 151050]


# Labels


@pytest.mark.parametrize(
    ("model", "solver", "expected"),
    [
        ("deq", "lbroyden", ("DEQ", "lbroyden", False)),
        ("mdeq", "vcab3", ("Multiscale DEQ", "vcab3", True)),
        ("skip_deq", "bs3", ("Skip DEQ", "bs3", True)),
        ("skip_mdeq", "anderson", ("Multiscale Skip DEQ", "anderson", False)),
        ("skip_reg_deq", "tsit5", ("Skip Reg. DEQ", "tsit5", True)),
        ("skip_reg_mdeq", "picard", ("Multiscale Skip Reg. DEQ", "picard", False)),
        ("neural_ode", "lbroyden", ("Neural ODE", "–", True)),
        ("explicit", "vcab3", ("Explicit", "–", None)),
        ("residual", "lbroyden", ("Residual", "–", None)),
        ("mine", "lbroyden", ("mine", "lbroyden", False)),
    ],
)
def test_models_have_their_published_names(tmp_path, model, solver, expected):
    (row,) = rows(tmp_path, {"choices": {"model": model, "solver": solver}})
    assert (row.label.model, row.label.solver, row.label.continuous) == expected


@pytest.mark.parametrize(("weight", "regularized"), [(0.0, False), (0, False), (0.5, True)])
def test_jacobian_regularization_is_a_weight_above_zero(tmp_path, weight, regularized):
    (row,) = rows(tmp_path, with_settings(loss__jacobian=weight))
    assert row.label.jacobian is regularized


def test_a_run_without_an_experiment_is_called_by_its_name(tmp_path):
    run = {"choices": {"experiment": "None"}, "name": "digits/deq_lbroyden"}
    assert rows(tmp_path, run)[0].label.experiment == "digits"
    assert rows(tmp_path / "x", {**run, "name": "mine"})[0].label.experiment == "mine"


def test_rows_are_in_the_published_order(tmp_path):
    models = ("residual", "explicit", "neural_ode", "mdeq", "skip_reg_deq", "skip_deq", "deq")
    runs = [
        {"choices": {"model": model, "solver": solver}, **with_settings(loss__jacobian=weight)}
        for model in models
        for solver in ("vcab3", "lbroyden")
        for weight in (1.0, 0.0)
    ]
    made = [row.label for row in rows(tmp_path, *runs)]
    order = ["DEQ", "Skip DEQ", "Skip Reg. DEQ", "Multiscale DEQ", "Neural ODE", "Explicit"]
    order.append("Residual")
    assert list(dict.fromkeys(label.model for label in made)) == order
    first = [(label.continuous, label.jacobian) for label in made[:4]]
    assert first == [(False, False), (False, True), (True, False), (True, True)]


# Metrics


def test_seconds_of_different_devices_have_no_mean(tmp_path):
    (row,) = rows(tmp_path, {}, {"device": "NVIDIA H200", "metrics": {"test/accuracy": 0.99}})
    assert row.metrics["test/accuracy"].mean == pytest.approx(0.985)
    assert row.metrics["test/seconds"].mean is None
    assert row.metrics["training_minutes"].mean is None


def test_a_metric_that_some_runs_lack_is_that_of_the_others(tmp_path):
    (row,) = rows(tmp_path, {}, {"metrics": {"test/accuracy_top5": 0.5}})
    metric = row.metrics["test/accuracy_top5"]
    assert (metric.mean, metric.deviation, metric.n) == (0.5, None, 1)


# What paths lead to


def test_a_run_found_in_several_ways_counts_once(tmp_path):
    run = write_run(tmp_path / "outputs" / "mnist_fc" / "deq" / "1")
    sweep = tmp_path / "outputs" / "multirun" / "1"
    write_job(sweep, 0, run)
    (tmp_path / "link").symlink_to(tmp_path / "outputs")
    (tmp_path / "outputs" / "back").symlink_to(tmp_path / "outputs")
    paths = [run, sweep, tmp_path / "outputs", tmp_path / "link", tmp_path]
    found = find_runs(paths)
    assert list(found.runs) == [run]
    assert not found.failed
    assert not found.unfinished


def test_files_that_loggers_keep_in_a_run_are_not_runs(tmp_path):
    run = write_run(tmp_path / "run")
    write_run(run / "wandb" / "files")
    assert list(find_runs([tmp_path]).runs) == [run]


def test_a_sweep_leads_to_its_runs_and_reports_the_others(tmp_path):
    sweep = tmp_path / "multirun" / "1"
    write_job(sweep, 0, write_run(tmp_path / "a"))
    write_job(sweep, 2, None, error="out of memory", model="deq", seed="2")
    write_job(sweep, 10, unfinished_run(tmp_path / "b"), error="NaN")
    write_job(sweep, 11, unfinished_run(tmp_path / "c"))
    write_job(sweep, 12, tmp_path / "gone", seed="3")
    found = find_runs([sweep, tmp_path])
    assert list(found.runs) == [tmp_path / "a"]
    assert tmp_path / "c" in found.unfinished
    cure = f"its folder {tmp_path / 'gone'} is not there: give the folder above its runs instead"
    assert list(found.failed.values()) == [
        f"job 2 of {sweep} failed (model=deq seed=2): out of memory",
        f"job 10 of {sweep} failed (): NaN",
        f"job 12 of {sweep} is missing (seed=3): {cure}",
    ]
