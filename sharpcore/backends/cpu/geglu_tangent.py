"""GEGLU on the cpu backend: checks tensors and hands them to the C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cpu.layout import computable, dense_each
from sharpcore.backends.cpu.native import extension
from sharpcore.errors import InvalidInput


def geglu_tangent(tangent: Tensor, projection: Tensor, approximate: str) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result is contiguous."""
    return _geglu("geglu_tangent", tangent, projection, approximate)


def geglu_adjoint(cotangent: Tensor, projection: Tensor, approximate: str) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result is contiguous."""
    return _geglu("geglu_adjoint", cotangent, projection, approximate)


def _geglu(kernel: str, vectors: Tensor, projection: Tensor, approximate: str) -> Tensor:
    native = extension()
    if native is None or not computable([vectors, projection]):
        return reference.KERNELS[kernel](vectors, projection, approximate)
    if approximate not in ("none", "tanh"):
        raise InvalidInput(f"approximate: expected none or tanh, got {approximate!r}")
    if projection.ndim < 1 or projection.shape[-1] % 2:
        raise InvalidInput(f"projection: expected shape [..., 2 C], got {list(projection.shape)}")
    narrow = torch.Size((*projection.shape[:-1], projection.shape[-1] // 2))
    adjoint = kernel == "geglu_adjoint"
    given, returned = (narrow, projection.shape) if adjoint else (projection.shape, narrow)
    if vectors.ndim < 1 or vectors.shape[1:] != given:
        name = "cotangent" if adjoint else "tangent"
        raise InvalidInput(f"{name}: expected shape [K, *{list(given)}], got {list(vectors.shape)}")

    out = vectors.new_empty((vectors.shape[0], *returned))
    if out.numel() == 0:
        return out
    vectors, projection = dense_each(vectors), projection.contiguous()
    getattr(native, kernel)(
        out=out.data_ptr(),
        vectors=vectors.data_ptr(),
        projection=projection.data_ptr(),
        float64=vectors.dtype == torch.float64,
        tanh=approximate == "tanh",
        count=vectors.shape[0],
        rows=narrow[:-1].numel(),
        columns=narrow[-1],
        out_stride=out.stride(0),
        vector_stride=vectors.stride(0),
        threads=torch.get_num_threads(),
    )
    return out
