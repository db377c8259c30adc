"""Products with the Jacobian of Stable Diffusion 1.4's UNet, random weights, guidance pair at 64x64.

    pytest benchmarks/bench_sd14.py -s -m sd14

The unit is one forward pass in float32, without gradients, through fused attention, of the same batch. Errors
are of one product, against a central difference in float64 that casts the weights of one layer at a time.
"""

from __future__ import annotations

from typing import Any

import pytest
from candidates import add
from isolated import fill_peaks, peaks
from problems import Problem

# GiB beside the weights. torch.func.jvp holds several matrices of 4096 x 4096 for each of 16 heads.
FORWARD_MODE_NEEDS = 8.0
BUDGETED = ("linearize (trace), memory budget", "product, K=1, memory budget")
PEAKS = (
    "forward",
    "relinearize",
    "product, K=1",
    "product, K=8, per tangent",
    "central difference",
    *BUDGETED,
)


@pytest.mark.sd14
def test_sd14(table: Any, benchmark: Any) -> None:
    memory = peaks("sd14", PEAKS)
    problem = Problem("sd14")
    problem.find_truth()

    def run() -> None:
        add(table, problem, "forward", "relinearize", "product, K=1")
        add(table, problem, "product, K=8, per tangent", "transposed product, K=1", turns=2)
        table.measure()
        # What was kept for the products goes before other candidates need the memory.
        problem.release()
        add(table, problem, *BUDGETED, turns=2)
        add(table, problem, "linearize (trace)", "one-off product (linearize and K=1)", turns=2)
        add(table, problem, "central difference", turns=2)
        add(table, problem, "torch.func.jvp", turns=1, needs=FORWARD_MODE_NEEDS)
        table.measure()

    benchmark.pedantic(run, rounds=1)
    fill_peaks(table, memory)


@pytest.mark.sd14
def test_sd14_bfloat16(table: Any, benchmark: Any) -> None:
    """Products in bfloat16 of the float32 network, and what a plain bfloat16 network gives."""
    memory = peaks("sd14", ("forward", "bfloat16 product, K=1"))
    problem = Problem("sd14")
    problem.find_truth()

    def run() -> None:
        add(table, problem, "forward", "bfloat16 product, K=1")
        add(table, problem, "bfloat16 product, K=8, per tangent", "bfloat16 transposed product, K=1", turns=2)
        table.measure()
        problem.release()
        add(table, problem, "bfloat16 network, forward")
        add(table, problem, "bfloat16 network, torch.func.jvp", turns=1, needs=FORWARD_MODE_NEEDS)
        table.measure()

    benchmark.pedantic(run, rounds=1)
    fill_peaks(table, memory)
