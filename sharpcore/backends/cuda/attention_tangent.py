"""Attention on the cuda backend: checks tensors and launches the Triton kernels on views of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cuda.layout import computable
from sharpcore.backends.heads import (
    as_heads,
    check_cotangent,
    check_operands,
    check_primal_results,
    check_tangents,
    expanded_mask,
    is_viewable,
    present,
    results,
)
from sharpcore.backends.output import check_out, deliver
from sharpcore.backends.reference.attention_tangent import additive_mask, attention_targets
from sharpcore.kernels import attention_tangent as launches

# To a type checker an unpacked generator is any number of arguments.
kernels: Any = launches

# Offsets within a tile of rows are 32-bit numbers.
_LARGEST_STEP = 1 << 24


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
    out: tuple[Tensor, Tensor] | None = None,
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """As its namesake in sharpcore.backends.reference; [B, L, H, Ev] of the output is contiguous.

    `out` is written without a copy where the entries of its rows are adjacent. Products of float32 are
    sums of three products of its high and low halves on tensor cores, about as exact as float32 itself; with
    `tf32` one product, of 11 bits.
    """
    mask = None if mask is None else additive_mask(mask, q.dtype)
    given = () if out is None else out
    if not _takes([q, k, v, *given[:1]], [*given[1:]], mask):
        return reference.KERNELS["attention_forward"](q, k, v, mask=mask, scale=scale, out=out)
    shape = (*q.shape[:-1], *v.shape[-1:])
    check_operands(q, k, v)
    check_out(out and out[0], shape, q.dtype)
    check_out(out and out[1], q.shape[:-1], torch.float32)
    o = results(out and out[0], q, shape)
    lse = out[1] if out else q.new_empty(q.shape[:-1], dtype=torch.float32)
    direct = is_viewable(lse.unsqueeze(-1), 0, adjacent=False)
    statistics = lse if direct else torch.empty_like(lse, memory_format=torch.contiguous_format)
    if lse.numel():
        kernels.attention_forward(
            *(as_heads(t, 0) for t in (q, k, v, o)),
            _rows(statistics),
            mask=None if mask is None else expanded_mask(mask, q, k),
            scale=scale,
            precision=_precision(tf32),
        )
    return deliver(o, out and out[0]), deliver(statistics, lse)


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
    tf32: bool = False,
) -> Tensor:
    """As its namesake in sharpcore.backends.reference; [K, B, L, H, Ev] of the result is contiguous.

    `out` is written without a copy where the entries of its rows are adjacent. `tf32` as in
    attention_forward.
    """
    mask = None if mask is None else additive_mask(mask, q.dtype)
    tangents = (dq, dk, dv)
    lse = _statistics(lse, q.dtype)
    if not _takes([q, k, v, o, *present(*tangents, out)], [lse], mask):
        kernel = reference.KERNELS["attention_tangent"]
        return kernel(q, k, v, o, lse, dq, dk, dv, mask=mask, scale=scale, out=out)
    check_operands(q, k, v)
    check_primal_results(q, v, o, lse)
    shape = (check_tangents(tangents, (q, k, v)), *q.shape[:-1], v.shape[-1])
    check_out(out, shape, q.dtype)
    result = results(out, q, shape, 1)
    if result.numel():
        kernels.attention_tangent(
            *(as_heads(t, 0) for t in (q, k, v, o)),
            _rows(lse),
            *(None if t is None else as_heads(t, 1) for t in tangents),
            as_heads(result, 1),
            mask=None if mask is None else expanded_mask(mask, q, k),
            scale=scale,
            precision=_precision(tf32),
        )
    return deliver(result, out)


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
    tf32: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As its namesake in sharpcore.backends.reference; the results lie in memory as attention_tangent's.

    Each of `out` is written without a copy where the entries of its rows are adjacent. `tf32` as in
    attention_forward.
    """
    mask = None if mask is None else additive_mask(mask, q.dtype)
    targets = attention_targets(needed, out)
    lse = _statistics(lse, q.dtype)
    if not _takes([q, k, v, o, cotangent, *present(*targets)], [lse], mask):
        kernel = reference.KERNELS["attention_adjoint"]
        return kernel(q, k, v, o, lse, cotangent, mask=mask, scale=scale, needed=needed, out=out)
    check_operands(q, k, v)
    check_primal_results(q, v, o, lse)
    count = check_cotangent(cotangent, o)
    shapes = [(count, *primal.shape) for primal in (q, k, v)]
    for target, shape in zip(targets, shapes, strict=True):
        check_out(target, shape, q.dtype)
    grads = [
        results(target, q, shape, 1) if wanted else None
        for target, shape, wanted in zip(targets, shapes, needed, strict=True)
    ]
    if 0 in (*cotangent.shape, k.shape[-2]):
        for grad in present(*grads):
            grad.zero_()
    elif any(needed):
        kernels.attention_adjoint(
            *(as_heads(t, 0) for t in (q, k, v, o)),
            _rows(lse),
            as_heads(cotangent, 1),
            *(None if grad is None else as_heads(grad, 1) for grad in grads),
            mask=None if mask is None else expanded_mask(mask, q, k),
            scale=scale,
            precision=_precision(tf32),
        )
    dq, dk, dv = (
        None if grad is None else deliver(grad, target) for grad, target in zip(grads, targets, strict=True)
    )
    return dq, dk, dv


def _takes(tensors: Sequence[Tensor], statistics: Sequence[Tensor], mask: Tensor | None) -> bool:
    """Whether the kernels take these; the mask may have the dtype of the tensors or of their statistics."""
    if any(t.ndim > 1 and t.stride(-2) > _LARGEST_STEP for t in tensors):
        return False
    if not all(0 < t.shape[-1] <= kernels.LARGEST_WIDTH for t in tensors if t.ndim):
        return False
    if mask is None:
        return computable(tensors, statistics)
    if mask.dtype == tensors[0].dtype:
        return computable([*tensors, mask], statistics)
    return computable(tensors, [*statistics, mask])


def _precision(tf32: bool) -> str:
    return "tf32" if tf32 else "tf32x3"


def _statistics(lse: Tensor, dtype: torch.dtype) -> Tensor:
    return lse.float() if lse.dtype == dtype and dtype.itemsize == 2 else lse


def _rows(lse: Tensor) -> Tensor:
    """[..., L] as [B, H, L]."""
    return as_heads(lse.unsqueeze(-1), 0, adjacent=False).squeeze(-1)
