"""Printing never ends a run: unknown characters, readers that leave, full disks, closed streams.

Public reports of such ends: wandb issues 1757 and 6201.
"""

import ast
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fastdeq.cli import main
from fastdeq.streams import check_written, keep_streams
from tests.commands import ROOT, SHORT, CommandLine

pytestmark = pytest.mark.slow

StdoutTo = Callable[..., None]


@pytest.fixture
def stdout_to() -> Iterator[StdoutTo]:
    """Puts a stream in the place of stdout, made as Python makes it at its start."""
    with ExitStack() as open_files, pytest.MonkeyPatch.context() as patch:

        def put(file: int | str, encoding: str = "utf-8") -> None:
            stream = open_files.enter_context(open(file, "w", encoding=encoding))
            patch.setattr(sys, "stdout", stream)

        yield put


def unread() -> int:
    """The end of a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


# Characters


@pytest.mark.parametrize(
    ("encoding", "printed"), [("ascii", b"1 ? 8 ?\n"), ("latin-1", b"1 \xd7 8 ?\n")]
)
def test_a_character_without_an_encoding_is_replaced(
    stdout_to: StdoutTo, tmp_path: Path, encoding: str, printed: bytes
) -> None:
    stdout_to(str(tmp_path / "out"), encoding)
    keep_streams()
    print("1 × 8 ─", flush=True)
    assert (tmp_path / "out").read_bytes() == printed


def test_the_name_of_a_file_that_is_not_utf_8_can_be_printed(
    stdout_to: StdoutTo, tmp_path: Path
) -> None:
    stdout_to(str(tmp_path / "out"))
    keep_streams()
    print(os.fsdecode(b"caf\xe9"), flush=True)
    assert (tmp_path / "out").read_bytes() == b"caf?\n"


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_the_data_command_prints_in_every_encoding(
    stdout_to: StdoutTo, tmp_path: Path, capsys: pytest.CaptureFixture[str], encoding: str
) -> None:
    stdout_to(str(tmp_path / "out"), encoding)
    with pytest.raises(SystemExit) as end:
        main(["data", "digits"])
    sys.stdout.flush()
    assert end.value.code == 0
    assert capsys.readouterr().err == ""
    assert b"1,437 samples of 1 " in (tmp_path / "out").read_bytes()


@pytest.mark.slow
def test_a_sweep_in_the_c_locale_leaves_the_files_that_others_leave(tmp_path: Path) -> None:
    # The folder's name comes as bytes that ASCII cannot decode.
    folder = tmp_path / "λ"
    folder.mkdir()
    answer = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-m", *SHORT, "seed=1,2"],
        cwd=folder,
        env={**os.environ, **C_LOCALE},
        capture_output=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == b""
    (table,) = folder.glob("outputs/multirun/*/table.md")
    assert "±" in table.read_text(encoding="utf-8")
    logs = list(folder.glob("outputs/digits/*/*/train.log"))
    assert len(logs) == 2
    for log in logs:
        assert "───" in log.read_text(encoding="utf-8")
        assert "see " in log.read_text(encoding="utf-8")


BYTES = ("os", "tarfile", "gzip", "Image", "self")
"""Whose `open` yields bytes."""


def opened_without_encoding(source: str) -> list[str]:
    """The calls that open a text file, or a program's output as text, in the locale's encoding."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        *owner, name = ast.unparse(node.func).rsplit(".", 1)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        words = [ast.unparse(each) for each in node.args]
        modes = "".join(word for word in words if word.strip("'rwaxbt+") == "")
        text = (
            (owner and name in ("read_text", "write_text"))  # not those of fastdeq.runs.files
            or (name == "open" and owner not in [[each] for each in BYTES] and "b" not in modes)
            or given.get("text") == "True"
        )
        if text and "encoding" not in given and None not in given:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("folder", ["fastdeq", "tools", "benchmarks"])
def test_text_is_read_and_written_in_an_encoding_that_is_named(folder: str) -> None:
    for path in [*(ROOT / folder).rglob("*.py"), ROOT / "train.py"]:
        found = opened_without_encoding(path.read_text(encoding="utf-8"))
        assert not found, f"{path}: {found}"


