"""Reuse: every training sample starts at its last equilibrium."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from torch import nn

from fastdeq import DEQChain
from fastdeq.data import Batches
from fastdeq.nn import DenseCell, UnrolledNetwork
from fastdeq.runs.folder import EQUILIBRIA
from fastdeq.training import AbstractTask, Pretraining, Reuse
from tests.loops import each
from tests.training.tasks import (
    CLASSES,
    FEATURES,
    WIDTH,
    Listed,
    make_task,
    make_trainer,
    network,
    samples,
    take_step_settings,
)

N, EPOCHS = 10, 3


def fit(
    task: AbstractTask, folder: Path, *callbacks: Any, batches: Any = None, **more: Any
) -> Trainer:
    """Train on ten samples in shuffled batches of four."""
    take_step_settings(task, more)
    x, targets, _ = samples(N)
    if batches is None:
        batches = Batches(x, targets, batch_size=4, shuffle=True)
    options = {"max_epochs": EPOCHS, "limit_val_batches": 0} | more
    trainer = make_trainer(folder, callbacks=list(callbacks), **options)
    trainer.fit(task, train_dataloaders=batches, val_dataloaders=Listed(samples(5)))
    return trainer


def solves(task: AbstractTask) -> list[tuple[list[int], Any]]:
    """Fills up with the samples and the solution of every call."""
    seen: list[tuple[list[int], Any]] = []
    places = {tuple(x.tolist()): place for place, x in enumerate(samples(N).inputs)}

    def see(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(([places[tuple(x.tolist())] for x in inputs[0]], output[1]))

    task.model.register_forward_hook(see)
    return seen


@each("store", ["memory", "hdf5"])
def test_every_sample_starts_at_its_last_equilibrium_and_the_first_time_at_zero(store, tmp_path):
    task = make_task(model=network("zero"), lr=0.1)
    seen = solves(task)
    fit(task, tmp_path / store, Reuse(store=store))
    last = torch.zeros(N, WIDTH)
    for places, solution in seen:
        assert torch.equal(solution.z0, last[places])
        last[places] = solution.value.detach()
    assert len(seen) == 3 * EPOCHS
    assert last.any()
    assert not (tmp_path / store / EQUILIBRIA).exists()


def test_reuse_saves_evaluations_and_ends_at_the_same_weights(tmp_path):
    weights, nfe = [], []
    for callbacks in ([], [Reuse()]):
        torch.manual_seed(0)
        task = make_task(model=network("zero"), lr=0.01)
        seen = solves(task)
        fit(task, tmp_path, *callbacks, max_epochs=8)
        weights.append(torch.cat([p.detach().flatten() for p in task.parameters()]))
        nfe.append(sum(float(solution.nfe.sum()) for _, solution in seen[3:]))
    torch.testing.assert_close(*weights, rtol=0.01, atol=0.001)  # both solved to 1e-3
    assert nfe[1] < 0.9 * nfe[0]


def test_an_evaluation_starts_at_zero_and_pretraining_keeps_nothing(tmp_path):
    task = make_task(model=network("zero"), lr=0.1)
    seen = solves(task)
    reuse = Reuse()
    fit(task, tmp_path, Pretraining(steps=3), reuse, max_epochs=2)
    assert all(not solution.z0.any() for _, solution in seen)
    task.model.eval()
    assert not task.model(samples(N).inputs)[1].z0.any()


def test_a_state_of_several_batches_per_step_is_kept_too(tmp_path):
    task = make_task(model=network("zero"), lr=0.1)
    seen = solves(task)
    fit(task, tmp_path, Reuse(), accumulate_grad_batches=2)
    assert all(solution.z0.any() for _, solution in seen[3:])


def test_what_is_kept_in_memory_is_restored_and_a_file_refuses_to_resume(tmp_path):
    task, one, other = make_task(model=network("zero"), lr=0.1), Reuse(), Reuse()
    trainer = fit(task, tmp_path, one)
    saved = tmp_path / "saved.pt"
    torch.save(one.saved(), saved)
    other.on_load_checkpoint(trainer, task, torch.load(saved, weights_only=True))
    found, expected = (each.start(trainer, torch.device("cpu")) for each in (other, one))
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, expected)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"store=hdf5 cannot be resumed.*store=memory"):
        Reuse(store="hdf5").on_load_checkpoint(trainer, task, {})


def test_the_size_is_logged_before_it_is_kept(tmp_path, caplog):
    with caplog.at_level("INFO", logger="fastdeq"):
        fit(make_task(model=network("zero")), tmp_path, Reuse(), max_epochs=1)
    assert f"{N} equilibria of {WIDTH} entries: 0.0 MB in memory" in caplog.text


def test_what_reuse_cannot_do_is_refused_before_training(tmp_path):
    unrolled = DEQChain(
        stem=nn.Linear(FEATURES, WIDTH),
        deq=UnrolledNetwork(DenseCell(WIDTH), steps=2),
        head=nn.Linear(WIDTH, CLASSES),
    )
    for model, message in (
        (network("explicit"), "starts elsewhere than at zero: use model=deq"),
        (network("first"), "starts elsewhere"),
        (unrolled, "does not solve"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(make_task(model=model), tmp_path, Reuse())
    with pytest.raises(ValueError, match=r"one process.*trainer\.devices=1"):
        Reuse.check(network("zero"), 2)
    with pytest.raises(ValueError, match="a Listed does not: use a data module"):
        fit(make_task(model=network("zero")), tmp_path, Reuse(), batches=Listed(samples(5)))
    with pytest.raises(ValueError, match="store is 'disk', but must be 'memory' or 'hdf5'"):
        Reuse(store="disk")  # type: ignore[arg-type]
