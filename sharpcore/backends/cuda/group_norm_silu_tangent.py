"""GroupNorm and SiLU on the cuda backend: checks tensors and hands them to the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cpu.group_norm_silu_tangent import check_group_norm
from sharpcore.backends.cuda.layout import computable
from sharpcore.backends.launches import launch
from sharpcore.backends.output import check_out, deliver
from sharpcore.errors import InvalidInput
from sharpcore.kernels.group_norm_silu_tangent import group_norm_silu


def group_norm_silu_tangent(
    tangent: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    silu: bool,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result lies channels-first or channels-last as the
    tangent does, and `out` is written without a copy where its positions are evenly spaced."""
    return _group_norm_silu(
        "group_norm_silu_tangent", tangent, x, mean, rstd, weight, bias, groups, silu, out
    )


def group_norm_silu_adjoint(
    cotangent: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    silu: bool,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result lies channels-first or channels-last as the
    cotangent does, and `out` is written without a copy where its positions are evenly spaced."""
    return _group_norm_silu(
        "group_norm_silu_adjoint", cotangent, x, mean, rstd, weight, bias, groups, silu, out
    )


def _group_norm_silu(
    kernel: str,
    vectors: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    silu: bool,
    out: Tensor | None,
) -> Tensor:
    tensors = [vectors, x] if out is None else [vectors, x, out]
    if not computable(tensors) or not readable((mean, rstd, weight, bias), x) or vectors.numel() == 0:
        return reference.KERNELS[kernel](vectors, x, mean, rstd, weight, bias, groups, silu, out=out)
    if vectors.shape[1:] != x.shape:
        raise InvalidInput(
            f"tangent: expected shape [K, *x.shape] = [K, *{list(x.shape)}], got {list(vectors.shape)}"
        )
    check_group_norm(x, weight, bias, groups)
    count, batch, channels = vectors.shape[:3]
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        if statistic.shape != (batch, groups):
            raise InvalidInput(f"{name}: expected shape {[batch, groups]}, got {list(statistic.shape)}")
    check_out(out, vectors.shape, vectors.dtype)

    flat = (count, batch, channels, vectors.shape[3:].numel())
    result = memory_for(vectors, 2) if out is None else out
    written = result.reshape(flat)
    parameters = map(dense, (mean, rstd, weight, bias))
    operands = (written, vectors.reshape(flat), x.reshape(flat[1:]), *parameters)
    adjoint = kernel == "group_norm_silu_adjoint"
    launch(group_norm_silu, operands, *operands, groups, silu=silu, adjoint=adjoint)
    return finish(written, result)


def readable(parameters: Sequence[Tensor | None], beside: Tensor) -> bool:
    """Whether the kernels take these statistics and parameters, which they widen, beside a tensor that they
    take."""
    return all(p is None or (p.device == beside.device and computable([p])) for p in parameters)


def dense(parameter: Tensor | None) -> Tensor | None:
    """The same, contiguous."""
    return None if parameter is None else parameter.contiguous()


def memory_for(tensor: Tensor, channel_dim: int) -> Tensor:
    """New memory of a tensor's shape, channels-last where the tensor is."""
    shape, stride = tensor.shape, tensor.stride()
    if shape[channel_dim] == 1 or stride[channel_dim] != 1 or shape[channel_dim + 1 :].numel() == 1:
        return tensor.new_empty(shape)
    last = (*shape[:channel_dim], *shape[channel_dim + 1 :], shape[channel_dim])
    return tensor.new_empty(last).movedim(-1, channel_dim)


def finish(written: Tensor, result: Tensor) -> Tensor:
    """The result, which is there where `written` is its reshaped view, or is copied from new memory."""
    return result if written.data_ptr() == result.data_ptr() else deliver(written.view(result.shape), result)
