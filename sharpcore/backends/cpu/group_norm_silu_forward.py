"""GroupNorm, SiLU and the statistics on the cpu backend: checks tensors and hands them to the C++ kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cpu.group_norm_silu_tangent import (
    check_group_norm,
    empty,
    lay_out,
    lies,
    sample_stride,
    widen,
)
from sharpcore.backends.cpu.layout import computable, dtype_code, is_apart
from sharpcore.backends.cpu.native import extension
from sharpcore.backends.output import check_out, deliver


def group_norm_silu_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As its namesake in sharpcore.backends.reference; y lies channels-first or channels-last as x does, and
    `out` is written without a copy where it lies so, too."""
    if x.dtype == torch.bfloat16:
        weight, bias = widen(weight), widen(bias)
    statistics = [t for t in (weight, bias) if t is not None]
    native = extension()
    if native is None or not computable([x] if out is None else [x, out], statistics):
        forward = reference.KERNELS["group_norm_silu_forward"]
        return forward(x, weight, bias, groups, eps, silu, out=out)
    check_group_norm(x, weight, bias, groups)
    check_out(out, x.shape, x.dtype)
    batch, channels = x.shape[:2]

    positions = x.shape[2:].numel()
    channels_last = lies(x, 1, True)
    if channels_last and out is not None and (positions == 1 or channels == 1):  # it also lies channels-first
        channels_last = lies(out, 1, True)
    x = lay_out(x, 1, channels_last)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    direct = out is not None and lies(out, 1, channels_last) and is_apart(out, 1)
    y: Tensor = out if direct else empty(x, 1, channels_last)  # type: ignore[assignment]
    dtype = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    mean, rstd = (x.new_empty((batch, groups), dtype=dtype) for _ in range(2))
    if y.numel() == 0:
        return deliver(y, out), mean.zero_(), rstd.fill_(float("nan"))
    native.group_norm_silu_forward(
        out=y.data_ptr(),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        x=x.data_ptr(),
        weight=0 if weight is None else weight.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        dtype=dtype_code(x.dtype),
        eps=eps,
        batch=batch,
        channels=channels,
        positions=positions,
        groups=groups,
        out_stride=y.stride(0),
        x_stride=x.stride(0),
        weight_stride=sample_stride(weight),
        bias_stride=sample_stride(bias),
        channels_last=channels_last,
        silu=silu,
        threads=torch.get_num_threads(),
    )
    return deliver(y, out), mean, rstd
