"""Products with the Jacobian of an SDXL-like UNet, random weights, as deep as memory allows, at 32x32.

    pytest benchmarks/bench_sdxl.py -s -m sdxl

The unit is one forward pass without gradients, through fused attention, of the same batch, a guidance pair.
"""

from __future__ import annotations

from typing import Any

import configs
import pytest
from candidates import add
from problems import Problem


@pytest.mark.sdxl
def test_sdxl(table: Any, benchmark: Any) -> None:
    depth = configs.sdxl_depth()
    problem = Problem("sdxl", depth=depth)
    problem.find_truth()
    parameters = sum(parameter.numel() for parameter in problem.pair.unet.parameters())
    print(f"\ninnermost transformers {depth} blocks deep, {parameters / 1e9:.2f} G parameters")

    def run() -> None:
        add(table, problem, "forward", "relinearize", "product, K=1")
        add(table, problem, "product, K=8, per tangent", "central difference", turns=2)
        table.measure()

    benchmark.pedantic(run, rounds=1)
    for row in table.rows:
        row.labels["depth"], row.labels["parameters"] = depth, parameters
