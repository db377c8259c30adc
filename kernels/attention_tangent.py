"""Triton kernels of attention, its K tangents and its transpose, that never hold a matrix of scores.

The tangents of a program share the tile of scores and probabilities. With G = P * S' the tangent is
P V' + G V - rowsum(G) O: one accumulator takes both products and the row sums come along, so that the keys
are walked once.

A head's width is covered by one tile or by two (80 = 64 + 16, 160 = 128 + 32): MAIN columns and TAIL more, 0
for none. Strides count UNIT entries: the compiler then knows how many lie in one aligned piece of memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sharpcore.kernels import tuning

LOG2E = tl.constexpr(1.4426950408889634)
# Probabilities of fp16 are multiplied by 2^BOOST and the sums divided by it: with thousands of keys and
# tangents of norm one, P * S' would be subnormal.
BOOST = tl.constexpr(6)
UNBOOST = tl.constexpr(2.0**-6)


@triton.jit
def _at(pointer, strides, b, h, row, UNIT: tl.constexpr):
    """Row of a head of [B, H, rows, width]."""
    return pointer + (b * strides[0] + h * strides[1] + row * strides[2]) * UNIT


@triton.jit
def _vector_at(pointer, strides, vector, b, h, row, UNIT: tl.constexpr):
    """Row of a head of one of [K, B, H, rows, width]."""
    return pointer + (vector * strides[0] + b * strides[1] + h * strides[2] + row * strides[3]) * UNIT


@triton.jit
def _piece(
    pointer,
    stride,
    limit,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """[ROWS, COLUMNS] of a matrix from its column FIRST on; zero from row `limit` and column WIDTH on."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = FIRST + tl.arange(0, COLUMNS)[None, :]
    places = pointer + rows * stride + columns
    if EVEN:
        if FIRST + COLUMNS <= WIDTH:
            tile = tl.load(places)
        else:
            tile = tl.load(places, mask=columns < WIDTH, other=0.0)
    else:
        tile = tl.load(places, mask=(rows < limit) & (columns < WIDTH), other=0.0)
    return tile


