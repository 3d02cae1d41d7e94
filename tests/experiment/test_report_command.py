"""``fastdeq report``: one table of runs in three formats, one line where it fails."""

import csv
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, CommandLine, a_run
from tests.experiment.reported import HEADINGS, printed, refused, several_runs
from tests.experiment.run_folders import MNIST, write_run


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return several_runs()


# Formats

CELLS = [
    # Accuracy: √((0.1333² + 0.0333² + 0.1667²) / 2) = 0.1528; 2·√(0.107²/3 + 0.1528²/3) = 0.2153
    [
        *("DEQ", "lbroyden", "no", "no", "134,538", "3", "98.03 ± 0.15 [97.93 ± 0.11]"),
        *("9.00 ± 1.00 [18.34 ± 0.73]", "0.01 ± 0", "0.004 ± 0", "0.004 ± 0 [0.038]"),
        *("8.0 ± 0.0 [5.2]", "within: +0.11 of ±0.22"),
    ],
    # 2·0.025·√(4/3) = 0.0577
    [
        *("DEQ", "lbroyden", "no", "yes", "134,538 [138,000]", "1", "98.30 [98.12 ± 0.03]"),
        *("4.00 [5.03 ± 0.06]", "0.01", "0.004", "0.004 [0.011]", "8.0 [7.3]"),
        "above: +0.18 of ±0.06",
    ],
]
NOTES = [
    "±: sample standard deviation over seeds",
    "[ ]: published, mean ± standard deviation over 3 seeds: arXiv 2201.12240, table of MNIST, "
    "fully connected",
    "verdict: the difference to the published mean, and the ± that counts as within: "
    "2·√(s₀²/n₀ + s²/n) for n seeds here and n₀ published ones with deviations s and s₀, "
    "2·s₀·√(1 + 1/n₀) for a single seed here. With three published seeds, one in six to eight of "
    "equal settings is not within, by chance. Runs of another length, on part of the data, or "
    "beside an unknown spread are not judged",
    "published times: the paper names no GPU (its cluster scripts assume V100s with 32 GB): "
    "no time is judged",
    "1 of 4 runs is from a working tree with uncommitted changes",
    "the runs are from 2 commits: 4dcf6a63ea (3), 0813f8e8b9 (1)",
    "the runs are from 2 devices: cpu (3), NVIDIA H200 × 2 (1)",
    "job 0 of outputs/multirun/1 failed (model=deq seed=4): out of memory",
    "outputs/mnist_fc/under_way is unfinished: it has no summary.json; no epoch has ended",
]


def test_markdown_is_a_table_with_everything_else_below_it(capsys, runs):
    out, err = printed(capsys, str(runs))
    table, notes = out.rstrip("\n").split("\n\n")
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1  # aligned
    assert set(lines.pop(1)) == {"|", "-"}
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells == [HEADINGS, *CELLS]
    assert notes.splitlines() == [f"- {note}" for note in NOTES]
    assert err == []


def test_csv_has_a_column_for_every_number(capsys, runs):
    out, err = printed(capsys, str(runs), "--format=csv")
    assert err == NOTES
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 2
    first = {key: value for key, value in rows[0].items() if value}
    metrics = (
        ("test/accuracy", (0.979 + 0.98 + 0.982) / 3, math.sqrt(7 / 3) / 1000, 0.97926, 0.00107),
        ("test/nfe", 9.0, 1.0, 18.345, 0.732),
        ("test/loss", 0.067, 0.0, None, None),
        ("train/seconds", 0.01, 0.0, None, None),
        ("train/backward_seconds", 0.004, 0.0, None, None),
        ("test/seconds", 0.004, 0.0, 0.038, None),
        ("training_minutes", 8.0, 0.0, 5.197, None),
    )
    expected = {
        f"{name}{end}": value
        for name, *values in metrics
        for end, value in zip(
            ("", "_deviation", "_published", "_published_deviation"), values, strict=True
        )
        if value is not None
    }
    margin = 2 * math.sqrt(0.00107**2 / 3 + 7 / 9 * 1e-6)
    expected |= {"runs": 3, "seeds": 3, "parameters": 134538}
    expected |= {"difference": 2.941 / 3 - 0.97926, "margin": margin}
    words = {"experiment": "mnist_fc", "model": "DEQ", "solver": "lbroyden", "continuous": "no"}
    words |= {"jacobian": "no", "verdict": "within: +0.11 of ±0.22"}
    assert {key: first.pop(key) for key in words} == words
    assert {key: float(value) for key, value in first.items()} == pytest.approx(
        expected, rel=1e-9, abs=1e-15
    )


