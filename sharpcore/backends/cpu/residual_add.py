"""Residual sums on the cpu backend: PyTorch's where all lie alike, the C++ kernel where one is turned."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cpu.layout import (
    computable,
    dtype_code,
    is_apart,
    is_channels_first,
    is_channels_last,
)
from sharpcore.backends.cpu.native import extension
from sharpcore.backends.launches import launch


def residual_add(first: Tensor, second: Tensor, scale: float = 1, *, out: Tensor | None = None) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result lies in memory as `first` does.

    The C++ kernel serves images [K, B, C, *spatial] of which one lies channels-first and another
    channels-last, `out` included; where all lie alike, PyTorch's own sum reaches the speed of a copy.
    """
    strides = first.stride()
    if strides != second.stride() or (out is not None and strides != out.stride()):
        result = _turned(first, second, scale, out)
        if result is not None:
            return result
    elif out is not None and first.dtype == second.dtype == out.dtype and first.shape == out.shape:
        launch(torch.add, (first, second, out), first, second, alpha=scale, out=out)
        return out
    return reference.KERNELS["residual_add"](first, second, scale, out=out)


def _turned(first: Tensor, second: Tensor, scale: float, out: Tensor | None) -> Tensor | None:
    """The sum by the C++ kernel, or None where it is not for it."""
    native = extension()
    tensors = (first, second) if out is None else (first, second, out)
    shape = first.shape
    if native is None or len(shape) < 4 or not all(t.shape == shape for t in tensors):
        return None
    last = [_lies_channels_last(t) for t in tensors]
    if None in last or all(last) or not any(last) or not computable(tensors) or first.numel() == 0:
        return None
    if out is None:
        empty = first.new_empty
        out = empty((*shape[:2], *shape[3:], shape[2])).movedim(-1, 2) if last[0] else empty(shape)
        last.append(last[0])
    elif not is_apart(out, 2):
        return None
    channels, positions = shape[2], shape[3:].numel()
    launch(
        native.residual_add,
        (first, second, out),
        out=out.data_ptr(),
        out_strides=out.stride()[:2],
        first=(first.data_ptr(), last[0] != last[2], first.stride()[:2]),
        second=(second.data_ptr(), last[1] != last[2], second.stride()[:2]),
        scale=scale,
        dtype=dtype_code(first.dtype),
        count=shape[0],
        batch=shape[1],
        rows=positions if last[2] else channels,
        columns=channels if last[2] else positions,
        threads=torch.get_num_threads(),
    )
    return out


def _lies_channels_last(image: Tensor) -> bool | None:
    """Whether each [C, *spatial] lies channels-last or channels-first; None where it does neither."""
    if is_channels_first(image):
        return False
    return True if is_channels_last(image) else None
