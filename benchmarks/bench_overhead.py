"""What running an instruction costs beside its arithmetic, at most, as a share of a product on "mid".

    pytest benchmarks/bench_overhead.py -s

The network has the structure of "mid", with 32 channels at an 8x8 latent. A product there, divided by its
instructions, still holds their small kernels, so it bounds the overhead of an instruction from above. The
unit is a product, K=1, on "mid".
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
