"""What a run prints before its training and after its test."""

import textwrap
from typing import Any

import pytorch_lightning as lightning

from fastdeq.report import fit, heading, row
from fastdeq.report.columns import FIRST, Group
from fastdeq.runs.folder import BEST, LAST
from fastdeq.runs.log import LOG, log_fitted
from fastdeq.settings import brief
from fastdeq.training import AbstractTask, table_of, why_ended

_INDENT = 12


def announce(
    task: AbstractTask,
    trainer: lightning.Trainer,
    *,
    folder: object,
    resume: str | None,
    ranks: int,
    parameters: int,
) -> None:
    """Log what will be trained: of solver, adjoint and loss the settings that are not defaults."""
    device = trainer.strategy.root_device
    lines = {"run folder": folder}
    if resume is not None:
        lines["resuming"] = f"from {resume}"
    lines |= {
        "device": f"{device}{f' × {ranks}' if ranks > 1 else ''}",
        "parameters": f"{parameters:,}",
        **task.model.equilibria[0].settings,
        "loss": task.weights,
    }
    for name, value in lines.items():
        _log(f"{name:<{_INDENT}}{brief(value)}")


def conclude(
    summary: dict[str, Any],
    trainer: lightning.Trainer,
    task: AbstractTask,
    *,
    folder: Any,
    reference: dict[str, Any] | None,
) -> None:
    """Log the final table, with the published row below the measured one, the run folder, and why
    the training ended.
    """
    table, metrics = table_of(trainer, task, "test"), summary["metrics"]
    LOG.info("")
    _log_table(table, lambda kept: heading(kept, ""))
    _log_table(table, lambda kept: row(kept, "measured", metrics))
    if reference is not None:
        _log_table(table, lambda kept: row(kept, "published", reference["metrics"]))
        _log(f"published:  {reference['source']}")
    _log(
        f"test solves: relative residual {metrics['test/residual']:.1e}, "
        f"{100 * metrics['test/unconverged']:.2f} % unconverged"
    )
    if summary["train_seconds"] is not None:
        step = summary["train_ms_per_step"]
        pace = "" if step is None else f", {step:.1f} ms per step (median)"
        count = summary["steps"]
        steps = "1 step" if count == 1 else f"{count:,} steps"
        _log(f"{steps} in {summary['train_seconds']:.1f} s{pace}")
    if (shares := summary["train_time_shares"]) is not None:
        names = _PARTS if "f" in shares else {**_PARTS, "solver": "solver with f"}
        parts = ", ".join(f"{100 * share:.0f} % {names[name]}" for name, share in shares.items())
        _log(f"training time: {parts}")
    trained = summary["mode"] == "train"
    if trained and not (folder / BEST).exists():
        _log(f"the run ended before its first validation: there is {LAST} and no {BEST}")
    LOG.info("see %s", folder)
    if trained:
        _log(f"training ended: {why_ended(trainer)}")


_PARTS = {"f": "f", "solver": "solver", "adjoint": "adjoint", "other": "everything else"}


def _log(text: str) -> None:
    """Log a line; a terminal shows it in several, broken between words."""
    log_fitted(text, lambda width: _wrapped(text, width))


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(
        text,
        max(width, 2 * _INDENT),
        subsequent_indent=" " * _INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _log_table(table: tuple[Group, ...], text: Any) -> None:
    log_fitted(text(table), lambda width: text(fit(table, width - FIRST)))
