"""What goes along with the averaged gradients of two processes."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from fastdeq.data import Batch
from fastdeq.experiment.launch import free_port, leave
from fastdeq.training import Failures, PayloadDDPStrategy, Resumption, payload_strategy
from tests.processes import start_ranks
from tests.training.failing import NAN, task_of
from tests.training.tasks import make_trainer, samples, trained

WORLD = 2
WHOLE = samples(5)
PARTS = [
    Batch(WHOLE.inputs[:3], WHOLE.targets[:3], 2 * 3 / 5),
    Batch(WHOLE.inputs[3:], WHOLE.targets[3:], 2 * 2 / 5),
]
STANDING_IN = [Batch(*WHOLE[:2], 2.0), Batch(*samples(4)[:2], 0.0)]

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


class Watch(Callback):
    """Sends numbers of its own, and keeps what comes of them and of the step."""

    def __init__(self) -> None:
        self.gathered: list[Tensor | None] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.statistics: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = payload_strategy(trainer)
        assert strategy is not None
        # In bf16, 257 would be 256.
        mine = torch.tensor([257.0, torch.inf]) if trainer.global_rank else torch.tensor([1.0, 2.0])
        strategy.register("watch", lambda: mine)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = payload_strategy(trainer)
        assert strategy is not None
        self.gathered.append(strategy.gathered("watch"))
        named = pl_module.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        self.statistics.append(statistics_of(pl_module))


def statistics_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in module.named_buffers() if "running" in name}


CASES: dict[str, dict[str, Any]] = {
    "one bucket": {},
    "many buckets": {"ddp": {"bucket_cap_mb": 1e-5}},
    "bf16": {"precision": "bf16-true"},
    "accumulated": {"accumulate_grad_batches": 2},
    "standing in": {},
    "skipped": {"accumulate_grad_batches": 2},
}


def batches_of(case: str, rank: int) -> list[Batch]:
    if case == "standing in":
        return [STANDING_IN[rank]] * 4
    if case == "skipped":  # what is wrong is seen by the second process, in its first batch
        first = NAN if rank else WHOLE
        return [first, WHOLE, WHOLE, WHOLE]
    return [PARTS[rank]] * 4


def make(rank: int, case: str, folder: Path) -> dict[str, Any]:
    """Four batches of training."""
    options = dict(CASES[case])
    ddp = options.pop("ddp", {})
    watch, task = Watch(), task_of()
    trainer = trained(
        *(task, batches_of(case, rank), folder),
        callbacks=[Failures(on_failure="skip_step", unconverged=None), Resumption(), watch],
        strategy=PayloadDDPStrategy(process_group_backend="gloo", **ddp),
        plugins=[LightningEnvironment()],
        devices=WORLD,
        **options,
    )
    assert trainer.world_size == WORLD
    return {
        "gathered": watch.gathered,
        "gradients": watch.gradients,
        "statistics": watch.statistics,
        "weights": [parameter.detach() for parameter in task.parameters()],
    }


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    found = {case: make(rank, case, Path(folder)) for case in CASES}
    torch.save(found, f"{folder}/rank{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the two processes have seen in all cases."""
    folder = tmp_path_factory.mktemp("payload")
    start_ranks(worker, args=(free_port(), str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


def alone(batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients and running statistics of a first step, made by one process."""
    task = task_of()
    loss, _, _ = task.train().evaluate(batch, 0)
    loss.backward()
    named = task.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}, statistics_of(task)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one bucket", "many buckets"])
def test_gradients_are_the_mean_of_those_of_the_parts(ranks: list[Any], case: str) -> None:
    first, second = (alone(part)[0] for part in PARTS)
    mean = {name: (first[name] + second[name]) / WORLD for name in first}
    for rank in ranks:
        # A bucket of several gradients and one of a single one add up the same two numbers.
        torch.testing.assert_close(rank[case]["gradients"][0], mean, rtol=1e-6, atol=1e-8)
    weights = [rank[case]["weights"] for rank in ranks]
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_payloads_are_gathered_unchanged_in_the_order_of_ranks(ranks: list[Any]) -> None:
    sent = torch.tensor([[1.0, 2.0], [257.0, torch.inf]])
    for case, options in CASES.items():
        for rank in ranks:
            for step, gathered in enumerate(rank[case]["gathered"]):
                if (step + 1) % options.get("accumulate_grad_batches", 1):
                    assert gathered is None
                else:
                    assert torch.equal(gathered, sent), (case, step)


def test_running_statistics_are_the_mean_over_all_samples(ranks: list[Any]) -> None:
    _, whole = alone(WHOLE)
    for rank in ranks:
        found = rank["one bucket"]["statistics"][0]
        assert found.keys() == whole.keys()
        for name, mean in whole.items():
            if name.endswith("mean"):  # two float32 sums in another order
                torch.testing.assert_close(found[name], mean, rtol=1e-5, atol=1e-7)
    for one, other in zip(*(rank["one bucket"]["statistics"] for rank in ranks), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_placeholder_batch_does_not_change_running_statistics(ranks: list[Any]) -> None:
    _, whole = alone(WHOLE)
    for rank in ranks:
        found = rank["standing in"]["statistics"][0]
        for name, statistic in whole.items():
            torch.testing.assert_close(found[name], statistic, rtol=1e-6, atol=1e-7)


def test_a_failing_accumulated_batch_on_any_process_skips_the_step(
    ranks: list[Any],
) -> None:
    # What is left is the second step: the same batch, twice on each process.
    task = task_of()
    loss, _, _ = task.train().evaluate(WHOLE, 0)
    loss.backward()
    task.make_optimizer(task.parameters()).step()
    for rank in ranks:
        for mine, weight in zip(task.parameters(), rank["skipped"]["weights"], strict=True):
            # The means of equal gradients; Adam's first step magnifies what is near 0.
            torch.testing.assert_close(weight, mine.detach(), rtol=1e-4, atol=1e-5)


def test_a_single_process_sends_no_payload(tmp_path: Path) -> None:
    assert payload_strategy(make_trainer(tmp_path)) is None


def test_another_hook_is_refused() -> None:
    with pytest.raises(ValueError, match="leave ddp_comm_hook"):
        PayloadDDPStrategy(ddp_comm_hook=lambda state, bucket: bucket)


def test_another_strategy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    trainer = make_trainer(
        tmp_path,
        strategy=DDPStrategy(process_group_backend="gloo"),
        plugins=[LightningEnvironment()],
        devices=WORLD,
    )
    with pytest.raises(TypeError, match=r"trainer\.strategy\._target_=fastdeq\.training\.Payload"):
        payload_strategy(trainer)
