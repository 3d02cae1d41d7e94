"""Two processes train like one: DistributedDataParallel around a chain with an equilibrium."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastdeq import (
    DeepEquilibriumNetwork,
    DEQChain,
    SkipDeepEquilibriumNetwork,
    compilation,
)
from fastdeq.adjoints import Implicit, JacobianFree
from fastdeq.experiment.launch import leave
from fastdeq.krylov import GMRES
from fastdeq.nn import VariationalDropout, weight_norm
from fastdeq.regularizers import skip_loss
from fastdeq.solvers import Anderson, LimitedMemoryBroydenSolver
from tests.processes import start_ranks

WORLD, HALF, WIDTH = 2, 4, 5

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
]


class Cell(nn.Module):
    """f(z, x) = tanh(dropout(W z) + U x): easy where the input is large and saturates it."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.state = nn.Linear(WIDTH, WIDTH)
        self.injection = nn.Linear(WIDTH, WIDTH, bias=False)
        self.dropout = VariationalDropout(p)
        nn.init.orthogonal_(self.state.weight, 0.8)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.dropout(self.state(z)) + self.injection(x))


def model(kind: str) -> DEQChain:
    """The same on every rank: stem, equilibrium layer and head, in float64."""
    torch.manual_seed(0)
    cell: nn.Module = Cell(0.3 if kind == "dropout" else 0.0)
    if kind == "weight_norm":
        weight_norm(cell)
    linear = Anderson(tol=1e-12, max_steps=100) if kind == "anderson" else GMRES(tol=1e-12)
    options: dict[str, Any] = {
        "solver": LimitedMemoryBroydenSolver(tol=1e-12, max_steps=100),
        "adjoint": JacobianFree() if kind == "jfb" else Implicit(solver=linear),
    }
    if kind == "skip":
        deq: DeepEquilibriumNetwork = SkipDeepEquilibriumNetwork(
            cell, nn.Linear(WIDTH, WIDTH), **options
        )
    else:
        # In the processes alone: what they are compared with is not compiled.
        compiled = kind == "compiled" and dist.is_initialized()
        deq = DeepEquilibriumNetwork(cell, compile=compiled, **options)
    return DEQChain(stem=nn.Linear(3, WIDTH), deq=deq, head=nn.Linear(WIDTH, 2)).double()


def batch() -> Tensor:
    """Rank 0's half saturates the cell; rank 1's takes many evaluations."""
    x = torch.randn(WORLD * HALF, 3, generator=torch.Generator().manual_seed(1))
    return (x * torch.tensor([20.0] * HALF + [0.5] * HALF)[:, None]).double()


def part(rank: int) -> Tensor:
    return batch()[rank * HALF : (rank + 1) * HALF]


def step(network: nn.Module, kind: str, x: Tensor, seed: int) -> Tensor:
    """Loss and backward pass; returns the evaluations spent on each sample."""
    torch.manual_seed(seed)
    y, solution = network(x, jacobian_loss=kind == "jacobian")
    loss = y.square().mean()
    if kind == "jacobian":
        loss = loss + solution.jacobian_loss
    if kind == "skip":
        loss = loss + skip_loss(solution)
    loss.backward()
    nfe: Tensor = solution.nfe
    return nfe


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


PLAIN = ("gmres", "anderson", "jfb", "weight_norm", "skip", "compiled")
RANDOM = ("jacobian", "dropout")  # draw per rank, so no one-batch run is the same


def worker(rank: int, folder: str) -> None:
    """Two steps of every kind of model under DistributedDataParallel; saves what came out."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    compilation.BACKEND = "eager"  # without the minutes that generating code takes
    store = f"file://{folder}/store"
    limit = timedelta(minutes=1)  # a rank that waits for a dead one fails instead of hanging
    dist.init_process_group("gloo", init_method=store, timeout=limit, rank=rank, world_size=WORLD)
    results = {}
    for kind in PLAIN + RANDOM:
        network = DistributedDataParallel(model(kind))
        for _ in range(2):  # a parameter left unready would stop the second step
            network.zero_grad()
            nfe = step(network, kind, part(rank), seed=rank)
        results[kind] = {"gradients": gradients(network.module), "nfe": nfe}
    torch.save(results, f"{folder}/rank{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the two processes found, for all kinds: starting them is what takes the time."""
    folder: Path = tmp_path_factory.mktemp("ddp")
    start_ranks(worker, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("kind", PLAIN + RANDOM)
def test_both_ranks_hold_the_same_gradients_for_all_parameters(ranks, kind):
    first, second = (rank[kind]["gradients"] for rank in ranks)
    assert first.keys() == dict(model(kind).named_parameters()).keys()
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("kind", PLAIN)
def test_the_gradients_are_those_of_the_whole_batch_in_one_process(ranks, kind):
    network = model(kind)
    step(network, kind, batch(), seed=0)
    # Forward and backward are solved to a relative 1e-12.
    torch.testing.assert_close(
        ranks[0][kind]["gradients"], gradients(network), rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("kind", PLAIN + RANDOM)
def test_the_gradients_are_the_mean_of_what_the_halves_give_alone(ranks, kind):
    network = model(kind)
    for rank in range(WORLD):
        step(network, kind, part(rank), seed=rank)  # gradients add up
    mean = {name: gradient / WORLD for name, gradient in gradients(network).items()}
    torch.testing.assert_close(ranks[0][kind]["gradients"], mean, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", PLAIN + RANDOM)
def test_each_rank_spends_the_evaluations_that_its_half_needs(ranks, kind):
    easy, hard = (rank[kind]["nfe"].double().mean() for rank in ranks)
    assert easy < hard