@triton.jit
def _load(
    pointer,
    stride,
    limit,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The tiles of ROWS rows."""
    tiles = (_piece(pointer, stride, limit, 0, MAIN, WIDTH, ROWS, EVEN),)
    if TAIL:
        tiles += (_piece(pointer, stride, limit, MAIN, TAIL, WIDTH, ROWS, EVEN),)
    return tiles


@triton.jit
def _save_piece(pointer, stride, limit, tile, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.arange(0, tile.shape[0])[:, None]
    columns = FIRST + tl.arange(0, tile.shape[1])[None, :]
    inside = (rows < limit) & (columns < WIDTH)
    tl.store(pointer + rows * stride + columns, tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _save(pointer, stride, limit, tiles, WIDTH: tl.constexpr, TAIL: tl.constexpr):
    _save_piece(pointer, stride, limit, tiles[0], 0, WIDTH)
    if TAIL:
        _save_piece(pointer, stride, limit, tiles[1], tiles[0].shape[1], WIDTH)


@triton.jit
def _zeros(ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    tiles = (tl.zeros([ROWS, MAIN], tl.float32),)
    if TAIL:
        tiles += (tl.zeros([ROWS, TAIL], tl.float32),)
    return tiles


@triton.jit
def _scaled(tiles, factor, TAIL: tl.constexpr):
    """Tiles times a factor, or one for each row [rows, 1]."""
    scaled = (tiles[0] * factor,)
    if TAIL:
        scaled += (tiles[1] * factor,)
    return scaled


@triton.jit
def _subtracted(tiles, factor, others, TAIL: tl.constexpr):
    """tiles - factor * others."""
    left = (tiles[0] - factor * others[0].to(tl.float32),)
    if TAIL:
        left += (tiles[1] - factor * others[1].to(tl.float32),)
    return left


@triton.jit
def _add_scores(scores, a, b, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """scores + a b^T."""
    scores = tl.dot(a[0], tl.trans(b[0]), scores, input_precision=PRECISION)
    if TAIL:
        scores = tl.dot(a[1], tl.trans(b[1]), scores, input_precision=PRECISION)
    return scores


@triton.jit
def _add_weighted(sums, weights, tiles, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """sums + weights @ tiles."""
    added = (tl.dot(weights, tiles[0], sums[0], input_precision=PRECISION),)
    if TAIL:
        added += (tl.dot(weights, tiles[1], sums[1], input_precision=PRECISION),)
    return added


@triton.jit
def _biased(
    products, mask, row_stride, column_stride, rows, columns, length, keys, scale, EVEN_KEYS: tl.constexpr
):
    """scale * products + mask, -inf past the last key; rows and columns broadcast to the products' shape."""
    scores = products * scale
    if mask is not None:
        inside = (rows < length) & (columns < keys)
        bias = tl.load(mask + rows * row_stride + columns * column_stride, mask=inside, other=float("-inf"))
        scores += bias.to(tl.float32)
    elif not EVEN_KEYS:
        scores = tl.where(columns < keys, scores, float("-inf"))
    return scores


@triton.jit
def _probabilities(scores, lse, BOOSTED: tl.constexpr):
    """exp(scores - lse), times 2^BOOST where BOOSTED."""
    exponents = (scores - lse) * LOG2E
    if BOOSTED:
        exponents += BOOST
    return tl.exp2(exponents)


@triton.jit
def _statistics(pointer, stride, limit, ROWS: tl.constexpr):
    """lse of ROWS rows; inf past the last one and without a key, where probabilities are zero."""
    rows = tl.arange(0, ROWS)
    lse = tl.load(pointer + rows * stride, mask=rows < limit, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def _place(heads, length, count, BLOCK: tl.constexpr, VECTORS: tl.constexpr):
    """First row, first tangent, batch entry and head of a program; neighbours share keys and values."""
    blocks = tl.cdiv(length, BLOCK)
    chunks = tl.cdiv(count, VECTORS)
    program = tl.program_id(0)
    row = (program % blocks).to(tl.int64) * BLOCK
    program = program // blocks
    pair = program // chunks
    return row, (program % chunks) * VECTORS, (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)


@triton.jit(do_not_specialize=["heads", "length", "keys"])
def forward_kernel(
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
    o,
    o_strides,
    lse,
    lse_strides,
    mask,
    mask_strides,
    heads,
    length,
    keys,
    scale,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    LENGTH_UNIT: tl.constexpr,
    KEYS_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    VALUE_MAIN: tl.constexpr,
    VALUE_TAIL: tl.constexpr,
):
    """o [B, H, L, Ev] and lse [B, H, L] of q, k, v; a program makes BLOCK_L rows of a head."""
    EVEN_ROWS: tl.constexpr = LENGTH_UNIT % BLOCK_L == 0
    EVEN_KEYS: tl.constexpr = KEYS_UNIT % BLOCK_S == 0
    row, _, b, h = _place(heads, length, 1, BLOCK_L, 1)
    left = (length - row).to(tl.int32)
    q_tiles = _load(
        _at(q, q_strides, b, h, row, UNIT), q_strides[2] * UNIT, left, WIDTH, MAIN, TAIL, BLOCK_L, EVEN_ROWS
    )
    rows = tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_S)
    largest = tl.full([BLOCK_L], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_L], tl.float32)
    sums = _zeros(BLOCK_L, VALUE_MAIN, VALUE_TAIL)
    if mask is not None:
        mask = _at(mask, mask_strides, b, h, row, 1)
    key = row * 0
    for _start in range(0, keys, BLOCK_S):
        right = (keys - key).to(tl.int32)
        k_tiles = _load(
            _at(k, k_strides, b, h, key, UNIT),
            k_strides[2] * UNIT,
            right,
            WIDTH,
            MAIN,
            TAIL,
            BLOCK_S,
            EVEN_KEYS,
        )
        scores = _add_scores(tl.zeros([BLOCK_L, BLOCK_S], tl.float32), q_tiles, k_tiles, TAIL, PRECISION)
        scores = _biased(
            scores,
            mask,
            mask_strides[2],
            mask_strides[3],
            rows[:, None],
            columns[None, :],
            left,
            right,
            scale,
            EVEN_KEYS,
        )
        if mask is not None:
            mask += mask_strides[3] * BLOCK_S
        previous = largest
        largest = tl.maximum(largest, tl.max(scores, 1))
        # Where no key was admissible so far, scores - largest would be NaN.
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        p = _probabilities(scores, shift[:, None], False)
        shrink = tl.exp2((previous - shift) * LOG2E)
        total = total * shrink + tl.sum(p, 1)
        v_tiles = _load(
            _at(v, v_strides, b, h, key, UNIT),
            v_strides[2] * UNIT,
            right,
            VALUE_WIDTH,
            VALUE_MAIN,
            VALUE_TAIL,
            BLOCK_S,
            EVEN_KEYS,
        )
        sums = _scaled(sums, shrink[:, None], VALUE_TAIL)
        sums = _add_weighted(sums, p.to(v.dtype.element_ty), v_tiles, VALUE_TAIL, PRECISION)
        key += BLOCK_S
    # A row of NaN has no largest score either, but its sum is NaN.
    empty = (largest == float("-inf")) & (total == 0.0)
    total = tl.where(empty, 1.0, total)
    sums = _scaled(sums, 1.0 / total[:, None], VALUE_TAIL)
    _save(_at(o, o_strides, b, h, row, UNIT), o_strides[2] * UNIT, left, sums, VALUE_WIDTH, VALUE_TAIL)
    result = tl.where(empty, float("-inf"), largest + tl.log(total))
    tl.store(_at(lse, lse_strides, b, h, row, 1) + rows * lse_strides[2], result, mask=rows < left)


