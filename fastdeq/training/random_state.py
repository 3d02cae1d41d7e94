"""The random state of a process, and gathering objects from all processes."""

import random
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Trainer


def gathered(mine: Any, trainer: Trainer) -> list[Any]:
    """The object of each process, by rank. All processes must call it; tensors are on the CPU."""
    if trainer.world_size == 1:
        return [mine]
    everyone: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def random_state() -> dict[str, Any]:
    """The state of every generator that a step may draw from, as tensors and plain containers."""
    return as_plain(taken_random_state())


def taken_random_state() -> tuple[Any, ...]:
    """The same in the generators' own form, which is faster to take. `as_plain` converts it."""
    return (
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        random.getstate(),
        np.random.get_state(legacy=True),
    )


def as_plain(taken: tuple[Any, ...]) -> dict[str, Any]:
    """Convert the result of `taken_random_state` to the form of `random_state`."""
    on_cpu, cuda, (version, words, gauss), (_, keys, position, has_gauss, cached) = taken
    return {
        "torch": on_cpu,
        "cuda": cuda,
        "python": [version, list(words), gauss],
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore a state that `random_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"]:
        torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    words32 = keys.cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words32, position, has_gauss, cached))
