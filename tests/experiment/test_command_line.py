"""What a person can do with train.py beside a plain run: help, completion, runs from runs."""

import csv
import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from fastdeq.experiment.renamed import current_all
from tests.commands import SHORT, CommandLine, a_run
from tests.configurations import GROUPS

pytestmark = pytest.mark.slow


def summary(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / "summary.json").read_text())
    return content


def metrics(folder: Path) -> dict[str, float]:
    """Of the final test, without times."""
    found = summary(folder)["metrics"]
    assert isinstance(found, dict)
    return {
        name: value
        for name, value in found.items()
        if name.startswith("test/") and "seconds" not in name
    }


def newest(command: CommandLine, *arguments: str) -> Path:
    """Run, and return the folder that came with it."""
    before = set(command.folder.rglob("summary.json"))
    answer = command(*arguments)
    assert answer.status == 0, answer.err
    (added,) = set(command.folder.rglob("summary.json")) - before
    return added.parent


def test_help_names_every_choice_of_every_group_and_leaves_nothing(command: CommandLine) -> None:
    answer = command("--help")
    assert answer.status == 0
    for group, choices in GROUPS.items():
        assert f"\n{group}: {', '.join(choices)}\n" in answer.out
    for word in ("python train.py -m", "from_run=", "mode=test", 'eval "$(python train.py -sc'):
        assert word in answer.out
    lists = tuple(f"{group}: " for group in GROUPS)  # one line each, however many choices
    assert all(len(line) <= 110 for line in answer.out.splitlines() if not line.startswith(lists))
    assert answer.files == []


def test_the_configuration_is_printed_without_a_run(command: CommandLine) -> None:
    answer = command("--cfg", "job", "model=deq", "solver.tol=1e-4")
    assert answer.status == 0
    assert OmegaConf.create(answer.out).solver.tol == 1e-4
    assert answer.files == []


def test_the_solver_is_printed_once_with_the_settings_that_are_not_defaults(
    command: CommandLine,
) -> None:
    out = command(*SHORT, "solver=anderson", "solver.tol=1e-4", "solver.memory=4").out
    assert out.count("Anderson(") == 1
    assert "Anderson(tol=0.0001, memory=4)\n" in out


def test_no_bar_is_drawn_where_nobody_watches(command: CommandLine) -> None:
    out = command(*SHORT).out
    assert "\r" not in out
    assert "\x1b" not in out


# Runs from runs


def test_testing_a_run_gives_its_metrics_again(command: CommandLine) -> None:
    trained = a_run(command, "seed=3", "arch.width=32")
    for weights in ((), (f"checkpoint={trained / 'last.ckpt'}",)):
        tested = newest(command, "mode=test", f"from_run={trained}", *weights)
        assert metrics(tested) == metrics(trained)
        assert summary(tested)["mode"] == "test"
        assert not list(tested.glob("*.ckpt"))
        assert (tested / "test.log").exists()


def test_a_checkpoint_is_tested_under_other_settings(command: CommandLine) -> None:
    trained = a_run(command)
    exact = newest(command, "mode=test", f"from_run={trained}", "solver.tol=1e-6")
    assert metrics(exact)["test/residual"] < 1e-6 < metrics(trained)["test/residual"]
    assert metrics(exact)["test/nfe"] > metrics(trained)["test/nfe"]


def test_training_continues_from_the_weights_of_a_checkpoint(command: CommandLine) -> None:
    first = a_run(command)
    second = newest(command, *SHORT, f"checkpoint={first / 'last.ckpt'}", "optimizer.lr=0.0")
    old, new = (
        torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (first, second)
    )
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_run_from_a_run_has_its_overrides_and_those_typed_now(command: CommandLine) -> None:
    first = a_run(command, "model=deq", "solver=anderson", "solver.tol=1e-2", "seed=5")
    second = newest(command, f"from_run={first}", "seed=6", "solver.tol=1e-3")
    config = OmegaConf.load(second / "config.yaml")
    assert config.solver._target_ == "fastdeq.solvers.Anderson"
    assert (config.seed, config.solver.tol, config.trainer.max_epochs) == (6, 1e-3, 1)
    choices = summary(second)["choices"]
    assert isinstance(choices, dict)
    assert choices["model"] == "deq"
    # And a third from the second, as from any other.
    third = newest(command, f"from_run={second}")
    assert OmegaConf.load(third / "config.yaml").seed == 6


