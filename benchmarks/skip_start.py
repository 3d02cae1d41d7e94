"""Does the skip start lower the evaluations? Polynomial fitting with the published layers.

h(x) = 3x³/2 + x² − 5x + 2 sin x − 3 on [−1, 1], 512 noisy training points and 128 clean test
points; stem 1 → 100 (ReLU), cell W₂ relu(W₁z + W₁'x) with 100 → 200 → 100, skip network 100 → 200 →
100, head 100 → 1; BS3 to the steady state at tolerance 1e-3; Adam 1e-3, ÷ 10 after half, batch 32
(arXiv 2201.12240, first release). The library alone: no Hydra, no Lightning.

    python benchmarks/skip_start.py --epochs 300 --seed 1     # the published length
"""

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fastdeq
from fastdeq.layers import TwoLayerCell
from fastdeq.regularizers import skip_loss
from fastdeq.solvers import ContinuousSolver

SKIP_WEIGHT = 1e-2


@dataclass(frozen=True)
class Row:
    """The figures of one model."""

    model: str
    test_loss: float
    explicit_loss: float | None
    nfe: float
    unconverged: float
    ms: float


def polynomial(x: Tensor) -> Tensor:
    """The published target."""
    return 1.5 * x**3 + x**2 - 5 * x + 2 * x.sin() - 3


def build(kind: str) -> fastdeq.DEQChain:
    """The model of a row: vanilla, skip reg. or skip."""
    solver = ContinuousSolver(method="bs3", tol=1e-3, max_steps=50)
    if kind == "vanilla":
        deq = fastdeq.DeepEquilibriumNetwork(TwoLayerCell(100, 200), solver=solver)
    else:
        network = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 100))
        explicit = network if kind == "skip" else None
        deq = fastdeq.SkipDeepEquilibriumNetwork(TwoLayerCell(100, 200), explicit, solver=solver)
    stem = nn.Sequential(nn.Linear(1, 100), nn.ReLU())
    return fastdeq.DEQChain(stem=stem, deq=deq, head=nn.Linear(100, 1))


def train(kind: str, epochs: int, seed: int) -> Row:
    """Train one model and evaluate it on the clean points."""
    torch.manual_seed(seed)
    x = torch.rand(512, 1) * 2 - 1
    y = polynomial(x) + 0.005 * torch.randn(512, 1)
    model = build(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 2], gamma=0.1)
    seconds = []
    for _ in range(epochs):
        for rows in torch.randperm(512).split(32):
            start = time.perf_counter()
            prediction, solution = model(x[rows])
            loss = mse_loss(prediction, y[rows])
            if kind != "vanilla":
                loss = loss + SKIP_WEIGHT * skip_loss(solution)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
        schedule.step()
    return evaluate(kind, model, 1000 * statistics.median(seconds))


@torch.no_grad()
def evaluate(kind: str, model: fastdeq.DEQChain, ms: float) -> Row:
    """Test loss with and without a solve, and the mean NFE."""
    x = torch.linspace(-1, 1, 128)[:, None]
    prediction, solution = model(x)
    explicit = None if kind == "vanilla" else mse_loss(model.explicit(x), polynomial(x)).item()
    return Row(
        model=kind,
        test_loss=mse_loss(prediction, polynomial(x)).item(),
        explicit_loss=explicit,
        nfe=solution.nfe.float().mean().item(),
        unconverged=(~solution.converged).float().mean().item(),
        ms=ms,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Polynomial fitting: vanilla, skip reg. and skip.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    print(f"{arguments.epochs} epochs, seed {arguments.seed}, torch {torch.__version__}, CPU")
    print("| model | test MSE | without a solve | test NFE | unconverged % | ms a step |")
    print("|---|---|---|---|---|---|")
    for kind in ("vanilla", "skip reg.", "skip"):
        row = train(kind, arguments.epochs, arguments.seed)
        explicit = "" if row.explicit_loss is None else f"{row.explicit_loss:.2e}"
        print(
            f"| {row.model} | {row.test_loss:.2e} | {explicit} | {row.nfe:.1f} "
            f"| {100 * row.unconverged:.1f} | {row.ms:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