@triton.jit(do_not_specialize=["count", "heads", "length", "keys"])
def tangent_kernel(
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
    o,
    o_strides,
    lse,
    lse_strides,
    dq,
    dq_strides,
    dk,
    dk_strides,
    dv,
    dv_strides,
    result,
    result_strides,
    mask,
    mask_strides,
    count,
    heads,
    length,
    keys,
    scale,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    LENGTH_UNIT: tl.constexpr,
    KEYS_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    VALUE_MAIN: tl.constexpr,
    VALUE_TAIL: tl.constexpr,
):
    """result [K, B, H, L, Ev]; a program makes BLOCK_L rows of a head, for VECTORS tangents."""
    EVEN_ROWS: tl.constexpr = LENGTH_UNIT % BLOCK_L == 0
    EVEN_KEYS: tl.constexpr = KEYS_UNIT % BLOCK_S == 0
    BOOSTED: tl.constexpr = q.dtype.element_ty == tl.float16
    row, first, b, h = _place(heads, length, count, BLOCK_L, VECTORS)
    left = (length - row).to(tl.int32)
    rows = tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_S)
    q_tiles = _load(
        _at(q, q_strides, b, h, row, UNIT), q_strides[2] * UNIT, left, WIDTH, MAIN, TAIL, BLOCK_L, EVEN_ROWS
    )
    row_lse = _statistics(_at(lse, lse_strides, b, h, row, 1), lse_strides[2], left, BLOCK_L)
    dq_tiles = ()
    sums = ()
    row_sums = ()
    for i in tl.static_range(VECTORS):
        # A program that has fewer tangents computes the last one again, and does not store it.
        vector = tl.minimum(first + i, count - 1).to(tl.int64)
        if dq is not None:
            tiles = _load(
                _vector_at(dq, dq_strides, vector, b, h, row, UNIT),
                dq_strides[3] * UNIT,
                left,
                WIDTH,
                MAIN,
                TAIL,
                BLOCK_L,
                EVEN_ROWS,
            )
            dq_tiles += (tiles,)
        sums += (_zeros(BLOCK_L, VALUE_MAIN, VALUE_TAIL),)
        row_sums += (tl.zeros([BLOCK_L], tl.float32),)
    if mask is not None:
        mask = _at(mask, mask_strides, b, h, row, 1)
    key = row * 0
    for _start in range(0, keys, BLOCK_S):
        right = (keys - key).to(tl.int32)
        k_tiles = _load(
            _at(k, k_strides, b, h, key, UNIT),
            k_strides[2] * UNIT,
            right,
            WIDTH,
            MAIN,
            TAIL,
            BLOCK_S,
            EVEN_KEYS,
        )
        scores = _add_scores(tl.zeros([BLOCK_L, BLOCK_S], tl.float32), q_tiles, k_tiles, TAIL, PRECISION)
        scores = _biased(
            scores,
            mask,
            mask_strides[2],
            mask_strides[3],
            rows[:, None],
            columns[None, :],
            left,
            right,
            scale,
            EVEN_KEYS,
        )
        if mask is not None:
            mask += mask_strides[3] * BLOCK_S
        p = _probabilities(scores, row_lse[:, None], BOOSTED)
        weights = p.to(v.dtype.element_ty)
        p *= scale
        if (dq is not None) or (dk is not None):
            v_tiles = _load(
                _at(v, v_strides, b, h, key, UNIT),
                v_strides[2] * UNIT,
                right,
                VALUE_WIDTH,
                VALUE_MAIN,
                VALUE_TAIL,
                BLOCK_S,
                EVEN_KEYS,
            )
        new_sums = ()
        new_row_sums = ()
        for i in tl.static_range(VECTORS):
            vector = tl.minimum(first + i, count - 1).to(tl.int64)
            sum_i = sums[i]
            row_sum = row_sums[i]
            if (dq is not None) or (dk is not None):
                moved = tl.zeros([BLOCK_L, BLOCK_S], tl.float32)
                if dq is not None:
                    moved = _add_scores(moved, dq_tiles[i], k_tiles, TAIL, PRECISION)
                if dk is not None:
                    dk_tiles = _load(
                        _vector_at(dk, dk_strides, vector, b, h, key, UNIT),
                        dk_strides[3] * UNIT,
                        right,
                        WIDTH,
                        MAIN,
                        TAIL,
                        BLOCK_S,
                        EVEN_KEYS,
                    )
                    moved = _add_scores(moved, q_tiles, dk_tiles, TAIL, PRECISION)
                # Rounded before it is summed: the error of a weight then counts times V - O instead of V.
                moved_weights = (p * moved).to(v.dtype.element_ty)
                row_sum += tl.sum(moved_weights.to(tl.float32), 1)
                sum_i = _add_weighted(sum_i, moved_weights, v_tiles, VALUE_TAIL, PRECISION)
            if dv is not None:
                dv_tiles = _load(
                    _vector_at(dv, dv_strides, vector, b, h, key, UNIT),
                    dv_strides[3] * UNIT,
                    right,
                    VALUE_WIDTH,
                    VALUE_MAIN,
                    VALUE_TAIL,
                    BLOCK_S,
                    EVEN_KEYS,
                )
                sum_i = _add_weighted(sum_i, weights, dv_tiles, VALUE_TAIL, PRECISION)
            new_sums += (sum_i,)
            new_row_sums += (row_sum,)
        sums = new_sums
        row_sums = new_row_sums
        key += BLOCK_S
    o_tiles = _load(
        _at(o, o_strides, b, h, row, UNIT),
        o_strides[2] * UNIT,
        left,
        VALUE_WIDTH,
        VALUE_MAIN,
        VALUE_TAIL,
        BLOCK_L,
        EVEN_ROWS,
    )
    for i in tl.static_range(VECTORS):
        tiles = sums[i]
        if (dq is not None) or (dk is not None):
            tiles = _subtracted(tiles, row_sums[i][:, None], o_tiles, VALUE_TAIL)
        if BOOSTED:
            tiles = _scaled(tiles, UNBOOST, VALUE_TAIL)
        vector = (first + i).to(tl.int64)
        limit = tl.where(first + i < count, left, 0)
        _save(
            _vector_at(result, result_strides, vector, b, h, row, UNIT),
            result_strides[3] * UNIT,
            limit,
            tiles,
            VALUE_WIDTH,
            VALUE_TAIL,
        )


