"""``fastdeq data``: prepares, verifies and shows a set, and says what is wrong."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fastdeq.data import FashionMnistDataModule, MnistDataModule
from fastdeq.data.command import SETS, main
from fastdeq.data.mnist import FASHION_MNIST
from tests.data.idx_files import (
    idx,
    mirror,
    names,
    published,
    samples,
    small_mnist,
    write_files,
    zipped,
)

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf" / "data"


@pytest.fixture(autouse=True)
def _small_sets(monkeypatch, tmp_path):
    """The samples play the official sets; the environment names no folder but a cache aside."""
    monkeypatch.setattr(MnistDataModule, "source", small_mnist())
    monkeypatch.setattr(FashionMnistDataModule, "source", published(FASHION_MNIST, samples(1)))
    monkeypatch.setenv("FASTDEQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("FASTDEQ_DATA", raising=False)


def shown_by(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    """What the command prints where all is well, by title."""
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return {line[:14].strip(): line[14:] for line in printed.out.splitlines()}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, status: int) -> str:
    """What the command says where something is wrong: one line on stderr, nothing on stdout."""
    assert main(arguments) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


# What it shows


def test_mnist_is_prepared_and_shown(capsys, tmp_path):
    write_files(tmp_path / "root", samples())
    store = tmp_path / "store"
    shown = shown_by(capsys, "mnist", f"--root={tmp_path / 'root'}", f"--store={store}")
    size = (store / "mnist.h5").stat().st_size
    pixels = samples()[0] / 255
    assert shown["set"] == "mnist"
    assert shown["file"] == f"{store / 'mnist.h5'} ({size:,} bytes)"
    assert shown["train"] == "30 samples of 1 × 28 × 28"
    assert shown["test"] == "20 samples of 1 × 28 × 28"
    assert shown["per class"] == "2 2 2 2 2 2 2 2 2 2"  # of the test split, which comes last
    rest = "(training pixels / 255; normalized with"
    assert shown["mean"] == f"{pixels.mean():.6f} {rest} 0.130700)"
    assert shown["std"] == f"{pixels.std():.6f} {rest} 0.308100)"
    assert shown["version"] == "1998"
    assert shown["licence"].startswith("CC BY-SA 3.0")


def test_the_second_run_needs_no_source_files_and_shows_the_same(capsys, tmp_path):
    paths = write_files(tmp_path / "root", samples())
    command = ("mnist", f"--root={tmp_path / 'root'}")
    first = shown_by(capsys, *command)
    store = tmp_path / "cache" / "mnist.h5"
    before = store.stat()
    for path in paths:
        path.unlink()
    assert shown_by(capsys, *command) == first
    assert store.stat() == before


def test_digits_and_polynomial_need_nothing(capsys, tmp_path):
    digits = shown_by(capsys, "digits")
    assert digits["train"] == "1,437 samples of 1 × 8 × 8"
    assert digits["test"] == "360 samples of 1 × 8 × 8"
    assert digits["mean"].startswith("0.304982 (training pixels / 16; ")
    assert digits["std"].startswith("0.375789 (training pixels / 16; ")
    line = shown_by(capsys, "polynomial", "--samples=100", "--low", "0.5")
    assert line["train"] == "100 samples of 1"
    assert line["test"] == "128 samples of 1"
    assert line["inputs"] == "0.5 to 1"  # of the test points, which come last
    assert "3x³/2 + x² − 5x + 2 sin x − 3" in line["function"]
    assert not list(tmp_path.iterdir())


def test_the_set_is_downloaded_on_request(capsys, monkeypatch, tmp_path):
    files = dict(zip(names(), (zipped(idx(array)) for array in samples()), strict=True))
    with mirror(files) as (address, _):
        monkeypatch.setattr(MnistDataModule, "source", small_mnist(mirrors=[address]))
        assert main(["mnist", "--download"]) == 0
    assert "30 samples" in capsys.readouterr().out
    assert (tmp_path / "cache" / "mnist.h5").is_file()


def test_the_environment_names_the_root_unless_it_is_given(capsys, monkeypatch, tmp_path):
    write_files(tmp_path / "root", samples())
    monkeypatch.setenv("FASTDEQ_DATA", str(tmp_path / "root"))
    assert shown_by(capsys, "mnist")["train"] == "30 samples of 1 × 28 × 28"
    text = refused(capsys, "mnist", "--root=/nowhere", status=1)
    assert text.startswith("/nowhere: no such folder")


def test_keys_may_be_written_as_for_training_and_as_the_messages_do(capsys, tmp_path):
    write_files(tmp_path / "root", samples(2))
    shown = shown_by(capsys, "mnist", f"data.root={tmp_path / 'root'}", "data.verify=False")
    assert shown["version"] == "not verified"


def test_help_names_every_set_and_every_option_of_one(capsys):
    assert main(["--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(name in printed for name in SETS)
    assert "fastdeq data mnist --root PATH" in printed
    assert main(["mnist", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--{name}" in printed for name in ("root PATH", "store FOLDER", "no-verify"))


# What it refuses


def test_a_command_line_that_makes_no_sense_has_status_2_and_the_cure(capsys):
    for arguments, text in [
        (["mnits"], "unknown data set 'mnits': did you mean mnist?"),
        (["fashion-mnist"], "unknown data set 'fashion-mnist': did you mean fashion_mnist?"),
        (["x"], f"unknown data set 'x': choose from {', '.join(SETS)}"),
        ([], "the following arguments are required: NAME (see "),
        (["mnist", "--rot=/data"], "unknown option '--rot': did you mean --root?"),
        (["mnist", "data.donwload=true"], "unknown option '--donwload': did you mean --download?"),
        (["digits", "--root=/data"], "unknown option '--root': choose from "),
        (["mnist", "root=/data"], "'root=/data' is one argument too many"),
        (["mnist", "data.download=maybe"], "--download/--no-download: ignored explicit argument"),
        (["mnist", "--validation", "many"], "--validation: invalid int value: 'many'"),
        (["mnist", "--validation=1.5"], "--validation: invalid int value: '1.5'"),
        (["polynomial", "--noise=loud"], "--noise: invalid float value: 'loud'"),
        (["polynomial", "--noise=-1"], "PolynomialDataModule.noise is -1.0, but must be finite"),
        (["mnist", "--batch-size=0"], "MnistDataModule.batch_size is 0, but must be finite and"),
        (["mnist", "--no-verify"], "verify=false is for files of your own: give data.root=PATH"),
    ]:
        assert refused(capsys, *arguments, status=2).startswith(text), text


def test_wrong_data_have_status_1(capsys, tmp_path):
    path = write_files(tmp_path / "root", samples(), compressed=False)[0]
    path.write_bytes(path.read_bytes()[:-1])
    text = refused(capsys, "mnist", f"--root={tmp_path / 'root'}", status=1)
    assert text.startswith(f"{path}: truncated")
    assert not (tmp_path / "cache").exists()


def test_a_damaged_store_has_status_1_and_the_cure(capsys, tmp_path):
    write_files(tmp_path / "root", samples())
    command = ("mnist", f"--root={tmp_path / 'root'}")
    shown = shown_by(capsys, *command)
    store = tmp_path / "cache" / "mnist.h5"
    store.write_bytes(store.read_bytes()[:-1])
    text = refused(capsys, *command, status=1)
    assert text.startswith(f"{store}: ")
    assert text.endswith("delete it and it is built again")
    store.unlink()
    assert shown_by(capsys, *command) == shown


def test_data_that_are_not_there_have_status_1(capsys):
    assert "data.download=true" in refused(capsys, "mnist", status=1)


# Beside the rest


def test_the_keys_are_those_of_the_configuration():
    for name in SETS:
        configured = OmegaConf.load(CONF / f"{name}.yaml").data
        target = configured.pop("_target_")
        assert target == f"fastdeq.data.{SETS[name].__name__}", name
        assert set(configured) == set(inspect.signature(SETS[name]).parameters), name


def test_every_configured_set_is_known_to_the_command():
    assert set(SETS) == {path.stem for path in CONF.glob("*.yaml")}


@pytest.mark.slow
def test_it_runs_as_a_module_with_its_exit_status():
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fastdeq", "data", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False
        )

    well = run("polynomial", "--seed=3")
    assert well.returncode == 0
    assert "512 samples of 1" in well.stdout
    wrong = run("polynomial", "--sede=3")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: unknown option '--sede': did you mean --seed?\n"
