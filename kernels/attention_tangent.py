"""Triton kernels of attention, its K tangents and its transpose, that never hold a matrix of scores.

The tangents of a program share the tile of scores and probabilities. With G = P * S' the tangent is
P V' + G V - rowsum(G) O: one accumulator takes both products and the row sums come along, so that the keys
are walked once.

A head's width is covered by tiles of at most PIECE columns (80 = 64 + 16, 160 = 128 + 32). Strides count UNIT
entries: the compiler then knows how many lie in one aligned piece of memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sharpcore.kernels.tuning import run

LOG2E = tl.constexpr(1.4426950408889634)
# Probabilities of fp16 are multiplied by 2^BOOST and the sums divided by it: with thousands of keys and
# tangents of norm one, P * S' would be subnormal.
BOOST = tl.constexpr(6)
UNBOOST = tl.constexpr(2.0**-6)


@triton.constexpr_function
def pieces(width, largest):
    """First columns and sizes, powers of two, of the tiles that cover a width."""
    made, first = [], 0
    while first < width:
        size = min(largest, max(16, triton.next_power_of_2(width - first)))
        made.append((first, size))
        first += size
    return tuple(made)


@triton.jit
def _at(pointer, strides, vector, b, h, row, UNIT: tl.constexpr):
    """A row of a head of [K, B, H, rows, width]."""
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
    strides,
    vector,
    b,
    h,
    row,
    limit,
    WIDTH: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
):
    """ROWS rows of a head, a tile for each piece of the width, zero past `limit` rows; EVEN: none is."""
    pointer = _at(pointer, strides, vector, b, h, row, UNIT)
    tiles = ()
    for i in tl.static_range(len(PIECES)):
        tiles += (_piece(pointer, strides[3] * UNIT, limit, PIECES[i][0], PIECES[i][1], WIDTH, ROWS, EVEN),)
    return tiles


@triton.jit
def _save(
    pointer,
    strides,
    vector,
    b,
    h,
    row,
    limit,
    tiles,
    WIDTH: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Write the first `limit` rows of tiles to a head."""
    pointer = _at(pointer, strides, vector, b, h, row, UNIT)
    rows = tl.arange(0, ROWS)[:, None]
    for i in tl.static_range(len(PIECES)):
        columns = PIECES[i][0] + tl.arange(0, PIECES[i][1])[None, :]
        places = pointer + rows * (strides[3] * UNIT) + columns
        tl.store(places, tiles[i].to(pointer.dtype.element_ty), mask=(rows < limit) & (columns < WIDTH))


@triton.jit
def _zeros(ROWS: tl.constexpr, PIECES: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(PIECES)):
        tiles += (tl.zeros([ROWS, PIECES[i][1]], tl.float32),)
    return tiles


@triton.jit
def _scaled(tiles, factor):
    """Tiles times a factor, or one for each row [rows, 1]."""
    scaled = ()
    for i in tl.static_range(len(tiles)):
        scaled += (tiles[i] * factor,)
    return scaled


@triton.jit
def _subtracted(tiles, factor, others):
    """tiles - factor * others."""
    left = ()
    for i in tl.static_range(len(tiles)):
        left += (tiles[i] - factor * others[i].to(tl.float32),)
    return left


@triton.jit
def _add_scores(scores, a, b, PRECISION: tl.constexpr):
    """scores + a b^T."""
    for i in tl.static_range(len(a)):
        scores = tl.dot(a[i], tl.trans(b[i]), scores, input_precision=PRECISION)
    return scores


@triton.jit
def _add_weighted(sums, weights, tiles, PRECISION: tl.constexpr):
    """sums + weights @ tiles."""
    added = ()
    for i in tl.static_range(len(tiles)):
        added += (tl.dot(weights, tiles[i], sums[i], input_precision=PRECISION),)
    return added


