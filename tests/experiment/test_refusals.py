"""Wrong input to train.py: one line with the cure, status 1, and nothing half-made left behind."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastdeq.data import ImageFolderDataModule
from tests.commands import SHORT, CommandLine, a_run, refused
from tests.damage import cut, empty, flip, replace
from tests.data.idx_files import samples, small_mnist, write_files
from tests.data.image_folders import images, write_images

TYPOS = {
    "modle=deq": ("'modle'", "did you mean", "'model'"),
    "solver.tolerance=1e-3": ("'solver.tolerance'",),
    "solver.tole=1e-3": ("'solver.tole'", "did you mean 'solver.tol'"),
    "trainer.max_epoch=3": ("'trainer.max_epoch'", "did you mean 'trainer.max_epochs'"),
    "+solver.tole=1e-3": ("'solver.tole'", "did you mean 'solver.tol'"),
    "+traner.max_epochs=3": ("'traner'", "did you mean 'trainer'"),
    "+optimizer.learning_rate=1": ("'optimizer.learning_rate'",),
    "model=deqq": ("model=deqq", "did you mean 'deq'", "choices: deq, ", "skip_deq"),
    "solver=brodyen": ("solver=brodyen", "did you mean 'broyden'"),
    "data=minst": ("data=minst", "did you mean 'mnist'"),
    "experiment=mnist": ("experiment=mnist", "mnist_fc"),
    "model": ("'model' sets nothing", "model=VALUE"),
    "solver.tol=[1,": ("cannot read 'solver.tol=[1,'",),
    "~solver": ("solver",),
}


@pytest.mark.parametrize("typed", TYPOS)
def test_what_is_misspelt_is_named_with_what_is_near(command: CommandLine, typed: str) -> None:
    refused(command(typed), *TYPOS[typed])


VALUES = {
    "solver.tol=abc": ("solver.tol is 'abc'", "number"),
    "solver.tol=-1e-3": ("solver", "tol is -0.001"),
    "solver.tol=nan": ("solver.tol is nan", "finite"),
    "solver.max_steps=0": ("max_steps is 0",),
    "solver.max_steps=2.5": ("solver.max_steps is 2.5",),
    "adjoint.solver.max_steps=0": ("adjoint", "max_steps is 0"),
    "loss.skip=-1": ("loss", "skip is -1"),
    "loss.jacobian=-1": ("loss", "jacobian is -1"),
    "loss.jacobian_probability=1.5": ("loss", "jacobian_probability is 1.5"),
    "optimizer.lr=fast": ("optimizer", "fast"),
    "optimizer.weight_decay=-1": ("optimizer", "-1"),
    "data.batch_size=0": ("data", "batch_size", "0"),
    "data.batch_size=many": ("data", "batch_size", "many"),
    "data.validation=100000": ("data", "validation 100000", "hold out fewer"),
    "seed=-1": ("seed is -1",),
    "seed=one": ("seed is 'one'",),
    "mode=predict": ("mode is 'predict'", "'train'", "'test'"),
    "debug=perhaps": ("debug is 'perhaps'",),
    "name=../elsewhere": ("name is '../elsewhere'", "below paths.outputs"),
    "trainer.max_epochs=0": ("trainer.max_epochs is 0",),
    "trainer.max_epochs=-1": ("never end",),
    "trainer.max_epochs=ten": ("trainer.max_epochs", "ten"),
    "trainer.limit_train_batches=0": ("trainer.limit_train_batches is 0",),
    "trainer.gradient_clip_val=-1": ("trainer.gradient_clip_val is -1",),
    "trainer.precision=8": ("precision",),
    "precision=fp16": ("precision is 'fp16'", "'bf16'"),
    "memory_format=nhwc": ("memory_format is 'nhwc'", "'channels_last'"),
    "trainer.devices=0": ("trainer.devices is 0",),
    "trainer.devices=2": ("several devices need trainer=ddp",),
    "callbacks.failures.on_failure=skip": ("callbacks.failures.on_failure is 'skip'", "skip_step"),
    "callbacks.failures.unconverged=2": ("unconverged is 2", "share from 0 to 1"),
    "callbacks.failures.in_a_row=0": ("in_a_row is 0", "at least 1"),
    "callbacks.failures.patience=0": ("patience is 0", "at least 1"),
    "callbacks.pretraining.steps=-1": ("pretraining", "steps", "-1"),
    "arch.expansion=0": ("arch.expansion is 0",),
    "arch.channels=[8,a]": ("arch.channels.1 is 'a'", "whole number"),
    "arch.channels={a:1}": ("arch.channels is a list", "write arch.channels=[...]"),
    "callbacks.resumption.minutes={a:1}": ("callbacks.resumption.minutes is {'a': 1}",),
    "callbacks=reuse": ("callbacks.reuse chooses the start", "model=deq"),  # of skip_mdeq
    "callbacks.pretraining=3": ("callbacks.pretraining is 3", "a Callback"),
    "trainer._target_=null": ("trainer._target_ is None", "dotted name"),
    "trainer._target_=torch.nn.Linear": ("trainer.",),
    "trainer.log_every_n_steps={a:1}": ("trainer.log_every_n_steps is {'a': 1}", "whole number"),
    "trainer.deterministic={a:1}": ("trainer.deterministic is {'a': 1}", "true or false"),
    "trainer.num_sanity_val_steps=-7": ("trainer.num_sanity_val_steps is -7", "at least -1"),
    "+trainer.accumulate_grad_batches=0": ("trainer.accumulate_grad_batches is 0", "at least 1"),
    "+trainer.callbacks=null": ("trainer.callbacks is given by fastdeq itself",),
    "+optimizer.betas=[0.9]": ("optimizer.betas is [0.9]", "a list (a number"),
    "+optimizer.betas=[0.9,2]": ("optimizer", "(given +optimizer.betas=[0.9,2])"),
    "optimizer.lr=-0.1": ("optimizer.lr is -0.1", "at least 0"),
    "loss.skip=abc": ("error: loss.skip is 'abc'", "number"),
    "skip_weight=5": ("skip_weight=5", "write loss.skip=5"),
    "loss=plain": ("loss=plain", "write loss.skip=0.0"),
    "sweep=svhn": ("sweep=svhn", "write sweep=multiscale experiment=svhn solver=lbroyden"),
    "experiment=svhn_tsit5": ("write experiment=svhn solver=tsit5 data.batch_size=64",),
    "task=regression": ("write task._target_=fastdeq.training.RegressionTask",),
    "reference=null": ("reference=null", "leave it out"),
    "task.optimizer.lr=1": ("task.optimizer.lr=1", "write optimizer.lr=1"),
    "model.deq.cell=arch.cel": ("model.deq.cell", "this arch has no 'cel'"),
    "model.deq.solver=null": ("model.deq.solver is None", "set solver instead"),
    "~model.deq.adjoint": ("model.deq.adjoint is None", "set adjoint instead"),
    "logger=[1,2]": ("logger is 1", "tensorboard, wandb"),
    "data=null": ("data is None", "digits, emnist, fashion_mnist"),
    "paths.outputs=null": ("paths.outputs is None", "text"),
    "+paths.runs=a": ("'paths.runs'", "did you mean 'paths.run'"),
    "solver.max_steps=9999999999999999999": ("solver.max_steps is 9", "below 2**63"),
    "seed=99999999999": ("seed is 99999999999", "at most 4294967295"),
    "arch.channels=[8,0]": ("channels",),
}


def test_an_option_that_its_class_knows_but_its_file_does_not_list_is_hinted(
    command: CommandLine,
) -> None:
    for typed, owner in (
        ("trainer.profiler=simple", "Trainer"),
        ("optimizer.amsgrad=true", "Adam"),
        ("callbacks.pretraining.step=1", None),
    ):
        answer = command(typed)
        key = typed.partition("=")[0]
        if owner:
            line = f"{key} is an option of {owner} that its file does not list: write +{key}=VALUE"
            refused(answer, line)
        else:
            refused(answer, f"there is no key '{key}'; did you mean")


@pytest.mark.parametrize("typed", VALUES)
def test_values_of_a_wrong_type_or_out_of_range_are_named(command: CommandLine, typed: str) -> None:
    refused(command("trainer.accelerator=cpu", typed), *VALUES[typed])


CLASSIFICATION, REGRESSION = (
    f"task._target_=fastdeq.training.{name}Task" for name in ("Classification", "Regression")
)


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        (("data=polynomial", CLASSIFICATION), (REGRESSION,)),
        ((REGRESSION, "~task.top5"), (CLASSIFICATION,)),
        ((REGRESSION,), ("task.top5",)),
        (("~task._target_",), ("task has no class: set task._target_",)),
        (("model=deq", "arch=polynomial"), ("(1, 8, 8)", "choose the arch")),
        (("arch=fc",), ("DenseCell", "arch=digits_conv", "model=deq")),
        (("model=residual", "arch=fc"), ("no 'plain'", "leave arch= out")),
        (("+task.top5=true", "data=polynomial", CLASSIFICATION), (REGRESSION,)),
        (("sizes.outputs=7",), ("sizes.outputs is 7", "leave sizes to the data group")),
        (("model=deq", "sizes.features=60"), ("64", "60")),
        (("model=deq", "loss.skip=5"), ("model=deq does not predict z₀", "model=skip_deq")),
        (("solver=newton_krylov", "adjoint=unrolled"), ("use the Implicit adjoint",)),
    ],
    ids=" ".join,
)
def test_incompatible_settings_are_refused(
    command: CommandLine, typed: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    refused(command("trainer.accelerator=cpu", *typed), *parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(command: CommandLine) -> None:
    refused(command("trainer=ddp"), "there is no GPU here", "trainer=ddp_cpu")


def test_more_gpus_than_there_are_are_refused(
    command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused(command("trainer=ddp", "trainer.devices=4"), "asks for 4", "there are 2 GPUs")
    refused(command("trainer=ddp", "trainer.devices=[1,5]"), "asks for [1, 5]", "2 GPUs")


def test_more_processes_than_samples_in_a_batch_are_refused(command: CommandLine) -> None:
    answer = command("trainer=ddp_cpu", "trainer.devices=4", "data.batch_size=3")
    refused(answer, "data.batch_size is 3", "4 of them")


# Data


def test_data_that_are_not_there_are_refused_with_where_to_get_them(command: CommandLine) -> None:
    refused(command("data=mnist"), "data.root", "FASTDEQ_DATA", "data.download=true")
    refused(command("data=mnist", "data.root=nowhere"), "nowhere")


FOLDERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no val": (lambda root: shutil.rmtree(root / "val"), ("has no folder val", "data.root")),
    "classes differ": (lambda root: shutil.rmtree(root / "val/dog"), ("no folder for dog",)),
    "no images": (lambda root: empty_folder(root / "train/eel"), ("train/eel", "has no images")),
    "unsorted": (
        lambda root: write_images(root, {"val/1.png": b""}),
        ("val/1.png", "outside of a class"),
    ),
    "no image": (lambda root: (root / "val/eel/0.png").write_bytes(b"x"), ("val/eel/0.png",)),
    "more classes": (
        lambda root: write_images(root, images(("owl",))),
        ("has 4 classes, but sizes.outputs is 3", "set sizes.outputs=4"),
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_image_folders_that_are_not_as_they_must_be_are_refused(
    command: CommandLine, tmp_path: Path, case: str
) -> None:
    pytest.importorskip("PIL")
    change, parts = FOLDERS[case]
    root = write_images(tmp_path / "root")
    change(root)
    refused(command(*IMAGES, f"data.root={root}"), str(root), *parts)
    assert not list((tmp_path / "cache").rglob("*.h5"))
    assert not list((tmp_path / "cache").rglob("*.tmp"))


@pytest.mark.parametrize("damage", ["cut", "empty", "replace"])
def test_a_damaged_store_of_an_image_folder_is_refused_with_the_cure(
    command: CommandLine, tmp_path: Path, damage: str
) -> None:
    pytest.importorskip("PIL")
    ImageFolderDataModule(root=write_images(tmp_path / "root")).prepare_data()
    (store,) = (tmp_path / "cache").rglob("*.h5")
    {"cut": cut, "empty": empty, "replace": replace}[damage](store)
    answer = command(*IMAGES, f"data.root={tmp_path / 'root'}")
    refused(answer, store.name, "delete it and it is built again")


IMAGES = ("data=image_folder", "arch=cifar_tiny", "data.size=32", "sizes.outputs=3")


def test_settings_of_image_folders_are_refused_by_name(command: CommandLine) -> None:
    pytest.importorskip("PIL")
    refused(command(*IMAGES), "data.root=PATH", "FASTDEQ_DATA")
    refused(command(*IMAGES, "data.crop_area=[0.5,0.1]"), "data.crop_area must rise")
    refused(command(*IMAGES, "data.workers=some"), "data.workers is 'some'")
    refused(command(*IMAGES, "augmentation=flip"), "there is no key 'data.augmentation'")


def empty_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


DAMAGES = [cut, flip, empty, replace]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("compressed", [True, False], ids=["gzip", "plain"])
def test_damaged_idx_files_are_refused_by_name(
    command: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    compressed: bool,
) -> None:
    monkeypatch.setattr("fastdeq.data.MnistDataModule.source", small_mnist())
    files = write_files(tmp_path / "mnist", samples(), compressed=compressed)
    damage(files[2])
    refused(command("data=mnist", f"data.root={tmp_path / 'mnist'}"), files[2].name)
    assert not list((tmp_path / "cache").rglob("*.h5"))


def test_idx_files_of_another_set_are_refused(command: CommandLine, tmp_path: Path) -> None:
    write_files(tmp_path / "mnist", samples(seed=1))
    answer = command("data=mnist", f"data.root={tmp_path / 'mnist'}")
    refused(answer, "train-images-idx3-ubyte", "verify=false")
    assert not list((tmp_path / "cache").rglob("*.h5"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_refused_with_the_cure(
    command: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
) -> None:
    monkeypatch.setattr("fastdeq.data.MnistDataModule.source", small_mnist())
    write_files(tmp_path / "mnist", samples())
    overrides = ("data=mnist", f"data.root={tmp_path / 'mnist'}", f"data.store={tmp_path}")
    a_run(command, *overrides)
    shutil.rmtree(command.folder / "outputs")
    (store,) = tmp_path.glob("*.h5")
    damage(store)
    refused(command(*overrides), store.name, "delete it and it is built again")


# Checkpoints and run folders


def test_testing_needs_weights(command: CommandLine) -> None:
    refused(command("mode=test"), "checkpoint=PATH", "from_run=FOLDER")
    refused(command("mode=test", "checkpoint=nowhere.ckpt"), "nowhere.ckpt", "last.ckpt")
    refused(command("from_run=nowhere"), "nowhere is not a run folder")


@pytest.fixture
def checkpoint(command: CommandLine, tmp_path: Path) -> Path:
    """Of a run whose folder is gone."""
    kept = tmp_path / "last.ckpt"
    shutil.copy(a_run(command) / "last.ckpt", kept)
    shutil.rmtree(command.folder / "outputs")
    return kept


@pytest.mark.parametrize("damage", [cut, empty, replace])
def test_a_damaged_checkpoint_is_refused(
    command: CommandLine, checkpoint: Path, damage: Callable[[Path], None]
) -> None:
    damage(checkpoint)
    refused(command("mode=test", f"checkpoint={checkpoint}"), "last.ckpt", "cannot be read")


def test_a_checkpoint_of_another_model_or_of_another_program_is_refused(
    command: CommandLine, checkpoint: Path
) -> None:
    refused(command("mode=test", f"checkpoint={checkpoint}", "model=deq"), "another model")
    refused(
        command("mode=test", f"checkpoint={checkpoint}", "model=skip_deq", "arch.width=64"),
        "another model",
    )
    torch.save({"weights": torch.zeros(3)}, checkpoint)
    refused(command("mode=test", f"checkpoint={checkpoint}"), "not a checkpoint of a run")


def test_a_run_folder_that_is_there_is_refused_and_left_alone(
    command: CommandLine, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "summary.json").write_text("precious")
    refused(command(*SHORT, f"paths.run={folder}"), "paths.run", "exists")
    assert (folder / "summary.json").read_text() == "precious"


def test_outputs_that_cannot_be_written_are_refused(command: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    refused(command(*SHORT, f"paths.outputs={tmp_path / 'file'}"), "paths.outputs")


# How it is said


def test_with_debug_the_traceback_comes_before_the_line(command: CommandLine) -> None:
    answer = command("solver.tol=abc", "debug=true")
    assert answer.status == 1
    assert "Traceback (most recent call last)" in answer.err
    assert answer.err.splitlines()[-1] == "error: solver.tol is 'abc', but must be a number"


@pytest.mark.slow
def test_a_shell_sees_the_line_and_the_status(command: CommandLine) -> None:
    refused(command.process("solver.tole=1"), "did you mean 'solver.tol'")


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        (("seed=1,2", "solver.tole=1"), ("did you mean 'solver.tol'",)),
        (("seed=1,2", "model=deq,deqq"), ("did you mean 'deq'",)),
    ],
    ids=" ".join,
)
def test_a_sweep_is_refused_before_its_first_job(
    command: CommandLine, typed: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    refused(command("-m", *SHORT, *typed), *parts)
