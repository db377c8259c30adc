"""The `out` argument of every kernel: memory of the caller's that takes the result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharpcore.errors import InvalidInput


def check_out(out: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raise InvalidInput where `out` is given and cannot hold a result of this shape and dtype."""
    if out is not None and (out.shape != torch.Size(shape) or out.dtype != dtype):
        raise InvalidInput(
            f"out: expected shape {list(shape)} and dtype {dtype}, got {list(out.shape)} and {out.dtype}"
        )


def deliver(result: Tensor, out: Tensor | None) -> Tensor:
    """The result itself, or, where `out` is given, `out` holding it."""
    if out is None or out is result:
        return result
    check_out(out, result.shape, result.dtype)
    return out.copy_(result)
