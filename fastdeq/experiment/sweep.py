"""L8: around the jobs of a sweep: a check before the first, a record of each, a table after."""

import sys
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from fastdeq.experiment.folder import write_json
from fastdeq.report import SweepTable, read_jobs

RESUMABLE = 75
"""The exit status of a run that has saved its state to go on later (sysexits' EX_TEMPFAIL)."""


def record_job(folder: Path | None, error: str | None, *, interrupted: bool = False) -> None:
    """Write <sweep>/jobs/<number>.json: the job's overrides, run folder, and what went wrong.

    interrupted: nothing did, but the job has stopped before its end and can go on.
    """
    hydra = HydraConfig.get()
    jobs = Path(hydra.sweep.dir) / "jobs"
    jobs.mkdir(parents=True, exist_ok=True)
    given = OverridesParser.create().parse_overrides(list(hydra.overrides.task))
    record = {
        "overrides": {
            override.key_or_group: override.get_value_element_as_str() for override in given
        },
        "folder": None if folder is None else str(folder.absolute()),
        "error": error,
        "interrupted": interrupted,
    }
    write_json(jobs / f"{hydra.job.num}.json", record)


class Sweep(Callback):
    """Hydra's callback around a sweep (conf/train.yaml: hydra.callbacks)."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Compose with every value that the sweep names, once, before anything is written."""
        params = config.hydra.sweeper.get("params") or {}
        given = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
        overrides = [
            _alternatives(override) for override in OverridesParser.create().parse_overrides(given)
        ]
        first = [texts[0] for texts in overrides]
        for place, texts in enumerate(overrides):
            for text in texts[1:] or texts:
                self._compose([*first[:place], text, *first[place + 1 :]])

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print and write the table; leave with status 1 if a job failed, 75 if one can go on."""
        folder = Path(config.hydra.sweep.dir)
        jobs = read_jobs(folder)
        if not jobs:
            return
        table = SweepTable(jobs)
        table.write(folder)
        print(f"\n{table.markdown()}\n\nmean ± standard deviation over seeds; see {folder}")
        unfinished = [job for job in jobs if job.error is not None]
        for job in unfinished:
            settings = " ".join(f"{key}={value}" for key, value in job.overrides.items())
            how = "was interrupted" if job.interrupted else "failed"
            print(f"job {job.number} {how} ({settings}): {job.error}", file=sys.stderr)
        if unfinished:
            sys.exit(RESUMABLE if all(job.interrupted for job in unfinished) else 1)

    def _compose(self, overrides: list[str]) -> None:
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        try:
            composed = hydra.compose_config(
                "train", overrides, run_mode=RunMode.RUN, with_log_configuration=False
            )
            if composed.get("mode") == "replay":
                raise ValueError("mode=replay makes one step again: leave -m out")
        except Exception as error:
            # Hydra turns a callback's exceptions into warnings and goes on.
            raise Refused(error) from error


class Refused(BaseException):
    """Passes through Hydra to the command line; see `on_multirun_start`."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _alternatives(override: Override) -> list[str]:
    """The override once for each value that it sweeps over."""
    if not override.is_sweep_override():
        return [override.input_line or ""]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
