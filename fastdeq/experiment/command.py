"""The command line around Hydra: one-line errors, runs that start from others, sweeps."""

import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from fastdeq.commands import UsageError, check_options, typed
from fastdeq.experiment.choices import check_choices, with_merged_groups
from fastdeq.experiment.curve import curve
from fastdeq.experiment.explain import explain
from fastdeq.experiment.launch import work_for
from fastdeq.experiment.place import PLACE, prefix
from fastdeq.experiment.renamed import check_renamed, current_all
from fastdeq.experiment.rendezvous import (
    end_with,
    in_submitit,
    is_worker,
    preemption_signal,
    release_workers,
    rendezvous,
    requeue,
)
from fastdeq.experiment.replay import replay
from fastdeq.experiment.run import read_score, run
from fastdeq.experiment.signals import received
from fastdeq.experiment.sweep import RESUMABLE, ConfigError, failed_job, quiet_hydra, record_job
from fastdeq.runs.folder import OVERRIDES
from fastdeq.runs.reading import read_overrides
from fastdeq.runs.status import Interrupted
from fastdeq.streams import check_written, keep_streams

quiet_hydra()  # submitit's processes load this module and compose, without anything else of it
OmegaConf.register_new_resolver("typed", typed, replace=True)  # for conf/hydra/help


def command_line(main: Callable[[], object]) -> None:
    """Let Hydra compose and call `main`. Any error is printed as one line and ends the process with
    status 1, or 2 for an unknown flag. With debug=true the traceback is printed too.

    main: the function that `hydra.main` has decorated.
    """
    keep_streams()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them
    quiet_hydra()
    if is_worker():
        run_worker()
        return
    try:
        flags, overrides, prints = _parse(sys.argv[1:])
        check_renamed(overrides)
        overrides = with_saved_overrides(with_merged_groups(overrides))
        check_choices(overrides)
        sys.argv[1:] = [*flags, *overrides]
        try:
            main()
        finally:
            if prints:
                check_written()
    except ConfigError as error:
        fail(error.cause)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        _end(2)
    except Exception as error:
        fail(error)
    finally:
        release_workers()


def job(cfg: DictConfig) -> float:
    """Run one job of the command, alone or in a sweep; return its test score, NaN if it failed.

    A failed job of a sweep does not stop the others, unless stop_at_failure is set; the table and
    the exit status report it.
    """
    keep_streams()  # processes of submitit and joblib do not call command_line
    _undo_chdir()
    if is_worker():  # of submitit, which composes on every rank
        return run_worker()
    end_with(0)
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        try:
            if cfg.get("mode") == "replay":
                loss = replay(cfg).diagnosis.loss
                check_written()
                return loss
            if cfg.get("mode") == "curve":
                points = curve(cfg)
                check_written()
                return points[-1].metrics["loss"]
            return read_score(run(cfg))
        except Interrupted as pause:
            print(f"the same command resumes it, with paths.run={pause.folder}", flush=True)
            _end(RESUMABLE)
        except Exception as error:
            fail(error, debug=cfg.get("debug") is True)
    folder = None
    hydra = HydraConfig.get()
    overrides = " ".join(hydra.overrides.task)
    mine = PLACE.get()
    alone = f"\njob {hydra.job.num}  {overrides}"
    print(alone if mine is None else mine.heading(overrides), flush=True)
    if cfg.get("stop_at_failure") is True and (failed := failed_job()) is not None:
        why = f"not started, for job {failed} has failed (stop_at_failure)"
        print(f"{prefix()}{why}", flush=True)
        record_job(None, why, interrupted=True)
        end_with(RESUMABLE)
        return math.nan
    try:
        folder = run(cfg)
        score = read_score(folder)
    except Exception as error:
        interrupted = isinstance(error, Interrupted)
        if not interrupted:
            report(error, debug=cfg.get("debug") is True)
        record_job(folder, explain(error), interrupted=interrupted)
        if interrupted and in_submitit() and received() == preemption_signal().name:
            _requeue()
        elif received():  # the stop request was for the sweep
            print("the same command resumes the sweep", flush=True)
            _end(RESUMABLE)
        else:
            end_with(RESUMABLE if interrupted else 1)
        return math.nan
    finally:
        release_workers()
    record_job(folder, None)
    return score


