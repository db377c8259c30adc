"""LayerNorm on the cpu backend: checks tensors and hands them to the C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cpu.group_norm_silu_tangent import widen
from sharpcore.backends.cpu.layout import computable, dense_each, dtype_code, is_apart, is_dense
from sharpcore.backends.cpu.native import extension
from sharpcore.backends.launches import launch
from sharpcore.backends.output import check_out, deliver
from sharpcore.errors import InvalidInput


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
    copy where each of its K results is."""
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
    copy where each of its K results is."""
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
    if vectors.dtype == torch.bfloat16:
        mean, rstd, weight = map(widen, (mean, rstd, weight))  # type: ignore[assignment]
    statistics = [mean, rstd] if weight is None else [mean, rstd, weight]
    native = extension()
    if native is None or not computable([vectors, x] if out is None else [vectors, x, out], statistics):
        return reference.KERNELS[kernel](vectors, x, mean, rstd, weight, axes, out=out)
    check_layer_norm(vectors, x, mean, rstd, weight, axes)
    check_out(out, vectors.shape, vectors.dtype)

    normalized = x.shape[-axes:]
    direct = out is not None and is_dense(x.shape, out.stride()[1:]) and is_apart(out, 1)
    result: Tensor = out if direct else vectors.new_empty(vectors.shape)  # type: ignore[assignment]
    if result.numel() == 0:
        return deliver(result, out)
    # [K, B, rows, C] whose memory is [K, B, C, rows]: tokens that were an image a moment ago.
    columns = vectors.ndim == 4 and axes == 1 and not is_dense(vectors.shape[2:], vectors.stride()[2:])
    columns = columns and is_dense(vectors.mT.shape[2:], vectors.mT.stride()[2:])
    if not columns:
        vectors = dense_each(vectors)
    by_sample = weight is not None and weight.ndim > axes
    batch = x.shape[0] if columns or by_sample else 1
    x, mean, rstd = x.contiguous(), mean.contiguous(), rstd.contiguous()
    weight = None if weight is None else weight.contiguous()
    launch(
        getattr(native, kernel),
        (result, vectors, x, mean, rstd, weight),
        out=result.data_ptr(),
        vectors=vectors.data_ptr(),
        x=x.data_ptr(),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        weight=0 if weight is None else weight.data_ptr(),
        dtype=dtype_code(vectors.dtype),
        columns=columns,
        count=vectors.shape[0],
        batch=batch,
        rows=mean.numel() // batch,
        size=normalized.numel(),
        out_stride=result.stride(0),
        vector_strides=vectors.stride()[:2] if columns else (vectors.stride(0), x.numel() // batch),
        weight_stride=normalized.numel() if by_sample else 0,
        threads=torch.get_num_threads(),
    )
    return deliver(result, out)


def check_layer_norm(
    vectors: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, axes: int
) -> None:
    """Refuse shapes with which the kernels would read or write outside their tensors."""
    if not 1 <= axes <= x.ndim:
        raise InvalidInput(f"axes: expected 1 to the {x.ndim} axes of x, got {axes}")
    if vectors.shape[1:] != x.shape:
        raise InvalidInput(f"tangent: expected shape [K, *{list(x.shape)}], got {list(vectors.shape)}")
    leading, normalized = x.shape[:-axes], x.shape[-axes:]
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        if statistic.shape != (*leading, *(1,) * axes):
            raise InvalidInput(
                f"{name}: expected shape {[*leading, *(1,) * axes]}, got {list(statistic.shape)}"
            )
    each_sample = (*leading[:1], *(1,) * len(leading[1:]), *normalized)
    if weight is not None and weight.shape not in (normalized, each_sample):
        raise InvalidInput(
            f"weight: expected shape {list(normalized)} or {list(each_sample)}, got {list(weight.shape)}"
        )