def test_csv_of_any_runs_has_the_same_columns(capsys, runs, tmp_path):
    write_run(tmp_path / "other", choices={"experiment": "None"}, metrics={"test/new": 1.0})
    headings = {
        printed(capsys, path, "--format=csv")[0].splitlines()[0] for path in ("outputs", "other")
    }
    assert len(headings) == 1


def test_json_has_numbers_and_folders(capsys, runs):
    out, err = printed(capsys, str(runs), "--format=json")
    assert err == NOTES
    rows = json.loads(out)
    assert [row["folders"] for row in rows] == [
        [f"outputs/mnist_fc/deq_{seed}" for seed in (1, 2, 3)],
        ["outputs/mnist_fc/jacobian"],
    ]
    row = rows[1]
    assert row["metrics"]["test/accuracy"] == {
        **{"mean": 0.983, "deviation": None, "n": 1},
        **{"published": 0.98123, "published_deviation": 0.00025},
    }
    assert set(row["metrics"]) == {
        *("test/accuracy", "test/loss", "test/nfe", "test/seconds", "train/seconds"),
        *("train/backward_seconds", "training_minutes"),
    }
    assert row["metrics"]["training_minutes"]["published"] == 7.321
    del row["metrics"], row["folders"]
    assert row == {
        **{"experiment": "mnist_fc", "model": "DEQ", "solver": "lbroyden", "continuous": False},
        **{"jacobian": True, "settings": "", "runs": 1, "seeds": 1},
        "parameters": {"value": 134538, "published": 138000},
        "reference": {"source": MNIST["source"], "seeds": 3, "steps": None, "epochs": 25},
        "verdict": "above: +0.18 of ±0.06",
        "difference": pytest.approx(0.983 - 0.98123),
        "margin": pytest.approx(2 * 0.00025 * math.sqrt(4 / 3)),
    }


@pytest.mark.parametrize(
    ("name", "form"), [("t.md", "markdown"), ("t.csv", "csv"), ("t.json", "json")]
)
def test_a_file_holds_what_would_be_printed_in_the_format_of_its_ending(capsys, runs, name, form):
    wanted = printed(capsys, str(runs), f"--format={form}")
    assert printed(capsys, str(runs), f"--out={name}") == (f"see {name}\n", wanted[1])
    assert Path(name).read_text() == wanted[0]
    assert printed(capsys, f"--out={name}", str(runs), f"--format={form}")[0] == f"see {name}\n"


def test_several_experiments_have_a_column_and_a_regression_its_loss(capsys, tmp_path):
    write_run(tmp_path / "a")
    folder = write_run(tmp_path / "b", choices={"experiment": "polynomial_fitting"})
    summary = json.loads((folder / "summary.json").read_text())
    del summary["metrics"]["test/accuracy"]
    summary["metrics"]["test/loss"] = 4.24e-05
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = printed(capsys, str(tmp_path))[0].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:4]]
    table = [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]
    assert [row["experiment"] for row in table] == ["mnist_fc", "polynomial_fitting"]
    assert [row["test accuracy %"] for row in table] == ["98.00", ""]
    assert [row["test loss"] for row in table] == ["", "4.24e-05"]
    assert [row["verdict"] for row in table] == ["no reference"] * 2


