"""K tangents and cotangents of attention: kernel, reference, torch.func.jvp and PyTorch's fused forward.

    pytest benchmarks/bench_attention_tangent.py -s

The unit is PyTorch's fused forward pass of the same attention in float32, for bfloat16 too; tangents and
cotangents count one by one. On that unit a tangent is to cost at most 2.4 with one, at most 2.0 with eight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpcore.backends import cpu, reference

aten = torch.ops.aten


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    rows: int
    keys: int
    width: int

    @property
    def scores(self) -> int:
        return self.batch * self.heads * self.rows * self.keys


SHAPES = {
    "mid-outer": Shape(2, 8, 1024, 1024, 8),  # the configuration "mid"
    "mid-cross": Shape(2, 8, 1024, 77, 8),
    "mid-middle": Shape(2, 8, 256, 256, 16),
    "mid-inner": Shape(2, 8, 64, 64, 32),
    "sd-outer": Shape(1, 8, 4096, 4096, 40),  # Stable Diffusion 1.x, 64x64 latent
    "sd-middle": Shape(2, 8, 1024, 1024, 80),
    "sd-inner": Shape(2, 8, 256, 256, 160),
    "sd-cross": Shape(1, 8, 4096, 77, 40),
}
# torch.func.jvp through mathematical attention holds several [rows, keys] matrices.
MATH_SCORES = 1 << 26


def halved(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.bfloat16() for t in tensors]


@pytest.mark.kernel
@pytest.mark.skipif(cpu.extension() is None, reason="sharpcore._C is not built")
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_attention_tangent(table: Any, benchmark: Any, name: str, count: int) -> None:
    shape = SHAPES[name]
    cross = shape.rows != shape.keys
    generator = torch.Generator().manual_seed(0)

    def draw(length: int, *leading: int) -> Tensor:
        """[*leading, B, H, length, E] views of [*leading, B, length, H, E] memory, as networks have them."""
        size = (*leading, shape.batch, length, shape.heads, shape.width)
        return torch.randn(size, generator=generator).transpose(-2, -3)

    q, k, v = draw(shape.rows), draw(shape.keys), draw(shape.keys)
    scale = shape.width**-0.5
    out, lse = reference.attention_forward(q, k, v, mask=None, scale=scale)
    dq = draw(shape.rows, count)
    dk, dv = (None, None) if cross else (draw(shape.keys, count), draw(shape.keys, count))
    cotangent = draw(shape.rows, count)
    needed = (True, not cross, not cross)
    primal, tangents = (q, k, v, out, lse), (dq, dk, dv)

    def exact() -> Tensor:
        double = [t.double() for t in (q, k, v)]
        double += reference.attention_forward(*double, mask=None, scale=scale)
        moved = (None if t is None else t[:1].double() for t in tangents)
        return reference.attention_tangent(*double, *moved, mask=None, scale=scale)

    truth = exact()

    def error(result: Tensor) -> float:
        return float((result[:1] - truth).norm() / truth.norm())

    def jvp() -> Tensor:
        given = [(t, d) for t, d in zip((q, k, v), tangents, strict=True) if d is not None]
        operands = tuple(t for t, _ in given)

        def attention(*moving: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*moving, *(q, k, v)[len(moving) :])

        # The fused kernel has no forward-mode derivative.
        with sdpa_kernel(SDPBackend.MATH):
            return torch.stack(
                [torch.func.jvp(attention, operands, tuple(d[i] for _, d in given))[1] for i in range(count)]
            )

    def forward() -> Tensor:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)[0]

    def half_forward() -> Tensor:
        return aten._scaled_dot_product_flash_attention_for_cpu(*half_qkv, 0.0, False, scale=scale)[0]

    def half_tangent() -> Tensor:
        return cpu.KERNELS["attention_tangent"](*half_primal, *half_tangents, mask=None, scale=scale)

    def half_adjoint() -> Any:
        return cpu.KERNELS["attention_adjoint"](
            *half_primal, half_cotangent, mask=None, scale=scale, needed=needed
        )

    def run(backend: Any) -> tuple[Any, Any]:
        return (
            lambda: backend.KERNELS["attention_tangent"](*primal, *tangents, mask=None, scale=scale),
            lambda: backend.KERNELS["attention_adjoint"](
                *primal, cotangent, mask=None, scale=scale, needed=needed
            ),
        )

    half_qkv, half_tangents = halved(q, k, v), halved(*tangents)
    forward_kernel = cpu.KERNELS["attention_forward"]
    half_primal = (*half_qkv, *forward_kernel(*half_qkv, mask=None, scale=scale))
    half_cotangent = cotangent.bfloat16()
    tangent, adjoint = run(cpu)
    plain_tangent, plain_adjoint = run(reference)
    table.add("fused forward", forward)
    table.add("fused forward, bfloat16", half_forward)
    table.add("cpu kernel, forward", lambda: forward_kernel(q, k, v, mask=None, scale=scale))
    table.add("cpu kernel, forward, bfloat16", lambda: forward_kernel(*half_qkv, mask=None, scale=scale))
    table.add("cpu kernel", tangent, per=count, error=error)
    table.add("cpu kernel, bfloat16", half_tangent, per=count, error=error)
    table.add("cpu kernel, adjoint", adjoint, per=count)
    table.add("cpu kernel, adjoint, bfloat16", half_adjoint, per=count)
    slow = 1 if shape.scores * count > MATH_SCORES else None
    table.add("reference", plain_tangent, per=count, error=error, turns=slow)
    table.add("reference, adjoint", plain_adjoint, per=count, turns=slow)
    if shape.scores <= MATH_SCORES:
        table.add("torch.func.jvp, math attention", jvp, per=count, error=error, turns=slow)
    benchmark.pedantic(table.measure, rounds=1)
    benchmark.extra_info.update({record["what"]: record["ratio"] for record in table.records()})
