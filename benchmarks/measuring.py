"""How the benchmarks measure: CPU seconds of one thread, cases in turns, medians, and ratios."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TypeVar

SYSTEMS = ("f alone", "fastdeq", "compiled", "best settings", "torchdeq")
"""The columns. "compiled" is fastdeq with `compile`."""

RATIOS = (
    ("fastdeq", "f alone"),
    ("compiled", "f alone"),
    ("fastdeq", "torchdeq"),
    ("best settings", "torchdeq"),
)
"""What is compared with what."""

HAS_TORCHDEQ = find_spec("torchdeq") is not None

Case = Callable[[], object]
_K = TypeVar("_K")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement. values: by system, in `unit`. note: what else there is to know."""

    section: str
    case: str
    unit: str
    values: Mapping[str, float]
    note: str = ""

    @property
    def ratios(self) -> dict[str, float]:
        """Those of `RATIOS` whose values are known."""
        known = [pair for pair in RATIOS if set(pair) <= self.values.keys()]
        return {f"{one} / {other}": self.values[one] / self.values[other] for one, other in known}


def in_turns(cases: Mapping[_K, Case], *, turns: int, warm_up: int) -> dict[_K, float]:
    """Median milliseconds of each case. In turns, a slow second of the machine affects all; the CPU
    time of the process, with one thread, is what other processes disturb least.
    """
    seconds: dict[_K, list[float]] = {name: [] for name in cases}
    for turn in range(warm_up + turns):
        for name, run in cases.items():
            begin = time.process_time()
            run()
            if turn >= warm_up:
                seconds[name].append(time.process_time() - begin)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def timed_rows(
    section: str,
    alone: Mapping[str, Case],
    cases: Mapping[tuple[str, str], Case],
    *,
    turns: int,
    warm_up: int,
) -> list[Row]:
    """One row per case name of `cases`, (case, system), all measured together in turns.

    alone: f alone, by the names of the cases, or by "" for all of them.
    """
    runs = {**{(name, "f alone"): run for name, run in alone.items()}, **cases}
    medians = in_turns(runs, turns=turns, warm_up=warm_up)
    rows = []
    for name in dict.fromkeys(case for case, _ in cases):
        values = {"f alone": medians[name if name in alone else "", "f alone"]}
        values |= {system: ms for (case, system), ms in medians.items() if case == name}
        rows.append(Row(section=section, case=name, unit="ms", values=values))
    return rows
