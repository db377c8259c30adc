"""GEGLU, its derivatives, and K tangents or cotangents through them, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sharpcore.backends.output import deliver


def geglu_forward(
    projection: Tensor, approximate: str, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """y = h * gelu(g), with [h | g] the halves of the projection's last axis, and its two derivatives.

    GEGLU (Shazeer, 2020, equation 6).

    Args:
        projection: [..., 2 C], h beside g, any floating dtype.
        approximate: "none" for GELU by the normal distribution, "tanh" for its approximation.
        out: where the two results go, of their shapes and dtypes; the second may be ``projection``.

    Returns:
        y, [..., C], and the factors [dy/dh | dy/dg] = [gelu(g) | h * gelu'(g)], [..., 2 C], both of the
        projection's dtype; 16-bit inputs are computed in float32.

    Raises:
        InvalidInput: ``out`` has other shapes or dtypes.
    """
    hidden, gate = projection.to(torch.promote_types(projection.dtype, torch.float32)).chunk(2, -1)
    activated = F.gelu(gate, approximate=approximate)
    slope = torch.ops.aten.gelu_backward(hidden, gate, approximate=approximate)
    value, factors = activated * hidden, torch.cat([activated, slope], -1)
    to_value, to_factors = (None, None) if out is None else out
    dtype = projection.dtype
    return deliver(value.to(dtype), to_value), deliver(factors.to(dtype), to_factors)


def geglu_tangent(tangent: Tensor, factors: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Push K tangents through y = h * gelu(g): ``y' = dy/dh * h' + dy/dg * g'``.

    Args:
        tangent: [K, ..., 2 C], h' beside g', any floating dtype.
        factors: [..., 2 C], dy/dh beside dy/dg, as :func:`geglu_forward` gives them.
        out: [K, ..., C] of the tangent's dtype, where the result goes.

    Returns:
        [K, ..., C], dtype of ``tangent``; 16-bit inputs are computed in float32.

    Raises:
        InvalidInput: ``out`` has another shape or dtype.
    """
    by_hidden, by_gate = _computed(factors).chunk(2, -1)
    hidden, gate = tangent.to(by_hidden.dtype).chunk(2, -1)
    return deliver(torch.addcmul(hidden * by_hidden, gate, by_gate).to(tangent.dtype), out)


def geglu_adjoint(cotangent: Tensor, factors: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Pull K cotangents back through GEGLU: the transpose of the tangent map.

    ``[dy/dh * u | dy/dg * u]``; ``cotangent`` u is [K, ..., C], the rest as in :func:`geglu_tangent`.

    Returns:
        [K, ..., 2 C], dtype of ``cotangent``.
    """
    by_hidden, by_gate = _computed(factors).chunk(2, -1)
    given = cotangent.to(by_hidden.dtype)
    return deliver(torch.cat([given * by_hidden, given * by_gate], -1).to(cotangent.dtype), out)


def _computed(factors: Tensor) -> Tensor:
    return factors.to(torch.promote_types(factors.dtype, torch.float32))
