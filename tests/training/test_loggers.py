"""What is written beside metrics.csv, by choice: TensorBoard and Weights & Biases."""

import csv
import socket
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fastdeq import experiment
from fastdeq.runs.status import Interrupted
from fastdeq.training import AbstractTask
from tests.configurations import composed

SHORT = (
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
)


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as lines:
        return list(csv.DictReader(lines))


@pytest.mark.slow
def test_tensorboard_writes_the_metrics_into_the_run_folder(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = experiment.run_config(
        composed(*SHORT, f"paths.outputs={tmp_path}", "logger=tensorboard")
    )
    assert list(folder.glob("tensorboard/events.out.tfevents.*"))
    events = reader.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    rows = metrics(folder)
    for name in ("step/loss", "train/loss", "val/accuracy", "test/accuracy"):
        written = [event.value for event in events.Scalars(name)]
        # A float32 in the one, its decimals in the other.
        assert written == pytest.approx([float(row[name]) for row in rows if row[name]], rel=1e-6)
        assert written
    tags = events.Tags()
    assert "hp_metric" not in tags["scalars"]
    assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")
    if find_spec("matplotlib") is not None:
        assert {"plots/training", "plots/nfe", "plots/convergence"} <= set(tags["images"])


# Weights & Biases


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Someone who has never logged in, and what is sent to the outside: it all ends here."""
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    asked: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = f"http://127.0.0.1:{server.getsockname()[1]}"
        proxies = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
        for name in ("WANDB_BASE_URL", *proxies):
            monkeypatch.setenv(name, here)
        threading.Thread(target=listen, args=(server, asked), daemon=True).start()
        wandb.teardown()  # what it has read from the environment before
        yield asked
        wandb.teardown()
        server.shutdown(socket.SHUT_RDWR)


def listen(server: socket.socket, asked: list[str]) -> None:
    """Keep what callers say first, and hang up."""
    while True:
        try:
            caller, _ = server.accept()
        except OSError:  # closed
            return
        with caller:
            asked.append(caller.recv(1000).decode(errors="replace"))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The W&B runs that are begun."""
    wandb, begun = pytest.importorskip("wandb"), []
    init = wandb.init

    def begin(**options: Any) -> Any:
        begun.append(init(**options))
        return begun[-1]

    monkeypatch.setattr(wandb, "init", begin)
    return begun


def refuse(*args: object) -> str:
    raise AssertionError("a login was asked for")


def kept(folder: Path) -> Path:
    """The file of the one offline run in a run folder."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert file.stat().st_size > 0
    return file


def test_without_a_login_each_run_is_kept_in_its_folder_without_prompt_or_network(
    tmp_path, stranger, runs, monkeypatch, capfd
):
    from fastdeq.training.loggers.weights_and_biases import WeightsAndBiases

    monkeypatch.setattr("builtins.input", refuse)
    monkeypatch.setattr("getpass.getpass", refuse)
    for name in ("first", "second"):  # as two jobs of a sweep, in one process
        (tmp_path / name).mkdir()
        logger = WeightsAndBiases(save_dir=tmp_path / name, project="fastdeq")
        logger.log_hyperparams({"seed": 0})
        logger.log_metrics({"train/loss": 0.5}, step=1)
        logger.close()
    first, second = runs
    assert first._is_finished
    assert second._is_finished
    assert first.id != second.id
    assert first.id in kept(tmp_path / "first").name
    assert second.id in kept(tmp_path / "second").name
    assert not stranger
    assert not any(capfd.readouterr())  # its banners would stand between the lines of the epochs


def test_a_resumed_run_keeps_its_id(tmp_path, stranger, runs):
    words = (*SHORT, f"paths.run={tmp_path / 'run'}", "logger=wandb", "model=deq")
    with pytest.raises(Interrupted):
        experiment.run_config(composed(*words, "stop_after=1e-9"))
    experiment.run_config(composed(*words))
    first, second = runs
    assert first.id == second.id
    assert first._is_finished
    assert not stranger


@pytest.mark.slow
def test_an_experiment_with_weights_and_biases_keeps_its_run_beside_metrics_csv(
    tmp_path, stranger, runs
):
    folder = experiment.run_config(composed(*SHORT, f"paths.outputs={tmp_path}", "logger=wandb"))
    (run,) = runs
    assert run._is_finished
    assert run.id in kept(folder).name
    assert run.name == "skip_mdeq_lbroyden_s0"
    if find_spec("matplotlib") is not None:
        assert list(folder.glob("wandb/offline-run-*/files/media/images/plots/training*.png"))
    written = kept(folder).read_bytes()
    for name in ("step/loss", "train/loss", "val/accuracy", "test/accuracy"):
        assert name.encode() in written
        assert [row[name] for row in metrics(folder) if row[name]]
    assert run.config["solver"]["tol"] == 5e-3
    assert not stranger


def test_a_run_that_fails_is_closed_too(tmp_path, stranger, runs, monkeypatch):
    def fail(*args: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(AbstractTask, "training_step", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        experiment.run_config(composed(*SHORT, f"paths.outputs={tmp_path}", "logger=wandb"))
    (run,) = runs
    assert run._is_finished


@pytest.mark.parametrize(
    ("chosen", "variable", "key", "mode"),
    [
        ("auto", None, None, "offline"),
        ("auto", None, "k" * 40, "online"),
        ("offline", None, "k" * 40, "offline"),
        ("disabled", None, None, "disabled"),
        ("online", "offline", "k" * 40, "offline"),  # the environment comes first
    ],
)
def test_the_mode_is_online_only_with_a_login_or_on_request(
    chosen, variable, key, mode, tmp_path, stranger, monkeypatch
):
    from fastdeq.training.loggers.weights_and_biases import WeightsAndBiases

    monkeypatch.setenv("WANDB_SILENT", "true")  # else a login greets by name, which it asks for
    for name, value in (("WANDB_MODE", variable), ("WANDB_API_KEY", key)):
        if value is not None:
            monkeypatch.setenv(name, value)
    begun: list[dict[str, Any]] = []
    monkeypatch.setattr("wandb.init", lambda **options: begun.append(options))
    WeightsAndBiases(save_dir=tmp_path, project="fastdeq", mode=chosen)
    assert [options["mode"] for options in begun] == [mode]
    assert not stranger  # to choose, nobody is asked
