"""Derivative of GEGLU for K tangents or cotangents, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def geglu_tangent(tangent: Tensor, projection: Tensor, approximate: str) -> Tensor:
    """Push K tangents through y = h * gelu(g), with [h | g] the halves of the projection's last axis.

    ``y' = gelu(g) * h' + h * gelu'(g) * g'``: the derivative of GEGLU (Shazeer, 2020, equation 6).

    Args:
        tangent: [K, ..., 2 C], any floating dtype.
        projection: [..., 2 C], h beside g.
        approximate: "none" for GELU by the normal distribution, "tanh" for its approximation.

    Returns:
        [K, ..., C], dtype of ``tangent``; 16-bit inputs are computed in float32.
    """
    by_hidden, by_gate = _factors(projection, approximate)
    hidden, gate = tangent.to(by_hidden.dtype).chunk(2, -1)
    return torch.addcmul(hidden * by_hidden, gate, by_gate).to(tangent.dtype)


def geglu_adjoint(cotangent: Tensor, projection: Tensor, approximate: str) -> Tensor:
    """Pull K cotangents back through GEGLU: the transpose of the tangent map.

    ``[gelu(g) * u | h * gelu'(g) * u]``; ``cotangent`` u is [K, ..., C], the rest as in
    :func:`geglu_tangent`.

    Returns:
        [K, ..., 2 C], dtype of ``cotangent``.
    """
    by_hidden, by_gate = _factors(projection, approximate)
    given = cotangent.to(by_hidden.dtype)
    return torch.cat([given * by_hidden, given * by_gate], -1).to(cotangent.dtype)


def _factors(projection: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """The derivatives of y with respect to h and to g, each [..., C]."""
    hidden, gate = projection.to(torch.promote_types(projection.dtype, torch.float32)).chunk(2, -1)
    slope = torch.ops.aten.gelu_backward(hidden, gate, approximate=approximate)
    return F.gelu(gate, approximate=approximate), slope
