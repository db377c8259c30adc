"""How tensors lie in memory, and which of them the C++ kernels take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def computable(tensors: Sequence[Tensor], statistics: Sequence[Tensor] = ()) -> bool:
    """Whether the C++ kernels take these: one supported dtype, that of the statistics the same (float32
    beside bfloat16), CPU memory, nothing for autograd to record."""
    dtype = tensors[0].dtype
    statistics_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    return (
        dtype in DTYPES
        and all(t.dtype == dtype for t in tensors)
        and all(t.dtype == statistics_dtype for t in statistics)
        and all(t.device.type == "cpu" for t in (*tensors, *statistics))
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *statistics)))
    )


def dtype_code(dtype: torch.dtype) -> int:
    """The number by which the C++ kernels know a dtype: that of `Dtype` in csrc/include/sharpcore/dtype.h."""
    return DTYPES.index(dtype)


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


def is_channels_first(vectors: Tensor) -> bool:
    """Whether each [C, *spatial] of [K, B, C, *spatial] lies in memory in this order without gaps."""
    return is_dense(vectors.shape[2:], vectors.stride()[2:])


def is_channels_last(vectors: Tensor) -> bool:
    """Whether each [C, *spatial] of [K, B, C, *spatial] lies in memory as [*spatial, C] without gaps."""
    shape, stride = vectors.shape, vectors.stride()
    return is_dense((*shape[3:], shape[2]), (*stride[3:], stride[2]))


def is_apart(vectors: Tensor, axes: int) -> bool:
    """Whether the slices of the leading `axes` axes, each of them dense, do not share memory."""
    size = vectors.shape[axes:].numel()
    for axis in reversed(range(axes)):
        if vectors.shape[axis] != 1 and vectors.stride(axis) < size:
            return False
        size = max(size, vectors.shape[axis] * vectors.stride(axis))
    return True
