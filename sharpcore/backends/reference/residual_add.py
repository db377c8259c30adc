"""Sum of K tangents with those of a residual, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpcore.backends.output import check_out
from sharpcore.errors import InvalidInput


def residual_add(first: Tensor, second: Tensor, scale: float = 1, *, out: Tensor | None = None) -> Tensor:
    """``first + scale * second``, in whatever memory layouts the two lie.

    Args:
        first: [K, *shape], any floating dtype.
        second: [K, *shape], same dtype.
        scale: a real number.
        out: [K, *shape] of that dtype, where the result goes; it may be ``first`` or ``second`` itself.

    Returns:
        [K, *shape]; 16-bit inputs are computed in float32.

    Raises:
        InvalidInput: the shapes or dtypes differ.
    """
    if first.shape != second.shape or first.dtype != second.dtype:
        raise InvalidInput(
            f"second: expected shape {list(first.shape)} and dtype {first.dtype}, "
            f"got {list(second.shape)} and {second.dtype}"
        )
    check_out(out, first.shape, first.dtype)
    return torch.add(first, second, alpha=scale, out=out)