@triton.jit
def _biased(products, mask, strides, rows, columns, length, keys, scale, EVEN_KEYS: tl.constexpr):
    """scale * products + mask, -inf past the last key; rows and columns broadcast to the products' shape."""
    scores = products * scale
    if mask is not None:
        inside = (rows < length) & (columns < keys)
        bias = tl.load(mask + rows * strides[3] + columns * strides[4], mask=inside, other=float("-inf"))
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
def _statistics(lse, strides, b, h, row, limit, ROWS: tl.constexpr):
    """lse of ROWS rows; inf past the last one and without a key, where probabilities are zero."""
    rows = tl.arange(0, ROWS)
    values = tl.load(
        _at(lse, strides, 0, b, h, row, 1) + rows * strides[3], mask=rows < limit, other=float("inf")
    )
    return tl.where(values == float("-inf"), float("inf"), values)


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
    PIECE: tl.constexpr,
):
    """o [B, H, L, Ev] and lse [B, H, L] of q, k, v; a program makes BLOCK_L rows of a head."""
    PIECES: tl.constexpr = pieces(WIDTH, PIECE)
    VALUE_PIECES: tl.constexpr = pieces(VALUE_WIDTH, PIECE)
    EVEN_ROWS: tl.constexpr = LENGTH_UNIT % BLOCK_L == 0
    EVEN_KEYS: tl.constexpr = KEYS_UNIT % BLOCK_S == 0
    row, _, b, h = _place(heads, length, 1, BLOCK_L, 1)
    left = (length - row).to(tl.int32)
    rows = tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_S)
    q_tiles = _load(q, q_strides, 0, b, h, row, left, WIDTH, PIECES, BLOCK_L, UNIT, EVEN_ROWS)
    if mask is not None:
        mask = _at(mask, mask_strides, 0, b, h, row, 1)
    largest = tl.full([BLOCK_L], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_L], tl.float32)
    sums = _zeros(BLOCK_L, VALUE_PIECES)
    key = row * 0
    for _start in range(0, keys, BLOCK_S):
        right = (keys - key).to(tl.int32)
        k_tiles = _load(k, k_strides, 0, b, h, key, right, WIDTH, PIECES, BLOCK_S, UNIT, EVEN_KEYS)
        v_tiles = _load(
            v, v_strides, 0, b, h, key, right, VALUE_WIDTH, VALUE_PIECES, BLOCK_S, UNIT, EVEN_KEYS
        )
        scores = _add_scores(tl.zeros([BLOCK_L, BLOCK_S], tl.float32), q_tiles, k_tiles, PRECISION)
        scores = _biased(
            scores, mask, mask_strides, rows[:, None], columns[None, :], left, right, scale, EVEN_KEYS
        )
        if mask is not None:
            mask += mask_strides[4] * BLOCK_S
        previous = largest
        largest = tl.maximum(largest, tl.max(scores, 1))
        # Where no key was admissible so far, scores - largest would be NaN.
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        p = _probabilities(scores, shift[:, None], False)
        shrink = tl.exp2((previous - shift) * LOG2E)
        total = total * shrink + tl.sum(p, 1)
        sums = _scaled(sums, shrink[:, None])
        sums = _add_weighted(sums, p.to(v.dtype.element_ty), v_tiles, PRECISION)
        key += BLOCK_S
    # A row of NaN has no largest score either, but its sum is NaN.
    empty = (largest == float("-inf")) & (total == 0.0)
    total = tl.where(empty, 1.0, total)
    sums = _scaled(sums, 1.0 / total[:, None])
    _save(o, o_strides, 0, b, h, row, left, sums, VALUE_WIDTH, VALUE_PIECES, BLOCK_L, UNIT)
    result = tl.where(empty, float("-inf"), largest + tl.log(total))
    places = _at(lse, lse_strides, 0, b, h, row, 1) + rows * lse_strides[3]
    tl.store(places, result, mask=rows < left)


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
    PIECE: tl.constexpr,
):
    """result [K, B, H, L, Ev]; a program makes BLOCK_L rows of a head, for VECTORS tangents."""
    PIECES: tl.constexpr = pieces(WIDTH, PIECE)
    VALUE_PIECES: tl.constexpr = pieces(VALUE_WIDTH, PIECE)
    EVEN_ROWS: tl.constexpr = LENGTH_UNIT % BLOCK_L == 0
    EVEN_KEYS: tl.constexpr = KEYS_UNIT % BLOCK_S == 0
    BOOSTED: tl.constexpr = q.dtype.element_ty == tl.float16
    row, first, b, h = _place(heads, length, count, BLOCK_L, VECTORS)
    left = (length - row).to(tl.int32)
    rows = tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_S)
    q_tiles = _load(q, q_strides, 0, b, h, row, left, WIDTH, PIECES, BLOCK_L, UNIT, EVEN_ROWS)
    row_lse = _statistics(lse, lse_strides, b, h, row, left, BLOCK_L)
    if mask is not None:
        mask = _at(mask, mask_strides, 0, b, h, row, 1)
    dq_tiles = ()
    sums = ()
    row_sums = ()
    for i in tl.static_range(VECTORS):
        if dq is not None:
            # A program that has fewer tangents computes the last one again, and does not store it.
            vector = tl.minimum(first + i, count - 1).to(tl.int64)
            tiles = _load(dq, dq_strides, vector, b, h, row, left, WIDTH, PIECES, BLOCK_L, UNIT, EVEN_ROWS)
            dq_tiles += (tiles,)
        sums += (_zeros(BLOCK_L, VALUE_PIECES),)
        row_sums += (tl.zeros([BLOCK_L], tl.float32),)
    key = row * 0
    for _start in range(0, keys, BLOCK_S):
        right = (keys - key).to(tl.int32)
        k_tiles = _load(k, k_strides, 0, b, h, key, right, WIDTH, PIECES, BLOCK_S, UNIT, EVEN_KEYS)
        scores = _add_scores(tl.zeros([BLOCK_L, BLOCK_S], tl.float32), q_tiles, k_tiles, PRECISION)
        scores = _biased(
            scores, mask, mask_strides, rows[:, None], columns[None, :], left, right, scale, EVEN_KEYS
        )
        if mask is not None:
            mask += mask_strides[4] * BLOCK_S
        p = _probabilities(scores, row_lse[:, None], BOOSTED)
        weights = p.to(v.dtype.element_ty)
        p *= scale
        if (dq is not None) or (dk is not None):
            v_tiles = _load(
                v,
                v_strides,
                0,
                b,
                h,
                key,
                right,
                VALUE_WIDTH,
                VALUE_PIECES,
                BLOCK_S,
                UNIT,
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
                    moved = _add_scores(moved, dq_tiles[i], k_tiles, PRECISION)
                if dk is not None:
                    dk_tiles = _load(
                        dk, dk_strides, vector, b, h, key, right, WIDTH, PIECES, BLOCK_S, UNIT, EVEN_KEYS
                    )
                    moved = _add_scores(moved, q_tiles, dk_tiles, PRECISION)
                # Rounded before it is summed: the error of a weight then counts times V - O instead of V.
                moved_weights = (p * moved).to(v.dtype.element_ty)
                row_sum += tl.sum(moved_weights.to(tl.float32), 1)
                sum_i = _add_weighted(sum_i, moved_weights, v_tiles, PRECISION)
            if dv is not None:
                dv_tiles = _load(
                    dv,
                    dv_strides,
                    vector,
                    b,
                    h,
                    key,
                    right,
                    VALUE_WIDTH,
                    VALUE_PIECES,
                    BLOCK_S,
                    UNIT,
                    EVEN_KEYS,
                )
                sum_i = _add_weighted(sum_i, weights, dv_tiles, PRECISION)
            new_sums += (sum_i,)
            new_row_sums += (row_sum,)
        sums = new_sums
        row_sums = new_row_sums
        key += BLOCK_S
    for i in tl.static_range(VECTORS):
        tiles = sums[i]
        if (dq is not None) or (dk is not None):
            o_tiles = _load(
                o,
                o_strides,
                0,
                b,
                h,
                row,
                left,
                VALUE_WIDTH,
                VALUE_PIECES,
                BLOCK_L,
                UNIT,
                EVEN_ROWS,
            )
            tiles = _subtracted(tiles, row_sums[i][:, None], o_tiles)
        if BOOSTED:
            tiles = _scaled(tiles, UNBOOST)
        limit = tl.where(first + i < count, left, 0)
        vector = (first + i).to(tl.int64)
        _save(
            result, result_strides, vector, b, h, row, limit, tiles, VALUE_WIDTH, VALUE_PIECES, BLOCK_L, UNIT
        )


@triton.jit(do_not_specialize=["count", "heads", "length"])
def along_kernel(
    o,
    o_strides,
    cotangent,
    cotangent_strides,
    along,
    along_strides,
    count,
    heads,
    length,
    VALUE_WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PIECE: tl.constexpr,
):
    """along [K, B, H, L], the products of each row of the cotangents with the output."""
    VALUE_PIECES: tl.constexpr = pieces(VALUE_WIDTH, PIECE)
    row, first, b, h = _place(heads, length, count, BLOCK_L, 1)
    left = (length - row).to(tl.int32)
    rows = tl.arange(0, BLOCK_L)
    vector = first.to(tl.int64)
    tiles = _load(
        cotangent,
        cotangent_strides,
        vector,
        b,
        h,
        row,
        left,
        VALUE_WIDTH,
        VALUE_PIECES,
        BLOCK_L,
        UNIT,
        False,
    )
    o_tiles = _load(o, o_strides, 0, b, h, row, left, VALUE_WIDTH, VALUE_PIECES, BLOCK_L, UNIT, False)
    products = tl.zeros([BLOCK_L], tl.float32)
    for i in tl.static_range(len(tiles)):
        products += tl.sum(tiles[i].to(tl.float32) * o_tiles[i].to(tl.float32), 1)
    places = _at(along, along_strides, vector, b, h, row, 1) + rows * along_strides[3]
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
    PIECE: tl.constexpr,
):
    """grad_q [K, B, H, L, E]; a program makes BLOCK_L rows of a head, for VECTORS cotangents."""
    PIECES: tl.constexpr = pieces(WIDTH, PIECE)
    VALUE_PIECES: tl.constexpr = pieces(VALUE_WIDTH, PIECE)
    EVEN_ROWS: tl.constexpr = LENGTH_UNIT % BLOCK_L == 0
    EVEN_KEYS: tl.constexpr = KEYS_UNIT % BLOCK_S == 0
    BOOSTED: tl.constexpr = q.dtype.element_ty == tl.float16
    row, first, b, h = _place(heads, length, count, BLOCK_L, VECTORS)
    left = (length - row).to(tl.int32)
    rows = tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_S)
    q_tiles = _load(q, q_strides, 0, b, h, row, left, WIDTH, PIECES, BLOCK_L, UNIT, EVEN_ROWS)
    row_lse = _statistics(lse, lse_strides, b, h, row, left, BLOCK_L)
    if mask is not None:
        mask = _at(mask, mask_strides, 0, b, h, row, 1)
    cotangent_tiles = ()
    row_along = ()
    sums = ()
    for i in tl.static_range(VECTORS):
        # A program that has fewer cotangents computes the last one again, and does not store it.
        vector = tl.minimum(first + i, count - 1).to(tl.int64)
        cotangent_tiles += (
            _load(
                cotangent,
                cotangent_strides,
                vector,
                b,
                h,
                row,
                left,
                VALUE_WIDTH,
                VALUE_PIECES,
                BLOCK_L,
                UNIT,
                EVEN_ROWS,
            ),
        )
        places = _at(along, along_strides, vector, b, h, row, 1) + rows * along_strides[3]
        row_along += (tl.load(places, mask=rows < left, other=0.0),)
        sums += (_zeros(BLOCK_L, PIECES),)
    key = row * 0
    for _start in range(0, keys, BLOCK_S):
        right = (keys - key).to(tl.int32)
        k_tiles = _load(k, k_strides, 0, b, h, key, right, WIDTH, PIECES, BLOCK_S, UNIT, EVEN_KEYS)
        v_tiles = _load(
            v, v_strides, 0, b, h, key, right, VALUE_WIDTH, VALUE_PIECES, BLOCK_S, UNIT, EVEN_KEYS
        )
        scores = _add_scores(tl.zeros([BLOCK_L, BLOCK_S], tl.float32), q_tiles, k_tiles, PRECISION)
        scores = _biased(
            scores, mask, mask_strides, rows[:, None], columns[None, :], left, right, scale, EVEN_KEYS
        )
        if mask is not None:
            mask += mask_strides[4] * BLOCK_S
        p = _probabilities(scores, row_lse[:, None], BOOSTED) * scale
        new_sums = ()
        for i in tl.static_range(VECTORS):
            moved = tl.zeros([BLOCK_L, BLOCK_S], tl.float32)
            moved = _add_scores(moved, cotangent_tiles[i], v_tiles, PRECISION)
            weights = (p * (moved - row_along[i][:, None])).to(k.dtype.element_ty)
            new_sums += (_add_weighted(sums[i], weights, k_tiles, PRECISION),)
        sums = new_sums
        key += BLOCK_S
    for i in tl.static_range(VECTORS):
        tiles = sums[i]
        if BOOSTED:
            tiles = _scaled(tiles, UNBOOST)
        limit = tl.where(first + i < count, left, 0)
        vector = (first + i).to(tl.int64)
        _save(grad_q, grad_q_strides, vector, b, h, row, limit, tiles, WIDTH, PIECES, BLOCK_L, UNIT)


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
    PIECE: tl.constexpr,
):
    """grad_k [K, B, H, S, E] and grad_v [K, B, H, S, Ev], None where not needed; a program makes BLOCK_S rows
    of a head, for VECTORS cotangents, from transposed tiles of scores."""
    PIECES: tl.constexpr = pieces(WIDTH, PIECE)
    VALUE_PIECES: tl.constexpr = pieces(VALUE_WIDTH, PIECE)
    EVEN_ROWS: tl.constexpr = LENGTH_UNIT % BLOCK_L == 0
    EVEN_KEYS: tl.constexpr = KEYS_UNIT % BLOCK_S == 0
    BOOSTED: tl.constexpr = q.dtype.element_ty == tl.float16
    key, first, b, h = _place(heads, keys, count, BLOCK_S, VECTORS)
    right = (keys - key).to(tl.int32)
    rows = tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_S)
    k_tiles = _load(k, k_strides, 0, b, h, key, right, WIDTH, PIECES, BLOCK_S, UNIT, EVEN_KEYS)
    if grad_k is not None:
        v_tiles = _load(
            v,
            v_strides,
            0,
            b,
            h,
            key,
            right,
            VALUE_WIDTH,
            VALUE_PIECES,
            BLOCK_S,
            UNIT,
            EVEN_KEYS,
        )
    if mask is not None:
        mask = _at(mask, mask_strides, 0, b, h, 0, 1) + key * mask_strides[4]
    k_sums = ()
    v_sums = ()
    for _ in tl.static_range(VECTORS):
        if grad_k is not None:
            k_sums += (_zeros(BLOCK_S, PIECES),)
        if grad_v is not None:
            v_sums += (_zeros(BLOCK_S, VALUE_PIECES),)
    row = key * 0
    for _start in range(0, length, BLOCK_L):
        left = (length - row).to(tl.int32)
        q_tiles = _load(q, q_strides, 0, b, h, row, left, WIDTH, PIECES, BLOCK_L, UNIT, EVEN_ROWS)
        row_lse = _statistics(lse, lse_strides, b, h, row, left, BLOCK_L)
        scores = _add_scores(tl.zeros([BLOCK_S, BLOCK_L], tl.float32), k_tiles, q_tiles, PRECISION)
        scores = _biased(
            scores, mask, mask_strides, rows[None, :], columns[:, None], left, right, scale, EVEN_KEYS
        )
        if mask is not None:
            mask += mask_strides[3] * BLOCK_L
        p = _probabilities(scores, row_lse[None, :], BOOSTED)
        weights = p.to(q.dtype.element_ty)
        p *= scale
        new_k_sums = ()
        new_v_sums = ()
        for i in tl.static_range(VECTORS):
            # A program that has fewer cotangents computes the last one again, and does not store it.
            vector = tl.minimum(first + i, count - 1).to(tl.int64)
            tiles = _load(
                cotangent,
                cotangent_strides,
                vector,
                b,
                h,
                row,
                left,
                VALUE_WIDTH,
                VALUE_PIECES,
                BLOCK_L,
                UNIT,
                EVEN_ROWS,
            )
            if grad_v is not None:
                new_v_sums += (_add_weighted(v_sums[i], weights, tiles, PRECISION),)
            if grad_k is not None:
                places = _at(along, along_strides, vector, b, h, row, 1) + rows * along_strides[3]
                row_along = tl.load(places, mask=rows < left, other=0.0)
                moved = tl.zeros([BLOCK_S, BLOCK_L], tl.float32)
                moved = _add_scores(moved, v_tiles, tiles, PRECISION)
                moved_weights = (p * (moved - row_along[None, :])).to(q.dtype.element_ty)
                new_k_sums += (_add_weighted(k_sums[i], moved_weights, q_tiles, PRECISION),)
        k_sums = new_k_sums
        v_sums = new_v_sums
        row += BLOCK_L
    for i in tl.static_range(VECTORS):
        limit = tl.where(first + i < count, right, 0)
        vector = (first + i).to(tl.int64)
        if grad_k is not None:
            tiles = k_sums[i]
            if BOOSTED:
                tiles = _scaled(tiles, UNBOOST)
            _save(grad_k, grad_k_strides, vector, b, h, key, limit, tiles, WIDTH, PIECES, BLOCK_S, UNIT)
        if grad_v is not None:
            tiles = v_sums[i]
            if BOOSTED:
                tiles = _scaled(tiles, UNBOOST)
            _save(
                grad_v,
                grad_v_strides,
                vector,
                b,
                h,
                key,
                limit,
                tiles,
                VALUE_WIDTH,
                VALUE_PIECES,
                BLOCK_S,
                UNIT,
            )


