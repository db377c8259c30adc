"""GroupNorm, SiLU, statistics on the cuda backend: checks tensors and hands them to the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cpu.group_norm_silu_tangent import check_group_norm
from sharpcore.backends.cuda.group_norm_silu_tangent import dense, finish, memory_for, readable
from sharpcore.backends.cuda.layout import computable
from sharpcore.backends.output import check_out
from sharpcore.kernels import group_norm_silu_forward as kernels


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
    """As its namesake in sharpcore.backends.reference; y lies channels-first or channels-last as x does, and
    `out` is written without a copy where its positions are evenly spaced."""
    tensors = [x] if out is None else [x, out]
    if not computable(tensors) or not readable((weight, bias), x) or x.numel() == 0:
        forward = reference.KERNELS["group_norm_silu_forward"]
        return forward(x, weight, bias, groups, eps, silu, out=out)
    check_group_norm(x, weight, bias, groups)
    check_out(out, x.shape, x.dtype)
    flat = (*x.shape[:2], x.shape[2:].numel())
    result = memory_for(x, 1) if out is None else out
    written = result.reshape(flat)
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2))
    kernels.group_norm_silu_forward(
        written, mean, rstd, x.reshape(flat), dense(weight), dense(bias), groups, eps, silu=silu
    )
    return finish(written, result), mean, rstd
