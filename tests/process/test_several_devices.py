"""``trainer=ddp_cpu``: several processes on one machine, started without a second Hydra."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.commands import ROOT, CommandLine
from tests.processes import children, command_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
]

# 37 test samples a batch: the last of 360 has 27, and no batch divides by two or three.
RUN = (
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=3",
    "trainer.accelerator=cpu",
    "data.eval_batch_size=37",
    "model=skip_deq",
)


def content(folder: Path) -> dict[str, object]:
    loaded: dict[str, object] = json.loads((folder / "summary.json").read_text())
    return loaded


def metrics(folder: Path) -> dict[str, float]:
    found = content(folder)["metrics"]
    assert isinstance(found, dict)
    return {name: value for name, value in found.items() if "seconds" not in name}


def run(command: CommandLine, *overrides: str) -> Path:
    before = set(command.folder.rglob("summary.json"))
    answer = command(*RUN, *overrides)
    assert answer.status == 0, answer.err
    (added,) = set(command.folder.rglob("summary.json")) - before
    return added.parent


def test_one_two_and_three_processes_have_the_same_metrics(command: CommandLine) -> None:
    single = run(command)
    for ranks in (2, 3):
        several = run(command, "trainer=ddp_cpu", f"trainer.devices={ranks}")
        assert content(several)["devices"] == ranks
        assert content(several)["steps"] == content(single)["steps"] == 3
        alone, together = metrics(single), metrics(several)
        assert set(alone) == set(together)
        for name, value in alone.items():
            # Counts are equal; what is averaged was added up in another order, in float32.
            exact = name.endswith("accuracy")
            if name.endswith("spectral_radius"):  # of the samples of the first process
                continue
            assert together[name] == pytest.approx(value, rel=0 if exact else 2e-3, abs=1e-7), name


@pytest.mark.parametrize(("on_failure", "megabytes"), [("warn", 25), ("skip_step", 0.01)])
def test_a_step_exchanges_averaged_gradients_and_nothing_else(
    command: CommandLine, on_failure: str, megabytes: float
) -> None:
    folder = run(
        *(command, "trainer=ddp_cpu", "model=skip_mdeq", "arch.normalization=batch"),
        *("arch.channels=[4,4]", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"),
        *("solver.max_steps=5", "callbacks.failures.unconverged=null"),
        *(f"+trainer.strategy.bucket_cap_mb={megabytes}", "trainer.limit_train_batches=5"),
        f"callbacks.failures.on_failure={on_failure}",
        "+callbacks.exchanged._target_=tests.process.faults.Exchanged",
    )
    for rank in (0, 1):
        exchanged = (folder / f"exchanged.{rank}").read_text().splitlines()
        assert set(exchanged) == {"gloo:all_reduce"}
        if megabytes == 25:  # all gradients in one bucket, in each of two steps
            assert len(exchanged) == 2
        else:
            assert len(exchanged) > 2


def test_two_jobs_of_two_processes_make_two_run_folders(command: CommandLine) -> None:
    answer = command(
        "-m", *RUN, "seed=1,2", "trainer=ddp_cpu", "trainer.devices=2", "logger=tensorboard"
    )
    assert answer.status == 0, answer.err
    names = [path.parent for path in answer.files if path.name == "config.yaml"]
    assert len(names) == len({content(folder)["seed"] for folder in names}) == 2
    outputs = command.folder / "outputs"
    assert sorted(path.name for path in outputs.iterdir()) == ["digits", "multirun"]
    assert len(list((outputs / "multirun").iterdir())) == 1
    for folder in names:
        assert (folder / "train.log").read_text().count("run folder") == 1
        # events.out.tfevents.<time>.<host>.<process>.<count>: the first process alone writes.
        writers = {path.name.split(".")[-2] for path in folder.glob("tensorboard/events*")}
        assert len(writers) == 1


def test_a_process_that_fails_ends_the_run_with_its_error(command: CommandLine) -> None:
    broken = "+callbacks.broken._target_=tests.process.faults.FailingRank"
    answer = command(*RUN, "trainer=ddp_cpu", "trainer.devices=2", broken, "paths.run=mine")
    assert answer.status == 1
    assert answer.err.splitlines()[-1] == "error: a process failed: RuntimeError: the second fails"
    assert not [path for path in answer.files if path.name == "summary.json"]
    # The others' failures follow from the first one's, whose traceback is the last in the log.
    log = (command.folder / "mine" / "train.log").read_text()
    last = log.rpartition("the run failed")[2]
    assert "on_train_batch_start" in last
    assert last.rstrip().endswith("\nRuntimeError: the second fails")


def test_steps_that_fail_are_those_of_all_processes(command: CommandLine) -> None:
    few = ("solver.max_steps=2", "callbacks.failures.unconverged_in_a_row=2")
    answer = command(*RUN, "trainer=ddp_cpu", *few, "paths.run=mine")
    assert answer.status == 1
    last = answer.err.splitlines()[-1]
    assert last.startswith(
        "error: the last 2 steps in a row failed; at the first of them 32 of 32 "
    )
    assert last.endswith("step 1 again: python train.py mode=replay from_run=mine")
    assert (command.folder / "mine" / "failure.ckpt").exists()


def test_a_process_that_is_killed_ends_the_run_and_the_others(command: CommandLine) -> None:
    endless = ("trainer.max_epochs=100000", "trainer.limit_val_batches=0")
    with subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *RUN, "trainer=ddp_cpu", *endless],
        cwd=command.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        assert next(line for line in parent.stdout if line.startswith("3/"))  # under way
        workers = [pid for pid in children(parent.pid) if "spawn_main" in command_of(pid)]
        assert len(workers) == 2
        os.kill(max(workers), signal.SIGKILL)
        _, err = parent.communicate(timeout=120)
    assert parent.returncode == 1
    assert "SIGKILL" in err.splitlines()[-1]
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
