"""Which runs are the same: one answer for resuming, for the folders of a sweep and for reports."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from fastdeq.experiment.build import link
from fastdeq.report import make_rows
from fastdeq.runs.identity import FREE, digest, identity, leaves
from fastdeq.runs.reading import Run
from fastdeq.runs.resuming import check_same, same_run_beside
from tests.commands import SHORT, CommandLine
from tests.configurations import composed
from tests.experiment.run_folders import summary

CONFIGURATIONS = (
    ("data=mnist", "model=deq", "logger=wandb"),
    ("data=image_folder", "model=skip_mdeq", "trainer=ddp"),
    ("data=polynomial", "loss.skip=2", "scheduler=staircase", "optimizer=sgd"),
)

OTHERS = {"seed": 9, "arch.normalization": "group"}
"""Values of keys that do not take just any."""


def plain(cfg: DictConfig) -> dict[str, Any]:
    resolved: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    return resolved


def changed(cfg: DictConfig, key: str, value: Any) -> dict[str, Any]:
    """The resolved configuration with another value, and with all that is made of it."""
    other = cfg.copy()
    OmegaConf.update(other, key, value, merge=False)
    return plain(other)


def run_of(config: dict[str, Any]) -> Run:
    """A finished run, as a report reads it."""
    return Run(
        folder=Path("run"),
        summary=summary(config, {}, {}, None, {}),
        settings=leaves(config),
        identity=identity(config),
    )


def same(one: dict[str, Any], other: dict[str, Any]) -> tuple[bool, bool]:
    """Whether a run of the one resumes the other's, and whether a report puts both in one row."""
    resumes = digest(identity(one)) == digest(identity(other))
    return resumes, len(make_rows(map(run_of, (one, other)))) == 1


def is_free(key: str) -> bool:
    return any(key == node or key.startswith(f"{node}.") for node in FREE)


