"""README.md and docs/ are true: their code runs, their commands exist, their links lead somewhere.

A `python` block runs, and blocks of a page share their names. A block with a title
(```python title="mine/cells.py") is written to that file, from where later blocks import it. A
block behind the comment `<!-- not run: why -->` is left out.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import nn

from fastdeq import cli
from fastdeq.data.command import main as data
from tests.commands import CommandLine, a_run
from tests.data.idx_files import samples, write_files
from tests.loops import each

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
README = PAGES["README.md"]
_FENCE = re.compile(
    r'(?P<mark><!-- not run: .+ -->\n)?^```(?P<language>\w+)(?: title="(?P<file>[\w/.]+)")?\n'
    r"(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A code block; file: where it is to be written."""

    language: str
    code: str
    file: str | None


def blocks(text: str, language: str | None = None) -> Iterator[Block]:
    for found in _FENCE.finditer(text):
        if found["mark"] is None and language in (None, found["language"]):
            yield Block(found["language"], found["code"], found["file"])


def commands(text: str) -> list[str]:
    """Lines of bash blocks, and commands with arguments in the text; not those with `...`."""
    lines = [line for block in blocks(text, "bash") for line in block.code.splitlines()]
    inline = re.findall(r"`((?:fastdeq|make|python) [^\s`]+ [^`\n]*)`", _FENCE.sub("", text))
    return [line for line in [*lines, *inline] if line.strip() and "..." not in line]


COMMANDS = [(page, line) for page, text in PAGES.items() for line in commands(text)]


def lines(*programs: str) -> list[tuple[str, str]]:
    found = [(page, line) for page, line in COMMANDS if line.startswith(programs)]
    assert found, f"no commands of {programs}: the pattern no longer matches them"
    return found


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Forgets what the test imports from files of a page."""
    before = set(sys.modules)
    yield monkeypatch
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "mine":
            del sys.modules[name]


def write_files_of(page: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """The titled blocks of a page; what is a Python package can be imported."""
    for block in blocks(PAGES[page]):
        if block.file:
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.code, encoding="utf-8")
    patch.syspath_prepend(str(folder))


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(PAGES[page], "python"))])
def test_the_python_blocks_of_a_page_run(
    page: str, packages: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    packages.chdir(tmp_path)
    write_files_of(page, tmp_path, packages)
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(PAGES[page], "python"):
        if not block.file:
            exec(compile(block.code, page, "exec"), names)
    for name in ("layer", "model") if page == "README.md" else ():
        module = names[name]
        assert isinstance(module, nn.Module)
        for parameter in module.parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_the_readme_is_short_and_its_own_f_takes_fifteen_lines_at_most() -> None:
    assert len(README.splitlines()) <= 150
    first = next(blocks(README, "python")).code
    assert "fixed_point(" in first
    assert len([line for line in first.splitlines() if line]) <= 15


@each("page, line", sorted({(page, line) for page, line in lines("make ")}))
def test_the_make_commands_have_their_targets(page: str, line: str) -> None:
    answer = subprocess.run(
        [*shlex.split(line), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr


_TRAIN = re.compile(
    r"(?:fastdeq train|python train\.py|fastdeq jobs submit|make train ARGS=)(?:\"(.*)\"$| ?(.*))"
)


@pytest.mark.slow
def test_the_train_commands_compose(
    command: CommandLine, packages: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = a_run(command)
    kinds = set()
    for page, line in lines(
        "fastdeq train", "python train.py", "fastdeq jobs submit", "make train ARGS"
    ):
        found = _TRAIN.match(line)
        assert found
        typed = (found[1] or found[2]).replace("RUN", str(run))
        if "--config-dir" in typed:
            write_files_of(page, command.folder, packages)
        kinds |= {re.split(r"[= ]", word)[0] for word in shlex.split(typed)}
        # A sweep's comma lists stand for several values; the first of each is composed.
        words = [re.sub(r"=([^,\[{]*),.*", r"=\1", word) for word in shlex.split(typed)]
        words = [word for word in words if word not in ("-m", "--help", "--cfg", "job")]
        queue = ["hydra/launcher=submitit_slurm"] if line.startswith("fastdeq jobs") else []
        answer = command(*queue, *words, "--cfg", "job")
        assert answer.status == 0, f"{page}: {line}\n{answer.err}"
    # A pattern that no longer matches would test nothing.
    assert kinds >= {"model", "experiment", "sweep", "from_run", "mode", "trainer", "--config-dir"}


def test_the_files_of_the_page_on_extending_train_a_step(
    command: CommandLine, packages: pytest.MonkeyPatch
) -> None:
    write_files_of("docs/extending.md", command.folder, packages)
    words = ("--config-dir", "conf", "data=rings", "arch=gated", "solver=aitken")
    assert "LimitedMemory" not in (made := command(*words, "trainer=one_batch")).out
    assert made.status == 0, made.err
    assert "Aitken" in made.out


@each("page, line", lines("fastdeq data"))
def test_the_data_commands_run(
    page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTDEQ_CACHE", str(tmp_path / "cache"))
    if "PATH" in line:
        write_files(tmp_path, samples())
        line = line.replace("PATH", f"{tmp_path} --no-verify")
    assert data(options(line)) == 0


def test_the_report_commands_run(
    command: CommandLine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(command)
    monkeypatch.chdir(command.folder)
    pytest.importorskip("matplotlib")
    for page, line in lines("fastdeq report"):
        if line.startswith("fastdeq report dynamics"):  # of other runs: test_dynamics.py
            continue
        words = shlex.split(line.replace("RUN", str(run)))[1:]
        assert cli.dispatch(words) == 0, f"{page}: {line}"
    assert "skip_deq" in capsys.readouterr().out.lower().replace(" ", "_")


def options(line: str) -> list[str]:
    """What follows the subcommand."""
    return shlex.split(line)[2:]


@each("page, text", PAGES.items())
def test_links_between_files_lead_somewhere(page: str, text: str) -> None:
    generated = ("contributing.md", "changelog.md", "configuration/")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", text):
        made = target.removeprefix("../").startswith(generated)
        if "://" not in target and not (made and page.startswith("docs/")):
            assert ((ROOT / page).parent / target).exists(), target


@each("page, text", [*PAGES.items(), ("CONTRIBUTING.md", (ROOT / "CONTRIBUTING.md").read_text())])
def test_no_page_installs_fastdeq_from_an_index(page: str, text: str) -> None:
    for line in re.findall(r"pip install.*", text):
        assert not re.search(r"install [\"']?fastdeq(\[|\b(?!-))", line), line


def test_the_files_of_the_map_of_the_code_exist() -> None:
    found = re.findall(r"^\| ((?:`[\w./]+`,? ?)+)\|", PAGES["docs/code.md"], re.MULTILINE)
    names = re.findall(r"`([^`]+)`", "".join(found))
    assert len(names) > 15
    for name in names:
        assert (ROOT / name).exists() or (ROOT / "fastdeq" / name).exists(), name
