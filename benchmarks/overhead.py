"""What the executor of the linear program costs beside the arithmetic of its instructions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import OK, Table, why
from problems import Problem
from torch import Tensor

from sharpcore import Linearization

ROUNDS = 20
LOOP = "the executor alone, its calls doing nothing"
SHARE = "overhead of all instructions, at most"


def overhead(table: Table, small: Problem, large: Problem) -> None:
    """Rows for a product of the large network, its executor without kernels, an instruction of the small
    network, and the share of all such instructions."""
    try:
        linearizations = [problem.linearization() for problem in (small, large)]
        instructions, many = (len(linearization.program.steps) for linearization in linearizations)
        loop, prepared = idle_executor(linearizations[1], large.tangents[:1])
    # Whatever it raises is the result.
    except Exception as error:
        table.add_row("product, K=1", status=why(error))
        return
    tangent, large_tangent = small.tangents[:1], large.tangents[:1]

    def products() -> None:
        for _ in range(ROUNDS):
            linearizations[0].jvp(tangent)

    def loops() -> None:
        for _ in range(ROUNDS):
            loop()

    table.unit(f"product, K=1, {many} instructions", lambda: linearizations[1].jvp(large_tangent))
    table.add(LOOP, loops, per=ROUNDS, prepared=prepared)
    one = f"one of {instructions} instructions on tiny tensors"
    table.add(one, products, per=ROUNDS * instructions)
    table.measure()
    ratio = table.ratio(one)
    share = None if ratio is None else ratio * many
    table.add_row(SHARE, derived=share, status=OK if share is not None else table.rows[-1].status)


def idle_executor(linearization: Linearization, tangents: Tensor) -> tuple[Callable[[], Any], str]:
    """A product as the program runs it in planned memory, with functions that do nothing, called with the
    same arguments, in the place of kernels; and how many of its instructions are calls of kernels, rather
    than of their maps. What is left of arithmetic is a copy of the tangents."""
    for _ in range(3):
        linearization.jvp(tangents)
    plan = linearization._workspace._plans[len(tangents), False]
    assert plan is not None
    assert plan.calls
    prepared = sum(bool(instruction.touched) for instruction in plan.instructions)
    calls = tuple(partial(_nothing, *call.args, **call.keywords) for call in plan.calls)
    program, maps, kernels = linearization.program, linearization._residuals, linearization.backend

    def run() -> None:
        kept, plan.calls = plan.calls, calls
        try:
            with torch.no_grad():
                program.run(plan, maps, kernels, tangents, transposed=False)
        finally:
            plan.calls = kept

    return run, f"{prepared} of {len(plan.instructions)}"


def _nothing(*arguments: Any, **keywords: Any) -> None:
    pass
