"""Attention on the cpu backend: checks tensors and hands their addresses and strides to the C++ kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cpu.layout import computable, dtype_code, statistics_dtype
from sharpcore.backends.cpu.native import extension
from sharpcore.backends.launches import launch
from sharpcore.backends.output import check_out, deliver
from sharpcore.backends.reference.attention_tangent import attention_targets
from sharpcore.errors import InvalidInput


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
    _check_attention(q, k, v)
    check_out(out and out[0], shape, q.dtype)
    check_out(out and out[1], q.shape[:-1], statistics_dtype(q.dtype))
    o = _results(out and out[0], q, shape)
    lse = out[1] if out else q.new_empty(q.shape[:-1], dtype=statistics_dtype(q.dtype))
    direct = _viewable(lse.unsqueeze(-1), 0, adjacent=False)
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
    given = [t for t in tangents if t is not None]
    native = extension()
    lse = _statistics(lse, q.dtype)
    if native is None or not _computable([q, k, v, o, *given, *_present(out)], [lse], mask):
        kernel = reference.KERNELS["attention_tangent"]
        return kernel(q, k, v, o, lse, dq, dk, dv, mask=mask, scale=scale, out=out)
    _check_attention(q, k, v)
    _check_primal_results(q, v, o, lse)
    if not given:
        raise InvalidInput("dq, dk, dv: expected at least one tangent, got None for all")
    count = given[0].shape[0]
    for name, tangent, primal in zip(("dq", "dk", "dv"), tangents, (q, k, v), strict=True):
        if tangent is not None and tangent.shape != (count, *primal.shape):
            raise InvalidInput(f"{name}: expected shape {[count, *primal.shape]}, got {list(tangent.shape)}")
    shape = (count, *q.shape[:-1], v.shape[-1])
    check_out(out, shape, q.dtype)

    kept = _AttentionPrimal(q, k, v, o, lse, mask, scale)
    result = _results(out, q, shape, 1)
    if result.numel():
        operands = [None if t is None else _as_heads(t, 1) for t in (result, dq, dk, dv)]
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
    if native is None or not _computable([q, k, v, o, cotangent, *_present(*targets)], [lse], mask):
        kernel = reference.KERNELS["attention_adjoint"]
        return kernel(q, k, v, o, lse, cotangent, mask=mask, scale=scale, needed=needed, out=out)
    _check_attention(q, k, v)
    _check_primal_results(q, v, o, lse)
    count = cotangent.shape[0] if cotangent.ndim else 0
    if cotangent.shape != (count, *o.shape):
        raise InvalidInput(
            f"cotangent: expected shape [K, *o.shape], o.shape = {list(o.shape)}, got {list(cotangent.shape)}"
        )
    shapes = [(count, *primal.shape) for primal in (q, k, v)]
    for target, shape in zip(targets, shapes, strict=True):
        check_out(target, shape, q.dtype)
    grads = [
        _results(target, q, shape, 1) if wanted else None
        for target, shape, wanted in zip(targets, shapes, needed, strict=True)
    ]
    if 0 in (*cotangent.shape, k.shape[-2], q.shape[-1]):
        for grad in _present(*grads):
            grad.zero_()
    elif any(needed):
        kept = _AttentionPrimal(q, k, v, o, lse, mask, scale)
        operands = [None if t is None else _as_heads(t, 1) for t in (cotangent, *grads)]
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
            scores = (*q.shape[:-1], k.shape[-2])
            try:
                mask = mask.expand(scores)
            except RuntimeError:
                raise InvalidInput(
                    f"mask: expected a shape that broadcasts to {list(scores)}, got {list(mask.shape)}"
                ) from None
            mask = _as_heads(mask, 0, adjacent=False)
        q, k, v, o = (_as_heads(t, 0) for t in (q, k, v, o))
        lse = _as_heads(lse.unsqueeze(-1), 0, adjacent=False)
        self.alive = (q, k, v, o, lse, mask)
        self.arguments: dict[str, Any] = {
            **{name: _operand(t) for name, t in (("q", q), ("k", k), ("v", v), ("out", o))},
            "lse": lse.data_ptr(),
            "lse_strides": lse.stride()[:3],
            "mask": 0 if mask is None else mask.data_ptr(),
            "mask_strides": (0, 0, 0, 0) if mask is None else mask.stride(),
            "mask_dtype": dtype_code(q.dtype if mask is None else mask.dtype),
            "scale": scale,
            "dtype": dtype_code(q.dtype),
            "sizes": (*q.shape[:3], k.shape[2], q.shape[3], v.shape[3]),
        }


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _computable(tensors: Sequence[Tensor], statistics: Sequence[Tensor], mask: Tensor | None) -> bool:
    """Whether the kernels take these; the mask may have the dtype of the tensors or of their statistics."""
    if mask is not None:
        if mask.dtype == tensors[0].dtype:
            tensors = [*tensors, mask]
        else:
            statistics = [*statistics, mask]
    return computable(tensors, statistics)


def _statistics(lse: Tensor, dtype: torch.dtype) -> Tensor:
    return lse.float() if lse.dtype == dtype == torch.bfloat16 else lse


def _viewable(tensor: Tensor, leading: int, *, adjacent: bool = True) -> bool:
    """Whether :func:`_as_heads` gives a view."""
    shape, stride = tensor.shape[leading:-3], tensor.stride()[leading:-3]
    merges = all(
        size == 1 or outer == size * inner
        for size, inner, outer in zip(shape[1:], stride[1:], stride[:-1], strict=True)
    )
    return merges and (not adjacent or tensor.stride(-1) == 1 or tensor.shape[-1] == 1)


def _results(out: Tensor | None, like: Tensor, shape: tuple[int, ...], leading: int = 0) -> Tensor:
    """What the kernel writes: `out` where it can."""
    if out is not None and _viewable(out, leading):
        return out
    return _empty_heads(like, shape)


def _as_heads(tensor: Tensor, leading: int, *, adjacent: bool = True) -> Tensor:
    """[*leading, ..., rows, width] as [*leading, B, H, rows, width]: a view if possible.

    With ``adjacent`` the entries of a row are adjacent in memory.
    """
    middle = tensor.ndim - leading - 2
    for _ in range(middle, 2):
        tensor = tensor.unsqueeze(leading)
    if middle > 2:
        tensor = tensor.flatten(leading, -4)
    return tensor if not adjacent or tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _empty_heads(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[K, ..., H, rows, width], uninitialized, of which [K, ..., rows, H, width] is contiguous."""
    if len(shape) < 4:
        return like.new_empty(shape)
    return like.new_empty((*shape[:-3], shape[-2], shape[-3], shape[-1])).transpose(-3, -2)


