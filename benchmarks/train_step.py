"""Milliseconds per step of train.py, on images in MNIST's format that are made here."""

import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import Row

ROOT = Path(__file__).resolve().parents[1]
FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def rows(quick: bool) -> Iterator[Row]:
    """`experiment=mnist_fc` with two models, one thread."""
    steps = 30 if quick else 400
    with tempfile.TemporaryDirectory() as name:
        write_images(Path(name), 600 if quick else 20_000)
        for model in ("skip_reg_deq",) if quick else ("skip_reg_deq", "deq"):
            yield _row(model, trained(Path(name), model, steps))


def _row(model: str, summary: dict[str, Any]) -> Row:
    shares = summary["train_time_shares"] or {}
    return Row(
        section="train.py, experiment=mnist_fc",
        case=f"model={model}",
        unit="ms per step",
        values={"fastdeq": float(summary["train_ms_per_step"])},
        note=", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items()),
    )


def trained(folder: Path, model: str, steps: int) -> dict[str, Any]:
    """The summary of a run; its milliseconds are the median of the steps, by the clock."""
    run = folder / model
    words = (
        *("experiment=mnist_fc", f"model={model}", f"data.root={folder}", f"data.store={folder}"),
        *("data.verify=false", "trainer.accelerator=cpu", f"trainer.max_steps={steps}"),
        *("trainer.max_epochs=-1", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"),
        *("callbacks.resumption.minutes=null", f"paths.run={run}"),
    )
    command = [sys.executable, str(ROOT / "train.py"), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return summary


def write_images(folder: Path, count: int) -> None:
    """Noisy copies of ten random images, which a model can learn, in the four IDX files."""
    draw = torch.Generator().manual_seed(0)
    classes = 128 * torch.rand(10, 28, 28, generator=draw)
    for number, size in enumerate((count, count // 10)):
        labels = torch.arange(size) % 10
        images = classes[labels] + 127 * torch.rand(size, 28, 28, generator=draw)
        for name, values in zip(FILES[2 * number :], (images, labels), strict=False):
            _write(folder / f"{name}-ubyte", values.to(torch.uint8))


def _write(path: Path, values: Tensor) -> None:
    header = struct.pack(f">BBBB{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
    path.write_bytes(header + bytes(values.flatten().tolist()))
