"""Plots of runs; needs matplotlib (the extra `plots`).

Colours are those of Okabe and Ito, which the colour-blind can tell apart; what a line means is
also in its dashes, so that a plot can be printed in black and white.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import matplotlib.figure
import numpy as np
from cycler import cycler
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fastdeq.report.records import Record
from fastdeq.runs.recorded import SolveRecord

Plot: TypeAlias = matplotlib.figure.Figure
Axis: TypeAlias = Any
"""Axes of matplotlib, whose own annotations name only some of the accepted types."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DARK_COLOURS = ("#56B4E9", "#E8803A", "#2FBF93", "#DB9BBF", "#E69F00", "#F0E442")
"""On a dark background: lighter ones in the same order."""

MARKERS = ("o", "s")
SOLID, DASHED, DOTTED = "-", "--", ":"

_WIDE, _NARROW, _HEIGHT = 7.2, 4.6, 3.2  # inches

_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.dpi": 120,
    "savefig.dpi": 160,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
}
_DARK = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "#16181d"),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), "#d8dbe2"),
    "axes.edgecolor": "#8a90a0",
    "grid.color": "#8a90a0",
}


def style(dark: bool = False, narrow: bool = False) -> AbstractContextManager[None]:
    """The context in which plots are made and saved. narrow: panels below each other."""
    size = {"figure.figsize": (_NARROW if narrow else _WIDE, _HEIGHT)}
    colours = {"axes.prop_cycle": cycler(color=DARK_COLOURS if dark else COLOURS)}
    settings: Any = {**_STYLE, **size, **colours, **(_DARK if dark else {})}
    return matplotlib.rc_context(settings)


def draw(
    name: str, runs: Sequence[Record], *, dark: bool = False, narrow: bool = False
) -> Plot | None:
    """The plot of PLOTS with this name; None if no run has what it shows."""
    with style(dark, narrow):
        return PLOTS[name](runs)


def png(plot: Plot, *, dark: bool = False, dpi: int = 160) -> bytes:
    """The plot as a PNG file."""
    content = io.BytesIO()
    with style(dark):
        plot.savefig(content, format="png", dpi=dpi)
    return content.getvalue()


def images(run: Record) -> dict[str, NDArray[np.uint8]]:
    """The pixels of all plots of one run, (height, width, 3), by name."""
    shown = {}
    for name in PLOTS:
        if (plot := draw(name, [run])) is not None:
            with style():
                shown[name] = pixels(plot)
    return shown


def pixels(plot: Plot) -> NDArray[np.uint8]:
    """The pixels of a plot, (height, width, 3), in the style around the call."""
    canvas = FigureCanvasAgg(plot)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]


def write(plot: Plot, folder: Path, name: str) -> list[Path]:
    """Write <name>.png and <name>.pdf into the folder."""
    paths = [folder / f"{name}.{kind}" for kind in ("png", "pdf")]
    with style():
        for path in paths:
            plot.savefig(path)
    return paths


def training(runs: Sequence[Record]) -> Plot | None:
    """Loss of training and evaluation, and the score with that of the explicit prediction."""
    shown = [run for run in runs if run.series("train/loss")[0] or run.series("val/loss")[0]]
    if not shown:
        return None
    accuracy = any(run.score == "accuracy" for run in shown)
    plot, axes = _panels(2 if accuracy else 1)
    losses = {"train/loss": DOTTED, "val/loss": SOLID, "val/explicit_loss": DASHED}
    _lines(axes[0], shown, losses)
    axes[0].set(title="loss")
    _log_if_wide(axes[0])
    if accuracy:
        scores = {"train/accuracy": DOTTED, "val/accuracy": SOLID, "val/explicit_accuracy": DASHED}
        _lines(axes[1], shown, scores, factor=100)
        axes[1].set(title="accuracy %")
    styles: dict[str, Any] = {"training": DOTTED, "evaluation": SOLID}
    if any(run.series("val/explicit_loss")[0] for run in shown):
        styles["without a solve"] = DASHED
    _legend(plot, shown, styles)
    return plot


