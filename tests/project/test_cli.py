"""``fastdeq``: subcommands, help, what is imported for it, and how its commands are named."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastdeq import cli, commands

ROOT = Path(__file__).parents[2]
NEEDED = {"jobs": "hydra_plugins.hydra_submitit_launcher"}


@pytest.fixture(autouse=True)
def _program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/fastdeq"])


@pytest.fixture
def mask() -> Iterator[None]:
    """The signals that are blocked are again those of before."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_help_is_given_at_each_level_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.dispatch(["--help"]) == 0
    printed = capsys.readouterr().out
    for name, (_, text) in cli.COMMANDS.items():
        assert f"    {name}" in printed, name
        assert text in printed, name
    levels = [["data"], ["data", "mnist"], ["report"], ["jobs"], ["jobs", "logs"], ["bench"]]
    for words in levels:
        if words[0] in NEEDED and find_spec(NEEDED[words[0]]) is None:
            continue
        assert cli.dispatch([*words, "--help"]) == 0, words
        printed = capsys.readouterr().out
        assert printed.startswith(f"usage: fastdeq {' '.join(words)}"), words
        assert len(words) > 1 or f"examples:\n  fastdeq {words[0]} " in printed, words


def test_without_a_command_the_help_is_printed_with_status_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.dispatch([]) == 2
    assert capsys.readouterr().out.startswith("usage: fastdeq ")


def test_a_wrong_word_names_the_nearest_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    for typed, text in (
        ("tarin", "unknown command 'tarin': did you mean train?"),
        ("--verison", "unknown option '--verison': did you mean --version?"),
        ("report outputs --fromat csv", "unknown option '--fromat': did you mean --format?"),
        ("report plot outputs", "unknown command 'report plot': did you mean report plots?"),
        ("data mnits", "unknown data set 'mnits': did you mean mnist?"),
        ("bench --secnds 3", "unknown option '--secnds': did you mean --seconds?"),
    ):
        assert cli.dispatch(typed.split()) == 2, typed
        assert capsys.readouterr().err == f"error: {text}\n"


def test_the_help_and_the_report_need_no_torch() -> None:
    for words in (["--help"], ["report", "--help"]):
        code = (
            "import sys; from fastdeq.cli import dispatch; "
            f"status = dispatch({words}); assert status == 0; "
            "heavy = {'torch', 'pytorch_lightning', 'hydra'} & set(sys.modules); assert not heavy"
        )
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.usefixtures("mask")
def test_a_signal_waits_before_anything_is_imported_for_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stops = {signal.SIGUSR1, signal.SIGUSR2}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
    found = []

    def module(name: str) -> SimpleNamespace:
        found.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()) & stops)
        return SimpleNamespace(main=lambda words: 75)

    monkeypatch.setattr(cli, "import_module", module)
    for command, blocked in (("report", set()), ("train", stops)):
        with pytest.raises(SystemExit) as end:
            cli.main([command])
        assert (found.pop(), end.value.code) == (blocked, 75)


def test_a_package_that_is_missing_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def module(name: str) -> None:
        raise ModuleNotFoundError("No module named 'hydra.core'", name="hydra.core")

    monkeypatch.setattr(cli, "import_module", module)
    assert cli.dispatch(["train"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: fastdeq train needs hydra: pip install "')
    assert line.endswith('[experiment]"')


def test_each_package_of_the_experiments_names_the_extra_without_it() -> None:
    code = """
import importlib, sys
for name in ("numpy", "yaml", "hydra", "lightning_fabric", "pytorch_lightning"):
    sys.modules[name] = None
for name in ("data", "training", "experiment", "report"):
    try:
        importlib.import_module(f"fastdeq.{name}")
    except ImportError as error:
        print(error.name, error)
"""
    words = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [  # with a name, `python -m` prints no traceback
        *("fastdeq.data", "fastdeq.training", "fastdeq.experiment", "fastdeq.report")
    ]
    for line in lines:
        assert re.search(r"fastdeq\.\w+ needs \w+: pip install .*\[experiment\]", line)


def test_a_command_is_named_as_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for program, train, data in (
        ("/venv/bin/fastdeq", "fastdeq train", "fastdeq data"),
        ("/code/train.py", "python train.py", "python -m fastdeq data"),
        ("/code/fastdeq/__main__.py", "python -m fastdeq train", "python -m fastdeq data"),
        ("/site-packages/submitit/core/_submit.py", "fastdeq train", "fastdeq data"),
    ):
        monkeypatch.setattr(sys, "argv", [program])
        assert (commands.typed("train"), commands.typed("data")) == (train, data)


COMPLETED = {
    "fastdeq rep": "report",
    "fastdeq report pl": "plots",
    "fastdeq report out": "outputs",  # a folder
    "fastdeq train model=skip_r": "model=skip_reg_deq model=skip_reg_mdeq",
    "fastdeq train model=deq solver.max_": "solver.max_steps=",
}


def test_bash_completes_commands_groups_and_keys_without_torch(tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "torch.py").write_text("raise AssertionError")
    program = tmp_path / "fastdeq"
    program.write_text(f"#!{sys.executable}\nfrom fastdeq.cli import main\n\nmain()\n")
    program.chmod(0o755)
    calls = [
        f"COMP_LINE='{line}' COMP_POINT=99 COMP_CWORD={len(line.split()) - 1} hydra_bash_completion"
        for line in COMPLETED
    ]
    script = 'eval "$(fastdeq train -sc install=bash)"'
    for call in calls:
        script += f'\n{call}; echo "${{COMPREPLY[@]}}"'
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    words, environment = ["bash", "-c", script], {**os.environ, **path}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines() == list(COMPLETED.values())
