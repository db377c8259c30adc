"""GroupNorm and SiLU on the cpu backend: checks tensors and hands them to the C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cpu.layout import computable, is_dense
from sharpcore.backends.cpu.native import extension
from sharpcore.errors import InvalidInput


def group_norm_silu_tangent(
    tangent: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    silu: bool,
) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result is laid out as the tangent."""
    return _group_norm_silu("group_norm_silu_tangent", tangent, x, mean, rstd, weight, bias, groups, silu)


def group_norm_silu_adjoint(
    cotangent: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    silu: bool,
) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result is laid out as the cotangent."""
    return _group_norm_silu("group_norm_silu_adjoint", cotangent, x, mean, rstd, weight, bias, groups, silu)


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
) -> Tensor:
    tensors = [t for t in (vectors, x, mean, rstd, weight, bias) if t is not None]
    native = extension()
    if native is None or not computable(tensors):
        return reference.KERNELS[kernel](vectors, x, mean, rstd, weight, bias, groups, silu)
    _check_group_norm(vectors, x, mean, rstd, weight, bias, groups)

    channels_last = _is_channels_last(vectors)
    if not (channels_last or _is_channels_first(vectors)):
        vectors = vectors.contiguous()
    count, batch, channels = vectors.shape[:3]
    if channels_last:
        out = vectors.new_empty((count, batch, *vectors.shape[3:], channels)).movedim(-1, 2)
        x = x if _is_channels_last(x[None]) else x.movedim(1, -1).contiguous().movedim(-1, 1)
    else:
        out = vectors.new_empty(vectors.shape)
        x = x if _is_channels_first(x[None]) else x.contiguous()
    if out.numel() == 0:
        return out
    mean, rstd = mean.contiguous(), rstd.contiguous()
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    getattr(native, kernel)(
        out=out.data_ptr(),
        vectors=vectors.data_ptr(),
        x=x.data_ptr(),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        weight=0 if weight is None else weight.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        float64=vectors.dtype == torch.float64,
        count=count,
        batch=batch,
        channels=channels,
        positions=vectors.shape[3:].numel(),
        groups=groups,
        out_strides=out.stride()[:2],
        vector_strides=vectors.stride()[:2],
        x_stride=x.stride(0),
        channels_last=channels_last,
        silu=silu,
        threads=torch.get_num_threads(),
    )
    return out


def _check_group_norm(
    vectors: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
) -> None:
    """Refuse shapes with which the kernel would read or write outside its tensors."""
    if x.ndim < 2 or vectors.shape[1:] != x.shape:
        raise InvalidInput(
            f"tangent: expected shape [K, *x.shape] = [K, *{list(x.shape)}], got {list(vectors.shape)}"
        )
    batch, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        raise InvalidInput(f"groups: expected a divisor of the {channels} channels, got {groups}")
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        if statistic.shape != (batch, groups):
            raise InvalidInput(f"{name}: expected shape {[batch, groups]}, got {list(statistic.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (channels,):
            raise InvalidInput(f"{name}: expected shape {[channels]} or None, got {list(parameter.shape)}")


def _is_channels_first(vectors: Tensor) -> bool:
    """Whether each [C, *spatial] of [K, B, C, *spatial] lies in memory in this order without gaps."""
    return is_dense(vectors.shape[2:], vectors.stride()[2:])


def _is_channels_last(vectors: Tensor) -> bool:
    """Whether each [C, *spatial] of [K, B, C, *spatial] lies in memory as [*spatial, C] without gaps."""
    shape, stride = vectors.shape, vectors.stride()
    return is_dense((*shape[3:], shape[2]), (*stride[3:], stride[2]))
