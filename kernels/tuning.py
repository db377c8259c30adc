"""Which configuration of a Triton kernel runs: a safe one, or the fastest for a shape, measured once.

What was measured is kept on disk.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
import triton.testing

# Triton writes what it measured into its own cache, by device, kernel source, key and configurations.
_lock = threading.Lock()
_tuners: dict[tuple[int, tuple[str, ...], tuple[triton.Config, ...]], Any] = {}
_chosen: dict[tuple[int, int, tuple[Any, ...]], triton.Config] = {}

Grid = Callable[[Mapping[str, Any]], tuple[int, ...]]


def enabled() -> bool:
    """Whether shapes are tuned: on a GPU, unless the environment variable SHARPCORE_AUTOTUNE is 0."""
    return os.environ.get("SHARPCORE_AUTOTUNE", "1") != "0" and not triton.knobs.runtime.interpret


def run(
    kernel: Any,
    grid: Grid,
    arguments: Mapping[str, Any],
    configurations: Sequence[triton.Config],
    key: Sequence[str] = (),
) -> None:
    """Launch a kernel on the current stream of the device that its tensors are on.

    Args:
        kernel: a function made by `triton.jit`.
        grid: from the arguments and the configuration's constants to the numbers of programs.
        arguments: by name, constants included, those of the configurations not.
        configurations: the first is safe on every GPU, and the one that runs where nothing is tuned.
        key: names of arguments; the fastest configuration is looked for anew where one of them, or a dtype,
            differs. Nothing is tuned while a CUDA graph is captured: the first one runs if none is known.
    """
    device = next(value for value in arguments.values() if isinstance(value, torch.Tensor)).device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        configuration = configurations[0]
        if len(configurations) > 1 and enabled():
            configuration = _fastest(kernel, grid, arguments, configurations, key)
        kernel[grid](**arguments, **configuration.all_kwargs())


def _fastest(
    kernel: Any,
    grid: Grid,
    arguments: Mapping[str, Any],
    configurations: Sequence[triton.Config],
    key: Sequence[str],
) -> triton.Config:
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    place = (
        id(kernel),
        tensors[0].get_device(),
        (*(arguments[name] for name in key), *(tensor.dtype for tensor in tensors)),
    )
    known = _chosen.get(place)
    if known is not None:
        return known
    if torch.cuda.is_current_stream_capturing():
        return configurations[0]
    with _lock:  # a tuner holds the arguments of the call that it measures
        which = (id(kernel), tuple(key), tuple(configurations))
        tuner = _tuners.get(which)
        if tuner is None:
            tune = triton.autotune(
                configs=list(configurations), key=list(key), cache_results=True, do_bench=_measure
            )
            tuner = _tuners[which] = tune(kernel)
        compile_all(kernel, grid, arguments, configurations)
        tuner[grid](**arguments)
        _chosen[place] = tuner.best_config
        return tuner.best_config


def compile_all(
    kernel: Any, grid: Grid, arguments: Mapping[str, Any], configurations: Sequence[triton.Config]
) -> None:
    """Compile all configurations beside each other. One that cannot be is found out when it is measured."""
    with ThreadPoolExecutor() as threads, triton.AsyncCompileMode(threads, ignore_errors=True):
        for configuration in configurations:
            kernel.warmup(**arguments, grid=grid, **configuration.all_kwargs())


def _measure(call: Callable[[], None], quantiles: Sequence[float]) -> Any:
    """Milliseconds of a call. Triton's usual 125 ms for each configuration take longer than compiling it."""
    return triton.testing.do_bench(call, warmup=5, rep=25, quantiles=quantiles)