# Wider heads go to the reference.
LARGEST_WIDTH = 160
_KEY = ("count", "heads", "length", "keys", "WIDTH", "VALUE_WIDTH", "PRECISION")


def _choice(
    piece: int, length: int, keys: int, *, vectors: int = 0, warps: int = 4, stages: int = 2
) -> triton.Config:
    constants = {"PIECE": piece, "BLOCK_L": length, "BLOCK_S": keys}
    if vectors:
        constants["VECTORS"] = vectors
    return triton.Config(constants, num_warps=warps, num_stages=stages)


def _made_for(width: int, *choices: tuple[int, int, triton.Config]) -> list[triton.Config]:
    """Those for heads of this width: wider than the first number, and at most as wide as the second."""
    return [choice for narrower, widest, choice in choices if narrower < width <= widest]


def forward_configurations(width: int, size: int, precision: str, count: int) -> list[triton.Config]:
    """For heads whose wider side has `width` entries of `size` bytes, and `count` tangents.

    The first one runs where nothing is tuned: compiled for sm_80 it spills no registers. The others spill
    none on sm_80 or on sm_90.
    """
    if size == 4 and precision == "tf32":
        return [_choice(64 if 64 < width <= 96 else 32, 32, 32), _choice(32, 64, 32)]
    if size == 4:
        return _made_for(
            width,
            (0, 64, _choice(64, 32, 16)),
            (64, 96, _choice(32, 32, 16)),
            (96, 160, _choice(64, 16, 16)),
        )
    return _made_for(
        width,
        (0, 96, _choice(64, 64, 32)),
        (96, 160, _choice(32, 64, 32)),
        (0, 64, _choice(64, 128, 64, stages=3)),
        (0, 64, _choice(64, 128, 128, warps=8, stages=3)),
        (0, 128, _choice(64, 128, 64, warps=8, stages=3)),
        (64, 160, _choice(64, 128, 64, warps=8)),
    )


