"""A user's own cell, solver and data set, from a package and a configuration folder of theirs."""

import sys
from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fastdeq.experiment.explain import explain
from fastdeq.experiment.targets import locate
from tests.commands import SHORT, CommandLine
from tests.loops import each

FILES = {
    "own/__init__.py": "",
    "own/broken.py": "import gone",
    "own/parts.py": """
import torch
from torch import nn

from fastdeq.data import InMemoryDataModule, Samples
from fastdeq.settings import setting, settings
from fastdeq.solvers import AbstractSolver
from fastdeq.solvers.base import Step


class Cell(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, z, x):
        return torch.tanh(0.1 * self.linear(z) + x)


@settings
class Halved(AbstractSolver):
    damping: float = setting(default=0.5, above=0, at_most=1)

    def init(self, problem, first):
        return None

    def step(self, problem, current, memory):
        return Step(problem.evaluate(current.z + self.damping * current.g)), None


class Stripes(InMemoryDataModule):
    input_shape = (1, 8, 8)
    outputs = 10
    normalization = None

    def __init__(self, *, batch_size, eval_batch_size, seed, validation, normalization):
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            validation=validation,
        )

    def load(self):
        labels = torch.arange(200) % 8
        images = nn.functional.one_hot(labels, 8).float()[:, None, :, None].expand(-1, 1, 8, 8)
        samples = Samples(images.contiguous(), labels)
        return samples, samples
""",
    "conf/solver/own.yaml": """
defaults: [picard, _self_]
_target_: own.parts.Halved
damping: 0.5
""",
    "conf/data/own.yaml": """
# @package _global_
defaults: [digits]
data: {_target_: own.parts.Stripes}
""",
    "conf/experiment/own.yaml": """
# @package _global_
defaults:
  - override /data: own
  - override /model: deq
  - override /solver: own
arch:
  cell: {_target_: own.parts.Cell}
""",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the package `own`, which can be imported, and conf/."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own", "own.parts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_own_classes_are_chosen_with_a_configuration_folder_of_ones_own(
    command: CommandLine, folder: Path
) -> None:
    where = ("--config-dir", str(folder / "conf"))
    answer = command(*where, *SHORT[:-1], "experiment=own", "solver.tol=0.05")
    assert answer.status == 0, answer.err
    (config,) = (OmegaConf.load(path) for path in answer.files if path.name == "config.yaml")
    assert config.solver._target_ == "own.parts.Halved"
    assert (config.solver.damping, config.solver.tol) == (0.5, 0.05)
    assert config.data._target_ == "own.parts.Stripes"
    assert "Halved(tol=0.05" in answer.out
    # What is wrong with one's own is named as for a class of fastdeq.
    answer = command(*where, *SHORT[:-1], "experiment=own", "solver.damping=2")
    assert answer.status == 1
    assert answer.err.startswith("error: solver.damping is 2")
    answer = command(*SHORT[:-1], "experiment=own")
    assert answer.err.startswith("error: there is no experiment=own")


TARGETS = {
    "fastdeq.solvers.Andersen": "but fastdeq.solvers has no 'Andersen'; did you mean "
    "fastdeq.solvers.Anderson?",
    "fastdeq.data.Digits": "but fastdeq.data has no 'Digits'; did you mean "
    "fastdeq.data.DigitsDataModule?",
    "fastdeq.solvers.Anderson.Qr": "but fastdeq.solvers.Anderson has no 'Qr'",
    "torch.optm.Adam": "but torch has no 'optm'; did you mean torch.optim?",
    "ownn.parts.Cell": "but there is no package 'ownn': is it installed, or its folder on "
    "PYTHONPATH?",
    "Anderson": "but must be the dotted name of a class or a function, package.module.Name",
    "fastdeq..Anderson": "but must be the dotted name of a class or a function, "
    "package.module.Name",
    "own.broken.Cell": "but own.broken cannot be imported (ModuleNotFoundError: No module named "
    "'gone')",
}


@each("name, reason", TARGETS.items())
def test_a_class_that_does_not_exist_is_named_in_one_sentence(
    name: str, reason: str, folder: Path
) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        locate("solver._target_", name)
    assert str(error.value) == f"solver._target_ is {name!r}, {reason}"


def test_a_wrong_class_is_reported_alike_in_every_group(command: CommandLine) -> None:
    for group in ("model", "data", "solver", "optimizer", "arch.cell", "+callbacks.mine"):
        answer = command(*SHORT, f"{group}._target_=fastdeq.Gone")
        assert answer.status == 1
        key = group.lstrip("+")
        assert answer.err == (
            f"error: {key}._target_ is 'fastdeq.Gone', but fastdeq has no 'Gone'\n"
        )
    with pytest.raises(InstantiationException) as error:  # of a saved configuration
        instantiate({"cell": {"_target_": "fastdeq.Gone"}})
    assert explain(error.value) == "cell._target_ is 'fastdeq.Gone', but fastdeq has no 'Gone'"