def test_what_rows_have_that_others_have_not_is_said(capsys, tmp_path):
    write_run(tmp_path / "a", settings={"solver.tol": 0.5})
    write_run(tmp_path / "b", device="NVIDIA H200", metrics={"test/accuracy": math.nan})
    write_run(tmp_path / "c")
    out = printed(capsys, str(tmp_path))[0]
    table, notes = out.split("\n\n")
    assert "| solver.tol=0.005 |" in table
    assert "| solver.tol=0.5   |" in table
    assert "| 2 (1 seed) |" in table
    assert "| nan             |" in table
    assert "| diverged: 1 of 2 runs |" in table
    assert notes.splitlines() == [
        "- the runs are from 2 devices: cpu (2), NVIDIA H200 (1)",
        "- times are left out where the runs of a row are from different devices",
        "- a seed that was run several times counts once, with the mean of its runs",
    ]


def test_metrics_that_are_not_finite_are_null_in_json(capsys, tmp_path):
    write_run(tmp_path / "a", metrics={"test/loss": math.inf, "test/accuracy": math.nan})
    (row,) = json.loads(printed(capsys, str(tmp_path), "--format=json")[0])
    assert row["verdict"] == "diverged"
    assert row["metrics"]["test/loss"]["mean"] is None
    assert row["metrics"]["test/accuracy"]["mean"] is None


def test_a_bar_in_a_setting_does_not_end_its_cell(capsys, tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", settings={"name": "a|b"})
    assert r"| name=a\|b " in printed(capsys, str(tmp_path))[0]


def test_older_references_are_shown_and_not_judged(capsys, tmp_path):
    older = {key: MNIST[key] for key in ("source", "where", "metrics", "training_minutes")}
    write_run(tmp_path / "a", reference=older)
    out = printed(capsys, str(tmp_path))[0]
    assert "| 98.00 [97.93]   |" in out
    assert "| published length unknown; published spread unknown |" in out
    assert f"- [ ]: published, mean ± standard deviation: {MNIST['source']}" in out


# A run of train.py


def test_a_real_run_is_reported(command: CommandLine, capsys):
    settings = ("model=skip_reg_deq", "data=digits", "arch=fc", "seed=3")
    folder = a_run(command, "experiment=mnist_fc", *settings)
    (row,) = json.loads(printed(capsys, "outputs", str(folder), "--format=json")[0])
    summary = json.loads((folder / "summary.json").read_text())
    metrics = {name: metric["mean"] for name, metric in row["metrics"].items()}
    assert metrics.pop("training_minutes") == summary["train_seconds"] / 60
    assert metrics == {name: summary["metrics"][name] for name in metrics}
    assert {"test/accuracy", "test/nfe", "train/seconds", "train/backward_seconds"} < set(metrics)
    assert (row["experiment"], row["model"], row["solver"]) == (
        *("mnist_fc", "Skip Reg. DEQ", "lbroyden"),
    )
    assert "partial training: 2 batches; partial test: 1 batch" in row["verdict"]
    assert row["metrics"]["test/accuracy"]["published"] == 0.97973


def test_real_seeds_share_a_row_and_real_settings_do_not(command: CommandLine, capsys):
    a_run(command, "seed=1", "logger=[]")
    a_run(command, "seed=2", "paths.outputs=outputs/b")
    a_run(command, "seed=1", "loss.skip=0.5", "arch.width=16")
    rows = json.loads(printed(capsys, "outputs", "--format=json")[0])
    assert [(row["settings"], row["runs"]) for row in rows] == [
        ("loss.skip=0.5 arch.width=16", 1),
        ("loss.skip=1.0 arch.width=128", 2),
    ]


# What it refuses


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "the following arguments are required: PATH (see "),
        (["--format=csv"], "the following arguments are required: PATH (see "),
        (["outputs", "--fromat=csv"], "unknown option '--fromat': did you mean --format?"),
        (["outputs", "--fromat", "csv"], "unknown option '--fromat': did you mean --format?"),
        (
            ["outputs", "--xyz=1"],
            "unknown option '--xyz': choose from -h, --help, --format, --out, --columns, --sort",
        ),
        (["outputs", "--format=jsn"], "unknown format 'jsn': did you mean json?"),
        (["outputs", "--format=xml"], "unknown format 'xml': choose from markdown, csv, json"),
        (["outputs", "--columns=model", "--format=csv"], "--columns chooses those of the table"),
        (["outputs", "--where=deq"], "--where is 'deq', but must be KEY=VALUE, such as model=deq"),
        (["outputs", "--where=model="], "--where is 'model=', but must be KEY=VALUE"),
        (["outputs", "--format"], "--format: expected one argument (see "),
        (["outputs", "--out="], "--out is '', but must end in .md, .csv, .json"),
        (["outputs", "--out=t.txt"], "--out is 't.txt', but must end in .md, .csv, .json"),
        (
            ["outputs", "--out=t.csv", "--format=json"],
            "--format is json, but t.csv is csv: leave --format out",
        ),
    ],
)
def test_a_command_line_that_makes_no_sense_has_status_2_and_the_cure(
    capsys, runs, arguments, text
):
    assert refused(capsys, *arguments, status=2).startswith(text)


