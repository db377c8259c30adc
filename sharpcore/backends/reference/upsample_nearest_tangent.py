"""Nearest-neighbour upsampling by whole numbers and its transpose, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpcore.backends.output import deliver


def upsample_nearest_tangent(
    tangent: Tensor, factors: tuple[int, int], *, out: Tensor | None = None
) -> Tensor:
    """Push K tangents through nearest-neighbour upsampling: every pixel becomes a block of equal ones.

    Args:
        tangent: [K, B, C, H, W], any floating dtype.
        factors: height P and width Q of a block.
        out: [K, B, C, P H, Q W] of the tangent's dtype, where the result goes.

    Returns:
        [K, B, C, P H, Q W].

    Raises:
        InvalidInput: ``out`` has another shape or dtype.
    """
    down, across = factors
    return deliver(tangent.repeat_interleave(down, 3).repeat_interleave(across, 4), out)


def upsample_nearest_adjoint(
    cotangent: Tensor, factors: tuple[int, int], *, out: Tensor | None = None
) -> Tensor:
    """Pull K cotangents back through nearest-neighbour upsampling: every pixel is the sum of its block.

    ``cotangent`` is [K, B, C, P H, Q W], the rest as in :func:`upsample_nearest_tangent`.

    Returns:
        [K, B, C, H, W], dtype of ``cotangent``; 16-bit inputs are summed in float32.
    """
    down, across = factors
    blocks = cotangent.unflatten(4, (-1, across)).unflatten(3, (-1, down))
    compute = torch.promote_types(cotangent.dtype, torch.float32)
    return deliver(blocks.sum((4, 6), dtype=compute).to(cotangent.dtype), out)
