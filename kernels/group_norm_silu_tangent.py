"""Triton kernels: K tangents or cotangents through GroupNorm, optionally followed by SiLU."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sharpcore.kernels.tuning import run

TILE = 4096  # elements
# A group, or neighbouring groups of a channels-last image, for one program: its second look finds them in a
# multiprocessor's own cache, or in registers.
WHOLE = 65536
# Bytes of vectors and x between the two looks at larger groups: half of what the caches of large GPUs keep.
CACHED = 16 * 2**20
HELD_WARPS = 16
# Elements of its vector that a thread of 16 warps holds in registers without spilling: of a tangent that lies
# channels-first, and otherwise.
HELD, HELD_ELSE = 40, 32
_KEY = ("channels", "positions", "groups", "vectors_c", "vectors_p", "SILU", "ADJOINT")


@dataclass(frozen=True)
class Tiles:
    """How an image is cut: a program has `groups` neighbouring groups, in tiles of channels by positions."""

    groups: int
    block_c: int
    block_p: int
    channel_steps: int
    position_steps: int

    @property
    def steps(self) -> int:
        """Tiles of a program that sees all positions."""
        return self.channel_steps * self.position_steps

    def constants(self, per_group: int) -> dict[str, int]:
        """By the names that the kernels have for them."""
        return {
            "PER_GROUP": per_group,
            "GROUPS": self.groups,
            "PADDED_GROUPS": triton.next_power_of_2(self.groups),
            "BLOCK_C": self.block_c,
            "BLOCK_P": self.block_p,
            "CHANNEL_STEPS": self.channel_steps,
            "POSITION_STEPS": self.position_steps,
        }


def cut(channels: int, groups: int, positions: int, *, channels_last: bool) -> Tiles:
    """Tiles of about 4096 elements, wide along what lies side by side in memory, with few idle lanes."""
    per_group = channels // groups
    if channels_last:
        # Whole groups side by side, or a part of one; the fewest idle lanes, then the widest.
        def lanes(width: int) -> tuple[int, int]:
            together = min(width // per_group, groups)
            blocks = triton.cdiv(groups, together) if together else groups * triton.cdiv(per_group, width)
            return blocks * width, -width

        block_c = min((256, 128, 64, 32, 16), key=lanes)
        together = max(1, min(block_c // per_group, groups))
        block_p = min(triton.next_power_of_2(positions), TILE // block_c)
    else:
        together = 1
        block_p = _least_waste(positions, TILE // 4, TILE)
        block_c = _least_waste(per_group, TILE // 4 // block_p, TILE // block_p)
    return Tiles(
        together,
        block_c,
        block_p,
        triton.cdiv(together * per_group, block_c),
        triton.cdiv(positions, block_p),
    )


def _least_waste(size: int, smallest: int, largest: int) -> int:
    """The power of two whose multiple just above `size` is smallest; of several the largest."""
    smallest = max(1, min(smallest, triton.next_power_of_2(size)))
    powers = [2**n for n in range(smallest.bit_length() - 1, largest.bit_length()) if 2**n < 2 * size]
    return min(powers, key=lambda power: (triton.cdiv(size, power) * power, -power))


@triton.jit
def per_channel(parameter, index, exists, DEFAULT: tl.constexpr):
    """A parameter of the channels as a column in float32."""
    if parameter is None:
        values = tl.full(index.shape, DEFAULT, tl.float32)
    else:
        values = tl.load(parameter + index, mask=exists, other=0).to(tl.float32)
    return values[:, None]


@triton.jit
def over_groups(values, PER_GROUP: tl.constexpr, PADDED_GROUPS: tl.constexpr):
    """Sums of a value of each channel over the channels of each group."""
    group = tl.arange(0, values.shape[0]) // PER_GROUP
    members = group[None, :] == tl.arange(0, PADDED_GROUPS)[:, None]
    return tl.sum(tl.where(members, values[None, :], 0.0), 1)


@triton.jit
def to_channels(values, PER_GROUP: tl.constexpr, BLOCK_C: tl.constexpr):
    """What each group has, as a column of its channels."""
    group = tl.arange(0, BLOCK_C) // PER_GROUP
    members = group[None, :] == tl.arange(0, values.shape[0])[:, None]
    return tl.sum(tl.where(members, values[:, None], 0.0), 0)[:, None]


@triton.jit
def tile(
    step,
    start,
    channels,
    positions,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    POSITION_STEPS: tl.constexpr,
):
    """First channel after `start` and first position of a tile, and which of its elements exist."""
    c = step // POSITION_STEPS * BLOCK_C
    p = step % POSITION_STEPS * BLOCK_P
    channel = c + tl.arange(0, BLOCK_C)
    exists = (channel < CHANNELS) & (start + channel < channels)
    position = p + tl.arange(0, BLOCK_P)
    return c, p, exists, exists[:, None] & (position < positions)[None, :]


@triton.jit
def offsets(stride_c, stride_p, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Those of a tile's elements from its first."""
    return tl.arange(0, BLOCK_C)[:, None] * stride_c + tl.arange(0, BLOCK_P)[None, :] * stride_p