@triton.jit(do_not_specialize=["count", "heads", "length"])
def along_kernel(
    cotangent,
    cotangent_strides,
    o,
    o_strides,
    along,
    along_strides,
    count,
    heads,
    length,
    VALUE_WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    LENGTH_UNIT: tl.constexpr,
    BLOCK_L: tl.constexpr,
    VALUE_MAIN: tl.constexpr,
    VALUE_TAIL: tl.constexpr,
):
    """along [K, B, H, L], the products of each row of the cotangents with the output."""
    EVEN_ROWS: tl.constexpr = LENGTH_UNIT % BLOCK_L == 0
    row, first, b, h = _place(heads, length, count, BLOCK_L, 1)
    left = (length - row).to(tl.int32)
    vector = first.to(tl.int64)
    o_tiles = _load(
        _at(o, o_strides, b, h, row, UNIT),
        o_strides[2] * UNIT,
        left,
        VALUE_WIDTH,
        VALUE_MAIN,
        VALUE_TAIL,
        BLOCK_L,
        EVEN_ROWS,
    )
    tiles = _load(
        _vector_at(cotangent, cotangent_strides, vector, b, h, row, UNIT),
        cotangent_strides[3] * UNIT,
        left,
        VALUE_WIDTH,
        VALUE_MAIN,
        VALUE_TAIL,
        BLOCK_L,
        EVEN_ROWS,
    )
    products = tl.sum(tiles[0].to(tl.float32) * o_tiles[0].to(tl.float32), 1)
    if VALUE_TAIL:
        products += tl.sum(tiles[1].to(tl.float32) * o_tiles[1].to(tl.float32), 1)
    rows = tl.arange(0, BLOCK_L)
    places = _vector_at(along, along_strides, vector, b, h, row, 1) + rows * along_strides[3]
    tl.store(places, products, mask=rows < left)


