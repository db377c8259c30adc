"""GroupNorm, optionally followed by SiLU, with its statistics, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sharpcore.backends.output import deliver


def group_norm_silu_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = act(weight * xhat + bias) with xhat = (x - mean) * rstd, rstd = 1 / sqrt(variance + eps).

    Mean and variance are those of a group of channels at all positions (Wu and He, 2018, equation 1), act is
    SiLU or nothing.

    Args:
        x: [B, C, *spatial], any number of spatial dimensions, any floating dtype.
        weight: [C], [B, C] (scale-shift norms) or None (ones).
        bias: [C], [B, C] or None (zeros).
        groups: number of groups; divides C.
        eps: what is added to the variance.
        silu: whether SiLU follows the normalization.
        out: takes y, any strides; no memory of the arguments.

    Returns:
        y [B, C, *spatial] in the dtype of ``x``; mean and rstd [B, groups], float32 where ``x`` has 16 bits,
        which is then also what y is computed in.

    Raises:
        InvalidInput: ``out`` has another shape or dtype.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    batch, channels = x.shape[:2]
    grouped = x.to(compute).reshape(batch, groups, channels // groups, x.shape[2:].numel())
    variance, mean = torch.var_mean(grouped, dim=(-2, -1), correction=0)
    rstd = (variance + eps).rsqrt()
    y = (grouped - mean[:, :, None, None]) * rstd[:, :, None, None]
    gain, shift = (
        None if parameter is None else parameter.to(compute).reshape(-1, groups, channels // groups, 1)
        for parameter in (weight, bias)
    )
    if gain is not None:
        y = y * gain
    if shift is not None:
        y = y + shift
    if silu:
        y = F.silu(y)
    return deliver(y.reshape(x.shape).to(x.dtype), out), mean, rstd
