"""Nearest-neighbour upsampling on the cpu backend: checks tensors and hands them to the C++ kernels."""

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
from sharpcore.backends.output import check_out, deliver
from sharpcore.errors import InvalidInput


def upsample_nearest_tangent(
    tangent: Tensor, factors: tuple[int, int], *, out: Tensor | None = None
) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result lies channels-first or channels-last as the
    tangent does, and `out` is written without a copy where it lies so, too."""
    return _upsample("upsample_nearest_tangent", "tangent", tangent, factors, out)


def upsample_nearest_adjoint(
    cotangent: Tensor, factors: tuple[int, int], *, out: Tensor | None = None
) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result lies channels-first or channels-last as the
    cotangent does, and `out` is written without a copy where it lies so, too."""
    return _upsample("upsample_nearest_adjoint", "cotangent", cotangent, factors, out)


def _upsample(
    kernel: str, name: str, vectors: Tensor, factors: tuple[int, int], out: Tensor | None
) -> Tensor:
    native = extension()
    if native is None or not computable([vectors] if out is None else [vectors, out]):
        return reference.KERNELS[kernel](vectors, factors, out=out)
    shape = result_shape(kernel, name, vectors, factors)
    count, batch, channels = shape[:3]
    returned = shape[3:]
    small = vectors.shape[3:] if kernel == "upsample_nearest_tangent" else returned
    check_out(out, shape, vectors.dtype)
    last = not is_channels_first(vectors) and is_channels_last(vectors)
    if not last:
        vectors = vectors if is_channels_first(vectors) else vectors.contiguous()
    lies_alike = is_channels_last if last else is_channels_first
    if out is not None and lies_alike(out) and is_apart(out, 2):
        result = out
    elif last:
        result = vectors.new_empty((count, batch, *returned, channels)).movedim(-1, 2)
    else:
        result = vectors.new_empty(shape)
    if result.numel():
        launch(
            getattr(native, kernel),
            (result, vectors),
            out=result.data_ptr(),
            vectors=vectors.data_ptr(),
            dtype=dtype_code(vectors.dtype),
            channels_last=last,
            sizes=(count, batch, channels, *small),
            factors=tuple(factors),
            out_strides=result.stride()[:2],
            vector_strides=vectors.stride()[:2],
            threads=torch.get_num_threads(),
        )
    return deliver(result, out)


def result_shape(kernel: str, name: str, vectors: Tensor, factors: tuple[int, int]) -> tuple[int, ...]:
    """That of a kernel's result; refuses vectors and factors that have none."""
    down, across = factors
    if down < 1 or across < 1:
        raise InvalidInput(f"factors: expected two positive whole numbers, got {factors}")
    if vectors.ndim != 5:
        raise InvalidInput(f"{name}: expected shape [K, B, C, H, W], got {list(vectors.shape)}")
    *leading, height, width = vectors.shape
    if kernel == "upsample_nearest_tangent":
        return (*leading, height * down, width * across)
    if height % down or width % across:
        raise InvalidInput(f"{name}: expected multiples of {factors}, got an image of {height} by {width}")
    return (*leading, height // down, width // across)
