"""GEGLU on the cuda backend: checks tensors and hands them to the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cpu.geglu_tangent import check_approximate, check_vectors, narrow
from sharpcore.backends.cuda.group_norm_silu_tangent import finish
from sharpcore.backends.cuda.layout import computable
from sharpcore.backends.launches import launch
from sharpcore.backends.output import check_out
from sharpcore.kernels import geglu_tangent as kernels


def geglu_forward(
    projection: Tensor, approximate: str, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """As its namesake in sharpcore.backends.reference; `out` is written without a copy where its rows are
    evenly spaced."""
    if not computable([projection, *(out or ())]) or projection.numel() == 0:
        return reference.KERNELS["geglu_forward"](projection, approximate, out=out)
    check_approximate(approximate)
    half = narrow("projection", projection)
    to_value, to_factors = (None, None) if out is None else out
    check_out(to_value, half, projection.dtype)
    check_out(to_factors, projection.shape, projection.dtype)
    value = projection.new_empty(half) if to_value is None else to_value
    factors = projection.new_empty(projection.shape) if to_factors is None else to_factors
    rows, columns = half[:-1].numel(), half[-1]
    values, slopes = value.reshape(rows, columns), factors.reshape(rows, 2 * columns)
    given = projection.reshape(rows, 2 * columns)
    tensors = (values, slopes, given)
    launch(kernels.geglu_forward, tensors, *tensors, tanh=approximate == "tanh")
    return finish(values, value), finish(slopes, factors)


def geglu_tangent(tangent: Tensor, factors: Tensor, *, out: Tensor | None = None) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result is contiguous, and `out` written without a
    copy where its rows are evenly spaced."""
    return _apply("geglu_tangent", "tangent", tangent, factors, out)


def geglu_adjoint(cotangent: Tensor, factors: Tensor, *, out: Tensor | None = None) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result is contiguous, and `out` written without a
    copy where its rows are evenly spaced."""
    return _apply("geglu_adjoint", "cotangent", cotangent, factors, out)


def _apply(kernel: str, name: str, vectors: Tensor, factors: Tensor, out: Tensor | None) -> Tensor:
    tensors = [vectors, factors] if out is None else [vectors, factors, out]
    if not computable(tensors) or vectors.numel() == 0:
        return reference.KERNELS[kernel](vectors, factors, out=out)
    half = narrow("factors", factors)
    adjoint = kernel == "geglu_adjoint"
    given, returned = (half, factors.shape) if adjoint else (factors.shape, half)
    check_vectors(name, vectors, given)
    shape = (vectors.shape[0], *returned)
    check_out(out, shape, vectors.dtype)
    result = vectors.new_empty(shape) if out is None else out
    rows = half[:-1].numel()
    written = result.reshape(len(vectors), rows, returned[-1])
    vectors = vectors.reshape(len(vectors), rows, given[-1])
    read = (vectors, factors.reshape(rows, factors.shape[-1]))
    launch(kernels.geglu_apply, (written, *read), written, *read, adjoint=adjoint)
    return finish(written, result)
