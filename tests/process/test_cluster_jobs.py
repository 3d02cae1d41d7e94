"""``fastdeq jobs`` without a Slurm, and what Slurm's variables mean to a run."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("submitit")
pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

from fastdeq.cluster.command import ACTIONS, main
from fastdeq.cluster.record import newest, read_submission
from fastdeq.experiment.checks import count_ranks
from fastdeq.experiment.rendezvous import current_step, is_worker, rendezvous
from fastdeq.experiment.submission import check_tasks
from tests.commands import SHORT, CommandLine

STEP = {
    "SLURM_JOB_ID": "8123",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_PROCID": "3",
}
SEVERAL = {"strategy": {}, "accelerator": "cpu"}


@pytest.fixture
def _step(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is the last of four tasks on two nodes."""
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    for name in ("SLURM_NTASKS_PER_NODE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    current_step.cache_clear()
    yield
    current_step.cache_clear()
    rendezvous.cache_clear()


@pytest.mark.usefixtures("_step")
def test_a_task_of_several_is_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    step = current_step()
    assert step is not None
    assert (step.rank, step.ranks, step.nodes, step.address) == (3, 4, 2, "node07")
    assert 15000 <= step.port < 31000
    assert is_worker()


@pytest.mark.usefixtures("_step")
@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "SLURM_PROCID"])
def test_a_batch_script_is_not_one_of_several_tasks(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv(variable)
    assert current_step() is None
    assert not is_worker()


@pytest.mark.usefixtures("_step")
def test_there_must_be_as_many_tasks_as_devices() -> None:
    assert count_ranks({"devices": 2, "num_nodes": 2, **SEVERAL}) == 4
    for devices, nodes in ((4, 1), (4, 2), (1, 2)):
        with pytest.raises(ValueError, match="srun has started 4 tasks on 2 nodes"):
            count_ranks({"devices": devices, "num_nodes": nodes, **SEVERAL})


def test_several_nodes_need_a_cluster() -> None:
    with pytest.raises(ValueError, match=r"num_nodes is 2: .*slurm/one_run\.sbatch"):
        count_ranks({"devices": 2, "num_nodes": 2, **SEVERAL})


def test_gpus_of_a_submission_are_counted_but_not_guessed() -> None:
    gpus = {"accelerator": "gpu", "strategy": {}}
    assert count_ranks({"devices": 4, "num_nodes": 2, **gpus}, for_submission=True) == 8
    with pytest.raises(ValueError, match="not known before the job starts"):
        count_ranks({"devices": "auto", **gpus}, for_submission=True)


def test_fewer_gpus_than_devices_are_refused() -> None:
    launcher = {"tasks_per_node": 4, "nodes": 1, "gpus_per_node": 2}
    trainer = {"devices": 4, "num_nodes": 1, "accelerator": "gpu"}
    with pytest.raises(ValueError, match=r"gpus_per_node is 2, but trainer\.devices is 4"):
        check_tasks(launcher, trainer)


def test_what_is_listed_is_what_a_sweep_runs(
    command: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ("model=deq,skip_deq", "seed=1,2", "name='two words'")
    assert main(["list", "-m", *SHORT[:-1], *grid]) == 0
    listed = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert command("-m", *SHORT[:-1], *grid).status == 0
    ran = [json.loads(path.read_text()) for path in command.folder.rglob("overrides.json")]
    assert sorted(map(sorted, listed)) == sorted(map(sorted, ran))


def test_a_shipped_grid_is_listed_and_can_be_narrowed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "sweep=single_scale", "experiment=polynomial_fitting", "seed=1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        ([], 2, "required: ACTION (see "),
        (["--help"], 0, "fastdeq jobs submit sweep=single_scale experiment=mnist_fc"),
        (["statu"], 2, "unknown action 'statu': did you mean status?"),
        (["status", "--sweeps=x"], 2, "unknown option '--sweeps': did you mean --sweep?"),
        (["status", "--sweep"], 2, "--sweep: expected one argument"),
        (["list", "--cfg"], 2, "unknown option '--cfg'"),
        (["logs", "--sweep=x"], 2, "required: N (see "),
        (["status"], 1, "holds no sweep that was submitted"),
        (["status", "--sweep=x"], 1, "x is not a submitted sweep"),
        (["list", "model=none"], 1, "there is no model=none"),
        (["list", "hydra/launcher=joblib"], 1, "train -m"),
        (["list", "hydra/sweeper=search", "seed=1"], 1, "a search does not know its jobs"),
    ],
)
def test_a_command_that_cannot_be_understood_ends_in_a_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == status
    printed = capsys.readouterr()
    assert text in printed.out + printed.err
    assert len(printed.err.splitlines()) <= 1


def test_the_help_names_every_action(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"\n    {action} " in printed for action in ACTIONS)


def test_the_newest_submission_is_found_and_a_damaged_one_named(tmp_path: Path) -> None:
    for stamp, content in (("2026-01-01", '{"jobs": []}'), ("2026-02-01", '{"jobs": [{}]}')):
        (tmp_path / "multirun" / stamp).mkdir(parents=True)
        (tmp_path / "multirun" / stamp / "submission.json").write_text(content)
    assert read_submission(tmp_path / "multirun" / "2026-01-01") == []
    assert newest(tmp_path).name == "2026-02-01"
    with pytest.raises(ValueError, match="is damaged"):
        read_submission(newest(tmp_path))