@triton.jit(do_not_specialize=["count", "heads", "length", "keys"])
def adjoint_queries_kernel(
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
    lse,
    lse_strides,
    cotangent,
    cotangent_strides,
    along,
    along_strides,
    grad_q,
    grad_q_strides,
    mask,
    mask_strides,
    count,
    heads,
    length,
    keys,
    scale,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    LENGTH_UNIT: tl.constexpr,
    KEYS_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    VALUE_MAIN: tl.constexpr,
    VALUE_TAIL: tl.constexpr,
):
    """grad_q [K, B, H, L, E]; a program makes BLOCK_L rows of a head, for VECTORS cotangents."""
    EVEN_ROWS: tl.constexpr = LENGTH_UNIT % BLOCK_L == 0
    EVEN_KEYS: tl.constexpr = KEYS_UNIT % BLOCK_S == 0
    BOOSTED: tl.constexpr = q.dtype.element_ty == tl.float16
    row, first, b, h = _place(heads, length, count, BLOCK_L, VECTORS)
    left = (length - row).to(tl.int32)
    rows = tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_S)
    q_tiles = _load(
        _at(q, q_strides, b, h, row, UNIT), q_strides[2] * UNIT, left, WIDTH, MAIN, TAIL, BLOCK_L, EVEN_ROWS
    )
    row_lse = _statistics(_at(lse, lse_strides, b, h, row, 1), lse_strides[2], left, BLOCK_L)
    cotangent_tiles = ()
    row_along = ()
    sums = ()
    for i in tl.static_range(VECTORS):
        vector = tl.minimum(first + i, count - 1).to(tl.int64)
        tiles = _load(
            _vector_at(cotangent, cotangent_strides, vector, b, h, row, UNIT),
            cotangent_strides[3] * UNIT,
            left,
            VALUE_WIDTH,
            VALUE_MAIN,
            VALUE_TAIL,
            BLOCK_L,
            EVEN_ROWS,
        )
        cotangent_tiles += (tiles,)
        places = _vector_at(along, along_strides, vector, b, h, row, 1) + rows * along_strides[3]
        row_along += (tl.load(places, mask=rows < left, other=0.0),)
        sums += (_zeros(BLOCK_L, MAIN, TAIL),)
    if mask is not None:
        mask = _at(mask, mask_strides, b, h, row, 1)
    key = row * 0
    for _start in range(0, keys, BLOCK_S):
        right = (keys - key).to(tl.int32)
        k_tiles = _load(
            _at(k, k_strides, b, h, key, UNIT),
            k_strides[2] * UNIT,
            right,
            WIDTH,
            MAIN,
            TAIL,
            BLOCK_S,
            EVEN_KEYS,
        )
        v_tiles = _load(
            _at(v, v_strides, b, h, key, UNIT),
            v_strides[2] * UNIT,
            right,
            VALUE_WIDTH,
            VALUE_MAIN,
            VALUE_TAIL,
            BLOCK_S,
            EVEN_KEYS,
        )
        scores = _add_scores(tl.zeros([BLOCK_L, BLOCK_S], tl.float32), q_tiles, k_tiles, TAIL, PRECISION)
        scores = _biased(
            scores,
            mask,
            mask_strides[2],
            mask_strides[3],
            rows[:, None],
            columns[None, :],
            left,
            right,
            scale,
            EVEN_KEYS,
        )
        if mask is not None:
            mask += mask_strides[3] * BLOCK_S
        p = _probabilities(scores, row_lse[:, None], BOOSTED) * scale
        new_sums = ()
        for i in tl.static_range(VECTORS):
            moved = tl.zeros([BLOCK_L, BLOCK_S], tl.float32)
            moved = _add_scores(moved, cotangent_tiles[i], v_tiles, VALUE_TAIL, PRECISION)
            weights = (p * (moved - row_along[i][:, None])).to(k.dtype.element_ty)
            new_sums += (_add_weighted(sums[i], weights, k_tiles, TAIL, PRECISION),)
        sums = new_sums
        key += BLOCK_S
    for i in tl.static_range(VECTORS):
        tiles = sums[i]
        if BOOSTED:
            tiles = _scaled(tiles, UNBOOST, TAIL)
        vector = (first + i).to(tl.int64)
        limit = tl.where(first + i < count, left, 0)
        places = _vector_at(grad_q, grad_q_strides, vector, b, h, row, UNIT)
        _save(places, grad_q_strides[3] * UNIT, limit, tiles, WIDTH, TAIL)


