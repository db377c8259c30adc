"""Attention on the cpu backend: checks tensors and hands their addresses and strides to the C++ kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cpu.layout import DTYPES, computable, dtype_code, statistics_dtype
from sharpcore.backends.cpu.native import extension
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
from sharpcore.backends.launches import launch
from sharpcore.backends.output import check_out, deliver
from sharpcore.backends.reference.attention_tangent import attention_targets

# The kernels know a mask's dtype by its place here: `MaskDtype` in attention_tangent.h.
_MASK_DTYPES = (*DTYPES, torch.bool)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As its namesake in sharpcore.backends.reference; [B, L, H, Ev] of the output is contiguous.

    `out` is written without a copy where the entries of its rows are adjacent.
    """
    given = () if out is None else out
    native = extension()
    if native is None or not _computable([q, k, v, *given[:1]], [*given[1:]], mask):
        return reference.KERNELS["attention_forward"](q, k, v, mask=mask, scale=scale, out=out)
    shape = (*q.shape[:-1], *v.shape[-1:])
    check_operands(q, k, v)
    check_out(out and out[0], shape, q.dtype)
    check_out(out and out[1], q.shape[:-1], statistics_dtype(q.dtype))
    o = results(out and out[0], q, shape)
    lse = out[1] if out else q.new_empty(q.shape[:-1], dtype=statistics_dtype(q.dtype))
    direct = is_viewable(lse.unsqueeze(-1), 0, adjacent=False)
    statistics = lse if direct else torch.empty_like(lse, memory_format=torch.contiguous_format)
    if lse.numel():
        kept = _AttentionPrimal(q, k, v, o, statistics, mask, scale)
        launch(native.attention_forward, kept.alive, **kept.arguments, threads=torch.get_num_threads())
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
) -> Tensor:
    """As its namesake in sharpcore.backends.reference; [K, B, L, H, Ev] of the result is contiguous.

    `out` is written without a copy where the entries of its rows are adjacent.
    """
    tangents = (dq, dk, dv)
    native = extension()
    lse = _statistics(lse, q.dtype)
    if native is None or not _computable([q, k, v, o, *present(*tangents, out)], [lse], mask):
        kernel = reference.KERNELS["attention_tangent"]
        return kernel(q, k, v, o, lse, dq, dk, dv, mask=mask, scale=scale, out=out)
    check_operands(q, k, v)
    check_primal_results(q, v, o, lse)
    count = check_tangents(tangents, (q, k, v))
    shape = (count, *q.shape[:-1], v.shape[-1])
    check_out(out, shape, q.dtype)

    kept = _AttentionPrimal(q, k, v, o, lse, mask, scale)
    result = results(out, q, shape, 1)
    if result.numel():
        operands = [None if t is None else as_heads(t, 1) for t in (result, dq, dk, dv)]
        launch(
            native.attention_tangent,
            (*kept.alive, *operands),
            **kept.arguments,
            **dict(zip(("result", "dq", "dk", "dv"), map(_operand, operands), strict=True)),
            count=count,
            threads=torch.get_num_threads(),
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As its namesake in sharpcore.backends.reference; the results lie in memory as attention_tangent's.

    Each of `out` is written without a copy where the entries of its rows are adjacent.
    """
    targets = attention_targets(needed, out)
    native = extension()
    lse = _statistics(lse, q.dtype)
    if native is None or not _computable([q, k, v, o, cotangent, *present(*targets)], [lse], mask):
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
    if 0 in (*cotangent.shape, k.shape[-2], q.shape[-1]):
        for grad in present(*grads):
            grad.zero_()
    elif any(needed):
        kept = _AttentionPrimal(q, k, v, o, lse, mask, scale)
        operands = [None if t is None else as_heads(t, 1) for t in (cotangent, *grads)]
        launch(
            native.attention_adjoint,
            (*kept.alive, *operands),
            **kept.arguments,
            **dict(zip(("cotangent", "grad_q", "grad_k", "grad_v"), map(_operand, operands), strict=True)),
            count=count,
            threads=torch.get_num_threads(),
        )
    dq, dk, dv = (
        None if grad is None else deliver(grad, target) for grad, target in zip(grads, targets, strict=True)
    )
    return dq, dk, dv


class _AttentionPrimal:
    """The primal operands as [B, H, rows, width], kept alive, and as arguments of the kernels."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, mask: Tensor | None, scale: float
    ) -> None:
        if mask is not None:
            mask = expanded_mask(mask, q, k)
        q, k, v, o = (as_heads(t, 0) for t in (q, k, v, o))
        lse = as_heads(lse.unsqueeze(-1), 0, adjacent=False)
        self.alive = (q, k, v, o, lse, mask)
        self.arguments: dict[str, Any] = {
            **{name: _operand(t) for name, t in (("q", q), ("k", k), ("v", v), ("out", o))},
            "lse": lse.data_ptr(),
            "lse_strides": lse.stride()[:3],
            "mask": 0 if mask is None else mask.data_ptr(),
            "mask_strides": (0, 0, 0, 0) if mask is None else mask.stride(),
            "mask_dtype": _MASK_DTYPES.index(q.dtype if mask is None else mask.dtype),
            "scale": scale,
            "dtype": dtype_code(q.dtype),
            "sizes": (*q.shape[:3], k.shape[2], q.shape[3], v.shape[3]),
        }


def _computable(tensors: Sequence[Tensor], statistics: Sequence[Tensor], mask: Tensor | None) -> bool:
    """Whether the kernels take these; the mask may be boolean, or have the dtype of the tensors or of their
    statistics."""
    if mask is not None:
        if mask.dtype == torch.bool:
            if not mask.is_cpu:
                return False
        elif mask.dtype == tensors[0].dtype:
            tensors = [*tensors, mask]
        else:
            statistics = [*statistics, mask]
    return computable(tensors, statistics)


def _statistics(lse: Tensor, dtype: torch.dtype) -> Tensor:
    return lse.float() if lse.dtype == dtype == torch.bfloat16 else lse


def _operand(tensor: Tensor | None) -> tuple[int, tuple[int, ...]]:
    """Address and strides of [B, H, rows, width] or [K, B, H, rows, width], without that of the width."""
    if tensor is None:
        return 0, (0, 0, 0, 0)
    return tensor.data_ptr(), (*((0,) if tensor.ndim == 4 else ()), *tensor.stride()[:-1])
