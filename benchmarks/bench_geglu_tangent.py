"""K tangents through GEGLU: kernel, reference, torch.func.jvp and a copy of the same bytes.

    pytest benchmarks/bench_geglu_tangent.py -s

The unit is a copy, into memory that is already mapped, of as many bytes as the kernel has to move: it reads
the projection and K tangents of its size, and writes K results of half that. The kernel allocates its result,
as does the copy into new memory: mapping that costs more than filling it where the
allocator gives it back.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sharpcore.backends import cpu, reference


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
    tangents = torch.randn(count, *projection.shape, generator=generator)
    cotangents = torch.randn(count, 2, tokens, columns, generator=generator)
    exact = reference.geglu_tangent(tangents.double(), projection.double(), approximate)
    source = torch.randn((projection.numel() + tangents.numel() + cotangents.numel()) // 2)
    target = torch.empty_like(source)

    def forward(projection: Tensor) -> Tensor:
        hidden, gate = projection.chunk(2, -1)
        return hidden * F.gelu(gate, approximate=approximate)

    def jvp() -> Tensor:
        return torch.stack([torch.func.jvp(forward, (projection,), (tangent,))[1] for tangent in tangents])

    def error(result: Tensor) -> float:
        return float((result - exact).norm() / exact.norm())

    table.add("copy", lambda: target.copy_(source))
    table.add("copy into new memory", source.clone)
    table.add("cpu kernel", lambda: cpu.geglu_tangent(tangents, projection, approximate), error=error)
    table.add("cpu kernel, adjoint", lambda: cpu.geglu_adjoint(cotangents, projection, approximate))
    table.add("reference", lambda: reference.geglu_tangent(tangents, projection, approximate), error=error)
    table.add("torch.func.jvp", jvp, error=error)
    table.add("the forward pass", lambda: forward(projection))
    benchmark.pedantic(table.measure, rounds=1)
    benchmark.extra_info.update({record["what"]: record["ratio"] for record in table.records()})
