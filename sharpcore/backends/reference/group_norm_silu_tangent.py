"""Derivative of GroupNorm, optionally followed by SiLU, for K tangents or cotangents, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpcore.backends.output import deliver


def group_norm_silu_tangent(
    tangent: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    silu: bool,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Push K tangents through y = act(weight * xhat + bias), xhat = (x - mean) * rstd.

    ``y' = act'(u) * weight * rstd * (x' - mean_g(x') - xhat * mean_g(xhat * x'))`` with
    u = weight * xhat + bias, act' = SiLU'(u) or 1, and mean_g the mean over the channels of a group and all
    positions: the derivative of GroupNorm (Wu and He, 2018, equation 1), followed by that of SiLU.

    Args:
        tangent: [K, B, C, *spatial], any number of spatial dimensions, any floating dtype.
        x: [B, C, *spatial], the input of the normalization.
        mean: [B, groups], mean of x over each group.
        rstd: [B, groups], 1 / sqrt(variance + eps) of each group.
        weight: [C], [B, C] (scale-shift norms) or None (ones).
        bias: [C], [B, C] or None (zeros); only its effect on act' matters.
        groups: number of groups; divides C.
        silu: whether SiLU follows the normalization.
        out: takes the result, any strides; no memory of the arguments.

    Returns:
        [K, B, C, *spatial], dtype of ``tangent``; 16-bit inputs are computed in float32.

    Raises:
        InvalidInput: ``out`` has another shape or dtype.
    """
    scale, xhat = _scale_and_xhat(x, mean, rstd, weight, bias, groups, silu)
    result = scale * _project(_split_groups(tangent, 2, groups).to(xhat.dtype), xhat)
    return deliver(result.reshape(tangent.shape).to(tangent.dtype), out)


def group_norm_silu_adjoint(
    cotangent: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    silu: bool,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Pull K cotangents back through GroupNorm and, optionally, SiLU: the transpose of the tangent map.

    ``h = weight * act'(u) * g`` and ``xbar = rstd * (h - mean_g(h) - xhat * mean_g(xhat * h))``;
    ``cotangent`` g is [K, B, C, *spatial], the rest as in :func:`group_norm_silu_tangent`.

    Returns:
        [K, B, C, *spatial], dtype of ``cotangent``.

    Raises:
        InvalidInput: ``out`` has another shape or dtype.
    """
    scale, xhat = _scale_and_xhat(x, mean, rstd, weight, bias, groups, silu)
    scaled = scale * _split_groups(cotangent, 2, groups).to(xhat.dtype)
    return deliver(_project(scaled, xhat).reshape(cotangent.shape).to(cotangent.dtype), out)


def _split_groups(tensor: Tensor, channel_dim: int, groups: int) -> Tensor:
    """[..., C, *spatial] as [..., groups, C / groups, positions]."""
    shape = tensor.shape
    channels = shape[channel_dim]
    positions = shape[channel_dim + 1 :].numel()
    return tensor.reshape(*shape[:channel_dim], groups, channels // groups, positions)


def _project(tangent: Tensor, xhat: Tensor) -> Tensor:
    """Remove from each group of ``tangent`` what the mean and the variance of the group absorb."""
    slope = (xhat * tangent).mean(dim=(-2, -1), keepdim=True)
    return tangent - tangent.mean(dim=(-2, -1), keepdim=True) - xhat * slope


def _scale_and_xhat(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """``act'(u) * weight * rstd`` and ``xhat``, both broadcastable to [B, groups, C / groups, positions]."""
    compute = torch.promote_types(x.dtype, torch.float32)
    rstd = rstd.to(compute)[:, :, None, None]
    xhat = (_split_groups(x, 1, groups).to(compute) - mean.to(compute)[:, :, None, None]) * rstd
    per_channel = x.shape[1] // groups
    gain, shift = (
        None if parameter is None else parameter.to(compute).reshape(-1, groups, per_channel, 1)
        for parameter in (weight, bias)
    )
    scale = rstd if gain is None else gain * rstd
    if silu:
        u = xhat if gain is None else gain * xhat
        if shift is not None:
            u = u + shift
        sigmoid = torch.sigmoid(u)
        scale = scale * (sigmoid * (1 + u * torch.sigmoid(-u)))
    return scale, xhat
