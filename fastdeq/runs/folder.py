"""The names of all files of a run folder and of a sweep's folder, and how a run folder is made."""

from datetime import datetime
from pathlib import Path

# Written before training
CONFIG = "config.yaml"
"""The resolved configuration."""
OVERRIDES = "overrides.json"
"""The command's overrides."""

# Written during training
STATUS = "status.json"
METRICS = "metrics.csv"
BEST, LAST = "best.ckpt", "last.ckpt"
RESUME, BEFORE = "resume.ckpt", "resume.before.ckpt"
"""The newest state to resume from, and the one before it."""
FAILURE = "failure.ckpt"
"""The failed step that mode=replay computes again."""
EQUILIBRIA = "equilibria.h5"
"""What `callbacks.reuse` keeps on disk; removed at the end of training."""
RECORDED = "recorded"
"""The folder of recorded solves; see `recording_file`."""
LOCK = ".lock"
WANDB_ID = ".wandb_id"

# Written at the end
SUMMARY = "summary.json"

# Written by `fastdeq export-weights`
WEIGHTS, CARD = "model.safetensors", "README.md"

# In a sweep's folder
SUBMISSION = "submission.json"
MULTIRUN = "multirun.yaml"
"""Written by Hydra before the first job."""
TABLE_MARKDOWN, TABLE_CSV = "table.md", "table.csv"


def log_file(folder: Path, mode: str) -> Path:
    """The file with the printed output of a run of this mode."""
    return folder / f"{mode}.log"


def recording_file(folder: Path, epoch: int | None) -> Path:
    """The file with the recorded solves of the validation after an epoch; None: of the test."""
    return folder / RECORDED / ("test.h5" if epoch is None else f"epoch_{epoch:04d}.h5")


def curve_file(checkpoint: Path) -> Path:
    """The file of mode=curve beside a checkpoint."""
    return checkpoint.with_name(f"{checkpoint.stem}.curve.json")


def job_record(sweep: Path, number: int) -> Path:
    """The file with the result of a sweep's job: overrides, run folder, error."""
    return sweep / "jobs" / f"{number}.json"


def job_numbers(sweep: Path) -> list[int]:
    """The jobs of a sweep that have a record; empty for a folder that is not a sweep's."""
    return sorted(int(path.stem) for path in sweep.glob("jobs/*.json") if path.stem.isdecimal())


def is_empty_sweep(folder: Path) -> bool:
    """Whether it is the folder of a sweep of which no job has ended."""
    started = any((folder / name).exists() for name in (MULTIRUN, SUBMISSION))
    return started and not job_numbers(folder)


def make_folder(outputs: Path, name: str, chosen: Path | None) -> Path:
    """Make a new, empty folder: `chosen`, or <outputs>/<name>/<date and time>, with a number added
    if that name is taken.

    Raises: FileExistsError if `chosen` exists; OSError if the folder cannot be made.
    """
    try:
        return _make_folder(outputs, name, chosen)
    except FileExistsError:
        raise
    except OSError as error:
        key, place = ("paths.run", chosen) if chosen else ("paths.outputs", outputs)
        raise OSError(f"{key}: no folder can be made in {place} ({error.strerror})") from error


def _make_folder(outputs: Path, name: str, chosen: Path | None) -> Path:
    if chosen is not None:
        try:
            chosen.mkdir(parents=True)
        except FileExistsError:
            raise FileExistsError(
                f"paths.run: {chosen} exists: give another name, leave it to the clock "
                "(paths.run=null), or resume its run (resume=auto)"
            ) from None
        return chosen
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1000):
        folder = outputs / name / (stamp if attempt == 0 else f"{stamp}_{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"could not make a new folder in {outputs / name}: 1000 in one second")
