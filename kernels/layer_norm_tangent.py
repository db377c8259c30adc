"""Triton kernels: K tangents or cotangents through LayerNorm."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sharpcore.kernels.tuning import run

TILE = 4096  # elements
HELD = 8192  # elements of a row that a program holds in registers
_KEY = ("rows", "size", "vectors_r", "vectors_n", "ADJOINT")


@triton.jit
def _xhat_and_gain(x, mask, mean, rstd, weight, columns, exists):
    xhat = (tl.load(x, mask=mask, other=0).to(tl.float32) - mean) * rstd
    gain = tl.full([1, 1], 1.0, tl.float32)
    if weight is not None:
        gain = tl.load(weight + columns, mask=exists, other=0).to(tl.float32)[None, :]
    return xhat, gain


@triton.jit
def _term(given, gain, ADJOINT: tl.constexpr):
    """What is projected."""
    term = given.to(tl.float32)
    if ADJOINT:
        term = term * gain
    return term


@triton.jit
def _project(given, xhat, gain, rstd, mean, slope, ADJOINT: tl.constexpr):
    """The result, from the row's mean of the terms and of xhat times them."""
    result = (_term(given, gain, ADJOINT) - mean - xhat * slope) * rstd
    if not ADJOINT:
        result = result * gain
    return result


@triton.jit
def layer_norm_kernel(
    out,
    vectors,
    x,
    mean,
    rstd,
    weight,
    count,
    batch,
    rows,
    size,
    out_k,
    out_b,
    out_r,
    out_n,
    vectors_k,
    vectors_b,
    vectors_r,
    vectors_n,
    x_b,
    x_r,
    x_n,
    weight_b,
    ADJOINT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HELD: tl.constexpr,
    TANGENTS: tl.constexpr,
):
    """Some rows of some vectors; HELD: a row is one tile, and x stays in registers for all vectors."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    first, b = tl.program_id(1) * TANGENTS, tl.program_id(2)
    lane = tl.arange(0, BLOCK_N)
    there = (row < rows)[:, None]
    mean_r = tl.load(mean + b * rows + row, mask=row < rows, other=0).to(tl.float32)[:, None]
    rstd_r = tl.load(rstd + b * rows + row, mask=row < rows, other=0).to(tl.float32)[:, None]
    wide, batch_wide = row.to(tl.int64)[:, None], b.to(tl.int64)
    out += batch_wide * out_b + wide * out_r + lane[None, :] * out_n
    vectors += batch_wide * vectors_b + wide * vectors_r + lane[None, :] * vectors_n
    x += batch_wide * x_b + wide * x_r + lane[None, :] * x_n
    if weight is not None:
        weight += b * weight_b
    last = tl.minimum(first + TANGENTS, count)
    if HELD:
        mask = there & (lane < size)[None, :]
        xhat, gain = _xhat_and_gain(x, mask, mean_r, rstd_r, weight, lane, lane < size)
        for k in range(first, last):
            far = tl.cast(k, tl.int64)
            given = tl.load(vectors + far * vectors_k, mask=mask, other=0)
            term = _term(given, gain, ADJOINT)
            average = (tl.sum(term, 1) / size)[:, None]
            slope = (tl.sum(xhat * term, 1) / size)[:, None]
            result = _project(given, xhat, gain, rstd_r, average, slope, ADJOINT)
            tl.store(out + far * out_k, result.to(out.dtype.element_ty), mask=mask)
    else:
        for k in range(first, last):
            far = tl.cast(k, tl.int64)
            terms = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
            slopes = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
            for begin in range(0, size, BLOCK_N):
                exists = begin + lane < size
                mask = there & exists[None, :]
                at = tl.cast(begin, tl.int64)
                xhat, gain = _xhat_and_gain(x + at * x_n, mask, mean_r, rstd_r, weight, begin + lane, exists)
                given = tl.load(vectors + far * vectors_k + at * vectors_n, mask=mask, other=0)
                term = _term(given, gain, ADJOINT)
                terms += term
                slopes += xhat * term
            average = (tl.sum(terms, 1) / size)[:, None]
            slope = (tl.sum(slopes, 1) / size)[:, None]
            for begin in range(0, size, BLOCK_N):
                exists = begin + lane < size
                mask = there & exists[None, :]
                at = tl.cast(begin, tl.int64)
                xhat, gain = _xhat_and_gain(x + at * x_n, mask, mean_r, rstd_r, weight, begin + lane, exists)
                given = tl.load(vectors + far * vectors_k + at * vectors_n, mask=mask, other=0)
                result = _project(given, xhat, gain, rstd_r, average, slope, ADJOINT)
                at_out = out + far * out_k + at * out_n
                tl.store(at_out, result.to(out.dtype.element_ty), mask=mask)


def layer_norm(
    out: Tensor,
    vectors: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    *,
    adjoint: bool,
) -> None:
    """Write [K, B, R, N] from vectors of that shape and x [B, R, N], any strides; mean and rstd [B, R],
    contiguous; weight [N] or [B, N], its last axis contiguous."""
    count, batch, rows, size = vectors.shape
    constants = tile_of_rows(rows, size, columns=vectors.stride(3) != 1 and vectors.stride(2) == 1)
    arguments: dict[str, Any] = {
        "out": out,
        "vectors": vectors,
        "x": x,
        "mean": mean,
        "rstd": rstd,
        "weight": weight,
        "count": count,
        "batch": batch,
        "rows": rows,
        "size": size,
        **dict(zip(("out_k", "out_b", "out_r", "out_n"), out.stride(), strict=True)),
        **dict(zip(("vectors_k", "vectors_b", "vectors_r", "vectors_n"), vectors.stride(), strict=True)),
        **dict(zip(("x_b", "x_r", "x_n"), x.stride(), strict=True)),
        "weight_b": 0 if weight is None or weight.ndim == 1 else weight.stride(0),
        "ADJOINT": adjoint,
        **constants,
    }

    def grid(chosen: Any) -> tuple[int, int, int]:
        return triton.cdiv(rows, constants["BLOCK_R"]), triton.cdiv(count, chosen["TANGENTS"]), batch

    # Long rows need more registers than a thread of four warps has.
    configurations = (
        CONFIGURATIONS if constants["BLOCK_R"] * constants["BLOCK_N"] <= TILE else CONFIGURATIONS[:-1]
    )
    run(layer_norm_kernel, grid, arguments, configurations, _KEY)


def tile_of_rows(rows: int, size: int, *, columns: bool) -> dict[str, Any]:
    """The kernel's constants for rows of a size; `columns`: an element of two rows lies side by side."""
    if columns and size > 64:
        return {"BLOCK_R": min(64, triton.next_power_of_2(rows)), "BLOCK_N": 64, "HELD": False}
    if size > HELD:
        return {"BLOCK_R": 1, "BLOCK_N": TILE, "HELD": False}
    block_n = triton.next_power_of_2(size)
    block_r = min(max(1, TILE // block_n), triton.next_power_of_2(rows))
    return {"BLOCK_R": block_r, "BLOCK_N": block_n, "HELD": True}


CONFIGURATIONS = (
    triton.Config({"TANGENTS": 4}, num_warps=8),
    triton.Config({"TANGENTS": 1}, num_warps=8),
    triton.Config({"TANGENTS": 1}, num_warps=16),
    triton.Config({"TANGENTS": 4}, num_warps=4),
)
