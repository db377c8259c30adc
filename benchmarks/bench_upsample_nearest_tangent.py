"""Nearest-neighbour upsampling of K tangents by two, and its transpose: kernels, PyTorch, a copy.

    pytest benchmarks/bench_upsample_nearest_tangent.py -s

The unit is a copy of as many bytes as either has to move: the small and the large image.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sharpcore.backends import cpu

aten = torch.ops.aten


@pytest.mark.kernel
@pytest.mark.skipif(cpu.extension() is None, reason="sharpcore._C is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize(
    ("channels", "size"),
    [
        pytest.param(128, 16, id="mid"),  # outermost upsampling of the configuration "mid"
        pytest.param(640, 32, id="sd-outer"),  # upsamplings of Stable Diffusion 1.x
        pytest.param(1280, 8, id="sd-inner"),
    ],
)
def test_upsample_nearest(
    table: Any, benchmark: Any, channels: int, size: int, count: int, layout: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    last = layout == "channels-last"

    def image(size: int) -> Tensor:
        folded = torch.randn(2 * count, channels, size, size, generator=generator).to(dtype)
        return folded.contiguous(memory_format=torch.channels_last) if last else folded

    def unfold(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (count, 2))

    small, large = image(size), image(2 * size)
    to_small, to_large = torch.empty_like(small), torch.empty_like(large)
    source = torch.randn(small.numel() * 5 // 2).to(dtype)
    target = torch.empty_like(source)

    def tangent() -> Tensor:
        return cpu.upsample_nearest_tangent(unfold(small), (2, 2), out=unfold(to_large))

    def adjoint() -> Tensor:
        return cpu.upsample_nearest_adjoint(unfold(large), (2, 2), out=unfold(to_small))

    def autograd() -> Tensor:
        point = torch.zeros_like(small).requires_grad_()
        return torch.autograd.grad(F.interpolate(point, scale_factor=2.0), point, large)[0]

    def backward() -> Tensor:
        return aten.upsample_nearest2d_backward(large, large.shape[2:], small.shape, 2.0, 2.0)

    table.add("copy", lambda: target.copy_(source))
    table.add("cpu kernel", tangent)
    table.add("upsample_nearest2d", lambda: aten.upsample_nearest2d.out(small, large.shape[2:], out=to_large))
    table.add("cpu kernel, adjoint", adjoint)
    table.add("upsample_nearest2d_backward", backward)
    table.add("autograd of interpolate", autograd)
    benchmark.pedantic(table.measure, rounds=1)
    benchmark.extra_info.update({record["what"]: record["ratio"] for record in table.records()})
