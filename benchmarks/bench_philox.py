"""Random probes: the cpu kernel, its reference, and PyTorch's own generators of as many numbers.

    pytest benchmarks/bench_philox.py -s

The unit is `torch.randn`, for signs `torch.randint`, of the same size and dtype.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sharpcore.backends import cpu, reference


@pytest.mark.kernel
@pytest.mark.skipif(cpu.extension() is None, reason="sharpcore._C is not built")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["rademacher", "normal", "sphere"])
@pytest.mark.parametrize(
    ("samples", "dimension"),
    [
        pytest.param(64, 1024, id="mid"),  # a batch of latents of the configuration "mid"
        pytest.param(8, 16384, id="sd"),  # latents of Stable Diffusion 1.x
    ],
)
def test_philox(
    table: Any, benchmark: Any, samples: int, dimension: int, kind: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    count, ids = 8, torch.arange(samples)
    shape = (count, samples, dimension)
    arguments = (kind, 0, ids, 0, count, dimension)
    if kind == "rademacher":
        table.add("torch.randint", lambda: torch.randint(0, 2, shape, generator=generator, dtype=dtype))
    else:
        table.add("torch.randn", lambda: torch.randn(shape, generator=generator, dtype=dtype))
    table.add("cpu kernel", lambda: cpu.philox_probes(*arguments, dtype=dtype, device="cpu"))
    table.add("reference", lambda: reference.philox_probes(*arguments, dtype=dtype, device="cpu"))
    benchmark.pedantic(table.measure, rounds=1)
    benchmark.extra_info.update({record["what"]: record["ratio"] for record in table.records()})
