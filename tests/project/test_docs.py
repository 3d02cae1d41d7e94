"""The README is true: its code runs, its commands exist, and so do the files of its map."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastdeq.report.command import main as report
from tests.commands import CommandLine, a_run
from tests.data.idx_files import samples, write_files

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
] + re.findall(r"`((?:python train\.py|fastdeq) ?[^`…]*)`", README)


@pytest.mark.parametrize("code", CODE, ids=lambda code: code.splitlines()[-1])
def test_the_examples_run_and_leave_gradients(code: str) -> None:
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    module = names.get("layer") or names["model"]
    assert isinstance(module, sys.modules["torch"].nn.Module)
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_the_example_of_ones_own_f_has_fifteen_lines_at_most() -> None:
    lines = [line for line in CODE[0].splitlines() if line.strip()]
    assert "def f(z)" in CODE[0]
    assert len(lines) <= 15


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make")])
def test_the_make_commands_have_their_targets(command: str) -> None:
    answer = subprocess.run(
        [*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("typed", [line for line in COMMANDS if "train.py" in line])
def test_the_train_commands_compose(command: CommandLine, typed: str) -> None:
    if "RUN" in typed:
        typed = typed.replace("RUN", str(a_run(command)))
    words = [word for word in shlex.split(typed)[2:] if word not in ("-m", "--cfg", "job")]
    # A sweep's comma lists stand for several values; the first of each is composed.
    words = [re.sub(r"=([^,\[]*),.*", r"=\1", word) for word in words]
    answer = command(*words, "--cfg", "job")
    assert answer.status == 0, answer.err


def test_what_the_train_commands_are_made_of_is_all_kinds() -> None:
    """A table that no longer matches the pattern above would test nothing."""
    for word in ("experiment=", "-m ", "sweep=", "from_run=", "mode=test", "trainer=ddp", "--cfg"):
        assert any(word in line for line in COMMANDS), word


@pytest.mark.slow
@pytest.mark.parametrize("typed", [line for line in COMMANDS if line.startswith("fastdeq data")])
def test_the_data_commands_run(typed: str, tmp_path: Path) -> None:
    if "PATH" in typed:
        write_files(tmp_path, samples())
        typed = typed.replace("PATH", f"{tmp_path} --no-verify")
    answer = subprocess.run(
        [sys.executable, "-m", *shlex.split(typed)],
        cwd=ROOT,
        env={**os.environ, "FASTDEQ_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert "train" in answer.stdout


@pytest.mark.parametrize("typed", [line for line in COMMANDS if line.startswith("fastdeq report")])
def test_the_report_commands_run(
    command: CommandLine, capsys: pytest.CaptureFixture[str], typed: str
) -> None:
    typed = typed.replace("RUN", str(a_run(command)))
    capsys.readouterr()
    assert report(shlex.split(typed)[2:]) == 0
    assert capsys.readouterr().out


def test_there_are_commands_of_every_module() -> None:
    for command in ("fastdeq data", "fastdeq report"):
        assert any(line.startswith(command) for line in COMMANDS), command


def test_the_files_of_the_map_exist() -> None:
    table = README.split("## Map")[1].split("\n\n")[1]
    for row in table.splitlines()[2:]:
        places = re.findall(r"`([^`]+)`", row.split("|")[1])
        for place in places:
            assert (ROOT / place).exists() or (ROOT / "fastdeq" / place).exists(), place
