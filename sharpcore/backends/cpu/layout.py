"""How tensors lie in memory, and which of them the C++ kernels take."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64)


def computable(tensors: list[Tensor]) -> bool:
    """Whether the C++ kernels take these: one supported dtype, CPU memory, nothing for autograd to record."""
    dtype = tensors[0].dtype
    return (
        dtype in DTYPES
        and all(t.dtype == dtype and t.device.type == "cpu" for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def dense_each(vectors: Tensor) -> Tensor:
    """[K, ...] of which each of the K lies in memory in this order without gaps: itself if it does."""
    return vectors if is_dense(vectors.shape[1:], vectors.stride()[1:]) else vectors.contiguous()


def is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True
