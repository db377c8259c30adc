"""Attention with its row statistics, its tangents and its transpose in plain PyTorch, in blocks of rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sharpcore.backends.output import deliver
from sharpcore.errors import InvalidInput

aten = torch.ops.aten

# Entries of the largest intermediate of a block: it stays in a CPU's last-level cache, and an N x N matrix
# never exists.
_BLOCK_ENTRIES = 1 << 19


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + mask) v, and the log-sum-exp of each row.

    q [..., L, E], k [..., S, E], v [..., S, Ev] with the same leading axes; mask broadcasts to [..., L, S]:
    numbers that are added to the scores, or booleans (True: the key takes part). Returns o [..., L, Ev] and
    lse [..., L]; a row whose scores are all -inf gives zeros and lse = -inf. 16-bit inputs are computed in
    float32, and their lse is float32. `out` takes the two results, any strides; no memory of the arguments.
    Raises InvalidInput where one of `out` has another shape or dtype, or the mask holds integers.
    """
    dtype = q.dtype
    o, lse = _forward(_wide(q), _wide(k), _wide(v), _wide_mask(mask, q.dtype), scale)
    o = o.to(dtype)
    return (o, lse) if out is None else (deliver(o, out[0]), deliver(lse, out[1]))


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu" and q.dim() == 4 and _flash_fits(q, k, v, mask):
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=mask, scale=scale
        )
        # With few keys the fused kernel takes a NaN among the queries for a masked row.
        if bool(torch.isnan(q).any()):
            lse = _row_logsumexp(q, k, mask, scale)
            return o.masked_fill(torch.isnan(lse).unsqueeze(-1), float("nan")), lse
        if mask is None or not bool(torch.isneginf(mask).any()):
            return o, lse
        lse = _row_logsumexp(q, k, mask, scale)
        return o.masked_fill(torch.isneginf(lse).unsqueeze(-1), 0), lse
    lse = _row_logsumexp(q, k, mask, scale)
    if q.device.type == "cpu":
        # A row without any admissible key is NaN in PyTorch's mathematical attention and zero in its fused
        # one.
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return o.masked_fill(torch.isneginf(lse).unsqueeze(-1), 0), lse
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), lse


def _wide(x: Tensor) -> Tensor:
    """In float32 if it has 16 bits."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean attention mask (True: the key takes part) as what is added to the scores, 0 or -inf.

    Raises InvalidInput where the mask holds neither booleans nor floating-point numbers.
    """
    if mask.dtype.is_floating_point:
        return mask
    if mask.dtype != torch.bool:
        raise InvalidInput(f"mask: expected booleans or floating-point numbers, got {mask.dtype}")
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def _wide_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores of tensors of `dtype`, with the two axes of the scores at least."""
    return None if mask is None else torch.atleast_2d(_wide(additive_mask(mask, dtype)))


def _flash_fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether PyTorch's fused CPU attention, which returns the row statistics as well, takes these
    operands."""
    return (
        q.dtype in (torch.float32, torch.float64)
        and q.dtype == k.dtype == v.dtype
        and q.shape[-1] == v.shape[-1]
        and 0 not in q.shape
        and 0 not in k.shape
        and (mask is None or (mask.dtype == q.dtype and mask.dim() in (2, 4)))
        and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    )


