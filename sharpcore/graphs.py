"""Recorded device work: CUDA graphs of products and of moves to other points, made once, launched again."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Graph(Protocol):
    """Work on a device that is recorded once, in memory that stays, and can be launched again."""

    def record(self, work: Callable[[], Any]) -> Any:
        """Record what `work` launches, without running it; returns what it returned."""

    def launch(self) -> None:
        """Run the recorded work on the current stream."""


class CudaGraph:
    """A CUDA graph; graphs that share a `pool` use the same memory one after the other."""

    def __init__(self, device: torch.device, pool: Any) -> None:
        self._device, self._pool = device, pool
        self._graph = torch.cuda.CUDAGraph()

    def record(self, work: Callable[[], Any]) -> Any:
        # Not torch.cuda.graph: it waits for the whole device, collects garbage, and shares one stream among
        # threads.
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = work()
            finally:
                self._graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        return result

    def launch(self) -> None:
        self._graph.replay()


def graph_maker(device: torch.device) -> Callable[[], Graph] | None:
    """What makes graphs that share their memory on this device; None where work is not recorded.

    That is on a CPU, and where the environment variable SHARPCORE_CUDA_GRAPHS is 0.
    """
    if device.type != "cuda" or os.environ.get("SHARPCORE_CUDA_GRAPHS", "1") == "0":
        return None
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(device, pool)


class Recordings:
    """The recorded work of one linearization, by name.

    Work runs as it is the first time: kernels are compiled and tuned then, which cannot be recorded. The
    second time it is recorded. Work that cannot be, as it waits for the device, goes on as it is; `refused`
    says why.
    """

    def __init__(self, make: Callable[[], Graph]) -> None:
        self._make = make
        self._known: set[Hashable] = set()
        self._made: dict[Hashable, tuple[Graph, list[Tensor], Any]] = {}
        self.refused: dict[Hashable, str] = {}

    def holds(self, name: Hashable) -> bool:
        """Whether the next call of `run` with this name launches a graph that is there."""
        return name in self._made

    def run(self, name: Hashable, inputs: Sequence[Tensor], work: Callable[..., Any]) -> Any:
        """work(*inputs); a result of a graph is overwritten when the graph is launched again."""
        if name not in self._made:
            if name not in self._known or name in self.refused:
                self._known.add(name)
                return work(*inputs)
            graph, places = self._make(), [torch.empty_like(tensor).copy_(tensor) for tensor in inputs]
            try:
                self._made[name] = graph, places, graph.record(lambda: work(*places))
            except RuntimeError as error:
                self.refused[name] = str(error).partition("\n")[0]
                return work(*inputs)
        graph, places, result = self._made[name]
        for place, tensor in zip(places, inputs, strict=True):
            place.copy_(tensor)
        graph.launch()
        return result

    def forget(self, *, but: Hashable) -> None:
        """Drop all graphs but one: what the others read has moved."""
        self._made = {name: made for name, made in self._made.items() if name == but}
