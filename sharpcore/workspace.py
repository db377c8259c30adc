"""The workspace of a linearization: the memory of its products, with a buffer plan for each number of
vectors."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from sharpcore.plan import ADD, Log, Plan
from sharpcore.program import Program
from sharpcore.residuals import Residuals


class Workspace:
    """Runs products in memory that is planned once and kept.

    The first product with K vectors, in either direction, allocates as it goes and is watched; the next ones
    run in the places that were planned from it. Only one product at a time can: one that finds the workspace
    in use by another thread allocates as it goes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._plans: dict[tuple[int, bool], Plan | None] = {}
        self._memory: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that are kept between products."""
        return 0 if self._memory is None else self._memory.nbytes

    def leave_point(self, program: Program) -> None:
        """Let go of the maps of the point that is left, unless a product is running."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            for plan in self._plans.values():
                for instruction in plan.instructions if plan is not None else ():
                    if instruction.node != ADD and not program.nodes[instruction.node].fixed:
                        instruction.forget()
        finally:
            self._lock.release()

    def product(
        self,
        program: Program,
        maps: Residuals,
        kernels: Any,
        vectors: Tensor,
        result: Tensor,
        *,
        transposed: bool,
        synchronize: bool = False,
    ) -> None:
        """The (transposed) Jacobian times K vectors, written to `result`."""
        if not self._lock.acquire(blocking=False):
            self._unplanned(program, maps, kernels, vectors, result, transposed, None)
            return
        try:
            plan = self.plan(program, maps, kernels, vectors, result, transposed=transposed)
            if plan is not None:
                made = program.run(
                    plan, maps, kernels, vectors, transposed=transposed, synchronize=synchronize
                )
                result.copy_(made)
                if result.is_cuda:  # another thread's stream may be next in the workspace
                    torch.cuda.current_stream(result.device).synchronize()
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
            vectors = vectors.contiguous()
            log = Log(start, vectors)
        reached = self._unplanned(program, maps, kernels, vectors, result, transposed, log)
        if log is not None:
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