def _row_logsumexp(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    lse = q.new_empty(q.shape[:-1])
    for rows in _row_blocks(q.shape[-2], q.shape[:-2].numel() * k.shape[-2]):
        scores = _scores(q, k, mask, scale, rows)
        lse[..., rows] = torch.logsumexp(scores, -1)
    return lse


def _head_blocks(heads: int, length: int, entries_per_row: int) -> list[slice]:
    """Few enough (batch, head) pairs at a time that blocks of some 64 rows of them fit."""
    size = max(1, _BLOCK_ENTRIES // max(1, min(length, 64) * entries_per_row))
    return [slice(start, min(start + size, heads)) for start in range(0, heads, size)]


def _part(x: Tensor | None, heads: slice) -> Tensor | None:
    return x if x is None or x.shape[0] == 1 else x[heads]


def _row_blocks(length: int, entries_per_row: int) -> list[slice]:
    size = max(1, min(length, _BLOCK_ENTRIES // max(1, entries_per_row)))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, rows: slice) -> Tensor:
    scores = (q[..., rows, :] * scale) @ k.mT
    if mask is not None:
        scores = scores + (mask if mask.shape[-2] == 1 else mask[..., rows, :])
    return scores


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse) in place, zero in rows that have no admissible key."""
    shift = lse.masked_fill(torch.isneginf(lse), 0) if lse.dtype.is_floating_point else lse
    return scores.sub_(shift.unsqueeze(-1)).exp_()


def _flat(x: Tensor, leading: int) -> Tensor:
    """Merge the axes between the `leading` first ones and the last two into one."""
    return x.reshape(*x.shape[:leading], x.shape[leading:-2].numel(), *x.shape[-2:])


def _flat_mask(mask: Tensor | None, batch: torch.Size, length: int, keys: int) -> Tensor | None:
    if mask is None:
        return None
    if mask.shape[:-2].numel() == 1:
        return mask.reshape(1, *mask.shape[-2:])
    return mask.expand(*batch, *mask.shape[-2:]).reshape(batch.numel(), *mask.shape[-2:])


def attention_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    *,
    mask: Tensor | None,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """The tangents of attention's output for K tangents of its operands.

    q, k, v, mask, scale as in `attention_forward`, o and lse as it returned them; dq [K, ..., L, E], dk [K,
    ..., S, E], dv [K, ..., S, Ev], None where an operand carries no tangent. Returns [K, ..., L, Ev]; 16-bit
    inputs are computed in float32. `out` takes the result, any strides; no memory of the arguments. Raises
    InvalidInput where `out` has another shape or dtype.

    With G = P * S' the softmax tangent applied to V is G V - rowsum(G) O: the row sums come from the same
    product, by a column of ones beside V.
    """
    given = next(t for t in (dq, dk, dv) if t is not None)
    count, batch, length, keys = given.shape[0], q.shape[:-2], q.shape[-2], k.shape[-2]
    width, dtype = v.shape[-1], q.dtype
    q, k, v, o = (_flat(_wide(t), 0) for t in (q, k, v, o))
    g = q.shape[0]
    lse = _wide(lse).reshape(g, length)
    mask = _flat_mask(_wide_mask(mask, dtype), batch, length, keys)
    # Tangents as [g, K, rows, width]: the primal tile of a (batch, head) is shared by its K tangents.
    dq, dk, dv = (None if t is None else _flat(_wide(t), 1).transpose(0, 1) for t in (dq, dk, dv))
    result = q.new_empty(g, count, length, width)
    for heads in _head_blocks(g, length, keys * (count + 1)):
        operands: Any = [_part(t, heads) for t in (q, k, v, o, lse, dq, dk, dv, mask)]
        _tangent_of_heads(result[heads], *operands, scale=scale)
    return deliver(result.transpose(0, 1).reshape(count, *batch, length, width).to(dtype), out)


def _tangent_of_heads(
    result: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    mask: Tensor | None,
    *,
    scale: float,
) -> None:
    """Write the tangents of some (batch, head) pairs: operands [g, rows, width], tangents and result [g, K,
    rows, width]."""
    g, count, length, width = result.shape
    keys = k.shape[1]
    moving = dq is not None or dk is not None
    left_all: Tensor | None
    right: Any
    if dq is not None and dk is not None:
        left_all = torch.cat([dq, q.unsqueeze(1).expand_as(dq)], -1) * scale
        right = torch.cat([k.unsqueeze(1).expand_as(dk), dk], -1).flatten(0, 1).mT
    elif dq is not None:
        left_all, right = dq * scale, k.mT
    elif dk is not None:
        left_all, right = None, dk.reshape(g, count * keys, dk.shape[-1]).mT
    v_ones = torch.cat([v, v.new_ones(g, keys, 1)], -1)
    dv_columns = None if dv is None else dv.permute(0, 2, 1, 3).reshape(g, keys, count * width)
    for rows in _row_blocks(length, g * keys * (count + 1)):
        size = rows.stop - rows.start
        p = _probabilities(_scores(q, k, mask, scale, rows), lse[:, rows])
        block: Any = None
        if moving:
            if left_all is None:
                ds = ((q[:, rows] * scale) @ right).view(g, size, count, keys).transpose(1, 2)
                weighted = ds * p.unsqueeze(1)
            else:
                left = left_all[:, :, rows]
                folded = left.reshape(
                    right.shape[0], size if dk is not None else count * size, left.shape[-1]
                )
                ds = torch.bmm(folded, right).view(g, count, size, keys)
                weighted = ds.mul_(p.unsqueeze(1))
            product = torch.bmm(weighted.reshape(g, count * size, keys), v_ones).view(
                g, count, size, width + 1
            )
            block = product[..., :width] - product[..., width:] * o[:, None, rows]
        if dv_columns is not None:
            moved = torch.bmm(p, dv_columns).view(g, size, count, width).transpose(1, 2)
            block = moved if block is None else block.add_(moved)
        result[:, :, rows] = block


def attention_adjoint(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cotangent: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
    needed: tuple[bool, bool, bool],
    out: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The transpose of `attention_tangent`: K cotangents of the output pulled back to q, k and v.

    cotangent [K, ..., L, Ev]; `needed` says for which of q, k, v a result is wanted. Returns [K, ..., L, E],
    [K, ..., S, E], [K, ..., S, Ev], None where not needed; 16-bit inputs are computed in float32. `out` takes
    the results that are needed, any strides; no memory of the arguments. Raises InvalidInput where one of
    `out` has another shape or dtype.
    """
    count, batch, length, keys = cotangent.shape[0], q.shape[:-2], q.shape[-2], k.shape[-2]
    shapes, dtype, targets = (q.shape, k.shape, v.shape), q.dtype, attention_targets(needed, out)
    q, k, v, o = (_flat(_wide(t), 0) for t in (q, k, v, o))
    g, width = q.shape[0], v.shape[-1]
    lse = _wide(lse).reshape(g, length)
    mask = _flat_mask(_wide_mask(mask, dtype), batch, length, keys)
    cot = _flat(_wide(cotangent), 1).transpose(0, 1)
    along = (cot * o.unsqueeze(1)).sum(-1, keepdim=True)
    need_q, need_k, need_v = needed
    grad_q = q.new_empty(g, count, length, q.shape[-1]) if need_q else None
    grad_k = q.new_zeros(g, count, keys, q.shape[-1]) if need_k else None
    grad_v = q.new_zeros(g, count, keys, width) if need_v else None
    for heads in _head_blocks(g, length, keys * (count + 1)):
        operands: Any = [_part(t, heads) for t in (q, k, v, lse, cot, along, mask)]
        grads: Any = [_part(t, heads) for t in (grad_q, grad_k, grad_v)]
        _adjoint_of_heads(*grads, *operands, scale=scale)
    return tuple(  # type: ignore[return-value]
        None if grad is None else deliver(grad.transpose(0, 1).reshape(count, *shape).to(dtype), target)
        for grad, shape, target in zip((grad_q, grad_k, grad_v), shapes, targets, strict=True)
    )


def attention_targets(
    needed: tuple[bool, bool, bool], out: tuple[Tensor | None, Tensor | None, Tensor | None] | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Where the results of `attention_adjoint` are wanted: `out` without what is not needed."""
    given = (None, None, None) if out is None else out
    dq, dk, dv = (target if wanted else None for target, wanted in zip(given, needed, strict=True))
    return dq, dk, dv


def _adjoint_of_heads(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    cot: Tensor,
    along: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
) -> None:
    """Fill the gradients of some (batch, head) pairs: operands [g, rows, width], cotangents and gradients [g,
    K, rows, width]."""
    g, count, length, width = cot.shape
    keys = k.shape[1]
    for rows in _row_blocks(length, g * keys * (count + 1)):
        size = rows.stop - rows.start
        p = _probabilities(_scores(q, k, mask, scale, rows), lse[:, rows])
        block = cot[:, :, rows].reshape(g, count * size, width)
        if grad_v is not None:
            columns = cot[:, :, rows].transpose(1, 2).reshape(g, size, count * width)
            grad_v += (p.mT @ columns).view(g, keys, count, width).transpose(1, 2)
        if grad_q is not None or grad_k is not None:
            ds = (block @ v.mT).view(g, count, size, keys)
            ds = ds.sub_(along[:, :, rows]).mul_(p.unsqueeze(1)).mul_(scale)
            if grad_q is not None:
                grad_q[:, :, rows] = (ds.view(g, count * size, keys) @ k).view(g, count, size, k.shape[-1])
            if grad_k is not None:
                grad_k += ds.mT @ q[:, None, rows]