@triton.jit
def far(index, stride):
    """An offset that may be large."""
    return tl.cast(index, tl.int64) * stride


@triton.jit
def _primal(x, mask, mean, rstd, weight, bias, index, exists, SILU: tl.constexpr, EVICTION: tl.constexpr):
    """xhat, and act'(u) * weight * rstd."""
    # The hint also keeps the compiler from holding the tile in registers from the first sweep to the second.
    xhat = (tl.load(x, mask=mask, other=0, eviction_policy=EVICTION).to(tl.float32) - mean) * rstd
    gain = per_channel(weight, index, exists, 1.0)
    scale = gain * rstd
    if SILU:
        u = gain * xhat + per_channel(bias, index, exists, 0.0)
        sigmoid = tl.sigmoid(u)
        scale = scale * (sigmoid * (1 + u * (1 - sigmoid)))
    return xhat, scale


@triton.jit
def _term(given, scale, ADJOINT: tl.constexpr):
    """What is projected."""
    term = given.to(tl.float32)
    if ADJOINT:
        term = term * scale
    return term


@triton.jit
def _project(given, xhat, scale, mean, slope, ADJOINT: tl.constexpr):
    """The result, from the group's mean of the terms and of xhat times them."""
    result = _term(given, scale, ADJOINT) - mean - xhat * slope
    if not ADJOINT:
        result = result * scale
    return result


