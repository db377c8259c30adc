"""How tensors lie in memory, and which of them the C++ kernels take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def computable(tensors: Sequence[Tensor], statistics: Sequence[Tensor] = ()) -> bool:
    """Whether the C++ kernels take these: one supported dtype, the statistics' the same (float32 beside
    bfloat16), CPU memory, nothing for autograd to record."""
    dtype = tensors[0].dtype
    if dtype not in DTYPES:
        return False
    recording = torch.is_grad_enabled()
    for group, expected in ((tensors, dtype), (statistics, statistics_dtype(dtype))):
        for tensor in group:
            if tensor.dtype != expected or not tensor.is_cpu or (recording and tensor.requires_grad):
                return False
    return True


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the statistics beside tensors of a dtype."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


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
    shape, stride = vectors.shape, vectors.stride()
    size = shape[axes:].numel()
    for axis in range(axes - 1, -1, -1):
        if shape[axis] != 1:
            if stride[axis] < size:
                return False
            size = shape[axis] * stride[axis]
    return True
