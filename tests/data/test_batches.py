"""Batches: what an epoch yields, in which order, and where it continues when interrupted."""

from typing import Any

import pytest
import torch

from fastdeq.data import Batch, Batches, Normalization

SAMPLES = 23


def make(**settings) -> Batches:
    settings = {"batch_size": 5, "shuffle": True, "seed": 7, **settings}
    return Batches(torch.arange(SAMPLES).view(-1, 1), torch.arange(SAMPLES), **settings)


def one_epoch(batches: Batches) -> list[list[int]]:
    return [batch.targets.tolist() for batch in batches]


def flat(batches: list[list[int]]) -> list[int]:
    return [sample for batch in batches for sample in batch]


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_yields_every_sample_once_in_full_batches_but_the_last(shuffle):
    batches = make(shuffle=shuffle)
    given = one_epoch(batches)
    assert [len(batch) for batch in given] == [5, 5, 5, 5, 3]
    assert sorted(flat(given)) == list(range(SAMPLES))
    assert len(batches) == 5


def test_inputs_and_targets_stay_together():
    for inputs, targets, weight in make():
        assert torch.equal(inputs[:, 0], targets)
        assert weight == 1.0


@pytest.mark.parametrize("rank", [0, 1])
def test_the_indices_are_those_of_the_batch_yielded_last_in_every_epoch_and_after_resuming(rank):
    batches = make(rank=rank, ranks=2)
    for _ in range(2):
        for _, targets, _ in batches:
            assert torch.equal(batches.indices, targets)
            state = batches.state_dict()
            if state["position"] == 2:
                middle = state
    resumed = make(rank=rank, ranks=2)
    resumed.load_state_dict(middle)
    for _, targets, _ in resumed:
        assert torch.equal(resumed.indices, targets)


def test_drop_last_leaves_out_only_the_incomplete_batch():
    batches = make(drop_last=True)
    given = one_epoch(batches)
    assert [len(batch) for batch in given] == [5, 5, 5, 5]
    assert len(batches) == 4
    assert len(set(flat(given))) == 20


def test_without_shuffle_every_epoch_is_in_stored_order():
    batches = make(shuffle=False)
    assert flat(one_epoch(batches)) == flat(one_epoch(batches)) == list(range(SAMPLES))


def test_the_same_seed_gives_the_same_order_whatever_else_is_drawn():
    torch.manual_seed(1)
    first = one_epoch(make())
    torch.manual_seed(2)
    assert one_epoch(make()) == first
    assert one_epoch(make(seed=8)) != first


def test_shuffling_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    one_epoch(make())
    assert torch.equal(torch.get_rng_state(), before)


def test_epochs_differ_in_order():
    batches = make()
    epochs = [flat(one_epoch(batches)) for _ in range(3)]
    assert batches.epoch == 2
    assert len({tuple(order) for order in epochs}) == 3


def test_seed_and_epoch_are_not_interchangeable():
    one, other = make(seed=0), make(seed=1)
    one.set_epoch(1)
    other.set_epoch(0)
    assert one_epoch(one) != one_epoch(other)


def test_set_epoch_gives_that_epochs_order():
    batches, again = make(), make()
    third = [one_epoch(batches) for _ in range(3)][2]
    again.set_epoch(2)
    assert one_epoch(again) == third
    again.set_epoch(2)
    assert one_epoch(again) == third


def test_an_epoch_broken_off_is_followed_by_the_next_epoch():
    batches, whole = make(), make()
    next(iter(batches))
    one_epoch(whole)
    assert one_epoch(batches) == one_epoch(whole)


def test_an_iterator_that_is_not_used_changes_nothing():
    batches = make()
    iter(batches)
    iter(batches)
    assert one_epoch(batches) == one_epoch(make())


def test_a_restored_position_gives_exactly_the_batches_not_yet_given():
    for given in range(6):
        uninterrupted, interrupted, resumed = make(), make(), make(seed=99)
        expected = one_epoch(uninterrupted) + one_epoch(uninterrupted)
        iterator = iter(interrupted)
        before = [next(iterator).targets.tolist() for _ in range(given)]
        resumed.load_state_dict(interrupted.state_dict())
        after = one_epoch(resumed)
        if given < len(resumed):  # otherwise the first one was already the next epoch
            after += one_epoch(resumed)
        assert before + after == expected


def test_a_restored_position_survives_set_epoch_of_its_own_epoch_only():
    interrupted = make()
    interrupted.set_epoch(3)
    next(iter(interrupted))
    state = interrupted.state_dict()
    resumed = make()
    resumed.load_state_dict(state)
    resumed.set_epoch(3)
    assert len(one_epoch(resumed)) == 4
    resumed.load_state_dict(state)
    resumed.set_epoch(4)
    assert len(one_epoch(resumed)) == 5


