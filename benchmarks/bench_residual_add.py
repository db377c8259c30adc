"""Sum of K tangents with a residual: kernel, PyTorch's sum and a copy of the same bytes.

    pytest benchmarks/bench_residual_add.py -s

The unit is a copy of as many bytes as the sum has to move: it reads two images and writes one. The image of a
transformer's tokens lies channels-last, its residual channels-first, unless they lie alike.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sharpcore.backends import cpu


@pytest.mark.kernel
@pytest.mark.skipif(cpu.extension() is None, reason="sharpcore._C is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize(
    ("channels", "size"),
    [
        pytest.param(64, 32, id="mid"),  # outermost layer of the configuration "mid"
        pytest.param(320, 64, id="sd-outer"),  # layers of Stable Diffusion 1.x
        pytest.param(1280, 16, id="sd-inner"),
    ],
)
def test_residual_add(
    table: Any, benchmark: Any, channels: int, size: int, count: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 2, channels, size, size)
    residual = torch.randn(shape, generator=generator).to(dtype)
    tokens = torch.randn((*shape[:2], size, size, channels), generator=generator).to(dtype).movedim(-1, 2)
    first, last = torch.empty_like(residual), torch.empty_like(tokens)
    source = torch.randn(residual.numel() * 3 // 2).to(dtype)
    target = torch.empty_like(source)

    table.add("copy", lambda: target.copy_(source))
    table.add("alike: torch.add", lambda: torch.add(residual, residual, out=first))
    table.add("into channels-last: cpu kernel", lambda: cpu.residual_add(tokens, residual, out=last))
    table.add("into channels-last: torch.add", lambda: torch.add(tokens, residual, out=last))
    table.add("into channels-first: cpu kernel", lambda: cpu.residual_add(tokens, residual, out=first))
    table.add("into channels-first: torch.add", lambda: torch.add(tokens, residual, out=first))
    benchmark.pedantic(table.measure, rounds=1)
    benchmark.extra_info.update({record["what"]: record["ratio"] for record in table.records()})
