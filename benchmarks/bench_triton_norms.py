"""The Triton kernels of norms, GEGLU, residual sums and upsampling on a GPU, for K tangents.

    pytest benchmarks/bench_triton_norms.py -s

The unit of a table is a copy of the same bytes, measured in the same run: what the kernel has to read and
write, half of it read, half written. A turn is a CUDA graph of 20 calls, so that launches cost what they do
in a product. Skipped where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("triton")

from sharpcore.backends import reference
from sharpcore.backends.cuda.geglu_tangent import geglu_adjoint, geglu_forward, geglu_tangent
from sharpcore.backends.cuda.group_norm_silu_forward import group_norm_silu_forward
from sharpcore.backends.cuda.group_norm_silu_tangent import group_norm_silu_adjoint, group_norm_silu_tangent
from sharpcore.backends.cuda.layer_norm_tangent import layer_norm_adjoint, layer_norm_tangent
from sharpcore.backends.cuda.residual_add import residual_add
from sharpcore.backends.cuda.upsample_nearest_tangent import (
    upsample_nearest_adjoint,
    upsample_nearest_tangent,
)

DEVICE = torch.device("cuda")
CALLS = 20
GROUPS = 32

each_count = pytest.mark.parametrize("count", [1, 8])
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
each_layout = pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
each_layer = pytest.mark.parametrize(
    ("channels", "side"),
    [
        pytest.param(320, 64, id="sd-outer"),  # layers of Stable Diffusion 1.x
        pytest.param(960, 64, id="sd-outer-up"),
        pytest.param(1280, 16, id="sd-inner"),
    ],
)


def draw(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
    """[K, B, C, ...], channels-last if asked for."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    made = torch.randn(shape, generator=generator, device=DEVICE).to(dtype)
    return made.movedim(2, -1).contiguous().movedim(-1, 2) if last else made


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """Many calls on the device as one; the first one, which tunes, is not among them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        result = run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(CALLS):
            run()

    def replay() -> Any:
        graph.replay()
        torch.cuda.synchronize()
        return result

    return replay


def compare(
    table: Any, benchmark: Any, size: int, runs: dict[str, tuple[Callable[[], Any], Tensor | None]]
) -> None:
    """Candidates with what their result should be, against a copy that moves `size` bytes."""
    source = torch.empty(size // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    table.add("copy of the same bytes", prepare=lambda: graphed(lambda: target.copy_(source)), per=CALLS)
    for what, (run, exact) in runs.items():

        def error(result: Tensor, exact: Tensor | None = exact) -> float:
            assert exact is not None
            return float((result.double() - exact).norm() / exact.norm())

        table.add(
            what,
            prepare=lambda run=run: graphed(run),
            per=CALLS,
            error=None if exact is None else error,
        )
    benchmark.pedantic(table.measure, rounds=1)
    benchmark.extra_info.update({record["what"]: record["ratio"] for record in table.records()})


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@each_layer
@each_count
@each_dtype
@each_layout
def test_triton_group_norm_silu(
    table: Any, benchmark: Any, channels: int, side: int, count: int, dtype: torch.dtype, last: bool
) -> None:
    tangents = draw(count, 2, channels, side, side, dtype=dtype, last=last)
    x = draw(1, 2, channels, side, side, dtype=dtype, last=last)[0]
    weight, bias = draw(2, channels, dtype=dtype)
    _, mean, rstd = group_norm_silu_forward(x, weight, bias, GROUPS, 1e-5, True)
    out = torch.empty_like(tangents)
    arguments = (tangents, x, mean, rstd, weight, bias)
    double = [t.double() for t in arguments]
    runs: dict[str, tuple[Callable[[], Any], Tensor | None]] = {
        "tangent": (
            lambda: group_norm_silu_tangent(*arguments, GROUPS, True, out=out),
            reference.group_norm_silu_tangent(*double, GROUPS, True),
        ),
        "adjoint": (
            lambda: group_norm_silu_adjoint(*arguments, GROUPS, True, out=out),
            reference.group_norm_silu_adjoint(*double, GROUPS, True),
        ),
        "reference": (lambda: reference.group_norm_silu_tangent(*arguments, GROUPS, True), None),
    }
    compare(table, benchmark, nbytes(tangents, x, out), runs)


@each_layer
@each_dtype
@each_layout
def test_triton_group_norm_silu_forward(
    table: Any, benchmark: Any, channels: int, side: int, dtype: torch.dtype, last: bool
) -> None:
    x = draw(1, 2, channels, side, side, dtype=dtype, last=last)[0]
    weight, bias = draw(2, channels, dtype=dtype)
    out = torch.empty_like(x)
    doubles = (x.double(), weight.double(), bias.double())
    exact = reference.group_norm_silu_forward(*doubles, GROUPS, 1e-5, True)[0]
    runs: dict[str, tuple[Callable[[], Any], Tensor | None]] = {
        "kernel": (lambda: group_norm_silu_forward(x, weight, bias, GROUPS, 1e-5, True, out=out)[0], exact),
        "PyTorch": (lambda: F.silu(F.group_norm(x, GROUPS, weight, bias, 1e-5)), exact),
    }
    compare(table, benchmark, nbytes(x, out), runs)


@each_count
@each_dtype
@pytest.mark.parametrize(
    ("tokens", "channels"), [pytest.param(4096, 320, id="sd-outer"), pytest.param(256, 1280, id="sd-inner")]
)
def test_triton_layer_norm(
    table: Any, benchmark: Any, tokens: int, channels: int, count: int, dtype: torch.dtype
) -> None:
    tangents = draw(count, 2, tokens, channels, dtype=dtype)
    x, weight = tangents[0].clone(), draw(channels, dtype=dtype)
    _, mean, rstd = torch.native_layer_norm(x.float(), (channels,), None, None, 1e-5)
    out = torch.empty_like(tangents)
    arguments = (tangents, x, mean, rstd, weight)
    double = [t.double() for t in arguments]
    turned = tangents.mT.contiguous().mT
    runs: dict[str, tuple[Callable[[], Any], Tensor | None]] = {
        "tangent": (
            lambda: layer_norm_tangent(*arguments, 1, out=out),
            reference.layer_norm_tangent(*double, 1),
        ),
        "adjoint": (
            lambda: layer_norm_adjoint(*arguments, 1, out=out),
            reference.layer_norm_adjoint(*double, 1),
        ),
        "tangent of an image": (lambda: layer_norm_tangent(turned, *arguments[1:], 1, out=out), None),
        "reference": (lambda: reference.layer_norm_tangent(*arguments, 1), None),
    }
    compare(table, benchmark, nbytes(tangents, x, out), runs)


@each_count
@each_dtype
def test_triton_geglu(table: Any, benchmark: Any, count: int, dtype: torch.dtype) -> None:
    tokens, columns = 2 * 4096, 1280
    projection = draw(tokens, 2 * columns, dtype=dtype)
    factors = geglu_forward(projection, "none")[1]
    tangents, cotangents = (draw(count, tokens, n * columns, dtype=dtype) for n in (2, 1))
    wide, narrow = torch.empty_like(tangents), torch.empty_like(cotangents)
    runs: dict[str, tuple[Callable[[], Any], Tensor | None]] = {
        "tangent": (
            lambda: geglu_tangent(tangents, factors, out=narrow),
            reference.geglu_tangent(tangents.double(), factors.double()),
        ),
        "adjoint": (
            lambda: geglu_adjoint(cotangents, factors, out=wide),
            reference.geglu_adjoint(cotangents.double(), factors.double()),
        ),
        "reference": (lambda: reference.geglu_tangent(tangents, factors), None),
    }
    compare(table, benchmark, nbytes(tangents, factors, narrow), runs)


@each_dtype
def test_triton_geglu_forward(table: Any, benchmark: Any, dtype: torch.dtype) -> None:
    projection = draw(2 * 4096, 2560, dtype=dtype)
    value, factors = geglu_forward(projection, "none")
    exact = reference.geglu_forward(projection.double(), "none")[0]
    runs: dict[str, tuple[Callable[[], Any], Tensor | None]] = {
        "kernel": (lambda: geglu_forward(projection, "none", out=(value, factors))[0], exact),
        "reference": (lambda: reference.geglu_forward(projection, "none")[0], exact),
    }
    compare(table, benchmark, nbytes(projection, factors, value), runs)


@each_layer
@each_count
@each_dtype
def test_triton_residual_add(
    table: Any, benchmark: Any, channels: int, side: int, count: int, dtype: torch.dtype
) -> None:
    residual = draw(count, 2, channels, side, side, dtype=dtype)
    tokens = draw(count, 2, channels, side, side, dtype=dtype, last=True)
    first, last = torch.empty_like(residual), torch.empty_like(tokens)
    runs: dict[str, tuple[Callable[[], Any], Tensor | None]] = {
        "alike: torch.add": (lambda: residual_add(residual, residual, out=first), None),
        "into channels-last": (lambda: residual_add(tokens, residual, out=last), None),
        "into channels-last: torch.add": (lambda: torch.add(tokens, residual, out=last), None),
        "into channels-first": (lambda: residual_add(tokens, residual, out=first), None),
        "into channels-first: torch.add": (lambda: torch.add(tokens, residual, out=first), None),
    }
    compare(table, benchmark, nbytes(residual, tokens, first), runs)


@each_count
@each_dtype
@each_layout
def test_triton_upsample_nearest(
    table: Any, benchmark: Any, count: int, dtype: torch.dtype, last: bool
) -> None:
    small = draw(count, 2, 640, 32, 32, dtype=dtype, last=last)
    large = draw(count, 2, 640, 64, 64, dtype=dtype, last=last)
    to_small, to_large = torch.empty_like(small), torch.empty_like(large)
    runs: dict[str, tuple[Callable[[], Any], Tensor | None]] = {
        "tangent": (lambda: upsample_nearest_tangent(small, (2, 2), out=to_large), None),
        "tangent, PyTorch": (lambda: F.interpolate(small.flatten(0, 1), scale_factor=2.0), None),
        "adjoint": (lambda: upsample_nearest_adjoint(large, (2, 2), out=to_small), None),
    }
    compare(table, benchmark, nbytes(small, large), runs)
