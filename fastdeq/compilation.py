"""torch.compile, as the compiled solves use it."""

import copy
import inspect
import logging
import time
import warnings
from collections.abc import Callable, Hashable
from functools import cache
from importlib import import_module
from typing import Any

import torch

BACKEND = "inductor"
"""The backend of `torch.compile`; another one compiles in less time, for tests."""

_RECOMPILES = 64  # shapes and settings for which a process compiles the same function
_LOOKS = r"The \.grad attribute of a Tensor that is not a leaf"
_log = logging.getLogger(__name__)


def run_compiled(
    function: Callable[..., Any], settings: Hashable, device: torch.device, *args: Any
) -> Any:
    """function(*args), compiled as one graph for each set of shapes.

    settings: of which there are graphs of their own.

    Raises: RuntimeError with the cure where it cannot be compiled.
    """
    dynamo = import_module("torch._dynamo")  # here, since it takes seconds
    graphs, begin = _graphs(dynamo), time.perf_counter()
    _ignore_looks_at_gradients()
    if device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()
    known = _compiled.cache_info().misses
    compiled = _compiled(function, settings, device.type, BACKEND)
    if _compiled.cache_info().misses != known:
        _log.warning("compiling a solve: seconds, or minutes where f has many operations ...")
    try:
        output = compiled(*args)
    except dynamo.exc.TorchDynamoException as error:
        raise RuntimeError(
            f"compile=True: torch.compile reports '{_first_line(error)}': remove from f what it "
            "cannot trace (such as control flow that depends on values of tensors), install a C++ "
            "compiler where there is none, or leave compile out"
        ) from error
    if _graphs(dynamo) != graphs:
        seconds = time.perf_counter() - begin
        _log.warning("compiled a solve in %.0f s; later ones of these shapes reuse it", seconds)
    # The next replay of a CUDA graph overwrites its outputs.
    return copy.deepcopy(output) if device.type == "cuda" else output


@cache
def _compiled(
    function: Callable[..., Any], settings: Hashable, device: str, backend: str
) -> Callable[..., Any]:
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": backend}
    if device == "cuda" and backend == "inductor":
        options["mode"] = "reduce-overhead"  # CUDA graphs
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        # Graphs for other settings do not count, and are not searched.
        options |= {"recompile_limit": _RECOMPILES, "isolate_recompiles": True}
    return torch.compile(function, **options)


def _ignore_looks_at_gradients() -> None:
    """torch.compile looks at the gradients of all arguments, and warns of its own looks."""
    # Not catch_warnings, which takes longer than a solve.
    if not any(getattr(each[1], "pattern", None) == _LOOKS for each in warnings.filters):
        warnings.filterwarnings("ignore", _LOOKS)


def _graphs(dynamo: Any) -> int:
    """How many graphs this process has compiled."""
    return int(dynamo.utils.counters["stats"]["unique_graphs"])


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
