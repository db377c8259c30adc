"""Triton kernel: the sum of two tensors that lie differently in memory."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sharpcore.kernels.tuning import run

TILE = 4096  # elements
AXES = 4


@triton.jit
def residual_add_kernel(
    out,
    first,
    second,
    scale,
    rows,
    columns,
    inner,
    out_o,
    out_i,
    out_r,
    out_c,
    first_o,
    first_i,
    first_r,
    first_c,
    second_o,
    second_i,
    second_r,
    second_c,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tile of [outer, inner, rows, columns]; `out` may be an operand, as a program writes only what it
    has read."""
    o, i = tl.program_id(0) // inner, tl.program_id(0) % inner
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    row, column = row.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
    o, i = o.to(tl.int64), i.to(tl.int64)
    first += o * first_o + i * first_i + row * first_r + column * first_c
    second += o * second_o + i * second_i + row * second_r + column * second_c
    added = tl.load(second, mask=mask, other=0).to(tl.float32)
    result = tl.load(first, mask=mask, other=0).to(tl.float32) + scale * added
    out += o * out_o + i * out_i + row * out_r + column * out_c
    tl.store(out, result.to(out.dtype.element_ty), mask=mask)


def residual_add(out: Tensor, first: Tensor, second: Tensor, scale: float) -> None:
    """Write first + scale * second, whose axes `walk` has made four."""
    outer, inner, rows, columns = out.shape
    block_c = min(64, triton.next_power_of_2(columns))
    block_r = min(TILE // block_c, triton.next_power_of_2(rows))
    arguments: dict[str, Any] = {
        "out": out,
        "first": first,
        "second": second,
        "scale": float(scale),
        "rows": rows,
        "columns": columns,
        "inner": inner,
        **dict(zip(("out_o", "out_i", "out_r", "out_c"), out.stride(), strict=True)),
        **dict(zip(("first_o", "first_i", "first_r", "first_c"), first.stride(), strict=True)),
        **dict(zip(("second_o", "second_i", "second_r", "second_c"), second.stride(), strict=True)),
        "BLOCK_R": block_r,
        "BLOCK_C": block_c,
    }

    def grid(_: Any) -> tuple[int, int, int]:
        return outer * inner, triton.cdiv(rows, block_r), triton.cdiv(columns, block_c)

    run(residual_add_kernel, grid, arguments, CONFIGURATIONS)


def walk(tensors: list[Tensor]) -> list[Tensor] | None:
    """The same elements with four axes: axes that all tensors walk as one are one, the one along which the
    first tensor is dense is the last, and the one before it that along which another is. None where more axes
    are left."""
    shape = tensors[0].shape
    strides = [tensor.stride() for tensor in tensors]
    order = sorted((a for a in range(len(shape)) if shape[a] != 1), key=lambda a: strides[0][a], reverse=True)
    axes: list[tuple[int, list[int]]] = []
    for axis in order:
        steps = [stride[axis] for stride in strides]
        if axes and axes[-1][1] == [step * shape[axis] for step in steps]:
            axes[-1] = (axes[-1][0] * shape[axis], steps)
        else:
            axes.append((shape[axis], steps))
    if len(axes) > AXES:
        return None
    columns = axes.pop() if axes else (1, [1] * len(tensors))
    other = [a for n in range(1, len(tensors)) for a in range(len(axes)) if axes[a][1][n] == 1]
    rows = axes.pop(other[0] if other else -1) if axes else (1, [0] * len(tensors))
    axes += [rows, columns]
    axes = [(1, [0] * len(tensors))] * (AXES - len(axes)) + axes
    sizes = [size for size, _ in axes]
    return [tensor.as_strided(sizes, [steps[n] for _, steps in axes]) for n, tensor in enumerate(tensors)]


# One: measuring would add more than once where the result replaces an operand.
CONFIGURATIONS = (triton.Config({}, num_warps=8),)