def _undo_chdir() -> None:
    """Undo hydra.job.chdir: paths, typed or printed, are relative to where the command was started.
    In a sweep's folder the table would not find the jobs, and a restarted sweep not its runs.
    """
    hydra = HydraConfig.get()
    if hydra.job.chdir:
        why = "each run makes its own folder, and paths are relative to where the command started"
        print(f"warning: hydra.job.chdir has no effect: {why}", flush=True)
        os.chdir(hydra.runtime.cwd)


def run_worker() -> float:
    """The whole work of a worker, a rank of a cluster that is not the first; returns NaN."""
    end_with(0)
    leader = rendezvous()
    assert leader is not None
    try:
        work_for(leader)
    except Interrupted:
        pass  # the leader reports it, and its exit status counts
    except Exception as error:
        end_with(1)
        report(error, debug="debug=true" in sys.argv)
        if HydraConfig.initialized():  # in a sweep; the leader may hang in a collective
            record_job(None, explain(error))
        leader.fail(explain(error), "".join(traceback.format_exception(error)))
    return math.nan


def _requeue() -> None:
    """Let submitit requeue the job; returns only if submitit refuses."""
    end_with(RESUMABLE)
    print("requeued", flush=True)
    try:
        requeue()
    except Exception as error:  # of submitit: timed out too many times
        report(error, debug=False)
        record_job(None, explain(error), interrupted=True)


def _end(status: int) -> NoReturn:
    end_with(status)
    sys.exit(status)


def fail(error: Exception, *, debug: bool | None = None) -> NoReturn:
    """Report the error and end the process with status 1."""
    report(error, debug="debug=true" in sys.argv if debug is None else debug)
    _end(1)


def report(error: Exception, *, debug: bool) -> None:
    """Print one line to stderr, with `debug` after the traceback."""
    if debug:
        traceback.print_exception(error)
    print(f"{prefix()}error: {explain(error)}", file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """Flags, overrides, and whether the flags only print.

    Hydra's own parser accepts flags before or after the overrides, not between them.

    Raises: UsageError for a flag that does not exist.
    """
    parser = get_args_parser()
    given, unknown = parser.parse_known_intermixed_args(list(arguments))
    check_options(unknown, parser)
    flags = list(arguments)
    for word in given.overrides:
        flags.remove(word)
    prints = (given.cfg, given.info, given.help, given.hydra_help, given.shell_completion)
    return flags, given.overrides, any(prints)


def with_saved_overrides(arguments: Sequence[str]) -> list[str]:
    """For `from_run=FOLDER` or `extend=FOLDER`, the arguments of that run with these in their
    places or after them; for `mode=test checkpoint=FOLDER/best.ckpt` likewise, unless these choose
    a model themselves.

    Raises: FileNotFoundError for a folder that holds no run.
    """
    last = {_key(word): word.partition("=")[2] for word in arguments}
    named = [key for key in ("from_run", "extend") if last.get(key) not in (None, "", "null")]
    key = named[0] if named else "checkpoint"
    if named:
        folder = Path(last[key])
    elif last.get("mode") == "test" and "checkpoint" in last and not _MODEL & last.keys():
        folder = Path(last["checkpoint"]).parent
        if not (folder / OVERRIDES).is_file():  # a checkpoint that was moved
            return list(arguments)
    else:
        return list(arguments)
    try:
        before = read_overrides(folder)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{key}: {error}") from error
    given = {_key(word) for word in arguments}
    saved = [word for word in current_all(before) if _key(word) not in given | _ONCE]
    return [*saved, *arguments]


_ONCE = {"from_run", "extend", "mode", "checkpoint", "paths.run", "resume", "stop_after", "debug"}
"""Keys of a single command, which runs that start from it do not inherit."""


_MODEL = {"model", "arch", "data", "recipe", "experiment", "sweep"}
"""Groups that say what a checkpoint is of; with one of them a test takes nothing from its run."""


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
