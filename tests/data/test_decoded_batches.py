"""Batches of images that are decoded as they come: the same ones, whoever decodes them."""

import multiprocessing
import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("PIL")

from fastdeq.data import EpochLoader, ImageFolderDataModule
from fastdeq.data.decode import CentralCrop, decode, to_tensor
from tests.data.image_folders import (
    SAMPLES,
    SIZE,
    VAL,
    folder,
    inputs,
    noise,
    pixels_of,
    png,
    ready,
    write_images,
)
from tests.processes import PROCESSES

pytestmark = pytest.mark.usefixtures("cache_aside")


def test_the_numbers_do_not_depend_on_the_workers(root):
    expected = [inputs(batches) for batches in loaders(ready(root, seed=3))]
    for workers in (1, 2):
        data = ready(root, seed=3, workers=workers)
        found = [inputs(batches) for batches in loaders(data)]
        assert all(map(torch.equal, found, expected)), workers
        data.teardown()


def loaders(data: ImageFolderDataModule) -> Sequence[EpochLoader]:
    """The training batches twice, for two epochs."""
    train = data.train_dataloader()
    return train, train, data.val_dataloader()


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_the_parts_of_all_ranks_are_the_batch_of_one(root, ranks):
    several = [ready(root, rank=rank, ranks=ranks) for rank in range(ranks)]
    for kind in ("train_dataloader", "test_dataloader"):
        alone = list(getattr(ready(root), kind)())
        parts = [list(getattr(data, kind)()) for data in several]
        assert {len(part) for part in parts} == {len(alone)}
        for whole, *part in zip(alone, *parts, strict=True):
            counted = [one for one in part if one.weight > 0]
            assert torch.equal(torch.cat([one.inputs for one in counted]), whole.inputs)
            assert torch.equal(torch.cat([one.targets for one in counted]), whole.targets)
            means = [one.weight * one.inputs.mean().item() for one in part]
            # Float32 means of some thousand values of order 1
            assert sum(means) / ranks == pytest.approx(whole.inputs.mean().item(), abs=1e-5)


def test_epochs_and_seeds_differ_in_order_and_crops(root):
    data = ready(root, seed=1)
    batches = data.train_dataloader()
    first, second = ([(b.inputs, b.targets) for b in batches] for _ in range(2))
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
    for batch in (*first, *second):
        assert len({tuple(one.flatten()[:64].tolist()) for one in batch[0]}) == len(batch[0])
    batches.set_epoch(0)
    assert torch.equal(inputs(batches), torch.cat([a for a, _ in first]))
    assert not torch.equal(inputs(ready(root, seed=2).train_dataloader()), inputs(batches))


def test_every_place_epoch_and_seed_has_a_crop_of_its_own(tmp_path):
    same = {f"{split}/a/{i}.png": png(noise(0)) for split in ("train", "val") for i in range(8)}
    root = write_images(tmp_path / "same", same)
    found = torch.cat([x for seed in (0, 1) for x in two_epochs(ready(root, seed=seed))])
    assert len({image.numpy().tobytes() for image in found}) == 2 * 2 * 8


def test_a_samples_crop_is_that_of_its_place_whatever_the_batch_size(root):
    small, large = (inputs(ready(root, batch_size=b).train_dataloader()) for b in (5, SAMPLES))
    assert torch.equal(small, large)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seen", [1, 3, 5, 7])
def test_a_restored_module_continues_with_exactly_the_batches_not_yet_given(root, workers, seen):
    whole, broken_off, resumed = (ready(root, workers=workers) for _ in range(3))
    expected = two_epochs(whole)
    batches = broken_off.train_dataloader()
    # Two epochs in a row, of 5 batches each; the workers are up to four batches ahead.
    given = (batch.inputs for _ in range(2) for batch in batches)
    before = [next(given) for _ in range(seen)]
    resumed.load_state_dict(broken_off.state_dict())
    again = resumed.train_dataloader()
    after = [batch.inputs for batch in again]
    if seen < 5:
        after += [batch.inputs for batch in again]
    assert len(before + after) == len(expected)
    assert all(map(torch.equal, before + after, expected))
    for data in (whole, broken_off, resumed):
        data.teardown()


def two_epochs(data: ImageFolderDataModule) -> list[Tensor]:
    batches = data.train_dataloader()
    return [batch.inputs for _ in range(2) for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_is_given_up_leaves_the_next_one_alone(root, workers):
    expected = two_epochs(ready(root))[5:]
    data = ready(root, workers=workers)
    batches = data.train_dataloader()
    next(iter(batches))
    found = [batch.inputs for batch in batches]
    assert all(map(torch.equal, found, expected))
    data.teardown()


def test_workers_stay_from_epoch_to_epoch_and_end_with_the_module(root):
    data = ready(root, workers=2)
    batches = data.val_dataloader()
    pids = []
    for _ in range(2):
        list(batches)
        pids.append(children())
    assert pids[0] == pids[1]
    assert len(pids[0]) == 2
    next(iter(batches))
    data.teardown()
    assert not children()
    assert len(inputs(batches)) == VAL * 3  # with new ones
    data.teardown()


def children() -> set[int | None]:
    """The workers that run."""
    return {process.pid for process in multiprocessing.active_children()}


def test_no_random_numbers_of_others_are_drawn(root):
    data = ready(root, workers=1)
    torch.manual_seed(5)
    np.random.seed(5)
    before = (torch.get_rng_state(), np.random.rand())
    np.random.seed(5)
    inputs(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.rand() == before[1]
    data.teardown()


def test_records_are_read_by_processes_that_were_forked_or_started_anew(root):
    records, _ = folder(root).load()
    expected = records.read(3)  # the file is open here from now on
    assert pickle.loads(pickle.dumps(records)).read(3) == expected
    with PROCESSES.Pool(1) as pool:
        assert pool.apply(records.read, (3,)) == expected
    pid = os.fork()
    if pid == 0:
        os._exit(0 if records.read(3) == expected else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert records.read(3) == expected


def test_a_sample_batch_is_the_middle_of_the_first_images(root):
    data = folder(root)
    found = data.sample_batch(3)
    whole = middles_of_cats(root)[:3]
    assert torch.equal(pixels_of(found), whole)
    assert found.targets.tolist() == [0, 0, 0]


def middles_of_cats(root: Path) -> Tensor:
    files = sorted((root / "train" / "cat").iterdir())
    crop = CentralCrop(size=SIZE)
    made = [crop.apply(decode(f.read_bytes()), np.random.default_rng()) for f in files]
    return torch.stack([to_tensor(one) for one in made])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_gets_the_same_images(root, workers):
    expected = inputs(ready(root).train_dataloader())
    data = ready(root, workers=workers)
    data._device = torch.device("cuda")
    found = inputs(data.train_dataloader())
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected)
    data.teardown()
