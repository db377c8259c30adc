"""Triton kernels: GEGLU with its derivatives, and K tangents or cotangents through them."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sharpcore.kernels.tuning import run

TILE = 2048  # elements of one half


@triton.jit
def geglu_forward_kernel(
    value,
    factors,
    projection,
    rows,
    columns,
    value_r,
    value_c,
    factors_r,
    factors_c,
    projection_r,
    projection_c,
    TANH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The factors may lie where the projection does: each program writes only what it has read."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    row, column = row.to(tl.int64)[:, None], column[None, :]
    given = projection + row * projection_r + column * projection_c
    hidden = tl.load(given, mask=mask, other=0).to(tl.float32)
    gate = tl.load(given + columns * projection_c, mask=mask, other=0).to(tl.float32)
    if TANH:
        # gelu(g) = g / (1 + exp(-u)), u = 2 sqrt(2 / pi) (g + 0.044715 g^3)
        below = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        density = below * (1 - below) * 1.5957691216057308 * (1 + 0.134145 * gate * gate)
        # Far out, where g^3 is infinite.
        density = tl.where(below * (1 - below) == 0, 0.0, density)
    else:
        below = 0.5 * (1 + tl.math.erf(gate * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    activated = gate * below
    slope = hidden * (below + gate * density)
    tl.store(
        value + row * value_r + column * value_c, (hidden * activated).to(value.dtype.element_ty), mask=mask
    )
    to = factors + row * factors_r + column * factors_c
    tl.store(to, activated.to(factors.dtype.element_ty), mask=mask)
    tl.store(to + columns * factors_c, slope.to(factors.dtype.element_ty), mask=mask)


@triton.jit
def geglu_apply_kernel(
    out,
    vectors,
    factors,
    count,
    rows,
    columns,
    out_k,
    out_r,
    out_c,
    vectors_k,
    vectors_r,
    vectors_c,
    factors_r,
    factors_c,
    ADJOINT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TANGENTS: tl.constexpr,
):
    """One tile of some vectors; the factors stay in registers."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(2) * TANGENTS
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    row, column = row.to(tl.int64)[:, None], column[None, :]
    factors += row * factors_r + column * factors_c
    by_hidden = tl.load(factors, mask=mask, other=0).to(tl.float32)
    by_gate = tl.load(factors + columns * factors_c, mask=mask, other=0).to(tl.float32)
    vectors += row * vectors_r + column * vectors_c
    out += row * out_r + column * out_c
    for k in range(first, tl.minimum(first + TANGENTS, count)):
        far = tl.cast(k, tl.int64)
        given = tl.load(vectors + far * vectors_k, mask=mask, other=0).to(tl.float32)
        if ADJOINT:
            to_hidden, to_gate = given * by_hidden, given * by_gate
            tl.store(out + far * out_k, to_hidden.to(out.dtype.element_ty), mask=mask)
            tl.store(out + far * out_k + columns * out_c, to_gate.to(out.dtype.element_ty), mask=mask)
        else:
            gate = tl.load(vectors + far * vectors_k + columns * vectors_c, mask=mask, other=0).to(tl.float32)
            result = given * by_hidden + gate * by_gate
            tl.store(out + far * out_k, result.to(out.dtype.element_ty), mask=mask)


def geglu_forward(value: Tensor, factors: Tensor, projection: Tensor, *, tanh: bool) -> None:
    """Write value [R, C] and factors [R, 2 C] from the projection [R, 2 C], any strides."""
    rows, columns = value.shape
    constants = tile(rows, columns)
    arguments: dict[str, Any] = {
        "value": value,
        "factors": factors,
        "projection": projection,
        "rows": rows,
        "columns": columns,
        **dict(zip(("value_r", "value_c"), value.stride(), strict=True)),
        **dict(zip(("factors_r", "factors_c"), factors.stride(), strict=True)),
        **dict(zip(("projection_r", "projection_c"), projection.stride(), strict=True)),
        "TANH": tanh,
        **constants,
    }

    def grid(_: Any) -> tuple[int, int]:
        return triton.cdiv(rows, constants["BLOCK_R"]), triton.cdiv(columns, constants["BLOCK_C"])

    run(geglu_forward_kernel, grid, arguments, FORWARD_CONFIGURATIONS)


def geglu_apply(out: Tensor, vectors: Tensor, factors: Tensor, *, adjoint: bool) -> None:
    """Write [K, R, C] from vectors [K, R, 2 C], or, as the adjoint, the other way; factors [R, 2 C]; any
    strides."""
    count, rows, _ = vectors.shape
    columns = factors.shape[1] // 2
    constants = tile(rows, columns)
    arguments: dict[str, Any] = {
        "out": out,
        "vectors": vectors,
        "factors": factors,
        "count": count,
        "rows": rows,
        "columns": columns,
        **dict(zip(("out_k", "out_r", "out_c"), out.stride(), strict=True)),
        **dict(zip(("vectors_k", "vectors_r", "vectors_c"), vectors.stride(), strict=True)),
        **dict(zip(("factors_r", "factors_c"), factors.stride(), strict=True)),
        "ADJOINT": adjoint,
        **constants,
    }

    def grid(chosen: Any) -> tuple[int, int, int]:
        return (
            triton.cdiv(rows, constants["BLOCK_R"]),
            triton.cdiv(columns, constants["BLOCK_C"]),
            triton.cdiv(count, chosen["TANGENTS"]),
        )

    run(geglu_apply_kernel, grid, arguments, CONFIGURATIONS, ("rows", "columns", "ADJOINT"))


def tile(rows: int, columns: int) -> dict[str, int]:
    """Rows and columns of a tile: wide, with few idle lanes."""
    powers = [2**n for n in range(5, 11) if 2**n < 2 * columns] or [triton.next_power_of_2(columns)]
    block_c = min(powers, key=lambda power: (triton.cdiv(columns, power) * power, -power))
    return {"BLOCK_C": block_c, "BLOCK_R": min(TILE // block_c, triton.next_power_of_2(rows))}


CONFIGURATIONS = (
    triton.Config({"TANGENTS": 4}, num_warps=4),
    triton.Config({"TANGENTS": 1}, num_warps=4),
    triton.Config({"TANGENTS": 4}, num_warps=8),
)
# One: measuring would read what an earlier run has overwritten, as the factors may replace the projection.
FORWARD_CONFIGURATIONS = (triton.Config({}, num_warps=4),)
