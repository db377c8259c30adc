"""K tangents through GroupNorm and SiLU: kernel, reference, torch.func.jvp and a copy of the same bytes.

    pytest benchmarks/bench_group_norm_silu_tangent.py -s

The unit is a memcpy of the same bytes: K tangents and x read, K results written, that is (2 K + 1) / 2 times
x copied into memory that is already mapped. Kernels write into such memory, too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sharpcore.backends import cpu, reference

GROUPS = 32


@pytest.mark.kernel
@pytest.mark.skipif(cpu.extension() is None, reason="sharpcore._C is not built")
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize(
    ("channels", "side"),
    [
        pytest.param(64, 32, id="mid"),  # outermost layer of the configuration "mid"
        pytest.param(320, 64, id="sd-outer"),  # layers of Stable Diffusion 1.x
        pytest.param(1280, 16, id="sd-inner"),
    ],
)
def test_group_norm_silu_tangent(
    table: Any, benchmark: Any, channels: int, side: int, count: int, channels_last: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, side, side, generator=generator)
    tangents = torch.randn(count, *x.shape, generator=generator)
    weight, bias = torch.randn(channels, generator=generator), torch.randn(channels, generator=generator)
    _, mean, rstd = torch.native_group_norm(x, weight, bias, 2, channels, side**2, GROUPS, 1e-5)
    # torch.func.jvp of a channels-last GroupNorm raises.
    inputs, directions = x, tangents
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
        tangents = tangents.movedim(2, -1).contiguous().movedim(-1, 2)
    arguments = (tangents, x, mean, rstd, weight, bias, GROUPS)
    doubled = (*(t.double() for t in arguments[:6]), GROUPS)
    exact = reference.group_norm_silu_tangent(*doubled, True)
    target = torch.empty_like(tangents)
    source = torch.randn((2 * count + 1) * x.numel() // 2, generator=generator)
    copied = torch.empty_like(source)

    def forward(x: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, GROUPS, weight, bias))

    def jvp() -> Tensor:
        return torch.stack([torch.func.jvp(forward, (inputs,), (direction,))[1] for direction in directions])

    def error(result: Tensor) -> float:
        return float((result - exact).norm() / exact.norm())

    table.add("memcpy of the same bytes", lambda: copied.copy_(source))
    table.add("copy of the tangents", lambda: target.copy_(tangents))
    table.add("cpu kernel", lambda: cpu.group_norm_silu_tangent(*arguments, True, out=target), error=error)
    table.add("cpu kernel, new memory", lambda: cpu.group_norm_silu_tangent(*arguments, True))
    table.add("cpu kernel, adjoint", lambda: cpu.group_norm_silu_adjoint(*arguments, True, out=target))
    table.add("cpu kernel, without SiLU", lambda: cpu.group_norm_silu_tangent(*arguments, False, out=target))
    rounded = [t.bfloat16() for t in (tangents, x)]
    small = target.bfloat16()
    table.add(
        "cpu kernel, bfloat16",
        lambda: cpu.group_norm_silu_tangent(*rounded, *arguments[2:], True, out=small),
        error=error,
    )
    table.add("reference", lambda: reference.group_norm_silu_tangent(*arguments, True), error=error)
    table.add("torch.func.jvp, channels first", jvp, error=error)
    benchmark.pedantic(table.measure, rounds=1)
    benchmark.extra_info.update({record["what"]: record["ratio"] for record in table.records()})
