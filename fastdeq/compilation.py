"""torch.compile, as the compiled solves use it."""

import copy
import inspect
import logging
import time
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch

BACKEND = "inductor"
"""The backend of `torch.compile`; another one compiles in less time, for tests."""

_RECOMPILES = 64  # shapes and settings for which a process compiles the same function
_log = logging.getLogger(__name__)


def run_compiled(function: Callable[..., Any], device: torch.device, *args: Any) -> Any:
    """function(*args), compiled as one graph for each set of shapes and settings.

    Raises: RuntimeError with the cure where it cannot be compiled.
    """
    dynamo = import_module("torch._dynamo")  # here, since it takes seconds
    graphs, begin = _graphs(dynamo), time.perf_counter()
    if device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()
    try:
        with warnings.catch_warnings():
            # torch.compile looks at the gradients of all arguments.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
            output = _compiled(function, device.type, BACKEND)(*args)
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
def _compiled(function: Callable[..., Any], device: str, backend: str) -> Callable[..., Any]:
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": backend}
    if device == "cuda" and backend == "inductor":
        options["mode"] = "reduce-overhead"  # CUDA graphs
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = _RECOMPILES
    return torch.compile(function, **options)


def _graphs(dynamo: Any) -> int:
    """How many graphs this process has compiled."""
    return int(dynamo.utils.counters["stats"]["unique_graphs"])


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
