"""Data modules in memory: splits, shuffling that can be restored, and every process's part."""

from unittest.mock import Mock

import pytest
import torch

from fastdeq.data import (
    EpochLoader,
    InMemoryDataModule,
    Normalization,
    PolynomialDataModule,
    Samples,
)
from fastdeq.data.module import hold_out
from fastdeq.experiment.signatures import signature_of

TRAIN, TEST = 40, 12
PINNED = [11, 16, 19, 35, 37]  # the five of 40 that are held out


class Numbers(InMemoryDataModule):
    """Sample i is the number i, training from 0 and test from 1000; counts the calls."""

    input_shape = (1,)
    outputs = 1
    normalization: Normalization | None = None

    def __init__(self, **settings) -> None:
        super().__init__(**{"batch_size": 7, "eval_batch_size": 5, **settings})
        self.calls: list[str] = []

    def prepare(self) -> None:
        self.calls.append("prepare")

    def load(self) -> tuple[Samples, Samples]:
        self.calls.append("load")
        train, test = torch.arange(TRAIN), torch.arange(1000, 1000 + TEST)
        return Samples(train.view(-1, 1), train), Samples(test.view(-1, 1), test)


def ready(**settings) -> Numbers:
    data = Numbers(**settings)
    data.prepare_data()
    data.setup()
    return data


def on_rank(rank: int, ranks: int, overfit_batches: int = 0, **settings) -> Numbers:
    data = Numbers(**settings)
    strategy = Mock(root_device=torch.device("cpu"))
    data.trainer = Mock(
        strategy=strategy, global_rank=rank, world_size=ranks, overfit_batches=overfit_batches
    )
    data.setup()
    return data


def given(batches: EpochLoader) -> list[list[int]]:
    return [batch.targets.tolist() for batch in batches]


def flat(batches: EpochLoader) -> list[int]:
    return [number for batch in given(batches) for number in batch]


# Splits


def test_without_a_hold_out_validation_is_the_test_split():
    data = ready()
    assert data.validates_on_test
    assert flat(data.val_dataloader()) == flat(data.test_dataloader())
    assert flat(data.test_dataloader()) == list(range(1000, 1000 + TEST))
    assert sorted(flat(data.train_dataloader())) == list(range(TRAIN))


def test_held_out_samples_validate_and_do_not_train():
    for count in [1, 10, TRAIN - 1]:
        data = ready(validation=count)
        train, validation = flat(data.train_dataloader()), flat(data.val_dataloader())
        assert not data.validates_on_test, count
        assert len(validation) == count, count
        assert sorted(train + validation) == list(range(TRAIN)), count
        assert validation == sorted(validation), count  # in stored order
        assert flat(data.test_dataloader()) == list(range(1000, 1000 + TEST)), count


def test_inputs_and_targets_are_split_together():
    data = ready(validation=10)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for inputs, targets, _ in loader:
            assert torch.equal(inputs[:, 0], targets)


def test_which_samples_are_held_out_is_fixed_for_good():
    # Written down once: a change would mix the two splits of runs that are continued or compared.
    assert hold_out(40, 5).nonzero().flatten().tolist() == PINNED
    assert flat(ready(validation=5, seed=0).val_dataloader()) == PINNED
    assert flat(ready(validation=5, seed=1).val_dataloader()) == PINNED


def test_a_larger_hold_out_holds_the_smaller():
    smaller, larger = hold_out(1000, 100), hold_out(1000, 300)
    assert smaller.sum() == 100
    assert larger.sum() == 300
    assert (larger | ~smaller).all()


def test_a_hold_out_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(ValueError, match=r"validation 40 leaves nothing of 40 .*: hold out fewer"):
        ready(validation=TRAIN)


def test_splits_of_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="3 inputs but 2 targets"):
        Samples(torch.zeros(3, 1), torch.zeros(2))


# Order


def test_the_order_of_training_is_that_of_the_seed_alone():
    first = given(ready(seed=1).train_dataloader())
    torch.manual_seed(99)
    assert given(ready(seed=1).train_dataloader()) == first
    assert given(ready(seed=2).train_dataloader()) != first


def test_epochs_are_shuffled_anew():
    batches = ready().train_dataloader()
    assert len({tuple(flat(batches)) for _ in range(3)}) == 3


def test_under_overfit_batches_every_epoch_repeats_the_same_batches():
    data = on_rank(0, 1, overfit_batches=1, batch_size=4)
    batches = data.train_dataloader()
    first, second = (next(iter(batches)).targets.tolist() for _ in range(2))
    assert first == second
    assert len(first) == 4


