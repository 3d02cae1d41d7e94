"""Trained models loaded from run folders, exported and evaluated."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

import fastdeq
from fastdeq import cli, experiment
from fastdeq.experiment.command import with_saved_overrides
from fastdeq.runs.folder import BEST, CONFIG, LAST
from fastdeq.runs.reading import read_summary
from fastdeq.training import ClassificationTask, RegressionTask
from tests.loops import each

WORDS = (
    *("model=skip_deq", "data.batch_size=360", "trainer.max_epochs=2", "solver.max_steps=4"),
    "trainer.accelerator=cpu",
)


def bias(model: torch.nn.Module) -> torch.Tensor:
    value: torch.Tensor = model.state_dict()["head.bias"]
    return value


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> experiment.Result:
    folder = tmp_path_factory.mktemp("runs")
    return experiment.run([*WORDS, f"paths.run={folder / 'run'}"])


@pytest.fixture
def copied(result: experiment.Result, tmp_path: Path) -> Path:
    """The run folder as on another machine, where its other folders do not exist."""
    shutil.copytree(result.folder, tmp_path / "copy")
    config = (tmp_path / "copy" / CONFIG).read_text()
    (tmp_path / "copy" / CONFIG).write_text(config.replace(str(result.folder.parent), "/gone"))
    return tmp_path / "copy"


def test_a_run_in_a_notebook_returns_its_model_metrics_and_folder(
    result: experiment.Result,
) -> None:
    assert result.metrics == read_summary(result.folder)["metrics"]
    assert not result.model.training
    assert json.loads((result.folder / "overrides.json").read_text())[0] == "model=skip_deq"
    assert read_summary(result.folder)["command"].endswith(f"paths.run={result.folder}")


def test_a_copied_run_is_loaded_and_has_the_accuracy_of_its_summary(
    result: experiment.Result, copied: Path
) -> None:
    model, config = fastdeq.load(copied)
    assert (model.training, config.solver.max_steps) == (False, 4)
    data = instantiate(config.data)
    data.prepare_data()
    data.setup()
    right, count = 0, 0
    with torch.no_grad():
        for x, targets, _ in data.test_dataloader():
            right += int((model(x)[0].argmax(1) == targets).sum())
            count += len(targets)
    assert right / count == pytest.approx(result.metrics["test/accuracy"], abs=1e-6)


def test_the_best_weights_and_those_of_a_checkpoint_are_loaded_by_name(copied: Path) -> None:
    saved = torch.load(copied / BEST, weights_only=True)
    saved["state_dict"]["model.head.bias"] += 1
    torch.save(saved, copied / BEST)
    best, last = fastdeq.load(copied, weights="best").model, fastdeq.load(copied).model
    assert not torch.equal(bias(best), bias(last))
    assert torch.equal(bias(fastdeq.load(copied / BEST).model), bias(best))


def test_a_task_is_loaded_in_the_way_of_lightning(copied: Path, tmp_path: Path) -> None:
    model = fastdeq.load(copied).model
    task = ClassificationTask.load_from_checkpoint(copied / LAST)
    assert torch.equal(bias(task.model), bias(model))
    moved = tmp_path / "alone" / LAST
    moved.parent.mkdir()
    shutil.copy(copied / LAST, moved)
    for loaded in (
        ClassificationTask.load_from_checkpoint(moved, hparams_file=copied / CONFIG),
        ClassificationTask.load_from_checkpoint(
            moved, model=model, optimizer=torch.optim.Adam, weights=task.weights
        ),
    ):
        assert torch.equal(bias(loaded.model), bias(model))
    with pytest.raises(TypeError, match=r"of a ClassificationTask: use ClassificationTask.load_fr"):
        RegressionTask.load_from_checkpoint(copied / LAST)


def test_exported_weights_are_loaded_with_their_configuration(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("safetensors")
    out = copied.parent / "out"
    assert cli.dispatch(["export-weights", str(copied), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        *("README.md", "config.yaml", "model.safetensors")
    ]
    model, _ = fastdeq.load(out)
    for name, value in fastdeq.load(copied).model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    card = (out / "README.md").read_text()
    for text in ("# skip_deq on digits", "| accuracy |", "(B, 1, 8, 8)", "solver.max_steps=4"):
        assert text in card, text
    assert "/gone" not in card + (out / "config.yaml").read_text()
    assert cli.dispatch(["export-weights", str(copied), "--out", str(out)]) == 1
    assert "exists: choose another folder with --out" in capsys.readouterr().err


def test_best_weights_are_exported_without_the_metrics_of_the_last(copied: Path) -> None:
    pytest.importorskip("safetensors")
    assert cli.dispatch(["export-weights", str(copied), "--weights", "best"]) == 0
    card = (copied / "export" / "README.md").read_text()
    assert "| accuracy |" not in card
    assert "belong to its last weights" in card


@each(
    "damage, message",
    [
        (lambda run: (run / CONFIG).unlink(), "is not a run folder .config.yaml is missing"),
        (lambda run: (run / LAST).unlink(), "last.ckpt does not exist, but best.ckpt does"),
        (lambda run: [(run / n).unlink() for n in (LAST, BEST)], "has no weights .last.ckpt is"),
        (lambda run: (run / LAST).write_bytes(b"no"), "last.ckpt cannot be read"),
        (
            lambda run: (run / CONFIG).write_text(
                (run / CONFIG).read_text().replace("width: 128", "width: 64")
            ),
            "last.ckpt holds another model than this configuration",
        ),
    ],
)
def test_what_cannot_be_loaded_is_named(damage, message, tmp_path_factory, result) -> None:
    run = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(result.folder, run)
    damage(run)
    with pytest.raises((ValueError, OSError), match=message):
        fastdeq.load(run)


def test_a_test_takes_the_configuration_beside_its_checkpoint(copied: Path) -> None:
    words = ["mode=test", f"checkpoint={copied / BEST}", "solver.max_steps=9"]
    taken = with_saved_overrides(words)
    assert taken[:2] == ["model=skip_deq", "data.batch_size=360"]
    assert taken[-3:] == words
    assert "solver.max_steps=4" not in taken
    for other in ("model=deq", "experiment=mnist_fc", "data=cifar10"):
        assert with_saved_overrides([*words, other]) == [*words, other], other
    tested = experiment.run([*words, f"paths.outputs={copied.parent / 'tests'}"])
    assert torch.equal(bias(tested.model), bias(fastdeq.load(copied / BEST).model))


def test_a_notebook_gets_one_line_for_wrong_words() -> None:
    for words, text in (
        (["-m", "seed=1,2"], "-m is for the command line alone"),
        (["modle=deq"], "there is no key 'modle'"),
        (["mode=replay", "from_run=x"], "x is not a run folder"),
        (["mode=replay", "checkpoint=x"], "mode=replay does not make a run"),
    ):
        with pytest.raises((ValueError, OSError, TypeError), match=text):
            experiment.run(words)
    with pytest.raises(TypeError, match="must be a list"):
        experiment.run("model=deq")


def test_loading_without_lightning_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'hydra.errors'", name="hydra.errors")

    monkeypatch.setattr(fastdeq, "import_module", missing)
    with pytest.raises(
        ImportError, match=r"fastdeq.load needs hydra: pip install .*\[experiment\]"
    ):
        _ = fastdeq.load
