"""What running an instruction costs beside its arithmetic, as a share of a product on "mid".

    pytest benchmarks/bench_overhead.py -s

Measured twice. The executor of "mid" alone: a product in which functions that do nothing are called with
the arguments of the kernels. And, from above, a network with the structure of "mid", 32 channels at an 8x8
latent: a product there, divided by its instructions, still holds their small kernels, and what stands between
a call and its kernel. The unit is a product, K=1, on "mid".
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from overhead import overhead
from problems import Problem


@pytest.mark.quick
def test_overhead(table: Any, benchmark: Any) -> None:
    table.name = f"overhead-{torch.get_num_threads()}-threads"
    benchmark.pedantic(lambda: overhead(table, Problem("overhead"), Problem("mid")), rounds=1)
