"""Reuse: every training sample's solve starts at its last equilibrium."""

from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import h5py
import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor

from fastdeq.data import EpochLoader
from fastdeq.flatten import Layout, map_scales
from fastdeq.nn import DeepEquilibriumNetwork, DEQChain, Zeros
from fastdeq.notation import State
from fastdeq.runs.folder import EQUILIBRIA
from fastdeq.runs.log import LOG
from fastdeq.solution import Solution
from fastdeq.training.plain_data import PlainDataModule

Store = Literal["memory", "hdf5"]


class Reuse(Callback):
    """Starts the solve of every training sample at the equilibrium of its last solve, one epoch
    before (DEQuify, arXiv 2509.08734); the first one at zero. Evaluations start at zero.

    store: "memory": the equilibria are kept in the memory of the host, and in the saved state of
        the run, which then resumes bit for bit. "hdf5": in the run folder (`equilibria.h5`), until
        the run ends; such a run cannot be resumed. The size is logged at the first step: samples ×
        entries of a state.

    An augmented sample starts at the equilibrium of another view of itself. Steps of pretraining
    neither use nor change what is kept.

    The training step reads it from the trainer's callbacks, and calls `start` and `keep`.

    Raises: ValueError for another store, a model that does not start at zero or does not solve,
    several processes, batches that do not say which samples they hold, and for resuming with a
    file.
    """

    def __init__(self, *, store: Store = "memory") -> None:
        if store not in get_args(Store):
            raise ValueError(f"Reuse.store is {store!r}, but must be 'memory' or 'hdf5'")
        self.store = store
        self._table: _Table | None = None  # (N, D), zeros for samples that were not solved
        self._example: State | None = None  # a state of one sample

    @staticmethod
    def check(model: DEQChain, ranks: int, data: LightningDataModule | None = None) -> None:
        """Refuse a model that has no use for it, several processes, and data whose batches do not
        say which samples they hold.

        Raises: ValueError.
        """
        if isinstance(data, PlainDataModule):
            raise ValueError(
                "callbacks.reuse needs batches that say which samples they hold, and those of "
                f"{type(data.data).__name__} do not: use a data module of fastdeq.data"
            )
        if ranks > 1:
            raise ValueError(
                "callbacks.reuse keeps the equilibria of one process, and the samples of a process "
                "are others in every epoch: use trainer.devices=1, or leave it out"
            )
        layer, *others = model.equilibria
        if others:
            raise ValueError(
                f"callbacks.reuse keeps one equilibrium per sample, but this model has "
                f"{len(model.equilibria)}: leave it out"
            )
        solves = isinstance(layer, DeepEquilibriumNetwork)
        if not solves or not isinstance(layer.initializer, Zeros):
            why = "starts elsewhere than at zero" if solves else "does not solve"
            raise ValueError(
                f"callbacks.reuse chooses the start of a solve, but this model {why}: use "
                "model=deq or model=mdeq, or leave it out"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises: as `check`."""
        if stage == "fit" and isinstance(model := pl_module.model, DEQChain):
            self.check(model, trainer.world_size)

    def start(self, trainer: Trainer, device: torch.device) -> State | None:
        """The start of the batch yielded last; None before the first solve of the run."""
        if self._table is None or self._example is None:
            return None
        flat = self._table.read(_indices(trainer)).to(device)
        return Layout.of(self._example).unflatten(flat)

    def keep(self, trainer: Trainer, solution: Solution) -> None:
        """Keep the equilibria of the batch yielded last."""
        if self._table is None:
            self._begin(trainer, solution.value)
        assert self._table is not None
        flat = Layout.of(solution.value).flatten(solution.value).detach()
        self._table.write(_indices(trainer), flat.cpu())

    def saved(self) -> dict[str, Any]:
        """What is kept in memory, for the state that a run resumes from; other checkpoints do not
        have it."""
        if not isinstance(self._table, _Memory):
            return {}
        return {"reuse": {"kept": self._table.kept, "example": self._example}}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore what `saved` returned.

        Raises: ValueError with store="hdf5".
        """
        if self.store == "hdf5":
            raise ValueError(
                "a run with callbacks.reuse.store=hdf5 cannot be resumed, since its file is of a "
                "later step: start a new run, or use callbacks.reuse.store=memory"
            )
        if (saved := checkpoint.get("reuse")) is not None:
            self._example, self._table = saved["example"], _Memory(saved["kept"])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the file."""
        if isinstance(self._table, _File):
            self._table.close()
            self._table = None

    def _begin(self, trainer: Trainer, value: State) -> None:
        """Log the size of what will be kept, and allocate it."""
        layout, n = Layout.of(value), _loader(trainer).samples
        entries = sum(shape.numel() for shape in layout.shapes)
        self._example = map_scales(lambda z: z[:1].detach().cpu(), value)
        size = n * entries * layout.dtype.itemsize / 1e6
        place = {"memory": "in memory", "hdf5": f"in {EQUILIBRIA}"}[self.store]
        count = f"{n:,} equilibria of {entries:,} entries"
        LOG.info("reuse       %s: %.1f MB %s", count, size, place)
        if self.store == "memory":
            self._table = _Memory(torch.zeros(n, entries, dtype=layout.dtype))
        else:
            path = Path(trainer.default_root_dir) / EQUILIBRIA
            self._table = _File(path, (n, entries), layout.dtype)


class _Table(Protocol):
    def read(self, rows: Tensor) -> Tensor: ...

    def write(self, rows: Tensor, values: Tensor) -> None: ...


class _Memory:
    def __init__(self, kept: Tensor) -> None:
        self.kept = kept

    def read(self, rows: Tensor) -> Tensor:
        return self.kept.index_select(0, rows)

    def write(self, rows: Tensor, values: Tensor) -> None:
        self.kept.index_copy_(0, rows, values)


class _File:
    """The same in a new HDF5 file, whose rows are accessed in ascending order."""

    def __init__(self, path: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._file = path, h5py.File(path, "w")
        name = str(dtype).removeprefix("torch.")
        self._kept = self._file.create_dataset("equilibria", shape, name)

    def read(self, rows: Tensor) -> Tensor:
        ascending, places = rows.sort()
        values = torch.from_numpy(self._kept[ascending.numpy()])
        return torch.empty_like(values).index_copy_(0, places, values)

    def write(self, rows: Tensor, values: Tensor) -> None:
        ascending, places = rows.sort()
        self._kept[ascending.numpy()] = values[places].numpy()

    def close(self) -> None:
        """Close and remove the file."""
        self._file.close()
        self._path.unlink()


def _loader(trainer: Trainer) -> EpochLoader:
    loader = trainer.train_dataloader
    if not isinstance(loader, EpochLoader):
        raise ValueError(
            f"callbacks.reuse needs batches that say which samples they hold, and a "
            f"{type(loader).__name__} does not: use a data module of fastdeq.data"
        )
    return loader


def _indices(trainer: Trainer) -> Tensor:
    return _loader(trainer).indices