def nfe(runs: Sequence[Record]) -> Plot | None:
    """Evaluations of f per sample, as a histogram, and their mean over training."""
    counted = [run for run in runs if run.recording is not None and len(run.recording.nfe)]
    trained = [run for run in runs if run.series("train/nfe")[0]]
    if not counted and not trained:
        return None
    plot, axes = _panels(2 if counted else 1)
    right = axes[-1]
    if counted:
        _histogram(axes[0], counted, runs)
    _lines(
        right,
        trained,
        {"train/nfe": DOTTED, "val/nfe": SOLID, "train/nfe_backward": "-."},
        all_runs=runs,
    )
    right.set(title="mean NFE")
    right.set_ylim(bottom=0)
    _legend(
        plot,
        [run for run in runs if run in counted or run in trained],
        {"training": DOTTED, "evaluation": SOLID, "backward": "-."},
        all_runs=runs,
    )
    return plot


def _histogram(axis: Axis, counted: Sequence[Record], runs: Sequence[Record]) -> None:
    numbers = {run.label: run.recording.nfe for run in counted if run.recording is not None}
    low = min(int(each.min()) for each in numbers.values())
    high = max(int(each.max()) for each in numbers.values())
    bins = np.arange(low - 1, high + 3) - 0.5
    if high - low > 60:
        bins = np.linspace(low - 0.5, high + 0.5, 61)
    for run in counted:
        each, colour = numbers[run.label], _colour(runs, run)
        options = {"weights": np.full(len(each), 100 / len(each)), "color": colour}
        if len(counted) == 1:
            axis.hist(each, bins, alpha=0.35, **options)
        dashes = (SOLID, DASHED)[runs.index(run) // len(COLOURS)]
        axis.hist(each, bins, histtype="step", linewidth=1.4, linestyle=dashes, **options)
    axis.set(title="NFE per sample, % of samples", xlabel="evaluations of f")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def convergence(runs: Sequence[Record]) -> Plot | None:
    """Residual after each solver step, forward and backward: median, 10 to 90 % of samples."""
    traced = {
        kind: [
            (run, solve)
            for run in runs
            if (solve := _solve(run, kind)) is not None and solve.residuals is not None
        ]
        for kind in ("forward", "backward")
    }
    if not any(traced.values()):
        return None
    plot, axes = _panels(2)
    titles = {
        "forward": "forward: ‖f(z) − z‖ / ‖z*‖",
        "backward": "backward: ‖w − (I − Jᵀ) v‖, first = 1",
    }
    for axis, (kind, solves) in zip(axes, traced.items(), strict=True):
        for run, solve in solves:
            _band(axis, solve, kind, _colour(runs, run), alpha=0.2 if len(solves) < 4 else 0.07)
        axis.set(title=titles[kind], xlabel="solver step", yscale="log")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if not axis.lines:
            why = "no residual above 0" if solves else "no backward solve"
            axis.text(0.5, 0.5, why, ha="center", transform=axis.transAxes)
    tols = {float(t) for run, _ in traced["forward"] if (t := _tol(run)) is not None}
    for tol in tols:
        axes[0].axhline(tol, color="0.5", linewidth=0.9, linestyle=DASHED)
        axes[0].annotate(
            f"tol {tol:g}",
            (1, tol),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
            color="0.5",
        )
    both = [
        run
        for run in runs
        if any(run is each for each, _ in (*traced["forward"], *traced["backward"]))
    ]
    _legend(plot, both, {}, all_runs=runs)
    return plot


def spectral_radius(runs: Sequence[Record]) -> Plot | None:
    """|λ|max of ∂f/∂z at z*, mean over the recorded samples, over training."""
    shown = [run for run in runs if run.series("val/spectral_radius")[0]]
    if not shown:
        return None
    plot, (axis,) = _panels(1)
    _lines(axis, shown, {"val/spectral_radius": SOLID}, all_runs=runs)
    axis.axhline(1, color="0.5", linewidth=0.9, linestyle=DASHED)
    axis.annotate(
        "Picard iteration converges below 1",
        (0.99, 1),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=8,
        color="0.5",
    )
    axis.set(title="spectral radius of ∂f/∂z at z*")
    axis.set_ylim(0, 1.12 * max(1, *(max(run.series("val/spectral_radius")[1]) for run in shown)))
    _legend(plot, shown, {}, all_runs=runs)
    return plot


_PARTS = {
    "f": ("f", COLOURS[0], ""),
    "solver": ("solver", COLOURS[5], "//"),
    "adjoint": ("adjoint", COLOURS[1], ".."),
    "other": ("everything else", "#999999", ""),
}


def time(runs: Sequence[Record]) -> Plot | None:
    """Shares of the training time, one bar per run."""
    shown = [run for run in runs if run.summary.get("train_time_shares")]
    if not shown:
        return None
    width, _ = matplotlib.rcParams["figure.figsize"]
    plot = Plot(figsize=(width, 1.3 + 0.42 * len(shown)), layout="constrained")
    axis = plot.add_subplot()
    starts = [0.0] * len(shown)
    for name, (text, colour, hatch) in _PARTS.items():
        shares = [100 * float(run.summary["train_time_shares"].get(name, 0)) for run in shown]
        axis.barh(
            range(len(shown)),
            shares,
            left=starts,
            height=0.62,
            label=text,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.5,
        )
        for place, (start, share) in enumerate(zip(starts, shares, strict=True)):
            if share >= (5 if width == _WIDE else 15):
                axis.text(
                    start + share / 2,
                    place,
                    f"{share:.0f} %",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="black",
                    bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1},
                )
        starts = [start + share for start, share in zip(starts, shares, strict=True)]
    axis.set_yticks(range(len(shown)), [_timed(run) for run in shown])
    axis.set_xlim(0, 100)
    axis.set_title("training time, % of a step", loc="right")  # long names leave a narrow axis
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    plot.legend(loc="outside lower center", ncols=len(_PARTS) if width == _WIDE else 2)
    return plot


