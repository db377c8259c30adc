"""K tangents and cotangents of attention by the Triton kernels, on a GPU.

    pytest benchmarks/bench_triton_attention.py -s

The unit is PyTorch's fused forward pass of the same attention in the same dtype; tangents and cotangents
count one by one. Everything is captured in CUDA graphs, so that launching costs nothing. The rate of useful
floating-point operations, without padding and what is computed twice, is printed beside that of a large
matrix product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sharpcore.backends import reference

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU, and there is none")
REPLAYS = 10
MATRIX = 8192  # rows and columns of the product whose rate is the yardstick
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    rows: int
    keys: int
    width: int

    @property
    def products(self) -> float:
        """Floating-point operations of one product with a matrix of scores."""
        return 2.0 * self.batch * self.heads * self.rows * self.keys * self.width


SHAPES = {
    "sd-outer": Shape(2, 8, 4096, 4096, 40),  # Stable Diffusion 1.x, 64x64 latent, guidance pair
    "sd-middle": Shape(2, 8, 1024, 1024, 80),
    "sd-inner": Shape(2, 8, 256, 256, 160),
    "sd-cross": Shape(2, 8, 4096, 77, 40),
    "sd2-outer": Shape(2, 5, 9216, 9216, 64),  # Stable Diffusion 2.x, 96x96 latent
    "xl-middle": Shape(2, 10, 4096, 4096, 64),
}


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """Replays a CUDA graph of `run` some times, and waits."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles, and finds the fastest configuration
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
        return result

    return replay


@contextlib.contextmanager
def tf32_products(wanted: bool) -> Any:
    """Lets PyTorch's own products of float32, the unit and the yardstick, use tf32 for a while."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = wanted
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@needs_gpu
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_triton_attention(table: Any, benchmark: Any, name: str, precision: str, count: int) -> None:
    from sharpcore.backends.cuda import KERNELS

    kernels = SimpleNamespace(**KERNELS)

    shape, dtype = SHAPES[name], DTYPES[precision]
    cross = shape.rows != shape.keys
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(length: int, *leading: int) -> Tensor:
        """[*leading, B, H, length, E] views of [*leading, B, length, H, E] memory, as networks have them."""
        size = (*leading, shape.batch, length, shape.heads, shape.width)
        values = torch.randn(size, generator=generator, device="cuda")
        return values.to(dtype).transpose(-2, -3)

    q, k, v = draw(shape.rows), draw(shape.keys), draw(shape.keys)
    options: dict[str, Any] = {"mask": None, "scale": shape.width**-0.5}
    fast: dict[str, Any] = {**options, "tf32": precision == "tf32"}
    primal = (q, k, v, *kernels.attention_forward(q, k, v, **fast))
    dq = draw(shape.rows, count)
    dk, dv = (None, None) if cross else (draw(shape.keys, count), draw(shape.keys, count))
    cotangent = draw(shape.rows, count)
    needed = (True, not cross, not cross)
    a = torch.randn(MATRIX, MATRIX, generator=generator, device="cuda").to(dtype)

    # One head of one batch entry in float64 is truth enough, and fits.
    part = [t[:1, :1].double() for t in (q, k, v)]
    part += reference.attention_forward(*part, **options)
    moved = (None if t is None else t[:1, :1, :1].double() for t in (dq, dk, dv))
    truth = reference.attention_tangent(*part, *moved, **options)

    def error(result: Tensor) -> float:
        return float((result[:1, :1, :1] - truth).norm() / truth.norm())

    def add(what: str, run: Callable[[], Any], operations: float, **rest: Any) -> None:
        row = table.add(what, prepare=lambda: captured(run), operations=operations, **rest)
        row.per *= REPLAYS

    # For each tangent or cotangent; the scores are shared.
    products = ((2 if cross else 4) + 1 / count) * shape.products
    with tf32_products(precision == "tf32"):
        add(
            "fused forward",
            lambda: F.scaled_dot_product_attention(q, k, v, scale=options["scale"]),
            2 * shape.products,
        )
        add("matrix product", lambda: a @ a, 2.0 * MATRIX**3)
        add("triton forward", lambda: kernels.attention_forward(q, k, v, **fast), 2 * shape.products)
        add(
            "triton tangent",
            lambda: kernels.attention_tangent(*primal, dq, dk, dv, **fast),
            products,
            per=count,
            error=error,
        )
        add(
            "triton adjoint",
            lambda: kernels.attention_adjoint(*primal, cotangent, **fast, needed=needed),
            products,
            per=count,
        )
        benchmark.pedantic(table.measure, rounds=1)
    rates = {}
    for row in table.rows:
        operations, seconds = row.labels.pop("operations"), row.record()["median_s"]
        if seconds is not None:
            rates[row.what] = row.labels["useful_tflops"] = operations / seconds / 1e12
    if "matrix product" in rates:
        for row in table.rows:
            if row.what in rates:
                row.labels["of_matrix_rate"] = rates[row.what] / rates["matrix product"]
                print(f"{row.what}: {rates[row.what]:.1f} TFLOP/s, {row.labels['of_matrix_rate']:.1%}")
    benchmark.extra_info.update({record["what"]: record["ratio"] for record in table.records()})