def tangent_configurations(width: int, size: int, precision: str, count: int) -> list[triton.Config]:
    """As `forward_configurations`."""
    if size == 4 and precision == "tf32":
        return _made_for(
            width,
            (0, 96, _choice(32, 32, 16, vectors=1)),
            (96, 160, _choice(32, 16, 16, vectors=1)),
            (0, 80, _choice(32, 64, 32, vectors=1)),
        )
    if size == 4:  # wider than 64, on sm_90: 16 to 56 bytes spilled
        return _made_for(
            width,
            (0, 160, _choice(32, 16, 16, vectors=1, warps=8)),
            (0, 64, _choice(32, 32, 16, vectors=1)),
        )
    choices = _made_for(
        width,
        (0, 128, _choice(32, 64, 32, vectors=1)),
        (128, 160, _choice(32, 64, 16, vectors=1)),
        (0, 64, _choice(64, 128, 64, vectors=1, warps=8, stages=3)),
        (0, 64, _choice(64, 64, 64, vectors=1, stages=3)),
        (32, 48, _choice(32, 128, 64, vectors=1, warps=8, stages=3)),
        (64, 128, _choice(64, 64, 64, vectors=1)),
        (64, 128, _choice(64, 128, 64, vectors=1, warps=8)),
        (64, 160, _choice(64, 128, 32, vectors=1, warps=8)),
    )
    if count > 1:
        choices += _made_for(
            width,
            (0, 64, _choice(64, 64, 32, vectors=2, stages=3)),
            (0, 64, _choice(64, 128, 32, vectors=2, warps=8, stages=3)),
            (32, 48, _choice(32, 128, 32, vectors=2, warps=8, stages=3)),
        )
    return choices