def test_the_state_is_plain_integers():
    assert all(type(value) is int for value in make().state_dict().values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 6}, "batch_size 6, this run has 5"),
        ({"samples": 24}, "samples 24, this run has 23"),
        ({"position": 6}, "position 6 is past 5"),
        ({"epoch": -1}, "saved epoch"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make().load_state_dict({**make().state_dict(), **change})


def test_an_incomplete_state_is_refused():
    with pytest.raises(ValueError, match="lacks seed, position"):
        make().load_state_dict({"epoch": 0, "batch_size": 5, "samples": SAMPLES})


# Several processes


def parts(ranks: int, **settings) -> list[tuple[Batch, ...]]:
    """What every rank gets of each batch of one epoch."""
    every = [list(make(rank=rank, ranks=ranks, **settings)) for rank in range(ranks)]
    return list(zip(*every, strict=True))  # strict: all ranks see equally many batches


def test_the_parts_of_a_batch_are_disjoint_and_together_the_whole_one():
    for shuffle in [True, False]:
        for ranks in [1, 2, 3, 4, 5, 8]:
            whole = one_epoch(make(shuffle=shuffle))
            for together, expected in zip(parts(ranks, shuffle=shuffle), whole, strict=True):
                counted = [part.targets.tolist() for part in together if part.weight > 0]
                assert flat(counted) == expected, (ranks, shuffle)
                sizes = [len(part.targets) if part.weight else 0 for part in together]
                assert max(sizes) - min(sizes) <= 1, (ranks, shuffle)


def test_the_mean_of_the_weighted_means_is_the_mean_of_the_whole_batch():
    for batch_size in [1, 5, 7, 23]:
        for ranks in [1, 2, 3, 4, 8, 30]:
            whole = make(batch_size=batch_size)
            for together, batch in zip(parts(ranks, batch_size=batch_size), whole, strict=True):
                means = [part.weight * part.targets.double().mean().item() for part in together]
                # float64 sums of at most 30 numbers below 30
                assert sum(means) / ranks == pytest.approx(
                    batch.targets.double().mean().item(), rel=1e-13
                )


def test_a_rank_without_samples_gets_one_that_does_not_count():
    for together in parts(8):
        assert all(len(part.inputs) == len(part.targets) >= 1 for part in together)
        assert [part.weight for part in together].count(0.0) >= 3


def test_a_position_saved_by_one_rank_is_that_of_all():
    ranks = [make(rank=rank, ranks=3) for rank in range(3)]
    for batches in ranks:
        iterator = iter(batches)
        next(iterator), next(iterator)
    states = [batches.state_dict() for batches in ranks]
    assert states[0] == states[1] == states[2]
    expected = one_epoch(make(rank=2, ranks=3))[2:]
    resumed = make(rank=2, ranks=3)
    resumed.load_state_dict(states[0])
    assert one_epoch(resumed) == expected


def test_the_number_of_batches_does_not_depend_on_the_ranks():
    for drop_last in [True, False]:
        assert len(make(drop_last=drop_last)) == len(make(drop_last=drop_last, rank=2, ranks=3)), (
            drop_last
        )


def test_normalization_is_the_formula_for_each_channel():
    images = torch.randint(0, 256, (6, 2, 3, 3), dtype=torch.uint8)
    normalization = Normalization(scale=255.0, mean=(0.25, 0.5), std=(0.125, 2.0))
    batches = Batches(images, torch.arange(6), batch_size=6, normalization=normalization)
    ((inputs, _, _),) = list(batches)
    assert inputs.dtype == torch.float32
    for channel, (mean, std) in enumerate(zip((0.25, 0.5), (0.125, 2.0), strict=True)):
        expected = (images[:, channel].float() / 255.0 - mean) / std
        # The same float32 operations in the same order: no tolerance.
        assert torch.equal(inputs[:, channel], expected)


def test_settings_out_of_range_are_refused_by_name():
    cases: list[tuple[dict[str, Any], str]] = [
        ({"batch_size": 0}, "batch_size is 0, but must be finite and at least 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5, but must be a whole number"),
        ({"batch_size": "abc"}, "batch_size is 'abc', but must be a whole number"),
        ({"batch_size": True}, "batch_size is True, but must be a whole number"),
        ({"seed": -1}, "seed is -1, but must be finite and at least 0"),
        ({"batch_size": 24, "drop_last": True}, "leaves no batch of 23 samples"),
        ({"ranks": 0}, "ranks is 0, but must be finite and at least 1"),
        ({"rank": -1, "ranks": 2}, "rank is -1, but must be finite and at least 0"),
        ({"rank": 2, "ranks": 2}, "rank 2 is not one of 2 ranks: they count from 0"),
        ({"normalization": Normalization(scale=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)}, "3 channel"),
    ]
    for settings, message in cases:
        with pytest.raises((TypeError, ValueError), match=message):
            make(**settings)


def test_lengths_that_differ_are_refused():
    with pytest.raises(ValueError, match="3 inputs but 2 targets"):
        Batches(torch.zeros(3, 1), torch.zeros(2), batch_size=1)


def test_a_normalization_that_cannot_be_computed_is_refused():
    cases: list[dict[str, Any]] = [
        {"scale": 0.0, "mean": (0.0,), "std": (1.0,)},
        {"scale": 1.0, "mean": (0.0,), "std": (0.0,)},
        {"scale": 1.0, "mean": (0.0,), "std": (1.0, 1.0)},
    ]
    for settings in cases:
        with pytest.raises(ValueError, match="must"):
            Normalization(**settings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_order_is_the_same_on_a_gpu_and_batches_stay_there():
    inputs, targets = torch.arange(SAMPLES).view(-1, 1), torch.arange(SAMPLES)
    on_gpu = Batches(inputs.cuda(), targets.cuda(), batch_size=5, shuffle=True, seed=7)
    assert one_epoch(on_gpu) == one_epoch(make())
    assert next(iter(on_gpu)).inputs.is_cuda
