"""The command ``fastdeq export-weights``: a run's weights as safetensors, with a model card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_model

from fastdeq.commands import Parser, exit_status, typed
from fastdeq.experiment.load import load
from fastdeq.experiment.model_card import model_card
from fastdeq.runs.files import write_text
from fastdeq.runs.folder import CARD, CONFIG, WEIGHTS
from fastdeq.runs.reading import read_config, read_run


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0, 1 for a run that cannot be exported, 2 for the
    usage.
    """
    return exit_status(lambda: _export(arguments), OSError, ValueError)


def parser() -> Parser:
    """The parser of `fastdeq export-weights`."""
    command = typed("export-weights")
    made = Parser(
        prog=command,
        description=f"Write {WEIGHTS}, {CONFIG} and a model card ({CARD}) of a finished run.",
        examples=f"  {command} RUN\n  {command} RUN --weights best --out shared/skip_deq",
    )
    made.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    made.add_argument(
        "--weights",
        choices=["last", "best"],
        default="last",
        metavar="WHICH",
        help="last: of the last epoch; best: of the best validation (default: last)",
    )
    made.add_argument(
        "--out", type=Path, metavar="FOLDER", help="a new folder (default: RUN/export)"
    )
    return made


def _export(arguments: Sequence[str]) -> int:
    given = parser().parse_args(arguments)
    run = given.run.resolve()
    print(f"see {export_weights(run, given.out or given.run / 'export', given.weights)}")
    return 0


def export_weights(run: Path, out: Path, weights: Any = "last") -> Path:
    """Write the weights, the configuration without folders of this machine, and the card of a
    finished run into the new folder `out`; return it.

    Raises: FileNotFoundError for a folder without a finished run; FileExistsError if `out` exists;
        ValueError for damaged files.
    """
    model, _ = load(run, weights=weights)
    try:
        finished = read_run(run)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{run} has no summary: the run has not finished") from error
    config = without_places(read_config(run))
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        raise FileExistsError(f"{out} exists: choose another folder with --out") from None
    save_model(model, str(out / WEIGHTS), metadata={"format": "pt"})
    write_text(out / CONFIG, yaml.safe_dump(config, sort_keys=False))
    write_text(out / CARD, model_card(finished, weights, model))
    return out


def without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without folders and files of the machine that the run was on."""
    data = {key: value for key, value in config["data"].items() if key not in ("root", "store")}
    dropped = ("paths", "logger", "checkpoint", "from_run", "extend")
    return {key: value for key, value in config.items() if key not in dropped} | {"data": data}