@triton.jit(do_not_specialize=["count", "heads", "length", "keys"])
def adjoint_keys_kernel(
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
    lse,
    lse_strides,
    cotangent,
    cotangent_strides,
    along,
    along_strides,
    grad_k,
    grad_k_strides,
    grad_v,
    grad_v_strides,
    mask,
    mask_strides,
    count,
    heads,
    length,
    keys,
    scale,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    LENGTH_UNIT: tl.constexpr,
    KEYS_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    VALUE_MAIN: tl.constexpr,
    VALUE_TAIL: tl.constexpr,
):
    """grad_k [K, B, H, S, E] and grad_v [K, B, H, S, Ev], None where not needed; a program makes BLOCK_S rows
    of a head, for VECTORS cotangents, from transposed tiles of scores."""
    EVEN_ROWS: tl.constexpr = LENGTH_UNIT % BLOCK_L == 0
    EVEN_KEYS: tl.constexpr = KEYS_UNIT % BLOCK_S == 0
    BOOSTED: tl.constexpr = q.dtype.element_ty == tl.float16
    key, first, b, h = _place(heads, keys, count, BLOCK_S, VECTORS)
    right = (keys - key).to(tl.int32)
    rows = tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_S)
    k_tiles = _load(
        _at(k, k_strides, b, h, key, UNIT), k_strides[2] * UNIT, right, WIDTH, MAIN, TAIL, BLOCK_S, EVEN_KEYS
    )
    if grad_k is not None:
        v_tiles = _load(
            _at(v, v_strides, b, h, key, UNIT),
            v_strides[2] * UNIT,
            right,
            VALUE_WIDTH,
            VALUE_MAIN,
            VALUE_TAIL,
            BLOCK_S,
            EVEN_KEYS,
        )
    k_sums = ()
    v_sums = ()
    for _ in tl.static_range(VECTORS):
        if grad_k is not None:
            k_sums += (_zeros(BLOCK_S, MAIN, TAIL),)
        if grad_v is not None:
            v_sums += (_zeros(BLOCK_S, VALUE_MAIN, VALUE_TAIL),)
    if mask is not None:
        mask = _at(mask, mask_strides, b, h, 0, 1) + key * mask_strides[3]
    row = key * 0
    for _start in range(0, length, BLOCK_L):
        left = (length - row).to(tl.int32)
        q_tiles = _load(
            _at(q, q_strides, b, h, row, UNIT),
            q_strides[2] * UNIT,
            left,
            WIDTH,
            MAIN,
            TAIL,
            BLOCK_L,
            EVEN_ROWS,
        )
        row_lse = _statistics(_at(lse, lse_strides, b, h, row, 1), lse_strides[2], left, BLOCK_L)
        scores = _add_scores(tl.zeros([BLOCK_S, BLOCK_L], tl.float32), k_tiles, q_tiles, TAIL, PRECISION)
        scores = _biased(
            scores,
            mask,
            mask_strides[2],
            mask_strides[3],
            rows[None, :],
            columns[:, None],
            left,
            right,
            scale,
            EVEN_KEYS,
        )
        if mask is not None:
            mask += mask_strides[2] * BLOCK_L
        p = _probabilities(scores, row_lse[None, :], BOOSTED)
        weights = p.to(q.dtype.element_ty)
        p *= scale
        new_k_sums = ()
        new_v_sums = ()
        for i in tl.static_range(VECTORS):
            vector = tl.minimum(first + i, count - 1).to(tl.int64)
            tiles = _load(
                _vector_at(cotangent, cotangent_strides, vector, b, h, row, UNIT),
                cotangent_strides[3] * UNIT,
                left,
                VALUE_WIDTH,
                VALUE_MAIN,
                VALUE_TAIL,
                BLOCK_L,
                EVEN_ROWS,
            )
            if grad_v is not None:
                new_v_sums += (_add_weighted(v_sums[i], weights, tiles, VALUE_TAIL, PRECISION),)
            if grad_k is not None:
                places = _vector_at(along, along_strides, vector, b, h, row, 1) + rows * along_strides[3]
                row_along = tl.load(places, mask=rows < left, other=0.0)
                moved = tl.zeros([BLOCK_S, BLOCK_L], tl.float32)
                moved = _add_scores(moved, v_tiles, tiles, VALUE_TAIL, PRECISION)
                moved_weights = (p * (moved - row_along[None, :])).to(q.dtype.element_ty)
                new_k_sums += (_add_weighted(k_sums[i], moved_weights, q_tiles, TAIL, PRECISION),)
        k_sums = new_k_sums
        v_sums = new_v_sums
        row += BLOCK_L
    for i in tl.static_range(VECTORS):
        vector = (first + i).to(tl.int64)
        limit = tl.where(first + i < count, right, 0)
        if grad_k is not None:
            tiles = k_sums[i]
            if BOOSTED:
                tiles = _scaled(tiles, UNBOOST, TAIL)
            places = _vector_at(grad_k, grad_k_strides, vector, b, h, key, UNIT)
            _save(places, grad_k_strides[3] * UNIT, limit, tiles, WIDTH, TAIL)
        if grad_v is not None:
            tiles = v_sums[i]
            if BOOSTED:
                tiles = _scaled(tiles, UNBOOST, VALUE_TAIL)
            places = _vector_at(grad_v, grad_v_strides, vector, b, h, key, UNIT)
            _save(places, grad_v_strides[3] * UNIT, limit, tiles, VALUE_WIDTH, VALUE_TAIL)