def curve(runs: Sequence[Record]) -> Plot | None:
    """The score of one checkpoint per run against the number of evaluations it may make."""
    shown = [run for run in runs if run.curve is not None]
    if not shown:
        return None
    accuracy = any(run.curve and run.curve["metric"] == "accuracy" for run in shown)
    metric = "accuracy" if accuracy else "loss"  # one axis cannot show both
    shown = [run for run in shown if run.curve and run.curve["metric"] == metric]
    plot, (axis,) = _panels(1)
    budgets = set()
    for run in shown:
        assert run.curve is not None
        points = run.curve["points"]
        factor = 100 if accuracy else 1
        x = [point["budget"] for point in points]
        y = [factor * point[metric] for point in points]
        budgets |= set(x)
        axis.plot(x, y, color=_colour(runs, run), marker=_marker(runs, run), markersize=5)
    axis.set_xscale("symlog", base=2, linthresh=1)
    axis.set_xticks(sorted(budgets), [str(budget) for budget in sorted(budgets)])
    axis.set(
        title="test accuracy %" if accuracy else "test loss",
        xlabel="evaluations of f at most (0: the explicit prediction)",
    )
    if not accuracy:
        axis.set_yscale("log")
    _legend(plot, shown, {}, all_runs=runs)
    return plot


PLOTS: Mapping[str, Callable[[Sequence[Record]], Plot | None]] = {
    "training": training,
    "nfe": nfe,
    "convergence": convergence,
    "spectral_radius": spectral_radius,
    "time": time,
    "curve": curve,
}
"""Plots by the names of their files."""