def test_overrides_of_an_earlier_version_are_run_in_todays_words(
    command: CommandLine, tmp_path: Path
) -> None:
    earlier = ["model=deq", "skip_weight=5", "arch_for/deq=fc", "paths=default", "reference=null"]
    (tmp_path / "overrides.json").write_text(json.dumps([*SHORT[:-1], *earlier]))
    run = newest(command, f"from_run={tmp_path}")
    assert OmegaConf.load(run / "config.yaml").loss.skip == 5
    assert summary(run)["choices"]["model"] == "deq"  # type: ignore[index]
    for saved, today in (
        (["skip_weight=5", "loss=plain"], ["loss.skip=0.0"]),
        (["loss=skip", "skip_weight=0.1"], ["loss.skip=0.1"]),
        (["+experiment=a", "logger=all"], ["+experiment=a", "logger=[tensorboard,wandb]"]),
        (
            ["sweep=polynomial_fitting", "model=deq", "seed=11"],
            ["sweep=single_scale", "experiment=polynomial_fitting", "model=deq", "seed=11"],
        ),
        (
            ["experiment=svhn_tsit5", "data.batch_size=8"],
            [
                *("experiment=svhn", "solver=tsit5", "data.batch_size=64"),
                *("data.eval_batch_size=64", "data.batch_size=8"),
            ],
        ),
    ):
        assert current_all(saved) == today


def test_the_same_run_again_gives_the_same_metrics(command: CommandLine) -> None:
    first = a_run(command, "model=deq", "seed=5")
    assert metrics(newest(command, f"from_run={first}")) == metrics(first)


# What is written


