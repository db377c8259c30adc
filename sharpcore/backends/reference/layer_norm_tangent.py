"""Derivative of LayerNorm for K tangents or cotangents, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpcore.backends.output import deliver


def layer_norm_tangent(
    tangent: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    axes: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Push K tangents through y = weight * xhat + bias, xhat = (x - mean) * rstd.

    ``y' = weight * rstd * (x' - mean(x') - xhat * mean(xhat * x'))`` with means over the normalized axes: the
    derivative of LayerNorm (Ba, Kiros and Hinton, 2016, equation 4).

    Args:
        tangent: [K, *x.shape], any floating dtype.
        x: [*leading, *normalized], the input of the normalization.
        mean: [*leading, 1, ..., 1], mean of x over the normalized axes.
        rstd: as mean, 1 / sqrt(variance + eps).
        weight: [*normalized], one a sample as [B, 1, ..., 1, *normalized] with B the first leading axis
            (adaptive norms), or None (ones).
        axes: how many trailing axes are normalized, at least one.
        out: takes the result, any strides; no memory of the arguments.

    Returns:
        [K, *x.shape], dtype of ``tangent``; 16-bit inputs are computed in float32.

    Raises:
        InvalidInput: ``out`` has another shape or dtype.
    """
    xhat, scale = _xhat_and_rstd(x, mean, rstd)
    result = _project(tangent.to(xhat.dtype), xhat, axes) * scale
    if weight is not None:
        result *= weight.to(xhat.dtype)
    return deliver(result.to(tangent.dtype), out)


def layer_norm_adjoint(
    cotangent: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    axes: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Pull K cotangents back through LayerNorm: the transpose of the tangent map.

    ``h = weight * g`` and ``xbar = rstd * (h - mean(h) - xhat * mean(xhat * h))``; ``cotangent`` g is
    [K, *x.shape], the rest as in :func:`layer_norm_tangent`.

    Returns:
        [K, *x.shape], dtype of ``cotangent``.

    Raises:
        InvalidInput: ``out`` has another shape or dtype.
    """
    xhat, scale = _xhat_and_rstd(x, mean, rstd)
    scaled = cotangent.to(xhat.dtype)
    if weight is not None:
        scaled = scaled * weight.to(xhat.dtype)
    return deliver((_project(scaled, xhat, axes) * scale).to(cotangent.dtype), out)


def _xhat_and_rstd(x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    rstd = rstd.to(compute)
    return (x.to(compute) - mean.to(compute)) * rstd, rstd


def _project(tangent: Tensor, xhat: Tensor, axes: int) -> Tensor:
    """Remove from each row of ``tangent`` what the mean and the variance of the row absorb."""
    dims = tuple(range(-axes, 0))
    slope = (xhat * tangent).mean(dims, keepdim=True)
    return tangent - tangent.mean(dims, keepdim=True) - xhat * slope