def _operand(tensor: Tensor | None) -> tuple[int, tuple[int, ...]]:
    """Address and strides of [B, H, rows, width] or [K, B, H, rows, width], without that of the width."""
    if tensor is None:
        return 0, (0, 0, 0, 0)
    return tensor.data_ptr(), (*((0,) if tensor.ndim == 4 else ()), *tensor.stride()[:-1])


def _check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse shapes with which the kernels would read outside their tensors."""
    if q.ndim < 2:
        raise InvalidInput(f"q: expected shape [..., L, E], got {list(q.shape)}")
    leading, width = q.shape[:-2], q.shape[-1]
    if k.ndim < 2 or k.shape != (*leading, k.shape[-2], width):
        raise InvalidInput(f"k: expected shape {[*leading, 'S', width]}, got {list(k.shape)}")
    if v.ndim < 2 or v.shape != (*leading, k.shape[-2], v.shape[-1]):
        raise InvalidInput(f"v: expected shape {[*leading, k.shape[-2], 'Ev']}, got {list(v.shape)}")


def _check_primal_results(q: Tensor, v: Tensor, o: Tensor, lse: Tensor) -> None:
    if o.shape != (*q.shape[:-1], v.shape[-1]):
        raise InvalidInput(f"o: expected shape {[*q.shape[:-1], v.shape[-1]]}, got {list(o.shape)}")
    if lse.shape != q.shape[:-1]:
        raise InvalidInput(f"lse: expected shape {list(q.shape[:-1])}, got {list(lse.shape)}")
