"""The README keeps its word: its code runs, its commands exist, its map is the house."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


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


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("python")])
def test_the_train_commands_compose(command: str) -> None:
    words = [word for word in shlex.split(command)[1:] if word not in ("-m", "--cfg", "job")]
    # A sweep's comma lists stand for several values; the first of each is composed.
    words = [re.sub(r"=([^,]*),.*", r"=\1", word) for word in words]
    answer = subprocess.run(
        [sys.executable, *words, "--cfg", "job"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr


def test_a_sweep_makes_a_folder_for_each_job(tmp_path: Path) -> None:
    overrides = "model=deq,skip_deq trainer.max_epochs=1 trainer.limit_train_batches=1"
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "train.py"),
            "-m",
            *overrides.split(),
            "trainer.accelerator=cpu",
            f"paths.outputs={tmp_path}",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(list(tmp_path.glob("digits/*/*/summary.json"))) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits", "multirun"]


def test_the_files_of_the_map_exist() -> None:
    table = README.split("## Map")[1].split("\n\n")[1]
    for row in table.splitlines()[2:]:
        places = re.findall(r"`([^`]+)`", row.split("|")[1])
        for place in places:
            assert (ROOT / place).exists() or (ROOT / "fastdeq" / place).exists(), place
