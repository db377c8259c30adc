"""Triton kernels: GroupNorm, optionally followed by SiLU, with its statistics."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sharpcore.kernels.group_norm_silu_tangent import (
    CACHED,
    WHOLE,
    cut,
    far,
    is_channels_last,
    offsets,
    over_groups,
    parts_at_once,
    per_channel,
    per_sample,
    sample_stride,
    tile,
    to_channels,
)
from sharpcore.kernels.tuning import run

_KEY = ("channels", "positions", "groups", "x_c", "x_p", "SILU")


@triton.jit
def _activate(values, mean, rstd, weight, bias, index, exists, SILU: tl.constexpr):
    y = (values.to(tl.float32) - mean) * rstd
    y = y * per_channel(weight, index, exists, 1.0) + per_channel(bias, index, exists, 0.0)
    if SILU:
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def _store_statistics(
    mean,
    rstd,
    means,
    rstds,
    b,
    block,
    groups,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
):
    member = tl.arange(0, PADDED_GROUPS)
    written = (member < GROUPS) & (block * GROUPS + member < groups)
    place = b * groups + block * GROUPS + member
    tl.store(mean + place, means, mask=written)
    tl.store(rstd + place, rstds, mask=written)


@triton.jit
def group_norm_silu_forward_whole_kernel(
    out,
    mean,
    rstd,
    x,
    weight,
    bias,
    eps,
    channels,
    positions,
    groups,
    out_b,
    out_c,
    out_p,
    x_b,
    x_c,
    x_p,
    weight_b,
    bias_b,
    SILU: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNEL_STEPS: tl.constexpr,
    POSITION_STEPS: tl.constexpr,
):
    """All positions of some groups. Each lane keeps mean and squares of what it saw (Welford, 1962); together
    they give the group's (Chan, Golub and LeVeque, 1983)."""
    block, b = tl.program_id(0), tl.program_id(1)
    start = block * GROUPS * PER_GROUP
    lane = tl.arange(0, BLOCK_C)
    out += far(b, out_b) + far(start, out_c)
    x += far(b, x_b) + far(start, x_c)
    to_out, to_x = offsets(out_c, out_p, BLOCK_C, BLOCK_P), offsets(x_c, x_p, BLOCK_C, BLOCK_P)
    if weight is not None:
        weight += b * weight_b + start
    if bias is not None:
        bias += b * bias_b + start

    seen = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    average = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    squares = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for step in range(CHANNEL_STEPS * POSITION_STEPS):
        c, p, exists, mask = tile(
            step, start, channels, positions, GROUPS * PER_GROUP, BLOCK_C, BLOCK_P, POSITION_STEPS
        )
        values = tl.load(x + far(c, x_c) + far(p, x_p) + to_x, mask=mask, other=0).to(tl.float32)
        seen += tl.where(mask, 1.0, 0.0)
        change = tl.where(mask, values - average, 0.0)
        average += change / tl.maximum(seen, 1.0)
        squares += change * (values - average)

    size = PER_GROUP * positions
    means = over_groups(tl.sum(seen * average, 1), PER_GROUP, PADDED_GROUPS) / size
    away = average - to_channels(means, PER_GROUP, BLOCK_C)
    # Zero, but for rounding (the corrected algorithm of the same authors).
    drift = over_groups(tl.sum(seen * away, 1), PER_GROUP, PADDED_GROUPS) / size
    squares += seen * away * away
    variance = over_groups(tl.sum(squares, 1), PER_GROUP, PADDED_GROUPS) / size - drift * drift
    means += drift
    rstds = tl.rsqrt(variance + eps)
    mean_c, rstd_c = to_channels(means, PER_GROUP, BLOCK_C), to_channels(rstds, PER_GROUP, BLOCK_C)
    _store_statistics(mean, rstd, means, rstds, b, block, groups, GROUPS, PADDED_GROUPS)
    for step in range(CHANNEL_STEPS * POSITION_STEPS):
        c, p, exists, mask = tile(
            step, start, channels, positions, GROUPS * PER_GROUP, BLOCK_C, BLOCK_P, POSITION_STEPS
        )
        values = tl.load(x + far(c, x_c) + far(p, x_p) + to_x, mask=mask, other=0)
        y = _activate(values, mean_c, rstd_c, weight, bias, c + lane, exists, SILU)
        tl.store(out + far(c, out_c) + far(p, out_p) + to_out, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def group_norm_silu_statistics_kernel(
    partials,
    x,
    batch,
    channels,
    positions,
    groups,
    x_b,
    x_c,
    x_p,
    PER_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNEL_STEPS: tl.constexpr,
    POSITION_STEPS: tl.constexpr,
):
    """Of one tile mean and squared deviations of each group's part: two planes [B, groups, tiles]."""
    step, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = block * GROUPS * PER_GROUP
    c, p, _, mask = tile(
        step, start, channels, positions, GROUPS * PER_GROUP, BLOCK_C, BLOCK_P, POSITION_STEPS
    )
    at_x = x + far(b, x_b) + far(start + c, x_c) + far(p, x_p) + offsets(x_c, x_p, BLOCK_C, BLOCK_P)
    values = tl.load(at_x, mask=mask, other=0).to(tl.float32)
    size = tl.minimum(PER_GROUP - c, BLOCK_C) * tl.minimum(positions - p, BLOCK_P)
    means = over_groups(tl.sum(values, 1), PER_GROUP, PADDED_GROUPS) / size
    deviation = tl.where(mask, values - to_channels(means, PER_GROUP, BLOCK_C), 0.0)
    squares = over_groups(tl.sum(deviation * deviation, 1), PER_GROUP, PADDED_GROUPS)
    member = tl.arange(0, PADDED_GROUPS)
    written = (member < GROUPS) & (block * GROUPS + member < groups)
    parts = CHANNEL_STEPS * POSITION_STEPS
    place = partials + (b * groups + block * GROUPS + member) * parts + step
    tl.store(place, means, mask=written)
    tl.store(place + batch * groups * parts, squares, mask=written)


@triton.jit
def group_norm_silu_forward_apply_kernel(
    out,
    mean,
    rstd,
    partials,
    x,
    weight,
    bias,
    eps,
    batch,
    channels,
    positions,
    groups,
    out_b,
    out_c,
    out_p,
    x_b,
    x_c,
    x_p,
    weight_b,
    bias_b,
    SILU: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNEL_STEPS: tl.constexpr,
    POSITION_STEPS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The result of one tile, from the statistics of all tiles of its groups."""
    parts = CHANNEL_STEPS * POSITION_STEPS
    step, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = block * GROUPS * PER_GROUP
    lane = tl.arange(0, BLOCK_C)
    member = tl.arange(0, PADDED_GROUPS)[:, None]
    read = (member < GROUPS) & (block * GROUPS + member < groups)
    row = partials + (b * groups + block * GROUPS + member) * parts
    plane = batch * groups * parts
    size = PER_GROUP * positions
    total = tl.zeros([PADDED_GROUPS, PARTS], tl.float32)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)[None, :]
        elements = _elements(part, positions, PER_GROUP, BLOCK_C, BLOCK_P, POSITION_STEPS)
        total += elements * tl.load(row + part, mask=read & (part < parts), other=0)
    means = tl.sum(total, 1) / size
    drifts = tl.zeros([PADDED_GROUPS, PARTS], tl.float32)
    squares = tl.zeros([PADDED_GROUPS, PARTS], tl.float32)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)[None, :]
        there = read & (part < parts)
        elements = _elements(part, positions, PER_GROUP, BLOCK_C, BLOCK_P, POSITION_STEPS)
        away = tl.load(row + part, mask=there, other=0) - means[:, None]
        own = tl.load(row + plane + part, mask=there, other=0)
        drifts += tl.where(there, elements * away, 0.0)
        squares += tl.where(there, own + elements * away * away, 0.0)
    drift = tl.sum(drifts, 1) / size  # as above
    rstds = tl.rsqrt(tl.sum(squares, 1) / size - drift * drift + eps)
    means += drift
    if step == 0:
        _store_statistics(mean, rstd, means, rstds, b, block, groups, GROUPS, PADDED_GROUPS)

    mean_c, rstd_c = to_channels(means, PER_GROUP, BLOCK_C), to_channels(rstds, PER_GROUP, BLOCK_C)
    c, p, exists, mask = tile(
        step, start, channels, positions, GROUPS * PER_GROUP, BLOCK_C, BLOCK_P, POSITION_STEPS
    )
    if weight is not None:
        weight += b * weight_b + start
    if bias is not None:
        bias += b * bias_b + start
    at_x = x + far(b, x_b) + far(start + c, x_c) + far(p, x_p) + offsets(x_c, x_p, BLOCK_C, BLOCK_P)
    values = tl.load(at_x, mask=mask, other=0)
    y = _activate(values, mean_c, rstd_c, weight, bias, c + lane, exists, SILU)
    out += far(b, out_b) + far(start + c, out_c) + far(p, out_p)
    tl.store(out + offsets(out_c, out_p, BLOCK_C, BLOCK_P), y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _elements(
    part,
    positions,
    PER_GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    POSITION_STEPS: tl.constexpr,
):
    """How many elements of a group each tile has."""
    channels = tl.minimum(PER_GROUP - part // POSITION_STEPS * BLOCK_C, BLOCK_C)
    return channels * tl.minimum(positions - part % POSITION_STEPS * BLOCK_P, BLOCK_P)


def group_norm_silu_forward(
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    *,
    silu: bool,
) -> None:
    """Write [B, C, P] from x of that shape, any strides, and the contiguous mean and rstd [B, groups]; weight
    and bias [C] or [B, C], contiguous."""
    batch, channels, positions = x.shape
    per_group = channels // groups
    tiles = cut(channels, groups, positions, channels_last=is_channels_last(x))
    blocks = triton.cdiv(groups, tiles.groups)
    to_x: dict[str, Any] = {
        "x": x,
        "channels": channels,
        "positions": positions,
        "groups": groups,
        **dict(zip(("x_b", "x_c", "x_p"), x.stride(), strict=True)),
        **tiles.constants(per_group),
    }
    arguments: dict[str, Any] = {
        **to_x,
        "out": out,
        "mean": mean,
        "rstd": rstd,
        "weight": weight,
        "bias": bias,
        "eps": float(eps),
        **dict(zip(("out_b", "out_c", "out_p"), out.stride(), strict=True)),
        "weight_b": sample_stride(weight),
        "bias_b": sample_stride(bias),
        "SILU": silu,
    }
    if tiles.groups * per_group * positions <= WHOLE:
        run(
            group_norm_silu_forward_whole_kernel,
            lambda _: (blocks, batch),
            arguments,
            CONFIGURATIONS,
            _KEY,
        )
        return
    # As many samples as are still in the cache when they are looked at again.
    together = max(1, min(batch, CACHED // (x[0].numel() * x.element_size())))
    partials = torch.empty((2, together, groups, tiles.steps), dtype=torch.float32, device=x.device)
    for first in range(0, batch, together):
        some = slice(first, first + together)
        part = x[some]
        split = {"x": part, "partials": partials, "batch": len(part)}

        def grid(_: Any, samples: int = len(part)) -> tuple[int, int, int]:
            return tiles.steps, blocks, samples

        run(group_norm_silu_statistics_kernel, grid, {**to_x, **split}, CONFIGURATIONS, _KEY[:-1])
        split |= {"out": out[some], "mean": mean[some], "rstd": rstd[some]}
        split |= {name: per_sample(p, some) for name, p in (("weight", weight), ("bias", bias))}
        run(
            group_norm_silu_forward_apply_kernel,
            grid,
            {**arguments, **split, "PARTS": parts_at_once(tiles)},
            CONFIGURATIONS,
            _KEY,
        )


CONFIGURATIONS = (
    triton.Config({}, num_warps=8),
    triton.Config({}, num_warps=4),
    triton.Config({}, num_warps=16),
)
