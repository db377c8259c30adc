"""Triton kernels: nearest-neighbour upsampling by whole numbers, and its transpose."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sharpcore.kernels.tuning import run

TILE = 2048  # elements
_KEY = ("channels", "width", "out_c", "out_w")
_AXES = ("k", "b", "c", "h", "w")


@triton.jit
def upsample_nearest_tangent_kernel(
    out,
    vectors,
    batch,
    channels,
    width,
    out_k,
    out_b,
    out_c,
    out_h,
    out_w,
    vectors_k,
    vectors_b,
    vectors_c,
    vectors_h,
    vectors_w,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """A part of one row of the large image; `width` is its width."""
    blocks = tl.cdiv(width, BLOCK_W)
    h, w = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    k, b = tl.program_id(2) // batch, tl.program_id(2) % batch
    mask = (c < channels)[:, None] & (w < width)[None, :]
    k, b, h, c = k.to(tl.int64), b.to(tl.int64), h.to(tl.int64), c.to(tl.int64)[:, None]
    row = vectors + k * vectors_k + b * vectors_b + (h // DOWN) * vectors_h
    given = tl.load(row + c * vectors_c + (w // ACROSS)[None, :] * vectors_w, mask=mask)
    out += k * out_k + b * out_b + h * out_h
    tl.store(out + c * out_c + w[None, :] * out_w, given, mask=mask)


@triton.jit
def upsample_nearest_adjoint_kernel(
    out,
    vectors,
    batch,
    channels,
    width,
    out_k,
    out_b,
    out_c,
    out_h,
    out_w,
    vectors_k,
    vectors_b,
    vectors_c,
    vectors_h,
    vectors_w,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """A part of one row of the small image; `width` is its width."""
    blocks = tl.cdiv(width, BLOCK_W)
    h, w = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    k, b = tl.program_id(2) // batch, tl.program_id(2) % batch
    mask = (c < channels)[:, None] & (w < width)[None, :]
    k, b, h, c = k.to(tl.int64), b.to(tl.int64), h.to(tl.int64), c.to(tl.int64)[:, None]
    vectors += k * vectors_k + b * vectors_b + c * vectors_c
    total = tl.zeros([BLOCK_C, BLOCK_W], tl.float32)
    for p in range(DOWN):
        row = vectors + (h * DOWN + p) * vectors_h
        for q in range(ACROSS):
            total += tl.load(row + (w * ACROSS + q)[None, :] * vectors_w, mask=mask, other=0).to(tl.float32)
    out += k * out_k + b * out_b + h * out_h
    tl.store(out + c * out_c + w[None, :] * out_w, total.to(out.dtype.element_ty), mask=mask)


def upsample_nearest(out: Tensor, vectors: Tensor, factors: tuple[int, int], *, adjoint: bool) -> None:
    """Write [K, B, C, P H, Q W] from vectors [K, B, C, H, W], or, as the adjoint, the other way; any
    strides."""
    count, batch, channels, height, width = out.shape
    constants = tile(channels, width, channels_last=out.stride(2) == 1 and out.stride(4) != 1)
    arguments: dict[str, Any] = {
        "out": out,
        "vectors": vectors,
        "batch": batch,
        "channels": channels,
        "width": width,
        **{f"out_{axis}": stride for axis, stride in zip(_AXES, out.stride(), strict=True)},
        **{f"vectors_{axis}": stride for axis, stride in zip(_AXES, vectors.stride(), strict=True)},
        "DOWN": factors[0],
        "ACROSS": factors[1],
        **constants,
    }

    def grid(_: Any) -> tuple[int, int, int]:
        blocks = height * triton.cdiv(width, constants["BLOCK_W"])
        return blocks, triton.cdiv(channels, constants["BLOCK_C"]), count * batch

    kernel = upsample_nearest_adjoint_kernel if adjoint else upsample_nearest_tangent_kernel
    run(kernel, grid, arguments, CONFIGURATIONS, _KEY)


def tile(channels: int, width: int, *, channels_last: bool) -> dict[str, int]:
    """Channels and positions of a tile, wide along what lies side by side in memory."""
    block_c, block_w = triton.next_power_of_2(channels), triton.next_power_of_2(width)
    if channels_last:
        block_c = min(block_c, 256)
        return {"BLOCK_C": block_c, "BLOCK_W": min(block_w, TILE // block_c)}
    block_w = min(block_w, 256)
    return {"BLOCK_C": min(block_c, TILE // block_w), "BLOCK_W": block_w}


CONFIGURATIONS = (triton.Config({}, num_warps=4), triton.Config({}, num_warps=8))
