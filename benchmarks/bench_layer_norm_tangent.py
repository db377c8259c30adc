"""K tangents through LayerNorm: kernel, reference, torch.func.jvp and a copy of the same bytes.

    pytest benchmarks/bench_layer_norm_tangent.py -s

The unit is a copy of the K tangents into memory that is already mapped. The kernel allocates its result, as
does the copy into new memory: mapping that costs more than filling it where the allocator gives it back.
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
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize(
    ("tokens", "channels"),
    [
        pytest.param(1024, 64, id="mid"),  # outermost layer of the configuration "mid"
        pytest.param(4096, 320, id="sd-outer"),  # layers of Stable Diffusion 1.x
        pytest.param(256, 1280, id="sd-inner"),
    ],
)
def test_layer_norm_tangent(table: Any, benchmark: Any, tokens: int, channels: int, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, channels, generator=generator)
    tangents = torch.randn(count, *x.shape, generator=generator)
    weight, bias = torch.randn(channels, generator=generator), torch.randn(channels, generator=generator)
    _, mean, rstd = torch.native_layer_norm(x, (channels,), weight, bias, 1e-5)
    arguments = (tangents, x, mean, rstd, weight)
    exact = reference.layer_norm_tangent(*(t.double() for t in arguments), 1)
    # The memory of an image, as the first LayerNorm of a transformer block of a UNet meets it.
    image = tangents.mT.contiguous().mT
    target = torch.empty_like(tangents)

    def jvp() -> Tensor:
        def forward(x: Tensor) -> Tensor:
            return F.layer_norm(x, (channels,), weight, bias)

        return torch.stack([torch.func.jvp(forward, (x,), (tangent,))[1] for tangent in tangents])

    def error(result: Tensor) -> float:
        return float((result - exact).norm() / exact.norm())

    table.add("copy", lambda: target.copy_(tangents))
    table.add("copy into new memory", tangents.clone)
    table.add("cpu kernel", lambda: cpu.layer_norm_tangent(*arguments, 1), error=error)
    table.add(
        "cpu kernel, tangents of an image",
        lambda: cpu.layer_norm_tangent(image, *arguments[1:], 1),
        error=error,
    )
    table.add("cpu kernel, mapped memory", lambda: cpu.layer_norm_tangent(*arguments, 1, out=target))
    table.add("cpu kernel, adjoint", lambda: cpu.layer_norm_adjoint(*arguments, 1))
    table.add("reference", lambda: reference.layer_norm_tangent(*arguments, 1), error=error)
    table.add("torch.func.jvp", jvp, error=error)
    benchmark.pedantic(table.measure, rounds=1)
    benchmark.extra_info.update({record["what"]: record["ratio"] for record in table.records()})