def _panels(count: int) -> tuple[Plot, list[Axis]]:
    width, height = matplotlib.rcParams["figure.figsize"]
    if width < _WIDE:
        plot = Plot(figsize=(width, (height - 0.3) * count + 0.3), layout="constrained")
        return plot, list(plot.subplots(count, 1, squeeze=False)[:, 0])
    plot = Plot(figsize=(width if count > 1 else 0.75 * width, height), layout="constrained")
    return plot, list(plot.subplots(1, count, squeeze=False)[0])


def _lines(
    axis: Axis,
    runs: Sequence[Record],
    styles: Mapping[str, Any],
    *,
    factor: float = 1,
    all_runs: Sequence[Record] | None = None,
) -> None:
    """Metrics over the epochs: a colour per run, a dash pattern per metric."""
    longest = max(len(run.series(name)[0]) for run in runs for name in styles) if runs else 0
    for run in runs:
        for name, dashes in styles.items():
            x, y = run.series(name)
            few = longest <= 15
            axis.plot(
                x,
                [factor * value if math.isfinite(value) else math.nan for value in y],
                dashes,
                color=_colour(all_runs or runs, run),
                marker=_marker(all_runs or runs, run) if few else None,
                linewidth=1.1 if dashes == DOTTED else None,
            )
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(
    plot: Plot,
    runs: Sequence[Record],
    styles: Mapping[str, Any],
    *,
    all_runs: Sequence[Record] | None = None,
) -> None:
    """Below the panels: the colours of the runs, then the dash patterns of the metrics."""
    every = all_runs or runs
    handles = [
        Line2D([], [], color=_colour(every, run), marker=_marker(every, run), label=run.label)
        for run in runs
    ]
    handles += [
        Line2D([], [], color="0.5", linestyle=dashes, label=text) for text, dashes in styles.items()
    ]
    longest = max(len(str(each.get_label())) for each in handles)
    columns = max(1, int(15 * plot.get_figwidth() / (longest + 6)))  # 15 letters per inch
    plot.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)))


def _log_if_wide(axis: Axis) -> None:
    """A logarithmic axis where the values span more than a factor of ten."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axis.lines])
    values = values[values > 0]
    if len(values) and values.max() > 10 * values.min():
        axis.set_yscale("log")


def _colour(runs: Sequence[Record], run: Record) -> str:
    colours = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
    return str(colours[runs.index(run) % len(colours)])


def _marker(runs: Sequence[Record], run: Record) -> str:
    return MARKERS[runs.index(run) // len(COLOURS)]


def _solve(run: Record, kind: str) -> SolveRecord | None:
    """The recorded solve of the first batch."""
    if run.recording is None or not run.recording.batches:
        return None
    found: SolveRecord | None = getattr(next(iter(run.recording.batches.values())), kind)
    return found


def _band(axis: Axis, solve: SolveRecord, kind: str, colour: str, *, alpha: float) -> None:
    residuals = np.asarray(solve.residuals, dtype=float)
    scale = residuals[0] if kind == "backward" or solve.norm is None else solve.norm
    relative = residuals / np.where(scale > 0, scale, 1)
    relative = np.where(relative > 0, relative, np.nan)
    used = ~np.isnan(relative).all(axis=1)
    if not used.any():  # the start is the equilibrium already, for every sample
        return
    low, median, high = np.nanquantile(relative[used], (0.1, 0.5, 0.9), axis=1)
    steps = np.arange(len(relative))[used]
    axis.fill_between(steps, low, high, color=colour, alpha=alpha, linewidth=0)
    axis.plot(steps, median, color=colour, marker="o" if len(steps) <= 25 else None)


def _tol(run: Record) -> float | None:
    """The tolerance, if it is one of the relative residual."""
    solver = run.config.get("solver") or {}
    relative = str(solver.get("termination", "")).startswith("rel")
    tol = solver.get("reltol") or solver.get("tol")
    return float(tol) if relative and isinstance(tol, int | float) else None


def _timed(run: Record) -> str:
    step = run.summary.get("train_ms_per_step")
    return run.label if step is None else f"{run.label}\n{step:,.1f} ms per step"
