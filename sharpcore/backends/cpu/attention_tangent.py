"""Attention on the cpu backend: checks tensors and hands their addresses and strides to the C++ kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cpu.layout import computable
from sharpcore.backends.cpu.native import extension
from sharpcore.errors import InvalidInput


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """As its namesake in sharpcore.backends.reference; [B, L, H, Ev] of the output is contiguous."""
    native = extension()
    if native is None or not computable([q, k, v, *([] if mask is None else [mask])]):
        return reference.KERNELS["attention_forward"](q, k, v, mask=mask, scale=scale)
    out = _empty_heads(q, (*q.shape[:-1], *v.shape[-1:]))
    lse = q.new_empty(q.shape[:-1])
    _check_attention(q, k, v, out, lse)
    if lse.numel():
        kept = _AttentionPrimal(q, k, v, out, lse, mask, scale)
        native.attention_forward(**kept.arguments, threads=torch.get_num_threads())
    return out, lse


def attention_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    *,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """As its namesake in sharpcore.backends.reference; [K, B, L, H, Ev] of the result is contiguous."""
    tangents = (dq, dk, dv)
    given = [t for t in tangents if t is not None]
    native = extension()
    if native is None or not computable([q, k, v, out, lse, *given, *([] if mask is None else [mask])]):
        return reference.KERNELS["attention_tangent"](q, k, v, out, lse, dq, dk, dv, mask=mask, scale=scale)
    _check_attention(q, k, v, out, lse)
    if not given:
        raise InvalidInput("dq, dk, dv: expected at least one tangent, got None for all")
    count = given[0].shape[0]
    for name, tangent, primal in zip(("dq", "dk", "dv"), tangents, (q, k, v), strict=True):
        if tangent is not None and tangent.shape != (count, *primal.shape):
            raise InvalidInput(f"{name}: expected shape {[count, *primal.shape]}, got {list(tangent.shape)}")

    leading = q.shape[:-2]
    kept = _AttentionPrimal(q, k, v, out, lse, mask, scale)
    result = _empty_heads(q, (count, *leading, q.shape[-2], v.shape[-1]))
    if result.numel() == 0:
        return result
    operands = [None if t is None else _as_heads(t, 1) for t in (result, dq, dk, dv)]
    native.attention_tangent(
        **kept.arguments,
        **dict(zip(("result", "dq", "dk", "dv"), map(_operand, operands), strict=True)),
        count=count,
        threads=torch.get_num_threads(),
    )
    return result


def attention_adjoint(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cotangent: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As its namesake in sharpcore.backends.reference; the results lie in memory as attention_tangent's."""
    native = extension()
    if native is None or not computable([q, k, v, out, lse, cotangent, *([] if mask is None else [mask])]):
        kernel = reference.KERNELS["attention_adjoint"]
        return kernel(q, k, v, out, lse, cotangent, mask=mask, scale=scale, needed=needed)
    _check_attention(q, k, v, out, lse)
    count = cotangent.shape[0] if cotangent.ndim else 0
    if cotangent.shape != (count, *out.shape):
        raise InvalidInput(
            f"cotangent: expected shape [K, *out.shape], out.shape = {list(out.shape)}, "
            f"got {list(cotangent.shape)}"
        )
    grads = [
        _empty_heads(q, (count, *primal.shape)) if wanted else None
        for primal, wanted in zip((q, k, v), needed, strict=True)
    ]
    if 0 in (*cotangent.shape, k.shape[-2], q.shape[-1]):
        grads = [None if grad is None else grad.zero_() for grad in grads]
    elif any(needed):
        kept = _AttentionPrimal(q, k, v, out, lse, mask, scale)
        operands = [None if t is None else _as_heads(t, 1) for t in (cotangent, *grads)]
        native.attention_adjoint(
            **kept.arguments,
            **dict(zip(("cotangent", "grad_q", "grad_k", "grad_v"), map(_operand, operands), strict=True)),
            count=count,
            threads=torch.get_num_threads(),
        )
    return grads[0], grads[1], grads[2]


class _AttentionPrimal:
    """The primal operands as [B, H, rows, width], kept alive, and as arguments of the kernels."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float
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
        q, k, v, out = (_as_heads(t, 0) for t in (q, k, v, out))
        lse = _as_heads(lse.unsqueeze(-1), 0, adjacent=False)
        self._alive = (q, k, v, out, lse, mask)
        self.arguments: dict[str, Any] = {
            **{name: _operand(t) for name, t in (("q", q), ("k", k), ("v", v), ("out", out))},
            "lse": lse.data_ptr(),
            "lse_strides": lse.stride()[:3],
            "mask": 0 if mask is None else mask.data_ptr(),
            "mask_strides": (0, 0, 0, 0) if mask is None else mask.stride(),
            "scale": scale,
            "float64": q.dtype == torch.float64,
            "sizes": (*q.shape[:3], k.shape[2], q.shape[3], v.shape[3]),
        }


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


def _check_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """Refuse shapes with which the kernels would read or write outside their tensors."""
    if q.ndim < 2:
        raise InvalidInput(f"q: expected shape [..., L, E], got {list(q.shape)}")
    leading, rows, width = q.shape[:-2], q.shape[-2], q.shape[-1]
    if k.ndim < 2 or k.shape != (*leading, k.shape[-2], width):
        raise InvalidInput(f"k: expected shape {[*leading, 'S', width]}, got {list(k.shape)}")
    if v.ndim < 2 or v.shape != (*leading, k.shape[-2], v.shape[-1]):
        raise InvalidInput(f"v: expected shape {[*leading, k.shape[-2], 'Ev']}, got {list(v.shape)}")
    if out.shape != (*leading, rows, v.shape[-1]):
        raise InvalidInput(f"out: expected shape {[*leading, rows, v.shape[-1]]}, got {list(out.shape)}")
    if lse.shape != (*leading, rows):
        raise InvalidInput(f"lse: expected shape {[*leading, rows]}, got {list(lse.shape)}")
