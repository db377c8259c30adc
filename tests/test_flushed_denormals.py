"""Denormals under torch.set_flush_denormal, which reaches the calling thread alone: workers follow it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_checks import needs_extension, to_channels_last
from torch import Tensor

from sharpcore.backends import cpu, reference

pytestmark = [
    needs_extension,
    pytest.mark.skipif(not torch.set_flush_denormal(False), reason="denormals cannot be flushed here"),
]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64).to(
        dtype
    )


def tiny(*shape: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers around the smallest: part of them are denormal, and so are most of their differences."""
    return draw(*shape, dtype=dtype) * torch.finfo(dtype).tiny


def attention(dtype: torch.dtype) -> list[Callable[[], Any]]:
    q, k, v = (draw(2, 8, rows, 16, dtype=dtype) for rows in (256, 128, 128))
    out, lse = reference.attention_forward(q, k, v, mask=None, scale=0.25)
    vectors = [tiny(4, *t.shape, dtype=dtype) for t in (q, k, v)]
    small = [tiny(*t.shape, dtype=dtype) for t in (q, k, v)]
    cotangent = tiny(4, *out.shape, dtype=dtype)
    settings: dict[str, Any] = {"mask": None, "scale": 0.25}
    return [
        lambda: cpu.attention_forward(*small, **settings),
        lambda: cpu.attention_tangent(q, k, v, out, lse, *vectors, **settings),
        lambda: cpu.attention_adjoint(q, k, v, out, lse, cotangent, needed=(True, True, True), **settings),
    ]


def group_norm(dtype: torch.dtype) -> list[Callable[[], Any]]:
    x, vectors = draw(2, 64, 32, 32, dtype=dtype), tiny(4, 2, 64, 32, 32, dtype=dtype)
    _, mean, rstd = torch.native_group_norm(x, None, None, 2, 64, 32 * 32, 8, 1e-5)
    found: list[Callable[[], Any]] = []
    for point, moved in ((x, vectors), (to_channels_last(x, 1), to_channels_last(vectors, 2))):
        arguments = (moved, point, mean, rstd, None, None, 8, True)
        found.append(lambda arguments=arguments: cpu.group_norm_silu_tangent(*arguments))
        found.append(lambda arguments=arguments: cpu.group_norm_silu_adjoint(*arguments))
        small = point * torch.finfo(dtype).tiny
        found.append(lambda small=small: cpu.group_norm_silu_forward(small, None, None, 8, 0.0, True)[1:2])
    return found


def layer_norm(dtype: torch.dtype) -> list[Callable[[], Any]]:
    x, vectors = draw(2048, 64, dtype=dtype), tiny(4, 2048, 64, dtype=dtype)
    _, mean, rstd = torch.native_layer_norm(x, (64,), None, None, 1e-5)
    arguments = (vectors, x, mean, rstd, None, 1)
    return [lambda: cpu.layer_norm_tangent(*arguments), lambda: cpu.layer_norm_adjoint(*arguments)]


def geglu(dtype: torch.dtype) -> list[Callable[[], Any]]:
    projection, vectors = draw(2048, 128, dtype=dtype), tiny(4, 2048, 128, dtype=dtype)
    factors = reference.geglu_forward(projection, "none")[1]
    return [
        lambda: cpu.geglu_forward(vectors[0], "none"),
        lambda: cpu.geglu_tangent(vectors, factors),
        lambda: cpu.geglu_adjoint(vectors[..., :64].contiguous(), factors),
    ]


def sums(dtype: torch.dtype) -> list[Callable[[], Any]]:
    image = tiny(4, 2, 64, 32, 32, dtype=dtype)
    other = to_channels_last(image, 2)
    return [
        lambda: cpu.residual_add(other, image),
        lambda: cpu.upsample_nearest_adjoint(image, (2, 2)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernels", [attention, group_norm, layer_norm, geglu, sums])
def test_results_do_not_depend_on_threads_where_denormals_are_flushed(
    kernels: Callable[[torch.dtype], list[Callable[[], Any]]], dtype: torch.dtype
) -> None:
    def run(kernel: Callable[[], Any], threads: int, flush: bool) -> list[Tensor]:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flush)
        found = kernel()
        torch.set_flush_denormal(False)  # a comparison would take denormals for zeros, too
        return list(found) if isinstance(found, tuple) else [found]

    for index, kernel in enumerate(kernels(dtype)):
        kept = run(kernel, 2, False)  # the workers exist from now on, and began without flushing
        for flush in (False, True, False):
            alone = run(kernel, 1, flush)
            for _ in range(5):
                assert all(map(torch.equal, alone, run(kernel, 2, flush))), index
            assert all(map(torch.equal, alone, kept)) != flush, index
