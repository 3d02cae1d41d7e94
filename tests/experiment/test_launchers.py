"""``train.py -m`` with jobs in other processes: the same table, the same failures, and searches."""

import json
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from fastdeq import extras
from tests.commands import ROOT, SHORT, Answer, CommandLine

pytestmark = pytest.mark.slow

FILES = sorted((ROOT / "conf" / "hydra" / "launcher").glob("*.yaml"))
PLUGINS = {
    "joblib": "hydra_plugins.hydra_joblib_launcher",
    "submitit_local": "hydra_plugins.hydra_submitit_launcher",
    "submitit_slurm": "hydra_plugins.hydra_submitit_launcher",
    "search": "hydra_plugins.hydra_optuna_sweeper",
}


def installed(name: str) -> bool:
    """Whether the plugin is there."""
    return extras.is_installed(PLUGINS[name])


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not installed(name), reason=f"{PLUGINS[name]} is not installed")


def summaries(answer: Answer) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in answer.files if path.name == "summary.json"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [pytest.param(name, marks=needs(name)) for name in ("joblib", "submitit_local")],
)
def test_jobs_in_other_processes_end_in_the_same_table_and_their_failures_are_named(
    command: CommandLine, launcher: str
) -> None:
    given = ("solver=newton_krylov,lbroyden", "adjoint=unrolled")
    answer = command.process("-m", f"hydra/launcher={launcher}", *SHORT, *given)
    assert answer.status == 1
    last = answer.err.splitlines()[-1]
    assert last.startswith("job 0 failed (")
    assert "Implicit adjoint" in last
    table = [line for line in answer.out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["newton_krylov", "lbroyden"]
    commands = [str(summary["command"]) for summary in summaries(answer)]
    assert len(commands) == 1  # whatever started the process: what the job is
    train = "fastdeq train" if launcher == "submitit_local" else "python train.py"
    assert all(text.startswith(f"{train} ") and " solver=" in text for text in commands)
    assert not [line for line in answer.err.splitlines() if "warn" in line.lower()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what optuna imports
@needs("search")
def test_a_search_tries_values_of_an_interval(command: CommandLine) -> None:
    search = ("hydra/sweeper=search", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1")
    answer = command("-m", *search, *SHORT, "solver.tol=interval(1e-4,1e-2)")
    assert answer.status == 0, answer.err
    folders = [path.parent for path in answer.files if path.name == "summary.json"]
    tols = [OmegaConf.load(folder / "config.yaml").solver.tol for folder in folders]
    assert len(set(tols)) == 3
    assert all(1e-4 <= tol <= 1e-2 for tol in tols)
    best, repeat = answer.out.splitlines()[-2:]
    assert best.startswith("best trial: job ")
    assert repeat.startswith("its command: python train.py ")


@needs("search")
def test_the_ends_of_an_interval_are_checked_before_the_search(command: CommandLine) -> None:
    answer = command("-m", "hydra/sweeper=search", *SHORT, "solver.nol=interval(0,1)")
    assert answer.status == 1
    assert "there is no key 'solver.nol'" in answer.err
    assert not answer.files
    answer = command("-m", "hydra/sweeper=search", *SHORT, "solver.tol=interval(-1,1)")
    assert answer.err.startswith("error: solver.tol is -1")
    assert not answer.files


def test_a_launcher_that_is_not_installed_names_its_extra(
    command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "is_installed", lambda package: False)
    for name, extra in (("joblib", "joblib"), ("submitit_local", "cluster")):
        answer = command("-m", f"hydra/launcher={name}", *SHORT, "seed=1,2")
        assert answer.status == 1
        assert answer.err.startswith(f"error: hydra/launcher={name} needs hydra_plugins.")
        assert answer.err.endswith(f'[{extra}]"\n')
        assert len(answer.err.splitlines()) == 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_launcher_has_the_class_and_no_other_keys_than_its_plugin(path: Path) -> None:
    if not installed(path.stem):
        pytest.skip(f"{PLUGINS[path.stem]} is not installed")
    Plugins.instance()  # which registers them
    theirs = ConfigStore.instance().load(f"hydra/launcher/{path.name}").node
    ours = OmegaConf.load(path)
    assert set(ours) <= set(theirs)
    assert ours._target_ == theirs._target_


@needs("submitit_slurm")
def test_a_value_of_the_wrong_type_is_named_with_its_key(command: CommandLine) -> None:
    given = ("hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=soon")
    answer = command("-m", *given, *SHORT, "seed=1,2")
    assert answer.status == 1
    assert answer.err.splitlines()[-1].startswith("error: hydra.launcher.timeout_min: Value 'soon'")
