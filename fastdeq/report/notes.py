"""The notes below a table of runs."""

import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fastdeq.report.rows import TIMES, Row
from fastdeq.report.runs import Found
from fastdeq.runs.folder import METRICS
from fastdeq.runs.identity import Leaf
from fastdeq.runs.lock import is_locked
from fastdeq.runs.reading import Run, read_metrics
from fastdeq.runs.status import FAILED, INTERRUPTED, RUNNING, read_status

VERDICT = (
    "verdict: the difference to the published mean, and the ± that counts as within: "
    "2·√(s₀²/n₀ + s²/n) for n seeds here and n₀ published ones with deviations s and s₀, "
    "2·s₀·√(1 + 1/n₀) for a single seed here. With three published seeds, one in six to eight of "
    "equal settings is not within, by chance. Runs of another length, on part of the data, or "
    "beside an unknown spread are not judged"
)


def footnotes(rows: Sequence[Row], found: Found) -> list[str]:
    """One sentence per note: how to read the table, how its runs differ, and which are missing."""
    runs = [run for row in rows for run in row.runs]
    return [
        *_reading(rows),
        *_provenance(runs),
        *_mixed(rows),
        *different_data(run.identity for run in runs),
        *_only_tested(found),
        *found.failed.values(),
        *(
            unfinished(folder)
            for key, folder in found.unfinished.items()
            if key not in found.failed  # said already
        ),
        *found.empty.values(),
    ]


def nothing(paths: Sequence[Path], found: Found) -> str:
    """The line for paths without a run that was trained to its end."""
    notes = [*found.failed.values(), *map(unfinished, found.unfinished.values())]
    notes += found.empty.values()
    if len(notes) == 1 and not found.runs:
        return notes[0]
    tested = f", {len(found.runs)} of mode=test" if found.runs else ""
    return (
        f"{', '.join(map(str, paths))}: no finished run here or below, "
        f"{len(found.unfinished)} unfinished, {len(found.failed)} failed{tested}"
    )


def unfinished(folder: Path) -> str:
    """The status of a run without a summary, and how far it has come."""
    status = read_status(folder)
    error = f" ({status['error']})" if status.get("error") else ""
    host = status.get("host")
    elsewhere = "" if host == platform.node() else f", or runs on {host}"
    state = {
        RUNNING: "is still running" if is_locked(folder) else f"was killed{elsewhere}",
        INTERRUPTED: f"was interrupted{error}",
        FAILED: f"has failed{error}",
    }.get(str(status.get("status")), "is unfinished: it has no summary.json")
    return f"{folder} {state}{_progress(folder)}"


def _progress(folder: Path) -> str:
    rows = read_metrics(folder / METRICS)
    epochs = [row for row in rows if any(name.startswith("val/") for name in row)]
    if not epochs:
        return "; no epoch has ended"
    last = epochs[-1]
    known = [(name, last.get(f"val/{name}")) for name in ("accuracy", "loss", "nfe")]
    parts = [f"{name} {value:.4g}" for name, value in known if value is not None]
    return f"; epoch {last['epoch'] + 1:.0f}: {', '.join(parts)}"


def _only_tested(found: Found) -> list[str]:
    folders = [str(run.folder) for run in found.runs.values() if run.only_tested]
    if not folders:
        return []
    what = (
        "run tests a checkpoint and has" if len(folders) == 1 else "runs test a checkpoint and have"
    )
    return [f"{len(folders)} {what} no row (mode=test): {', '.join(folders)}"]


def _reading(rows: Sequence[Row]) -> list[str]:
    notes = []
    if any(row.seeds > 1 for row in rows):
        notes.append("±: sample standard deviation over seeds")
    for source, seeds in dict.fromkeys(
        (row.reference.get("source", "unnamed"), row.reference.get("seeds"))
        for row in rows
        if row.reference is not None
    ):
        over = f" over {seeds} seeds" if seeds else ""
        notes.append(f"[ ]: published, mean ± standard deviation{over}: {source}")
    if any(row.reference is not None for row in rows):
        notes.append(VERDICT)
    if any(row.metrics[name].published is not None for row in rows for name in TIMES):
        notes.append(
            "published times: the paper names no GPU (its cluster scripts assume V100s with "
            "32 GB): no time is judged"
        )
    return notes


def _provenance(runs: Sequence[Run]) -> list[str]:
    notes = []
    dirty = [run for run in runs if run.summary.get("dirty")]
    if dirty:
        notes.append(f"{_of(len(dirty), len(runs))} a working tree with uncommitted changes")
    commits = Counter(str(run.summary.get("commit") or "unknown")[:10] for run in runs)
    devices = Counter(run.device for run in runs)
    for counts, what in ((commits, "commits"), (devices, "devices")):
        if len(counts) > 1:
            parts = ", ".join(f"{name} ({count})" for name, count in counts.most_common())
            notes.append(f"the runs are from {len(counts)} {what}: {parts}")
    return notes


def _of(count: int, total: int) -> str:
    if count == total:
        return "the run is from" if total == 1 else f"all {total} runs are from"
    return f"{count} of {total} runs {'is' if count == 1 else 'are'} from"


def _mixed(rows: Sequence[Row]) -> list[str]:
    notes = []
    if any(len({run.device for run in row.runs}) > 1 for row in rows):
        notes.append("times are left out where the runs of a row are from different devices")
    if any(row.seeds < len(row.runs) for row in rows):
        notes.append("a seed that was run several times counts once, with the mean of its runs")
    return notes


_NOT_THE_SET = ("seed", "batch_size", "eval_batch_size", "augmentation", "validation")


def different_data(identities: Iterable[Mapping[str, Leaf]]) -> list[str]:
    """One line if runs with these identities are of different data."""
    sets: dict[frozenset[tuple[str, Leaf]], str] = {}
    for settings in identities:
        kept = {
            key: value
            for key, value in settings.items()
            if key.startswith("data.") and key.split(".")[1].split("[")[0] not in _NOT_THE_SET
        }
        name = str(kept.get("data._target_", "unknown")).rpartition(".")[2]
        sets.setdefault(frozenset(kept.items()), name)
    if len(sets) < 2:
        return []
    counts = Counter(sets.values())
    names = ", ".join(f"{name} × {n}" if n > 1 else name for name, n in counts.items())
    return [
        f"the runs are of {len(sets)} data sets ({names}): metrics of one do not compare with "
        "those of another"
    ]
