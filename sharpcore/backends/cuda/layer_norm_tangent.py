"""LayerNorm on the cuda backend: checks tensors and hands them to the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cpu.layer_norm_tangent import check_layer_norm
from sharpcore.backends.cuda.group_norm_silu_tangent import finish, readable
from sharpcore.backends.cuda.layout import computable
from sharpcore.backends.launches import launch
from sharpcore.backends.output import check_out
from sharpcore.kernels.layer_norm_tangent import layer_norm


def layer_norm_tangent(
    tangent: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    axes: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result is contiguous, and `out` written without a
    copy where its rows are evenly spaced."""
    return _layer_norm("layer_norm_tangent", tangent, x, mean, rstd, weight, axes, out)


def layer_norm_adjoint(
    cotangent: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    axes: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result is contiguous, and `out` written without a
    copy where its rows are evenly spaced."""
    return _layer_norm("layer_norm_adjoint", cotangent, x, mean, rstd, weight, axes, out)


def _layer_norm(
    kernel: str,
    vectors: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    axes: int,
    out: Tensor | None,
) -> Tensor:
    tensors = [vectors, x] if out is None else [vectors, x, out]
    if not computable(tensors) or not readable((mean, rstd, weight), x) or vectors.numel() == 0:
        return reference.KERNELS[kernel](vectors, x, mean, rstd, weight, axes, out=out)
    check_layer_norm(vectors, x, mean, rstd, weight, axes)
    check_out(out, vectors.shape, vectors.dtype)

    by_sample = weight is not None and weight.ndim > axes
    size = x.shape[-axes:].numel()
    rows = x.numel() // size
    # Samples apart where each has a weight, or where they are images whose tokens lie channels-first.
    batch = x.shape[0] if by_sample or (vectors.ndim - axes > 2 and vectors.stride(-1) != 1) else 1
    flat = (vectors.shape[0], batch, rows // batch, size)
    result = vectors.new_empty(vectors.shape) if out is None else out
    written = result.reshape(flat)
    if weight is not None:
        weight = weight.reshape((batch, size) if by_sample else (size,)).contiguous()
    statistics = mean.contiguous(), rstd.contiguous()
    operands = (written, vectors.reshape(flat), x.reshape(flat[1:]), *statistics, weight)
    launch(layer_norm, operands, *operands, adjoint=kernel == "layer_norm_adjoint")
    return finish(written, result)
