"""GroupNorm and SiLU with its statistics: kernel, PyTorch's two operations and a copy.

    pytest benchmarks/bench_group_norm_silu_forward.py -s

The unit is PyTorch's native_group_norm followed by silu, as a network runs them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sharpcore.backends import cpu, reference

GROUPS = 32


@pytest.mark.kernel
@pytest.mark.skipif(cpu.extension() is None, reason="sharpcore._C is not built")
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("channels", "side"),
    [
        pytest.param(64, 32, id="mid"),  # outermost layer of the configuration "mid"
        pytest.param(320, 64, id="sd-outer"),  # layers of Stable Diffusion 1.x
        pytest.param(1280, 16, id="sd-inner"),
    ],
)
def test_group_norm_silu_forward(
    table: Any, benchmark: Any, channels: int, side: int, dtype: torch.dtype, channels_last: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, side, side, generator=generator).to(dtype)
    weight, bias = torch.randn(channels, generator=generator), torch.randn(channels, generator=generator)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    exact = reference.group_norm_silu_forward(x.double(), weight.double(), bias.double(), GROUPS, 1e-5, True)
    target = torch.empty_like(x)

    def pytorch() -> Any:
        y, mean, rstd = torch.native_group_norm(x, weight, bias, 2, channels, side**2, GROUPS, 1e-5)
        return torch.ops.aten.silu(y), mean, rstd

    def error(results: Any) -> float:
        return float((results[0] - exact[0]).norm() / exact[0].norm())

    table.add("PyTorch", pytorch, error=error)
    table.add("copy", lambda: target.copy_(x))
    table.add(
        "cpu kernel",
        lambda: cpu.group_norm_silu_forward(x, weight, bias, GROUPS, 1e-5, True),
        error=error,
    )
    table.add(
        "cpu kernel, mapped memory",
        lambda: cpu.group_norm_silu_forward(x, weight, bias, GROUPS, 1e-5, True, out=target),
    )
    benchmark.pedantic(table.measure, rounds=1)
    benchmark.extra_info.update({record["what"]: record["ratio"] for record in table.records()})