def along_configurations(width: int, size: int, precision: str, count: int) -> list[triton.Config]:
    """As `forward_configurations`; memory is the bound."""
    return [triton.Config({"PIECE": 64, "BLOCK_L": 32})]


def adjoint_queries_configurations(width: int, size: int, precision: str, count: int) -> list[triton.Config]:
    """As `forward_configurations`."""
    if size == 4 and precision == "tf32":
        return _made_for(
            width,
            (0, 128, _choice(64, 32, 16, vectors=1)),
            (128, 160, _choice(32, 16, 16, vectors=1)),
            (0, 80, _choice(32, 64, 32, vectors=1)),
        )
    if size == 4:
        return [_choice(64 if width <= 128 else 32, 16, 16, vectors=1, warps=8)]
    choices = _made_for(
        width,
        (0, 96, _choice(32, 64, 32, vectors=1)),
        (96, 160, _choice(32, 64, 16, vectors=1)),
        (0, 64, _choice(64, 128, 64, vectors=1, warps=8, stages=3)),
        (64, 160, _choice(64, 128, 64, vectors=1, warps=8)),
        (64, 160, _choice(64, 128, 32, vectors=1, warps=8)),
    )
    if count > 1:
        choices += _made_for(width, (0, 64, _choice(64, 128, 32, vectors=2, warps=8, stages=3)))
    return choices


