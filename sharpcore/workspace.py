"""The workspace of a linearization: the memory of its products, with a buffer plan for each number of
vectors."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpcore.explain import Timing
from sharpcore.graphs import Recordings, graph_maker
from sharpcore.plan import Log, Plan
from sharpcore.program import Program
from sharpcore.residuals import Residuals
from sharpcore.rules.linear import Convolution

_MOVE = "move"


class Workspace:
    """Runs products in memory that is planned once and kept.

    The first product with K vectors, in either direction, allocates as it goes and is watched; the next ones
    run in the places that were planned from it. Only one product at a time can: one that finds the workspace
    in use by another thread allocates as it goes, or waits, where residuals are made again: of those there is
    memory for one product.

    On a GPU products are recorded as CUDA graphs instead, which share the memory of one pool, and so are
    moves to another point: those write residuals to where they were, so that the graphs of products stay.
    """

    def __init__(self, device: torch.device) -> None:
        self._lock = threading.Lock()
        self._plans: dict[tuple[int, bool], Plan | None] = {}
        self._memory: Tensor | None = None
        make = graph_maker(device)
        self._recordings = None if make is None else Recordings(make)
        self._last: torch.cuda.Event | None = None  # the end of what was launched here last

    @property
    def nbytes(self) -> int:
        """Bytes that are kept between products."""
        return 0 if self._memory is None else self._memory.nbytes

    @property
    def refused(self) -> str:
        """Why work was not recorded as a CUDA graph; empty where it was, or is not meant to be."""
        refused = {} if self._recordings is None else self._recordings.refused
        return next(iter(refused.values()), "")

    @contextlib.contextmanager
    def _turn(self, device: torch.device) -> Iterator[None]:
        """What is launched in here comes after what was launched here before, on whatever stream."""
        if device.type != "cuda":
            yield
            return
        stream = torch.cuda.current_stream(device)
        if self._last is not None:
            stream.wait_event(self._last)
        yield
        self._last = stream.record_event()

    def move(
        self,
        program: Program,
        inputs: Sequence[Tensor],
        replay: Callable[..., Tensor | None],
        *,
        segments: bool,
    ) -> Tensor | None:
        """Run `replay`, which takes `inputs` to the value at another point and makes the maps there anew.

        Returns a copy of the value. `segments`: parts are run again in every product, so that memory comes
        and goes.
        """
        with self._lock, self._turn(inputs[0].device):
            recordings = None if segments else self._recordings
            if recordings is None or not recordings.holds(_MOVE):
                self._leave_point(program)
            value = replay(*inputs) if recordings is None else recordings.run(_MOVE, inputs, replay)
            return None if value is None else torch.empty_like(value).copy_(value)

    def _leave_point(self, program: Program) -> None:
        """Let go of the maps of the point that is left."""
        if self._recordings is not None:
            self._recordings.forget(but=_MOVE)
        fixed = {index for index, node in enumerate(program.nodes) if node.fixed}
        for plan in self._plans.values():
            if plan is not None:
                plan.forget(fixed)

    def product(
        self,
        program: Program,
        maps: Residuals,
        kernels: Any,
        vectors: Tensor,
        result: Tensor,
        *,
        transposed: bool,
        timed: bool = False,
    ) -> None:
        """The (transposed) Jacobian times K vectors, written to `result`."""
        if not self._lock.acquire(blocking=bool(maps.segments)):
            self._unplanned(program, maps, kernels, vectors, result, transposed, None)
            return
        try:
            with self._turn(vectors.device):
                if self._recordings is not None and not maps.segments and not timed:
                    product = program.pull if transposed else program.push
                    made = self._recordings.run(
                        (vectors.shape[0], transposed), (vectors,), lambda v: product(maps, kernels, v)
                    )
                    if made is None:
                        result.zero_()
                    else:
                        result.copy_(made)
                    return
                plan = self.plan(program, maps, kernels, vectors, result, transposed=transposed)
                if plan is not None:
                    made = program.run(plan, maps, kernels, vectors, transposed=transposed, timed=timed)
                    result.copy_(made)
        finally:
            self._lock.release()

    def plan(
        self,
        program: Program,
        maps: Residuals,
        kernels: Any,
        vectors: Tensor,
        result: Tensor,
        *,
        transposed: bool,
    ) -> Plan | None:
        """The plan for so many vectors; None where it had to be made, or cannot be: then the product is in
        `result`."""
        key = (vectors.shape[0], transposed)
        plan = self._plans.get(key)
        if plan is not None:
            return plan
        end = program.x if transposed else program.tangent_output
        start = program.tangent_output if transposed else program.x
        assert start is not None
        assert end is not None
        log = None
        if key not in self._plans:
            vectors = _laid_out(vectors, maps)
            log = Log(start, vectors)
        reached = self._unplanned(program, maps, kernels, vectors, result, transposed, log)
        if log is not None:
            if not vectors.is_cuda:
                program.timing = Timing(vectors.shape[0], transposed, log.seconds)
            plan = Plan(log, end) if reached and log.usable else None
            if plan is not None:
                self._place(plan, vectors.device)
            self._plans[key] = plan
        return None

    @staticmethod
    def _unplanned(
        program: Program,
        maps: Residuals,
        kernels: Any,
        vectors: Tensor,
        result: Tensor,
        transposed: bool,
        log: Log | None,
    ) -> bool:
        product = program.pull if transposed else program.push
        made = product(maps, kernels, vectors, log)
        if made is None:
            result.zero_()
        else:
            result.copy_(made)
        return made is not None

    def _place(self, plan: Plan, device: torch.device) -> None:
        """Give a plan its place in the memory that all plans share; where that grows, all move."""
        if self._memory is None or self._memory.nbytes < plan.nbytes:
            self._memory = None
            self._memory = torch.empty(plan.nbytes, dtype=torch.uint8, device=device)
            for other in self._plans.values():
                if other is not None:
                    other.place(self._memory)
        plan.place(self._memory)


def _laid_out(vectors: Tensor, maps: Residuals) -> Tensor:
    """The vectors without gaps, with channels last where they are images and convolutions want that."""
    if vectors.dim() == 5 and any(isinstance(m, Convolution) and m.is_packed for m in maps.kept()):
        folded = vectors.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return folded.unflatten(0, vectors.shape[:2])
    return vectors.contiguous()
