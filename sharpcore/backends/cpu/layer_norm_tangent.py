"""LayerNorm on the cpu backend: checks tensors and hands them to the C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cpu.layout import computable, dense_each, is_dense
from sharpcore.backends.cpu.native import extension
from sharpcore.errors import InvalidInput


def layer_norm_tangent(
    tangent: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, axes: int
) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result is contiguous."""
    return _layer_norm("layer_norm_tangent", tangent, x, mean, rstd, weight, axes)


def layer_norm_adjoint(
    cotangent: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, axes: int
) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result is contiguous."""
    return _layer_norm("layer_norm_adjoint", cotangent, x, mean, rstd, weight, axes)


def _layer_norm(
    kernel: str, vectors: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, axes: int
) -> Tensor:
    tensors = [t for t in (vectors, x, mean, rstd, weight) if t is not None]
    native = extension()
    if native is None or not computable(tensors):
        return reference.KERNELS[kernel](vectors, x, mean, rstd, weight, axes)
    if not 1 <= axes <= x.ndim:
        raise InvalidInput(f"axes: expected 1 to the {x.ndim} axes of x, got {axes}")
    if vectors.shape[1:] != x.shape:
        raise InvalidInput(f"tangent: expected shape [K, *{list(x.shape)}], got {list(vectors.shape)}")
    statistics = (*x.shape[:-axes], *(1,) * axes)
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        if statistic.shape != statistics:
            raise InvalidInput(f"{name}: expected shape {list(statistics)}, got {list(statistic.shape)}")
    if weight is not None and weight.shape != x.shape[-axes:]:
        raise InvalidInput(f"weight: expected shape {list(x.shape[-axes:])}, got {list(weight.shape)}")

    out = vectors.new_empty(vectors.shape)
    if out.numel() == 0:
        return out
    # [K, B, rows, C] whose memory is [K, B, C, rows]: tokens that were an image a moment ago.
    columns = vectors.ndim == 4 and axes == 1 and not is_dense(vectors.shape[2:], vectors.stride()[2:])
    columns = columns and is_dense(vectors.mT.shape[2:], vectors.mT.stride()[2:])
    if not columns:
        vectors = dense_each(vectors)
    batch = vectors.shape[1] if columns else 1
    x, mean, rstd = x.contiguous(), mean.contiguous(), rstd.contiguous()
    weight = None if weight is None else weight.contiguous()
    getattr(native, kernel)(
        out=out.data_ptr(),
        vectors=vectors.data_ptr(),
        x=x.data_ptr(),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        weight=0 if weight is None else weight.data_ptr(),
        float64=vectors.dtype == torch.float64,
        columns=columns,
        count=vectors.shape[0],
        batch=batch,
        rows=mean.numel() // batch,
        size=x.shape[-axes:].numel(),
        vector_strides=vectors.stride()[:2] if columns else (vectors.stride(0), 0),
        threads=torch.get_num_threads(),
    )
    return out
