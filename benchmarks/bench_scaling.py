"""How the price of a product grows with tangents, latent size, channels and batch, around "mid".

    pytest benchmarks/bench_scaling.py -s -m scaling --save-results
    python benchmarks/plots.py

The unit of each point is one forward pass without gradients, through fused attention, at that point.
"""

from __future__ import annotations

from typing import Any

import pytest
from scaling import curve

TURNS = 3
AXES: dict[str, tuple[float, ...]] = {
    "tangents": (1, 2, 4, 8, 16, 32),
    "size": (16, 24, 32, 48, 64, 96),
    "width": (0.5, 1, 2, 4),
    "batch": (1, 2, 4, 8),
}


@pytest.mark.scaling
@pytest.mark.parametrize("axis", AXES)
def test_scaling(table: Any, benchmark: Any, axis: str) -> None:
    table.turns = min(table.turns, TURNS)
    benchmark.pedantic(lambda: curve(table, "mid", axis, AXES[axis]), rounds=1)
