"""Products with the Jacobian of "mid" against every rival, in forward passes.

    pytest benchmarks/bench_linearize.py -s -m quick        # those that need no long set-up
    pytest benchmarks/bench_linearize.py -s -m "not quick"  # all, also compiled, with peak memory

The unit is one forward pass without gradients, through fused attention, of the same batch.
"""

from __future__ import annotations

from typing import Any

import pytest
from candidates import CANDIDATES, COMPILED, add
from isolated import add_compiled, fill_peaks, peaks
from problems import Problem

SLOW_TURNS = 3
OURS = tuple(name for name, candidate in CANDIDATES.items() if not candidate.rival and not candidate.compiled)
RIVALS = tuple(name for name, candidate in CANDIDATES.items() if candidate.rival and not candidate.compiled)
LONG_SETUP = ("torch.func.linearize, product",)


@pytest.mark.quick
def test_mid_quick(table: Any, benchmark: Any) -> None:
    """Without torch.func.linearize, whose set-up takes minutes, and without compilation."""
    memory = peaks("mid", ("forward", "product, K=1"))
    problem = Problem("mid")
    problem.find_truth()

    def run() -> None:
        add(table, problem, *OURS)
        add(table, problem, *(name for name in RIVALS if name not in LONG_SETUP), turns=1)
        table.measure()
        fill_peaks(table, memory)

    benchmark.pedantic(run, rounds=1)


def test_mid(table: Any, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Every candidate, compiled ones in processes of their own, and the peak memory of each."""
    memory = peaks("mid", (*OURS, *RIVALS))
    problem = Problem("mid")
    problem.find_truth()

    def run() -> None:
        add(table, problem, *OURS)
        add(table, problem, *RIVALS, turns=SLOW_TURNS)
        table.measure()
        fill_peaks(table, memory)
        limit = request.config.getoption("--compile-limit")
        add_compiled(table, problem, COMPILED, min(SLOW_TURNS, table.turns), limit)

    benchmark.pedantic(run, rounds=1)
