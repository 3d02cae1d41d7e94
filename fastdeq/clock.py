"""L0: the time at which a device has done what it was given."""

import time

import torch


def now(device: torch.device) -> float:
    """Seconds of a monotonic clock, read once `device` has finished its queue.

    On a CUDA device this waits (`torch.cuda.synchronize`): without it, a difference of two readings
    would be the time of queueing alone.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
