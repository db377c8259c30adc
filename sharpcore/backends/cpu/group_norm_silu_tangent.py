"""GroupNorm and SiLU on the cpu backend: checks tensors and hands them to the C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cpu.layout import computable, dtype_code, is_apart, is_dense
from sharpcore.backends.cpu.native import extension
from sharpcore.backends.launches import launch
from sharpcore.backends.output import check_out, deliver
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
    *,
    out: Tensor | None = None,
) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result lies channels-first or channels-last as the
    tangent does, and `out` is written without a copy where it lies so, too."""
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
    cotangent does, and `out` is written without a copy where it lies so, too."""
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
    if vectors.dtype == torch.bfloat16:
        mean, rstd, weight, bias = map(widen, (mean, rstd, weight, bias))  # type: ignore[assignment]
    statistics = [t for t in (mean, rstd, weight, bias) if t is not None]
    native = extension()
    if native is None or not computable([vectors, x] if out is None else [vectors, x, out], statistics):
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

    positions = vectors.shape[3:].numel()
    channels_last = lies(vectors, 2, True)
    if channels_last and (positions == 1 or channels == 1):  # it also lies channels-first
        channels_last = lies(x, 1, True) if out is None else lies(out, 2, True)
    vectors, x = lay_out(vectors, 2, channels_last), lay_out(x, 1, channels_last)
    direct = out is not None and lies(out, 2, channels_last) and is_apart(out, 2)
    result: Tensor = out if direct else empty(vectors, 2, channels_last)  # type: ignore[assignment]
    mean, rstd = mean.contiguous(), rstd.contiguous()
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    if result.numel():
        launch(
            getattr(native, kernel),
            (result, vectors, x, mean, rstd, weight, bias),
            out=result.data_ptr(),
            vectors=vectors.data_ptr(),
            x=x.data_ptr(),
            mean=mean.data_ptr(),
            rstd=rstd.data_ptr(),
            weight=0 if weight is None else weight.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            dtype=dtype_code(vectors.dtype),
            count=count,
            batch=batch,
            channels=channels,
            positions=positions,
            groups=groups,
            out_strides=result.stride()[:2],
            vector_strides=vectors.stride()[:2],
            x_stride=x.stride(0),
            weight_stride=sample_stride(weight),
            bias_stride=sample_stride(bias),
            channels_last=channels_last,
            silu=silu,
            threads=torch.get_num_threads(),
        )
    return deliver(result, out)


def widen(parameter: Tensor | None) -> Tensor | None:
    """What comes in bfloat16, in float32."""
    return parameter.float() if parameter is not None and parameter.dtype == torch.bfloat16 else parameter


def check_group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int) -> None:
    """Refuse shapes with which the kernels would read or write outside their tensors."""
    if x.ndim < 2:
        raise InvalidInput(f"x: expected shape [B, C, *spatial], got {list(x.shape)}")
    batch, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        raise InvalidInput(f"groups: expected a divisor of the {channels} channels, got {groups}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape not in ((channels,), (batch, channels)):
            raise InvalidInput(
                f"{name}: expected shape {[channels]}, {[batch, channels]} or None, "
                f"got {list(parameter.shape)}"
            )


def lies(tensor: Tensor, leading: int, channels_last: bool) -> bool:
    """Whether [C, *spatial], behind the leading axes, lies in memory without gaps: in this order, or as
    [*spatial, C]."""
    shape, stride = tensor.shape[leading:], tensor.stride()[leading:]
    if channels_last:
        return is_dense((*shape[1:], shape[0]), (*stride[1:], stride[0]))
    return is_dense(shape, stride)


def lay_out(tensor: Tensor, leading: int, channels_last: bool) -> Tensor:
    """The tensor in one of the two layouts, a copy where it has not got it."""
    if lies(tensor, leading, channels_last):
        return tensor
    if channels_last:
        return tensor.movedim(leading, -1).contiguous().movedim(-1, leading)
    return tensor.contiguous()


def empty(tensor: Tensor, leading: int, channels_last: bool) -> Tensor:
    """New memory of a tensor's shape in one of the two layouts."""
    if not channels_last:
        return tensor.new_empty(tensor.shape)
    shape = tensor.shape
    return tensor.new_empty((*shape[:leading], *shape[leading + 1 :], shape[leading])).movedim(-1, leading)


def sample_stride(parameter: Tensor | None) -> int:
    """How far the parameters of two samples are apart: 0 where all samples share them."""
    return 0 if parameter is None or parameter.ndim == 1 else parameter.stride(0)