@triton.jit
def group_norm_silu_whole_kernel(
    out,
    vectors,
    x,
    mean,
    rstd,
    weight,
    bias,
    channels,
    positions,
    groups,
    out_k,
    out_b,
    out_c,
    out_p,
    vectors_k,
    vectors_b,
    vectors_c,
    vectors_p,
    x_b,
    x_c,
    x_p,
    weight_b,
    bias_b,
    SILU: tl.constexpr,
    ADJOINT: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNEL_STEPS: tl.constexpr,
    POSITION_STEPS: tl.constexpr,
    HELD: tl.constexpr,
):
    """All positions of some groups, of one vector; HELD: in registers between the two sweeps."""
    k, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = block * GROUPS * PER_GROUP
    lane = tl.arange(0, BLOCK_C)
    here = (lane < GROUPS * PER_GROUP) & (start + lane < channels)
    group = b * groups + block * GROUPS + lane // PER_GROUP
    mean_c = tl.load(mean + group, mask=here, other=0).to(tl.float32)[:, None]
    rstd_c = tl.load(rstd + group, mask=here, other=0).to(tl.float32)[:, None]
    out += far(k, out_k) + far(b, out_b) + far(start, out_c)
    vectors += far(k, vectors_k) + far(b, vectors_b) + far(start, vectors_c)
    x += far(b, x_b) + far(start, x_c)
    to_out = offsets(out_c, out_p, BLOCK_C, BLOCK_P)
    to_vector = offsets(vectors_c, vectors_p, BLOCK_C, BLOCK_P)
    to_x = offsets(x_c, x_p, BLOCK_C, BLOCK_P)
    if weight is not None:
        weight += b * weight_b + start
    if bias is not None:
        bias += b * bias_b + start

    first = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    second = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    held = ()
    if HELD:
        for step in tl.static_range(CHANNEL_STEPS * POSITION_STEPS):
            c, p, exists, mask = tile(
                step, start, channels, positions, GROUPS * PER_GROUP, BLOCK_C, BLOCK_P, POSITION_STEPS
            )
            at_x = x + far(c, x_c) + far(p, x_p) + to_x
            xhat, scale = _primal(
                at_x, mask, mean_c, rstd_c, weight, bias, c + lane, exists, SILU, "evict_last"
            )
            at_vector = vectors + far(c, vectors_c) + far(p, vectors_p) + to_vector
            given = tl.load(at_vector, mask=mask, other=0, eviction_policy="evict_first")
            held = held + (given,)  # type: ignore[assignment]  # noqa: RUF005 (a tuple of Triton)
            term = _term(given, scale, ADJOINT)
            first += term
            second += xhat * term
    else:
        for step in range(CHANNEL_STEPS * POSITION_STEPS):
            c, p, exists, mask = tile(
                step, start, channels, positions, GROUPS * PER_GROUP, BLOCK_C, BLOCK_P, POSITION_STEPS
            )
            at_x = x + far(c, x_c) + far(p, x_p) + to_x
            xhat, scale = _primal(
                at_x, mask, mean_c, rstd_c, weight, bias, c + lane, exists, SILU, "evict_last"
            )
            at_vector = vectors + far(c, vectors_c) + far(p, vectors_p) + to_vector
            term = _term(tl.load(at_vector, mask=mask, other=0), scale, ADJOINT)
            first += term
            second += xhat * term

    size = PER_GROUP * positions
    sums = over_groups(tl.sum(first, 1), PER_GROUP, PADDED_GROUPS) / size
    slopes = over_groups(tl.sum(second, 1), PER_GROUP, PADDED_GROUPS) / size
    sum_c, slope_c = to_channels(sums, PER_GROUP, BLOCK_C), to_channels(slopes, PER_GROUP, BLOCK_C)
    if HELD:
        for step in tl.static_range(CHANNEL_STEPS * POSITION_STEPS):
            c, p, exists, mask = tile(
                step, start, channels, positions, GROUPS * PER_GROUP, BLOCK_C, BLOCK_P, POSITION_STEPS
            )
            at_x = x + far(c, x_c) + far(p, x_p) + to_x
            xhat, scale = _primal(
                at_x, mask, mean_c, rstd_c, weight, bias, c + lane, exists, SILU, "evict_first"
            )
            result = _project(held[step], xhat, scale, sum_c, slope_c, ADJOINT)
            at_out = out + far(c, out_c) + far(p, out_p) + to_out
            tl.store(at_out, result.to(out.dtype.element_ty), mask=mask, eviction_policy="evict_first")
    else:
        for step in range(CHANNEL_STEPS * POSITION_STEPS):
            c, p, exists, mask = tile(
                step, start, channels, positions, GROUPS * PER_GROUP, BLOCK_C, BLOCK_P, POSITION_STEPS
            )
            at_x = x + far(c, x_c) + far(p, x_p) + to_x
            xhat, scale = _primal(
                at_x, mask, mean_c, rstd_c, weight, bias, c + lane, exists, SILU, "evict_first"
            )
            at_vector = vectors + far(c, vectors_c) + far(p, vectors_p) + to_vector
            given = tl.load(at_vector, mask=mask, other=0, eviction_policy="evict_first")
            result = _project(given, xhat, scale, sum_c, slope_c, ADJOINT)
            at_out = out + far(c, out_c) + far(p, out_p) + to_out
            tl.store(at_out, result.to(out.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def group_norm_silu_sums_kernel(
    partials,
    vectors,
    x,
    mean,
    rstd,
    weight,
    bias,
    count,
    batch,
    channels,
    positions,
    groups,
    vectors_k,
    vectors_b,
    vectors_c,
    vectors_p,
    x_b,
    x_c,
    x_p,
    weight_b,
    bias_b,
    SILU: tl.constexpr,
    ADJOINT: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNEL_STEPS: tl.constexpr,
    POSITION_STEPS: tl.constexpr,
    TANGENTS: tl.constexpr,
):
    """Of one tile the sums of its terms and of xhat times them: two planes [K, B, groups, tiles]."""
    step, block = tl.program_id(0), tl.program_id(1)
    b, first = tl.program_id(2) % batch, tl.program_id(2) // batch * TANGENTS
    start = block * GROUPS * PER_GROUP
    lane = tl.arange(0, BLOCK_C)
    c, p, exists, mask = tile(
        step, start, channels, positions, GROUPS * PER_GROUP, BLOCK_C, BLOCK_P, POSITION_STEPS
    )
    group = b * groups + block * GROUPS + lane // PER_GROUP
    mean_c = tl.load(mean + group, mask=exists, other=0).to(tl.float32)[:, None]
    rstd_c = tl.load(rstd + group, mask=exists, other=0).to(tl.float32)[:, None]
    if weight is not None:
        weight += b * weight_b + start
    if bias is not None:
        bias += b * bias_b + start
    at_x = x + far(b, x_b) + far(start + c, x_c) + far(p, x_p) + offsets(x_c, x_p, BLOCK_C, BLOCK_P)
    xhat, scale = _primal(at_x, mask, mean_c, rstd_c, weight, bias, c + lane, exists, SILU, "evict_last")
    vectors += far(b, vectors_b) + far(start + c, vectors_c) + far(p, vectors_p)
    at_vector = offsets(vectors_c, vectors_p, BLOCK_C, BLOCK_P)
    parts = CHANNEL_STEPS * POSITION_STEPS
    member = tl.arange(0, PADDED_GROUPS)
    written = (member < GROUPS) & (block * GROUPS + member < groups)
    plane = count * batch * groups * parts
    for k in range(first, tl.minimum(first + TANGENTS, count)):
        given = tl.load(vectors + far(k, vectors_k) + at_vector, mask=mask, other=0)
        term = _term(given, scale, ADJOINT)
        place = partials + ((k * batch + b) * groups + block * GROUPS + member) * parts + step
        sums = over_groups(tl.sum(term, 1), PER_GROUP, PADDED_GROUPS)
        slopes = over_groups(tl.sum(xhat * term, 1), PER_GROUP, PADDED_GROUPS)
        tl.store(place, sums, mask=written)
        tl.store(place + plane, slopes, mask=written)


@triton.jit
def group_norm_silu_apply_kernel(
    out,
    partials,
    vectors,
    x,
    mean,
    rstd,
    weight,
    bias,
    count,
    batch,
    channels,
    positions,
    groups,
    out_k,
    out_b,
    out_c,
    out_p,
    vectors_k,
    vectors_b,
    vectors_c,
    vectors_p,
    x_b,
    x_c,
    x_p,
    weight_b,
    bias_b,
    SILU: tl.constexpr,
    ADJOINT: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNEL_STEPS: tl.constexpr,
    POSITION_STEPS: tl.constexpr,
    PARTS: tl.constexpr,
    TANGENTS: tl.constexpr,
):
    """The result of one tile, from the sums over all tiles of its groups."""
    parts = CHANNEL_STEPS * POSITION_STEPS
    # What was read last is read first: more of it is still in the cache.
    step, block = parts - 1 - tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    last = tl.num_programs(2) - 1 - tl.program_id(2)
    b, first = last % batch, last // batch * TANGENTS
    start = block * GROUPS * PER_GROUP
    lane = tl.arange(0, BLOCK_C)
    c, p, exists, mask = tile(
        step, start, channels, positions, GROUPS * PER_GROUP, BLOCK_C, BLOCK_P, POSITION_STEPS
    )
    group = b * groups + block * GROUPS + lane // PER_GROUP
    mean_c = tl.load(mean + group, mask=exists, other=0).to(tl.float32)[:, None]
    rstd_c = tl.load(rstd + group, mask=exists, other=0).to(tl.float32)[:, None]
    if weight is not None:
        weight += b * weight_b + start
    if bias is not None:
        bias += b * bias_b + start
    at_x = x + far(b, x_b) + far(start + c, x_c) + far(p, x_p) + offsets(x_c, x_p, BLOCK_C, BLOCK_P)
    xhat, scale = _primal(at_x, mask, mean_c, rstd_c, weight, bias, c + lane, exists, SILU, "evict_first")
    vectors += far(b, vectors_b) + far(start + c, vectors_c) + far(p, vectors_p)
    out += far(b, out_b) + far(start + c, out_c) + far(p, out_p)
    at_vector, at_out = (
        offsets(vectors_c, vectors_p, BLOCK_C, BLOCK_P),
        offsets(out_c, out_p, BLOCK_C, BLOCK_P),
    )
    member = tl.arange(0, PADDED_GROUPS)[:, None]
    read = (member < GROUPS) & (block * GROUPS + member < groups)
    plane = count * batch * groups * parts
    size = PER_GROUP * positions
    for k in range(first, tl.minimum(first + TANGENTS, count)):
        row = partials + ((k * batch + b) * groups + block * GROUPS + member) * parts
        sums = tl.zeros([PADDED_GROUPS, PARTS], tl.float32)
        slopes = tl.zeros([PADDED_GROUPS, PARTS], tl.float32)
        for begin in range(0, parts, PARTS):
            part = begin + tl.arange(0, PARTS)[None, :]
            sums += tl.load(row + part, mask=read & (part < parts), other=0)
            slopes += tl.load(row + plane + part, mask=read & (part < parts), other=0)
        sum_c = to_channels(tl.sum(sums, 1) / size, PER_GROUP, BLOCK_C)
        slope_c = to_channels(tl.sum(slopes, 1) / size, PER_GROUP, BLOCK_C)
        given = tl.load(
            vectors + far(k, vectors_k) + at_vector, mask=mask, other=0, eviction_policy="evict_first"
        )
        result = _project(given, xhat, scale, sum_c, slope_c, ADJOINT)
        at = out + far(k, out_k) + at_out
        tl.store(at, result.to(out.dtype.element_ty), mask=mask, eviction_policy="evict_first")


def group_norm_silu(
    out: Tensor,
    vectors: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    *,
    silu: bool,
    adjoint: bool,
) -> None:
    """Write [K, B, C, P] from vectors of that shape and x [B, C, P], any strides; mean and rstd [B, groups],
    weight and bias [C] or [B, C], contiguous."""
    count, batch, channels, positions = vectors.shape
    per_group = channels // groups
    last = is_channels_last(vectors)
    tiles = cut(channels, groups, positions, channels_last=last)
    blocks = triton.cdiv(groups, tiles.groups)
    arguments: dict[str, Any] = {
        "vectors": vectors,
        "x": x,
        "mean": mean,
        "rstd": rstd,
        "weight": weight,
        "bias": bias,
        "channels": channels,
        "positions": positions,
        "groups": groups,
        **dict(zip(("vectors_k", "vectors_b", "vectors_c", "vectors_p"), vectors.stride(), strict=True)),
        **dict(zip(("x_b", "x_c", "x_p"), x.stride(), strict=True)),
        "weight_b": sample_stride(weight),
        "bias_b": sample_stride(bias),
        "SILU": silu,
        "ADJOINT": adjoint,
        **tiles.constants(per_group),
    }
    to_out = dict(zip(("out_k", "out_b", "out_c", "out_p"), out.stride(), strict=True))
    if tiles.groups * per_group * positions <= WHOLE:
        run(
            group_norm_silu_whole_kernel,
            lambda _: (count, blocks, batch),
            {**arguments, "out": out, **to_out},
            whole_configurations(tiles, HELD_ELSE if adjoint or last else HELD),
            _KEY,
        )
        return
    samples_at_once, vectors_at_once = chunk(vectors)
    partials = torch.empty(
        (2, vectors_at_once, samples_at_once, groups, tiles.steps), dtype=torch.float32, device=vectors.device
    )
    for sample, first in product(range(0, batch, samples_at_once), range(0, count, vectors_at_once)):
        some, these = slice(sample, sample + samples_at_once), slice(first, first + vectors_at_once)
        part = vectors[these, some]

        def grid(constants: Any, part: Tensor = part) -> tuple[int, int, int]:
            return tiles.steps, blocks, part.shape[1] * triton.cdiv(part.shape[0], constants["TANGENTS"])

        arguments |= {
            "vectors": part,
            "x": x[some],
            "mean": mean[some],
            "rstd": rstd[some],
            "weight": per_sample(weight, some),
            "bias": per_sample(bias, some),
            "partials": partials,
            "count": part.shape[0],
            "batch": part.shape[1],
        }
        run(group_norm_silu_sums_kernel, grid, arguments, SPLIT_CONFIGURATIONS, _KEY)
        run(
            group_norm_silu_apply_kernel,
            grid,
            {**arguments, "out": out[these, some], **to_out, "PARTS": parts_at_once(tiles)},
            SPLIT_CONFIGURATIONS,
            _KEY,
        )


def chunk(vectors: Tensor) -> tuple[int, int]:
    """How many samples and vectors are swept at a time, so that they and x are still in the cache when they
    are looked at again: all vectors of some samples, or some of one."""
    each = vectors[0, 0].numel() * vectors.element_size()
    together = max(1, min(vectors.shape[0], CACHED // each - 1))
    return max(1, min(vectors.shape[1], CACHED // (each * (1 + together)))), together


SPLIT_CONFIGURATIONS = (
    triton.Config({"TANGENTS": 4}, num_warps=8),
    triton.Config({"TANGENTS": 1}, num_warps=8),
    triton.Config({"TANGENTS": 8}, num_warps=8),
    triton.Config({"TANGENTS": 2}, num_warps=16),
)


def whole_configurations(tiles: Tiles, held: int) -> list[triton.Config]:
    """Of the kernel whose programs see all positions; a thread may hold so many elements of its vector."""
    elements = tiles.steps * tiles.block_c * tiles.block_p
    if tiles.steps == 1:
        return [triton.Config({"HELD": True}, num_warps=n) for n in ((4, 8) if elements < TILE else (8, 16))]
    # The more warps, the fewer programs share a multiprocessor's cache: their second look finds more there.
    configurations = [triton.Config({"HELD": False}, num_warps=n) for n in (8, 16, 32)]
    if elements <= held * HELD_WARPS * 32:
        configurations.append(triton.Config({"HELD": True}, num_warps=HELD_WARPS))
    return configurations


def parts_at_once(tiles: Tiles) -> int:
    """How many tiles' sums are read at a time."""
    return min(triton.next_power_of_2(tiles.steps), 64)


def is_channels_last(image: Tensor) -> bool:
    """Whether the channels of [..., C, P] lie side by side and the positions do not."""
    return image.stride(-2) == 1 and image.stride(-1) != 1 and image.shape[-2] > 1


def sample_stride(parameter: Tensor | None) -> int:
    """How far the parameters of two samples are apart: 0 where all samples share them."""
    return 0 if parameter is None or parameter.ndim == 1 else parameter.stride(0)


def per_sample(parameter: Tensor | None, some: slice) -> Tensor | None:
    """The parameters of some samples: all, where those of all samples are the same."""
    return parameter if parameter is None or parameter.ndim == 1 else parameter[some]
