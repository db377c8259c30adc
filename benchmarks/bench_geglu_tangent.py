"""GEGLU and K tangents through it: kernels, reference, torch.func.jvp and a copy of the same bytes.

    pytest benchmarks/bench_geglu_tangent.py -s

The unit is a copy, into memory that is already mapped, of as many bytes as the kernel has to move: it reads
the factors and K tangents of their size, and writes K results of half that. A kernel that allocates its
result pays, as does the copy into new memory, for mapping it, which costs more than filling it where the
allocator gives it back. What is computed once at a point, value and factors, is compared with PyTorch's
operations for them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sharpcore.backends import cpu, reference


@pytest.mark.kernel
@pytest.mark.skipif(cpu.extension() is None, reason="sharpcore._C is not built")
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize(
    ("tokens", "columns"),
    [
        pytest.param(1024, 256, id="mid"),  # outermost layer of the configuration "mid"
        pytest.param(4096, 1280, id="sd-outer"),  # layers of Stable Diffusion 1.x
        pytest.param(256, 5120, id="sd-inner"),
    ],
)
def test_geglu_tangent(
    table: Any, benchmark: Any, tokens: int, columns: int, count: int, approximate: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(2, tokens, 2 * columns, generator=generator)
    value, factors = cpu.geglu_forward(projection, approximate)
    tangents = torch.randn(count, *projection.shape, generator=generator)
    cotangents = torch.randn(count, 2, tokens, columns, generator=generator)
    out, pulled = torch.empty_like(cotangents), torch.empty_like(tangents)
    exact = reference.geglu_tangent(
        tangents.double(), reference.geglu_forward(projection.double(), approximate)[1]
    )
    source = torch.randn((projection.numel() + tangents.numel() + cotangents.numel()) // 2)
    target = torch.empty_like(source)
    half = [tensor.bfloat16() for tensor in (tangents, factors, out)]

    def forward(projection: Tensor) -> Tensor:
        hidden, gate = projection.chunk(2, -1)
        return hidden * F.gelu(gate, approximate=approximate)

    def jvp() -> Tensor:
        return torch.stack([torch.func.jvp(forward, (projection,), (tangent,))[1] for tangent in tangents])

    def error(result: Tensor) -> float:
        return float((result - exact).norm() / exact.norm())

    table.add("copy", lambda: target.copy_(source))
    table.add("copy into new memory", source.clone)
    table.add("cpu kernel", lambda: cpu.geglu_tangent(tangents, factors, out=out), error=error)
    table.add("cpu kernel into new memory", lambda: cpu.geglu_tangent(tangents, factors))
    table.add("cpu kernel, bfloat16", lambda: cpu.geglu_tangent(*half[:2], out=half[2]), error=error)
    table.add("cpu kernel, adjoint", lambda: cpu.geglu_adjoint(cotangents, factors, out=pulled))
    table.add("reference", lambda: reference.geglu_tangent(tangents, factors), error=error)
    table.add("torch.func.jvp", jvp, error=error)
    table.add("value: PyTorch", lambda: forward(projection))
    table.add("value and factors: reference", lambda: reference.geglu_forward(projection, approximate))
    table.add(
        "value and factors: cpu kernel",
        lambda: cpu.geglu_forward(projection, approximate, out=(value, factors)),
    )
    benchmark.pedantic(table.measure, rounds=1)
    benchmark.extra_info.update({record["what"]: record["ratio"] for record in table.records()})
