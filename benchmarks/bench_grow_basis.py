"""Growth of bases by a block of vectors: kernel, a loop of torch operations, torch's batched operations.

    pytest benchmarks/bench_grow_basis.py -s

The unit is a copy of the bases into memory that is already mapped. Two passes of block Gram-Schmidt read each
basis four times. The error of a row is the largest entry of V V^T - I, new rows included.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sharpcore.backends import cpu, reference


@pytest.mark.kernel
@pytest.mark.skipif(cpu.extension() is None, reason="sharpcore._C is not built")
@pytest.mark.parametrize(
    ("samples", "size", "dimension", "block"),
    [
        pytest.param(64, 64, 1024, 4, id="tiny"),  # 64 samples of the shipped model
        pytest.param(64, 160, 1024, 1, id="tiny-1"),  # one vector, and as many rows as 10 pairs need
        pytest.param(2, 64, 4096, 4, id="mid"),
        pytest.param(1, 256, 16384, 4, id="large"),
    ],
)
def test_grow_basis(table: Any, benchmark: Any, samples: int, size: int, dimension: int, block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    rows = torch.linalg.qr(torch.randn(samples, dimension, size, **options))[0].mT
    basis = torch.zeros(samples, size + block, dimension, dtype=torch.float64)
    basis[:, :size] = rows
    vectors = torch.randn(block, samples, dimension, generator=generator)
    sizes = torch.full((samples,), size)
    floor = torch.zeros(samples, dtype=torch.float64)
    identity = torch.eye(size + block, dtype=torch.float64)
    target = torch.empty_like(basis)

    def error(_: Any) -> float:
        """What was grown last, in place."""
        return float((basis @ basis.mT - identity).abs().max())

    def batched() -> tuple[Tensor, Tensor]:
        """No deflation, no third pass: two batched products each way, and a batched QR."""
        known = basis[:, :size]
        w = vectors.transpose(0, 1).double()
        coefficients = torch.zeros(samples, size, block, dtype=torch.float64)
        for _ in range(2):
            along = known @ w.mT
            w = w - along.mT @ known
            coefficients += along
        orthonormal, triangle = torch.linalg.qr(w.mT)
        basis[:, size:] = orthonormal.mT
        return coefficients, triangle

    def grow(backend: Any) -> Any:
        return lambda: backend.grow_basis(basis, sizes, vectors, floor=floor, limit=size + block)

    table.add("copy", lambda: target.copy_(basis))
    table.add("cpu kernel", grow(cpu), error=error)
    table.add("loop of torch operations", grow(reference), error=error)
    table.add("batched torch operations", batched, error=error)
    benchmark.pedantic(table.measure, rounds=1)
    benchmark.extra_info.update({record["what"]: record["ratio"] for record in table.records()})
