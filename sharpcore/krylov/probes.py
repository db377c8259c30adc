"""Random probes of a seed (stand-in until the counter-based ones are merged)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def probes(
    kind: str,
    seed: int,
    *,
    samples: Sequence[int] | Tensor,
    first: int = 0,
    count: int,
    dimension: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """[count, B, d] numbers that depend on seed, sample, probe and element only."""
    out = torch.empty(count, len(samples), dimension, dtype=torch.float64)
    for j, sample in enumerate(samples):
        for i in range(count):
            key = (seed * 1_000_003 + int(sample) * 10_007 + first + i) % 2**63
            z = torch.randn(dimension, generator=torch.Generator().manual_seed(key), dtype=torch.float64)
            out[i, j] = z.sign() if kind == "rademacher" else z
    return out.to(device, dtype)
