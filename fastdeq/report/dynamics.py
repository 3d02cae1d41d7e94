"""The dynamics picture: how the solver moves a scalar state from z_k to z_{k+1}, over the input.

Needs matplotlib (the extra `plots`), and runs that have recorded their states.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image

from fastdeq.report.configuration import MODELS
from fastdeq.report.plots import COLOURS, DASHED, Axis, Plot, pixels, style
from fastdeq.report.records import Record
from fastdeq.runs.recorded import Numbers

MOST = 4
"""Panels at most."""

_POINTS = 25  # whose step is drawn as an arrow
_FRAMES = 40  # at most; of a longer solve not every step is shown
_MS = 160  # of a frame
_SHADES = LinearSegmentedColormap.from_list("shades", ["#cfe3f1", COLOURS[0]])


@dataclass(frozen=True, kw_only=True)
class Dynamics:
    """A panel. x, target: (N,). states: (K + 1, N), from z_0. nfe: mean over the samples."""

    title: str
    x: Numbers
    target: Numbers
    states: Numbers
    nfe: float

    @property
    def steps(self) -> int:
        return len(self.states) - 1


def dynamics_of(run: Record) -> Dynamics:
    """The panel of a run.

    Raises: ValueError if it has not recorded its states, or these are more than one number.
    """
    batches = {} if run.recording is None else run.recording.batches
    batch = next(iter(batches.values()), None)
    if batch is None or batch.forward.states is None or batch.inputs is None:
        raise ValueError(
            f"{run.folder} has not recorded its states: train it with "
            "+callbacks.record.states=true, as experiment=dynamics does"
        )
    states, x, target = batch.forward.states, batch.inputs, batch.targets
    if states.shape[2] != 1 or x[0].size != 1 or target is None or target[0].size != 1:
        raise ValueError(
            f"{run.folder} has states of {states.shape[2]} numbers for inputs of {x[0].size}: the "
            "picture shows one of one, as experiment=dynamics trains it"
        )
    order = np.argsort(x.reshape(-1))
    return Dynamics(
        title=_title(run),
        x=x.reshape(-1)[order],
        target=target.reshape(-1)[order],
        states=states[:, order, 0],
        nfe=float(batch.forward.nfe.mean()),
    )


def still(panels: Sequence[Dynamics]) -> Plot:
    """All iterates in one picture, darker from step to step, and the target."""
    with style():
        plot, axes = _empty(panels)
        for axis, panel in zip(axes, panels, strict=True):
            for k, z in enumerate(panel.states):
                shade = _SHADES(k / max(panel.steps, 1))
                axis.plot(panel.x, z, color=shade, linewidth=1.0, zorder=1)
            axis.plot(panel.x, panel.states[0], ":", color=COLOURS[1], label="start z₀", zorder=3)
            axis.plot(panel.x, panel.states[-1], color=COLOURS[0], label="z*", zorder=2)
            _target(axis, panel)
            axis.set_title(f"{panel.title}: {panel.steps} steps, NFE {panel.nfe:.1f}")
        _legend(plot, axes)
    return plot


def write_animation(panels: Sequence[Dynamics], path: Path) -> None:
    """Write a GIF: in frame k each panel shows z_k, z_{k+1} and the way between them."""
    longest = max(panel.steps for panel in panels)
    frames = sorted({round(k) for k in np.linspace(0, longest, min(longest + 1, _FRAMES))})
    with style():
        plot, axes = _empty(panels)
        for axis, panel in zip(axes, panels, strict=True):
            _target(axis, panel)
        drawn: list[list[Any]] = [[] for _ in panels]
        axes[0].plot([], [], color=COLOURS[0], label="z at step k")
        axes[0].plot([], [], color=COLOURS[1], label="step to k + 1")
        _legend(plot, axes)
        images = []
        for k in frames:
            for axis, panel, artists in zip(axes, panels, drawn, strict=True):
                _frame(axis, panel, k, artists)
            images.append(Image.fromarray(pixels(plot)).quantize(64))
            plot.set_layout_engine("none")  # that of the first frame stays
    shown = [_MS] * len(images)
    shown[-1] = 10 * _MS
    images[0].save(path, save_all=True, append_images=images[1:], duration=shown, loop=0)


def _frame(axis: Axis, panel: Dynamics, k: int, artists: list[Any]) -> None:
    for artist in artists:
        artist.remove()
    now = min(k, panel.steps)
    z, following = panel.states[now], panel.states[min(now + 1, panel.steps)]
    places = np.linspace(0, len(z) - 1, _POINTS).round().astype(int)
    artists[:] = axis.plot(panel.x, z, color=COLOURS[0], linewidth=2)
    if now < panel.steps:
        x = panel.x[places]
        artists += axis.plot(
            np.stack([x, x]), np.stack([z[places], following[places]]), color=COLOURS[1], lw=1.2
        )
        artists += axis.plot(x, following[places], ".", color=COLOURS[1], markersize=4)
    ended = "" if now < panel.steps else " (ended)"
    axis.set_title(f"{panel.title}: step {now}{ended}")


def _empty(panels: Sequence[Dynamics]) -> tuple[Plot, list[Axis]]:
    plot = Plot(figsize=(1 + 2.9 * len(panels), 3.3), layout="constrained")
    axes = list(plot.subplots(1, len(panels), sharey=True, squeeze=False)[0])
    targets = np.concatenate([panel.target for panel in panels])
    margin = 0.25 * float(targets.max() - targets.min() or 1)
    axes[0].set_ylim(float(targets.min()) - margin, float(targets.max()) + margin)
    axes[0].set_ylabel("z")
    for axis in axes:
        axis.set_xlabel("x")
    return plot, axes


def _target(axis: Axis, panel: Dynamics) -> None:
    axis.plot(panel.x, panel.target, DASHED, color="black", linewidth=1.2, label="target", zorder=4)


def _legend(plot: Plot, axes: Sequence[Axis]) -> None:
    handles, labels = axes[0].get_legend_handles_labels()
    plot.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def _title(run: Record) -> str:
    model = str((run.summary.get("choices") or {}).get("model", ""))
    return next((name for name, choices in MODELS.items() if model in choices), run.label)
