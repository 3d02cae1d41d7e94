"""The model card of exported weights: what they are, how good they are, how to load them."""

from typing import Any

from fastdeq.data.module import AbstractDataModule
from fastdeq.experiment.targets import locate
from fastdeq.nn import DEQChain
from fastdeq.runs.folder import CONFIG, WEIGHTS
from fastdeq.runs.reading import Run

_CARD = """\
---
library_name: fastdeq
tags: [deep-equilibrium-model]
---

# {title}

A deep equilibrium model: {model} on {data}, with {parameters:,} parameters.

| | |
|---|---|
{table}

## Metrics

{metrics}

## How to load

```python
import fastdeq

model, config = fastdeq.load("PATH OF THIS FOLDER")  # needs fastdeq[experiment,safetensors]
prediction, solution = model(x)  # x: a batch of inputs of shape {shape}
```

The model takes inputs as the data module of the run makes them: {inputs}.
`{weights}` holds the weights, `{config}` the configuration.

## Settings

The architecture is in `{config}`.

```text
{settings}
```
"""


def model_card(run: Run, weights: str, model: DEQChain) -> str:
    """The text of README.md. weights: "last" or "best", of which `model` has them."""
    choices, summary, layer = run.choices, run.summary, model.equilibria[0]
    versions = summary.get("versions") or {}
    table = {
        "model": choices["model"],
        "data": choices.get("data", "own"),
        "weights": {"last": "of the last epoch", "best": "of the best validation"}[weights],
        "training": f"{summary['epochs']:,} epochs, {summary['steps']:,} steps, seed {run.seed}",
        **{name: f"`{type(value).__name__}`" for name, value in layer.settings.items()},
        "device": run.device,
        "versions": ", ".join(f"{name} {versions[name]}" for name in _VERSIONS if name in versions),
        "commit": summary.get("commit") or "unknown",
    }
    return _CARD.format(
        title=f"{choices['model']} on {table['data']}",
        model=choices["model"],
        data=table["data"],
        parameters=summary["parameters"],
        table="\n".join(f"| {name} | {value} |" for name, value in table.items()),
        metrics=_metrics(run, weights),
        shape=f"(B, {', '.join(map(str, _shape(run)))})",
        inputs=_inputs(run),
        weights=WEIGHTS,
        config=CONFIG,
        settings="\n".join(
            f"{key}={value}" for key, value in run.identity.items() if _is_shown(key)
        ),
    )


_VERSIONS = ("fastdeq", "torch", "python")


def _metrics(run: Run, weights: str) -> str:
    if weights == "best":
        return "The test metrics of the run belong to its last weights, and these are others."
    tested = {name: value for name, value in run.metrics.items() if name.startswith("test/")}
    rows = [f"| {name.removeprefix('test/')} | {value:.6g} |" for name, value in tested.items()]
    return "\n".join(["| test | |", "|---|---|", *rows])


def _shape(run: Run) -> list[Any]:
    sizes = {key: value for key, value in run.settings.items() if key.startswith("sizes.input[")}
    return list(sizes.values())


def _inputs(run: Run) -> str:
    """The normalization of the data, if the setting or its class says what it is."""
    given = run.settings.get("data.normalization")
    if given == "published":
        module = locate("data._target_", run.settings["data._target_"])
        if issubclass(module, AbstractDataModule) and hasattr(module, "published"):
            return f"normalized by {module.published}"
    return "unchanged" if given is None else f"with `data.normalization={given}`"


_SETTINGS = ("solver", "adjoint", "loss", "optimizer", "scheduler", "precision")


def _is_shown(key: str) -> bool:
    return key.split(".")[0] in _SETTINGS