def test_the_search_for_files_without_encoding_finds_them() -> None:
    source = "path.read_text()\npath.open('w')\nopen(p, 'rb')\nrun(['a'], text=True)\nopen(p)"
    wanted = ["path.read_text()", "path.open('w')", "run(['a'], text=True)", "open(p)"]
    assert opened_without_encoding(source) == wanted
    assert opened_without_encoding("path.read_text(encoding='utf-8')") == []


# Streams that go away


def test_nothing_printed_fails_where_the_reader_has_left(stdout_to: StdoutTo) -> None:
    stdout_to(unread())
    keep_streams()
    for _ in range(1000):  # more than any buffer takes
        print("─" * 100, flush=True)
    check_written()  # as `| head` ends a filter: not an error


def test_output_that_a_full_disk_has_not_taken_is_an_error_of_printing_commands_alone(
    stdout_to: StdoutTo,
) -> None:
    stdout_to("/dev/full")
    keep_streams()
    print("a table", flush=True)
    with pytest.raises(OSError, match=r"stdout cannot be written \(No space left on device\)"):
        check_written()


def test_a_pipe_that_does_not_block_gets_everything(stdout_to: StdoutTo) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    stdout_to(writer)
    keep_streams()
    found: list[bytes] = []
    total = 51 + 1000 * 1000

    def read() -> None:
        with open(reader, "rb") as file:
            found.append(file.read(total))

    thread = threading.Thread(target=read)
    print("x" * 50, flush=True)  # before anybody reads
    thread.start()
    for _ in range(1000):
        print("x" * 999, flush=True)
    thread.join()
    assert len(found[0]) == total


def test_a_second_call_changes_nothing_and_a_stream_in_memory_stays(
    stdout_to: StdoutTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdout_to(os.devnull)
    keep_streams()
    first = sys.stdout
    keep_streams()
    assert sys.stdout is first
    memory = io.StringIO()
    monkeypatch.setattr(sys, "stdout", memory)
    keep_streams()
    assert sys.stdout is memory


@pytest.mark.parametrize("place", ["unread", "/dev/full", "closed"])
def test_a_run_without_its_stdout_comes_to_its_end(
    command: CommandLine, stdout_to: StdoutTo, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    if place == "closed":  # Python's own sign of it
        monkeypatch.setattr(sys, "stdout", None)
    else:
        stdout_to(unread() if place == "unread" else place)
    answer = command(*SHORT, "paths.run=run")
    assert answer.status == 0, answer.err
    log = (command.folder / "run" / "train.log").read_text(encoding="utf-8")
    for line in ("run folder", "1/1", "measured", "see run", "training ended: "):
        assert line in log
    assert (command.folder / "run" / "last.ckpt").exists()


def test_a_configuration_that_a_full_disk_has_not_taken_has_status_1(
    command: CommandLine, stdout_to: StdoutTo
) -> None:
    stdout_to("/dev/full")
    answer = command("--cfg", "job")
    assert answer.status == 1
    assert answer.err == (
        "error: stdout cannot be written (No space left on device): the output is incomplete\n"
    )


COMMAND = [sys.executable, "-m", "fastdeq", "--help"]  # imports neither torch nor Lightning


@pytest.mark.slow
def test_a_printing_command_ends_quietly_when_its_reader_has_left() -> None:
    # The interpreter itself writes what is left at its end ("Exception ignored in …", status 120).
    answer = subprocess.run(COMMAND, cwd=ROOT, stdout=unread(), stderr=subprocess.PIPE, check=False)
    assert (answer.returncode, answer.stderr) == (0, b"")


@pytest.mark.slow
def test_a_printing_command_on_a_full_disk_says_so_with_status_1() -> None:
    with open("/dev/full", "wb") as full:
        answer = subprocess.run(COMMAND, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, check=False)
    assert answer.returncode == 1
    assert answer.stderr.count(b"\n") == 1
    assert answer.stderr.startswith(b"error: stdout cannot be written (No space left on device)")


@pytest.mark.slow
def test_several_processes_with_all_streams_closed_come_to_their_end(tmp_path: Path) -> None:
    settings = (*SHORT, "trainer=ddp_cpu", "trainer.devices=2", "paths.run=run")
    train = f"{sys.executable} {ROOT / 'train.py'} {' '.join(settings)}"
    answer = subprocess.run(f"{train} <&- >&- 2>&-", shell=True, cwd=tmp_path, check=False)
    assert answer.returncode == 0
    log = (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
    assert "see run" in log
    assert "Error" not in log