def values_of(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All values that are typed or interpolated, by their keys as Hydra reads them."""
    if not node or not isinstance(node, dict | list):
        yield key, node
        return
    for name, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield from values_of(value, f"{key}.{name}".lstrip("."))


@pytest.mark.parametrize("choices", CONFIGURATIONS, ids=" ".join)
def test_a_key_changes_both_the_identity_and_the_row_or_neither(choices: tuple[str, ...]) -> None:
    cfg = composed(*choices)
    config = plain(cfg)
    assert same(config, config) == (True, True)
    for key, value in values_of(OmegaConf.to_container(cfg)):
        OmegaConf.update(cfg, key, OTHERS.get(key, "another"), merge=False)
        found = same(config, plain(cfg))
        OmegaConf.update(cfg, key, value, merge=False)
        if key.rpartition(".")[2] == "seed":
            assert found == (False, True), key  # a report takes the mean over seeds
        else:
            assert found == (is_free(key), is_free(key)), key


@pytest.mark.parametrize(
    ("key", "value", "is_same"),
    [
        *(("stop_after", 60, True), ("resume", "never", True), ("debug", True, True)),
        *(("data.workers", 0, True), ("data.verify", True, True), ("data.root", "/a", True)),
        *(("callbacks.resumption.minutes", 1, True), ("callbacks.resumption.steps", 9, True)),
        *(("trainer.log_every_n_steps", 1, True), ("trainer.devices", 2, True)),
        *(("paths.run", "/a", True), ("from_run", "/a", True), ("reference", {"seeds": 3}, True)),
        *(("solver.tol", 0.5, False), ("trainer.precision", "bf16-mixed", False)),
        *(("precision", "bf16", False), ("memory_format", "channels_last", True)),
        *(("compile", True, True), ("adjoint.order", 1, True)),
        ("adjoint.order", 2, False),
        *(("data.extra", False, True), ("data.skip_unreadable", False, True)),
        *(("data.test_share", 0.0, True), ("data.test_seed", 0, True)),
        *(("data.eval_batch_size", 7, False), ("data.crop_share", 0.5, False)),
        *(
            ("callbacks.failures.on_failure", "raise", False),
            ("callbacks.pretraining.steps", 7, False),
        ),
        *(("checkpoint", "a.ckpt", False), ("name", "mine", False)),
    ],
)
def test_what_the_results_do_not_depend_on_is_not_part_of_the_identity(
    key: str, value: Any, is_same: bool
) -> None:
    cfg = composed("data=image_folder")
    assert same(plain(cfg), changed(cfg, key, value)) == (is_same, is_same)


def test_every_key_of_the_list_is_one_of_a_configuration() -> None:
    known = [key for each in CONFIGURATIONS for key, _ in values_of(plain(composed(*each)))]
    for node in FREE:
        assert any(key == node or key.startswith(f"{node}.") for key in known), node


@pytest.mark.parametrize("key", ["optimizer", "weights", "schedule"])
def test_what_the_task_is_given_in_place_of_the_chosen_group_counts(key: str) -> None:
    cfg = composed("scheduler=cosine")
    assert same(plain(cfg), changed(cfg, f"task.{key}", {"lr": 1})) == (False, False)


def test_an_earlier_layout_that_repeats_whole_nodes_is_the_same_run() -> None:
    for model in ("deq", "skip_deq", "skip_mdeq", "explicit", "residual"):
        cfg = composed(f"model={model}", "data=mnist", "scheduler=cosine")
        old = plain(link(cfg))
        assert isinstance(old["model"]["stem"], dict)
        assert old["task"]["model"] == old["model"]
        assert identity(old) == identity(plain(cfg)), model
        OmegaConf.update(cfg, "solver.tol", 0.5)
        assert (identity(plain(link(cfg))) == identity(old)) is False, model


def test_equal_numbers_are_the_same_but_not_one_batch_and_all_batches() -> None:
    cfg = composed("model=skip_deq")
    assert same(changed(cfg, "loss.jacobian", 1), changed(cfg, "loss.jacobian", 1.0)) == (
        True,
        True,
    )
    for key in ("limit_train_batches", "limit_val_batches", "overfit_batches"):
        one, whole = (changed(cfg, f"trainer.{key}", value) for value in (1, 1.0))
        assert same(one, whole) == (False, False), key


def test_a_key_without_a_value_is_the_same_as_none() -> None:
    config = plain(composed("model=skip_deq"))
    config["trainer"] |= {"profiler": None}
    assert same(plain(composed("model=skip_deq")), config) == (True, True)


def test_an_ode_tol_of_null_as_in_earlier_versions_is_tol() -> None:
    for published in ("experiment=dynamics", "experiment=cifar10_tiny"):
        cfg = composed(published, "solver=vcab3")
        assert same(changed(cfg, "solver.ode_tol", None), plain(cfg)) == (True, True)
    cfg = composed("solver=vcab3", "solver.tol=1e-3")
    old = changed(cfg, "solver.ode_tol", None)
    assert same(old, plain(cfg)) == (False, False)
    assert same(old, changed(cfg, "solver.ode_tol", 1e-3)) == (True, True)


def test_a_folder_is_refused_for_one_batch_in_place_of_all(tmp_path: Path) -> None:
    cfg = composed("model=skip_deq")
    OmegaConf.save(cfg, tmp_path / "config.yaml", resolve=True)
    check_same(tmp_path, changed(cfg, "trainer.log_every_n_steps", 3))
    with pytest.raises(FileExistsError, match=r"trainer\.limit_train_batches"):
        check_same(tmp_path, changed(cfg, "trainer.limit_train_batches", 1))


def test_a_run_that_an_earlier_version_named_differently_is_found(tmp_path: Path) -> None:
    cfg = composed("model=skip_deq", "seed=3")
    for number, seed in (("0123456789ab", 2), ("ba9876543210", 3), ("not_a_sweeps_run", 3)):
        (tmp_path / number).mkdir()
        saved = OmegaConf.create(changed(cfg, "seed", seed))
        OmegaConf.save(saved, tmp_path / number / "config.yaml")
    new = tmp_path / digest(identity(plain(cfg)))
    assert same_run_beside(new, plain(cfg)) == tmp_path / "ba9876543210"
    assert same_run_beside(new, changed(cfg, "seed", 4)) is None


def test_a_sweep_that_an_earlier_version_has_made_is_done(command: CommandLine) -> None:
    sweep = ("-m", *SHORT, "seed=0")
    (made,) = [path for path in command(*sweep).files if path.name == "config.yaml"]
    made.parent.rename(made.parent.with_name("0123456789ab"))
    again = command(*sweep)
    assert again.status == 0, again.err
    assert "done already" in again.out
    assert sum(path.name == "config.yaml" for path in again.files) == 1


def test_a_run_of_an_earlier_version_is_the_same_run_though_its_classes_have_moved():
    config = composed("data=digits")
    text = OmegaConf.to_yaml(OmegaConf.create(plain(config)))
    for name, place in (("Failures", "callbacks"), ("ClassificationTask", "tasks")):
        assert f"fastdeq.training.{name}" in text
        text = text.replace(f"fastdeq.training.{name}", f"fastdeq.{place}.{name}")
    assert identity(yaml.safe_load(text)) == identity(plain(config))