def test_a_restored_module_continues_with_exactly_the_batches_not_yet_given():
    for seen in [0, 1, 3, 6, 8]:
        whole, interrupted, resumed = ready(), ready(), ready(seed=5)
        batches = whole.train_dataloader()
        expected = [batch for _ in range(3) for batch in given(batches)]
        batches = interrupted.train_dataloader()
        before: list[list[int]] = []
        while len(before) < seen:
            for batch in batches:
                before.append(batch.targets.tolist())
                if len(before) == seen:
                    break
        resumed.load_state_dict(interrupted.state_dict())
        batches = resumed.train_dataloader()
        after: list[list[int]] = []
        while len(before) + len(after) < len(expected):
            after += given(batches)
        assert before + after == expected, seen


def test_before_the_first_batch_there_is_not_position_to_save():
    data = Numbers()
    assert data.state_dict() == {}
    data.load_state_dict({})
    data.setup()
    assert given(data.train_dataloader()) == given(ready().train_dataloader())


def test_a_position_of_another_batch_size_is_refused():
    saved = ready()
    saved.train_dataloader()
    other = ready(batch_size=8)
    other.load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match="batch_size 7, this run has 8"):
        other.train_dataloader()


# Processes


def test_every_process_gets_its_part_of_each_batch():
    for ranks in [2, 3, 9]:
        modules = [on_rank(rank, ranks) for rank in range(ranks)]
        for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
            whole = getattr(ready(), loader)()
            every = [list(getattr(module, loader)()) for module in modules]
            for together, batch in zip(zip(*every, strict=True), whole, strict=True):
                counted = [part.targets for part in together if part.weight > 0]
                assert torch.equal(torch.cat(counted), batch.targets)
                means = [part.weight * part.targets.double().mean().item() for part in together]
                # float64 sums of nine numbers below 2000
                expected = batch.targets.double().mean().item()
                assert sum(means) / ranks == pytest.approx(expected, rel=1e-13)


# Loading


def test_a_set_is_prepared_once_and_loaded_once():
    data = ready()
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    data.sample_batch()
    assert data.calls == ["prepare", "load"]


def test_a_sample_batch_needs_nothing_before_and_is_as_training_sees_it():
    class Scaled(Numbers):
        normalization = Normalization(scale=2.0, mean=(1.0,), std=(4.0,))

    data = Scaled()
    inputs, targets, weight = data.sample_batch(3)
    assert data.calls == ["prepare", "load"]
    assert targets.tolist() == [0, 1, 2]
    assert inputs.flatten().tolist() == [(i / 2 - 1) / 4 for i in range(3)]
    assert weight == 1.0
    assert len(data.sample_batch(1000).inputs) == TRAIN


def test_a_sample_batch_leaves_the_order_of_training_alone():
    data, other = ready(), ready()
    batches, alone = data.train_dataloader(), other.train_dataloader()
    next(iter(batches)), next(iter(alone))
    data.sample_batch()
    assert data.state_dict() == other.state_dict()
    assert given(batches) == given(alone)


def test_an_impossible_sample_batch_is_refused():
    with pytest.raises(ValueError, match="n is 0, but must be finite and at least 1"):
        Numbers().sample_batch(0)


def test_asking_for_batches_before_setup_says_what_to_do():
    for loader in ["train_dataloader", "val_dataloader", "test_dataloader"]:
        with pytest.raises(RuntimeError, match=r"call setup\(\)"):
            getattr(Numbers(), loader)()


def test_settings_that_are_not_counts_are_refused_by_name():
    for name in ["batch_size", "eval_batch_size", "seed", "validation"]:
        for value in [-1, 1.5, "3", True, None]:
            said = rf"^Numbers\.{name} is {value!r}, but must be "
            with pytest.raises((TypeError, ValueError), match=said):
                Numbers(**{name: value})


def test_a_class_of_ones_own_has_the_arguments_that_it_declares():
    class Plain(Numbers):
        def __init__(self, *, count: int = 3, seed: int = 0) -> None:
            super().__init__(seed=seed)
            self.count = count

    assert Plain(seed=4).seed == 4
    assert signature_of(Plain).names == ("count", "seed")
    assert {"samples", "noise", "batch_size", "seed"} < {*signature_of(PolynomialDataModule).names}
    assert "augmentation" not in signature_of(PolynomialDataModule).names


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_set_moves_to_the_device_once_and_samples_come_back():
    data = Numbers()
    strategy = Mock(root_device=torch.device("cuda", 0))
    data.trainer = Mock(strategy=strategy, global_rank=0, world_size=1)
    data.setup()
    first, again = (next(iter(data.test_dataloader())) for _ in range(2))
    assert first.inputs.is_cuda
    assert first.inputs.data_ptr() == again.inputs.data_ptr()
    data.train_dataloader()
    assert not data.sample_batch().inputs.is_cuda