def test_paths_that_lead_to_no_run_have_status_1(capsys, runs, tmp_path):
    assert refused(capsys, "outptus", status=1) == "outptus: there is no such folder"
    Path("file.json").write_text("{}")
    text = refused(capsys, "outputs", "file.json", status=1)
    assert text == "file.json is a file: give a run's folder, or one above it"
    Path("empty").mkdir()
    text = refused(capsys, "outputs", "empty", status=1)
    assert text.startswith("empty: no run folder here or below")
    text = refused(capsys, "outputs/mnist_fc/under_way", "outputs/multirun", status=1)
    assert text.endswith("no finished run here or below, 1 unfinished, 1 failed")


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("summary.json", '{"metrics": {', "cannot be read, it is truncated or damaged: leave"),
        ("summary.json", b"\xff\xfe", "cannot be read, it is truncated or damaged: leave"),
        ("summary.json", "[]", "holds no 'metrics', or not as expected: it was not written by"),
        ("summary.json", '{"metrics": 1}', "holds no 'metrics', or not as expected"),
        ("config.yaml", "a: [", "cannot be read, it is truncated or damaged: leave"),
        ("config.yaml", "text", "holds no keys: it was not written by a run of fastdeq"),
        ("config.yaml", None, "is missing: a run is identified by its configuration"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(capsys, runs, file, content, text):
    path = runs / "mnist_fc" / "deq_2" / file
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refused(capsys, "outputs", status=1).startswith(f"{path} {text}")


def test_a_summary_of_no_model_is_named(capsys, tmp_path):
    path = write_run(tmp_path / "a") / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "choices": {}}))
    assert refused(capsys, str(tmp_path), status=1).startswith(f"{path} names no model and solver")


def test_a_record_of_a_job_that_cannot_be_read_is_named(capsys, runs):
    path = runs / "multirun" / "1" / "jobs" / "0.json"
    path.write_text("{}")
    assert refused(capsys, "outputs", status=1).startswith(f"{path} holds no 'overrides'")


def test_a_file_that_cannot_be_written_has_status_1(capsys, runs):
    assert "nowhere/t.md" in refused(capsys, "outputs", "--out=nowhere/t.md", status=1)


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["outputs", "--help"]])
def test_help_names_keys_and_formats(capsys, arguments):
    out = printed(capsys, *arguments)[0]
    assert "fastdeq report outputs" in out
    assert all(word in out for word in ("--format FORMAT", "--out FILE", "markdown", "csv", "json"))


def test_it_runs_as_a_module_with_its_exit_status(runs):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fastdeq", "report", *arguments]
        path = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=path, capture_output=True, text=True, check=False)

    well = run("outputs")
    assert well.returncode == 0
    assert "| DEQ   | lbroyden |" in well.stdout
    wrong = run("outputs", "--fromat=csv")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: unknown option '--fromat': did you mean --format?\n"
