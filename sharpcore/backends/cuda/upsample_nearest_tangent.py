"""Nearest-neighbour upsampling on the cuda backend: checks tensors and hands them to the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cpu.upsample_nearest_tangent import result_shape
from sharpcore.backends.cuda.layout import computable
from sharpcore.backends.launches import launch
from sharpcore.backends.output import check_out
from sharpcore.kernels.upsample_nearest_tangent import upsample_nearest


def upsample_nearest_tangent(
    tangent: Tensor, factors: tuple[int, int], *, out: Tensor | None = None
) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result lies channels-first or channels-last as the
    tangent does, and `out` is written without a copy."""
    return _upsample("upsample_nearest_tangent", "tangent", tangent, factors, out)


def upsample_nearest_adjoint(
    cotangent: Tensor, factors: tuple[int, int], *, out: Tensor | None = None
) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result lies channels-first or channels-last as the
    cotangent does, and `out` is written without a copy."""
    return _upsample("upsample_nearest_adjoint", "cotangent", cotangent, factors, out)


def _upsample(
    kernel: str, name: str, vectors: Tensor, factors: tuple[int, int], out: Tensor | None
) -> Tensor:
    if not computable([vectors] if out is None else [vectors, out]) or vectors.numel() == 0:
        return reference.KERNELS[kernel](vectors, factors, out=out)
    shape = result_shape(kernel, name, vectors, factors)
    check_out(out, shape, vectors.dtype)
    if out is not None:
        result = out
    elif vectors.stride(2) == 1 and vectors.stride(4) != 1:
        result = vectors.new_empty((*shape[:2], *shape[3:], shape[2])).movedim(-1, 2)
    else:
        result = vectors.new_empty(shape)
    launch(
        upsample_nearest,
        (result, vectors),
        result,
        vectors,
        tuple(factors),
        adjoint=kernel == "upsample_nearest_adjoint",
    )
    return result