def test_every_metric_of_the_summary_is_in_the_metrics(command: CommandLine) -> None:
    folder = a_run(command, "model=skip_deq")
    with (folder / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    found = summary(folder)["metrics"]
    assert isinstance(found, dict)
    assert {name.split("/")[0] for name in found} == {"train", "val", "test"}
    for name, value in found.items():
        written = [row[name] for row in rows if row.get(name)]
        assert float(written[-1]) == value, name


def test_the_summary_says_how_the_metrics_were_made(command: CommandLine) -> None:
    folder = a_run(command, "seed=2")
    content = summary(folder)
    assert {"versions", "commit", "dirty", "seed", "device", "command", "host"} <= set(content)
    command_line = content["command"]
    assert isinstance(command_line, str)
    assert command_line.endswith("seed=2")
    assert content["devices"] == 1
    for word in ("run folder", "solver", "measured"):
        assert word in (folder / "train.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["one_batch", "overfit"])
def test_the_settings_for_debugging_train(command: CommandLine, chosen: str) -> None:
    folder = newest(
        *(command, f"trainer={chosen}", "trainer.accelerator=cpu", "debug=true", "model=deq"),
        "data.batch_size=32",
    )
    content = summary(folder)
    assert content["steps"] == (1 if chosen == "one_batch" else 100)
    if chosen == "overfit":
        found = content["metrics"]
        assert isinstance(found, dict)
        assert found["train/accuracy"] == 1.0


@pytest.mark.filterwarnings("ignore:f is not finite", "ignore:Anomaly Detection")
def test_with_debug_a_nan_is_found_where_it_arises(command: CommandLine) -> None:
    answer = command(*SHORT, "trainer.limit_train_batches=9", "debug=true", "optimizer.lr=1e30")
    assert answer.status == 1
    assert "Traceback (most recent call last)" in answer.err
    assert "returned nan values" in answer.err.splitlines()[-1]


# Flags, paths, and values that other libraries refuse


def test_flags_may_stand_anywhere_among_the_overrides(command: CommandLine) -> None:
    run, seeds = f"from_run={a_run(command, 'seed=5')}", "seed=1,2"
    for done, place in ((0, ("-m", run, seeds)), (2, (run, "-m", seeds)), (2, (seeds, "-m", run))):
        answer = command(*place)
        assert answer.status == 0, answer.err
        assert answer.out.count("done already") == done  # it is the same sweep
        assert "mean ± standard deviation over seeds" in answer.out
        found = [summary(path.parent)["seed"] for path in command.folder.rglob("summary.json")]
        assert sorted(found) == [1, 2, 5]  # type: ignore[type-var]


def test_a_flag_with_a_value_keeps_it(command: CommandLine) -> None:
    answer = command("seed=3", "--cfg", "job", "model=deq", "--package", "solver")
    assert answer.status == 0, answer.err
    assert "max_steps: 50" in answer.out  # of the solver's node alone
    assert "seed" not in answer.out


@pytest.mark.parametrize("flags", [("hydra.run.dir=there",), ("-m", "seed=1,2")])
def test_paths_are_relative_to_where_the_command_started_whatever_hydra_does(
    command: CommandLine, flags: tuple[str, ...]
) -> None:
    weights = a_run(command).relative_to(command.folder) / "last.ckpt"
    answer = command(
        *(*SHORT, "hydra.job.chdir=true", *flags),
        *("paths.outputs=outs", f"checkpoint={weights}"),
    )
    assert answer.status == 0, answer.err
    assert "warning: hydra.job.chdir has no effect" in answer.out
    shown = [line.removeprefix("see ") for line in answer.out.splitlines() if line[:4] == "see "]
    assert len(shown) == (2 if "-m" in flags else 1)
    for folder in shown:
        assert (command.folder / folder / "summary.json").exists()
    if "-m" in flags:  # the table has found its jobs
        assert "mean ± standard deviation over seeds" in answer.out


REFUSED = {
    "seed=99999999999": "seed is 99999999999, but must be finite and at least 0 and at "
    "most 4294967295",
    "seed=4294967296": "seed is 4294967296,",
    "optimizer.lr=-0.1": "optimizer.lr is -0.1, but must be finite and at least 0",
    "optimizer.weight_decay=-1": "optimizer.weight_decay is -1,",
    "+optimizer.betas=[0.9,1.5]": "optimizer.betas=[0.9,1.5]",
    "+optimizer.betas=[0.9]": "optimizer.betas is [0.9],",
    "+optimizer.eps=-1": "optimizer.eps=-1",
    "optimizer=sgd optimizer.momentum=-1": "optimizer.momentum=-1",
    "optimizer=sgd optimizer.momentum=0": "optimizer.momentum=0",
    "optimizer=sgd optimizer.lr=-1 optimizer.momentum=-1": "optimizer.lr is -1,",
    "+optimizer.fused=true +optimizer.foreach=true": "optimizer.fused=true",
    "trainer.limit_val_batches=1.5": "trainer.limit_val_batches=1.5",
    "trainer.num_nodes=0": "trainer.num_nodes is 0,",
    "+trainer.val_check_interval=1.5": "trainer.val_check_interval=1.5",
    "+trainer.max_time=soon": "trainer.max_time=soon",
    "+trainer.gradient_clip_algorithm=none": "trainer.gradient_clip_algorithm is 'none'",
    "trainer.check_val_every_n_epoch=0": "trainer.check_val_every_n_epoch is 0,",
    "+trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches is 0,",
}
"""By others (PyTorch, NumPy, Lightning), in words of their own: the line has what was typed."""


@pytest.mark.slow
def test_values_that_other_libraries_refuse_are_named_with_their_key(command: CommandLine) -> None:
    for typed, wanted in REFUSED.items():
        answer = command(*SHORT, *typed.split())
        assert answer.status == 1, typed
        assert answer.err.startswith("error: "), answer.err
        assert wanted in answer.err, answer.err
        assert answer.err.count("\n") == 1, answer.err
        assert answer.files == []
