"""Any LightningDataModule with pairs (x, y) trains and resumes; others are refused in one line."""

from pathlib import Path

import pytest
import torch

from fastdeq.experiment.run import check
from fastdeq.training import PlainDataModule
from tests.comparisons import assert_same
from tests.configurations import composed
from tests.data.plain_modules import Own, Plain
from tests.runs import run, run_in_pieces

MODULES = "tests.data.plain_modules"


def own(name: str) -> tuple[str, str]:
    return f"data._target_={MODULES}.{name}", "model=skip_deq"


@pytest.mark.slow
def test_a_run_on_ordinary_loaders_stopped_after_every_step_equals_the_whole_one(
    tmp_path: Path,
) -> None:
    whole = run(tmp_path / "whole", *own("Own"))
    assert run_in_pieces(tmp_path / "pieces", *own("Own")) == 11
    assert_same(whole, tmp_path / "pieces")


def prepared(kind: type[Plain], **options: int) -> PlainDataModule:
    data = PlainDataModule(kind(**options), seed=3)
    data.setup("fit")
    return data


def epochs(data: PlainDataModule, count: int = 2) -> list[torch.Tensor]:
    loader = data.train_dataloader()
    return [torch.cat([batch[0] for batch in loader]) for _ in range(count)]


def test_order_and_noise_depend_on_seed_and_epoch_alone() -> None:
    for kind in (Plain, Own):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first, second = epochs(prepared(kind))
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.equal(first, second)
        torch.manual_seed(2)
        for one, other in zip((first, second), epochs(prepared(kind)), strict=True):
            assert torch.equal(one, other)


def test_worker_processes_draw_the_same_in_every_process() -> None:
    one, other = (epochs(prepared(Plain, workers=1), count=1) for _ in range(2))
    assert torch.equal(one[0], other[0])


def test_evaluations_draw_the_same_in_every_epoch() -> None:
    data = prepared(Plain)
    assert data.validates_on_test
    assert not prepared(Own).validates_on_test
    loader = data.val_dataloader()
    first, second = (torch.cat([batch[0] for batch in loader]) for _ in range(2))
    assert torch.equal(first, second)


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    for name, words, more in (
        ("Lacking", "Lacking has no train_dataloader", ()),
        ("Named", "a batch of Named is dict, but must be two tensors", ()),
        ("Tripled", "a batch of Tripled is 3 tensors, but must be two tensors", ()),
        ("Unbounded", "returns a loader without a length", ()),
        ("Several", "Several.train_dataloader returns 2 loaders, but must return one", ()),
        ("Flat", "but the data has inputs (64,)", ()),
        ("NotData", "must be a LightningDataModule", ()),
        ("Plain", "callbacks.reuse needs batches", ("callbacks=reuse", "model=deq")),
        ("Plain", "not divided among 2 devices", ("trainer=ddp_cpu",)),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            check(composed(*own(name), *more))
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
