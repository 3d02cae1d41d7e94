"""Time on a device, without waiting for the device until the time is read."""

import time
from dataclasses import dataclass
from typing import SupportsFloat

import torch


class Stopwatch:
    """The seconds between construction and `stop`, by the clock of the device.

    On a CUDA device both are events in its current stream: neither waits. The first read of
    `seconds` waits for the second one. Elsewhere both are values of `time.perf_counter`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: float | None = None
        self._begin = _reading(device)
        self._end: float | torch.cuda.Event | None = None

    def stop(self) -> "Stopwatch":
        """End the measurement here, in the order of the device's work."""
        self._end = _reading(self._device)
        return self

    @property
    def seconds(self) -> float:
        """Raises: RuntimeError before `stop`."""
        if self._seconds is None:
            if self._end is None:
                raise RuntimeError("the stopwatch is running: call stop() before reading seconds")
            self._seconds = _between(self._begin, self._end)
            self._begin = self._end = 0.0  # the events are no longer needed
        return self._seconds

    def __float__(self) -> float:
        return self.seconds

    def __repr__(self) -> str:
        return "Stopwatch()" if self._seconds is None else f"Stopwatch({self._seconds:.6f} s)"

    def __getstate__(self) -> dict[str, object]:
        """Copied and pickled as a number of seconds: events belong to their process."""
        seconds = self.seconds
        return {**vars(self), "_seconds": seconds}


@dataclass(frozen=True)
class Seconds:
    """The sum of several times; reading it waits for the device."""

    parts: tuple[SupportsFloat, ...]

    def __float__(self) -> float:
        return sum(map(float, self.parts))


def _reading(device: torch.device) -> float | torch.cuda.Event:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        return float(end) - float(begin)  # type: ignore[arg-type]  # both are numbers
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