# Wider heads go to the reference.
LARGEST_WIDTH = 256
_KEY = ("count", "heads", "length", "keys", "WIDTH", "VALUE_WIDTH", "PRECISION")


def pieces(width: int) -> tuple[int, int]:
    """MAIN and TAIL that cover a width with the fewest columns: one power of two, or the sum of two."""
    whole = max(16, triton.next_power_of_2(width))
    main = whole // 2
    tail = max(16, triton.next_power_of_2(max(1, width - main)))
    return (main, tail) if main >= 16 and main + tail < whole else (whole, 0)


def _configuration(
    widths: tuple[int, int], length: int, keys: int, *, vectors: int = 0, warps: int = 4, stages: int = 2
) -> triton.Config:
    (main, tail), (value_main, value_tail) = map(pieces, widths)
    constants = {"BLOCK_L": length, "BLOCK_S": keys}
    constants |= {"MAIN": main, "TAIL": tail, "VALUE_MAIN": value_main, "VALUE_TAIL": value_tail}
    if vectors:
        constants["VECTORS"] = vectors
    return triton.Config(constants, num_warps=warps, num_stages=stages)


def forward_configurations(widths: tuple[int, int], size: int) -> list[triton.Config]:
    return [_configuration(widths, 64 if size == 2 else 32, 64 if size == 2 else 32)]


def tangent_configurations(widths: tuple[int, int], size: int, count: int) -> list[triton.Config]:
    block = 64 if size == 2 else 32
    return [_configuration(widths, block, block, vectors=min(2, count))]


def along_configurations(width: int) -> list[triton.Config]:
    main, tail = pieces(width)
    return [triton.Config({"BLOCK_L": 32, "VALUE_MAIN": main, "VALUE_TAIL": tail}, num_warps=4)]


adjoint_queries_configurations = tangent_configurations
adjoint_keys_configurations = tangent_configurations


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
    precision: str,
) -> None:
    """Write o [B, H, L, Ev] and lse [B, H, L] of q [B, H, L, E], k [B, H, S, E], v [B, H, S, Ev].

    The entries of a row are adjacent, but for lse and mask [B, H, L, S]. `precision` of float32 products:
    "ieee" or "tf32".
    """
    arguments = _arguments({"q": q, "k": k, "v": v, "o": o}, {"lse": lse, "mask": mask}, scale, precision)
    _launch(
        forward_kernel,
        arguments,
        forward_configurations((q.shape[3], v.shape[3]), q.element_size()),
        "BLOCK_L",
        q.shape[2],
    )