def adjoint_keys_configurations(width: int, size: int, precision: str, count: int) -> list[triton.Config]:
    """As `forward_configurations`; two sums for each cotangent leave no room for a second one."""
    if size == 4 and precision == "tf32":
        return _made_for(
            width,
            (0, 64, _choice(32, 16, 16, vectors=1)),
            (64, 96, _choice(128, 16, 16, vectors=1)),
            (96, 160, _choice(32, 16, 16, vectors=1)),
            (0, 64, _choice(32, 32, 32, vectors=1)),
        )
    if size == 4:
        return _made_for(
            width,
            (0, 64, _choice(64, 16, 16, vectors=1, warps=8)),
            (64, 96, _choice(128, 16, 16, vectors=1, warps=8)),
            (96, 160, _choice(64, 16, 16, vectors=1, warps=8)),
        )
    return _made_for(
        width,
        (0, 96, _choice(64, 32, 64, vectors=1)),
        (96, 128, _choice(64, 32, 32, vectors=1)),
        (128, 160, _choice(32, 32, 16, vectors=1)),
        (32, 48, _choice(32, 64, 64, vectors=1, warps=8)),
        (0, 64, _choice(64, 64, 128, vectors=1, warps=8)),
        (0, 64, _choice(64, 32, 128, vectors=1, warps=8)),
        (64, 96, _choice(64, 64, 64, vectors=1)),
        (64, 128, _choice(64, 64, 64, vectors=1, warps=8)),
        (64, 128, _choice(64, 64, 32, vectors=1)),
    )


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
    "tf32" or "tf32x3", the sum of three of them, about as exact as float32.
    """
    arguments = _arguments({"q": q, "k": k, "v": v, "o": o}, {"lse": lse, "mask": mask}, scale, precision)
    _launch(forward_kernel, forward_configurations, arguments)


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
    operands: dict[str, Tensor | None] = {"q": q, "k": k, "v": v, "o": o, "result": result}
    operands |= {"dq": dq, "dk": dk, "dv": dv}
    arguments = _arguments(operands, {"lse": lse, "mask": mask}, scale, precision, result.shape[0])
    _launch(tangent_kernel, tangent_configurations, arguments)


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
    moving = grad_q is not None or grad_k is not None
    along = torch.empty(cotangent.shape[:-1], dtype=torch.float32, device=q.device) if moving else None
    operands: dict[str, Tensor | None] = {"q": q, "k": k, "v": v, "o": o, "cotangent": cotangent}
    operands |= {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v}
    others: dict[str, Tensor | None] = {"lse": lse, "mask": mask, "along": along}
    arguments = _arguments(operands, others, scale, precision, cotangent.shape[0])
    if moving:
        _launch(along_kernel, along_configurations, arguments)
    if grad_q is not None:
        _launch(adjoint_queries_kernel, adjoint_queries_configurations, arguments)
    if grad_k is not None or grad_v is not None:
        _launch(adjoint_keys_kernel, adjoint_keys_configurations, arguments, "BLOCK_S")


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
        strides = () if tensor is None else _strides(tensor)[:-1]
        padding = (0,) * (4 - len(strides))
        arguments |= {name: tensor, f"{name}_strides": (*padding, *(stride // unit for stride in strides))}
    for name, tensor in others.items():
        strides = () if tensor is None else _strides(tensor)
        padding = (0,) * ((5 if name == "mask" else 4) - len(strides))
        arguments |= {name: tensor, f"{name}_strides": (*padding, *strides)}
    return arguments | {
        "count": count,
        "heads": q.shape[1],
        "length": q.shape[2],
        "keys": k.shape[2],
        "scale": float(scale),
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
    kernel: Any,
    configurations: Callable[[int, int, str, int], list[triton.Config]],
    arguments: Mapping[str, Any],
    block: str = "BLOCK_L",
) -> None:
    """Run a program for each block of rows, each chunk of tangents and each head."""
    q, count = arguments["q"], arguments["count"]
    rows = arguments["keys" if block == "BLOCK_S" else "length"]

    def grid(constants: Mapping[str, Any]) -> tuple[int, ...]:
        chunks = triton.cdiv(count, constants.get("VECTORS", 1))
        return (triton.cdiv(rows, constants[block]) * chunks * q.shape[0] * q.shape[1],)

    width = max(arguments["WIDTH"], arguments["VALUE_WIDTH"])
    choices = configurations(width, q.element_size(), arguments["PRECISION"], count)
    taken = {name: arguments[name] for name in kernel.arg_names if name in arguments}
    run(kernel, grid, taken, choices, [name for name in _KEY if name in taken])