def attention_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    result: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
    precision: str,
) -> None:
    """Write result [K, B, H, L, Ev] of the tangents, [K, ...] of each operand of `attention_forward`."""
    operands = {"q": q, "k": k, "v": v, "o": o, "dq": dq, "dk": dk, "dv": dv, "result": result}
    arguments = _arguments(operands, {"lse": lse, "mask": mask}, scale, precision, result.shape[0])
    configurations = tangent_configurations((q.shape[3], v.shape[3]), q.element_size(), result.shape[0])
    _launch(tangent_kernel, arguments, configurations, "BLOCK_L", q.shape[2])


def attention_adjoint(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cotangent: Tensor,
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    *,
    mask: Tensor | None,
    scale: float,
    precision: str,
) -> None:
    """Write what is given of grad_q [K, B, H, L, E], grad_k [K, B, H, S, E], grad_v [K, B, H, S, Ev], from
    cotangent [K, B, H, L, Ev]; the rest as in `attention_forward`."""
    count, widths = cotangent.shape[0], (q.shape[3], v.shape[3])
    moving = grad_q is not None or grad_k is not None
    along = torch.empty(cotangent.shape[:-1], dtype=torch.float32, device=q.device) if moving else None
    operands = {"q": q, "k": k, "v": v, "o": o, "cotangent": cotangent}
    operands |= {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v}
    others = {"lse": lse, "mask": mask, "along": along}
    arguments = _arguments(operands, others, scale, precision, count)
    if moving:
        _launch(along_kernel, arguments, along_configurations(v.shape[3]), "BLOCK_L", q.shape[2])
    if grad_q is not None:
        configurations = adjoint_queries_configurations(widths, q.element_size(), count)
        _launch(adjoint_queries_kernel, arguments, configurations, "BLOCK_L", q.shape[2])
    if grad_k is not None or grad_v is not None:
        configurations = adjoint_keys_configurations(widths, q.element_size(), count)
        _launch(adjoint_keys_kernel, arguments, configurations, "BLOCK_S", k.shape[2])


def _arguments(
    operands: Mapping[str, Tensor | None],
    others: Mapping[str, Tensor | None],
    scale: float,
    precision: str,
    count: int = 1,
) -> dict[str, Any]:
    """What the kernels take, by name: tensors and strides, sizes, and what the compiler is to know of them.

    `operands` are [..., rows, width] with adjacent entries in a row, `others` have any strides.
    """
    given = [t for t in operands.values() if t is not None]
    q, k, v = given[:3]
    unit = _unit(given)
    arguments: dict[str, Any] = {}
    for name, tensor in operands.items():
        strides = (0,) * 4 if tensor is None else _strides(tensor)[:-1]
        arguments |= {name: tensor, f"{name}_strides": tuple(stride // unit for stride in strides)}
    for name, tensor in others.items():
        arguments |= {name: tensor, f"{name}_strides": (0,) * 4 if tensor is None else _strides(tensor)}
    return arguments | {
        "count": count,
        "heads": q.shape[1],
        "length": q.shape[2],
        "keys": k.shape[2],
        "scale": scale,
        "WIDTH": q.shape[3],
        "VALUE_WIDTH": v.shape[3],
        "UNIT": unit,
        "LENGTH_UNIT": _divisor(q.shape[2]),
        "KEYS_UNIT": _divisor(k.shape[2]),
        "PRECISION": precision,
    }


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides; 0 where there is only one step."""
    return tuple(step if size > 1 else 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _unit(tensors: Sequence[Tensor]) -> int:
    """Entries, at most 16 bytes, that divide all strides but those of the last axis."""
    return math.gcd(16 // tensors[0].element_size(), *(s for t in tensors for s in _strides(t)[:-1]))


def _divisor(size: int) -> int:
    """The largest block that divides a size, of few: each makes a kernel of its own."""
    return next(block for block in (128, 64, 32, 1) if size % block == 0)


def _launch(
    kernel: Any, arguments: Mapping[str, Any], configurations: Sequence[triton.Config], block: str, rows: int
) -> None:
    """Run a program for each block of rows, each chunk of tangents and each head."""
    count, (batch, heads) = arguments["count"], arguments["q"].shape[:2]

    def grid(constants: Mapping[str, Any]) -> tuple[int, ...]:
        chunks = triton.cdiv(count, constants.get("VECTORS", 1))
        return (triton.cdiv(rows, constants[block]) * chunks * batch * heads,)

    taken = {name: arguments[name] for name in kernel.arg_names if name in arguments}
    tuning.run(kernel, grid, taken, configurations, [name for name in _KEY if name in taken])
