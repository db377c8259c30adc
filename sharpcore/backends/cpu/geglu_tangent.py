"""GEGLU on the cpu backend: checks tensors and hands them to the C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cpu.layout import computable, dense_each, dtype_code, is_apart, is_dense
from sharpcore.backends.cpu.native import extension
from sharpcore.backends.launches import launch
from sharpcore.backends.output import check_out, deliver
from sharpcore.errors import InvalidInput


def geglu_forward(
    projection: Tensor, approximate: str, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """As its namesake in sharpcore.backends.reference; contiguous `out` is written without a copy."""
    native = extension()
    if native is None or not computable([projection, *(out or ())]):
        return reference.KERNELS["geglu_forward"](projection, approximate, out=out)
    check_approximate(approximate)
    half = narrow("projection", projection)
    to_value, to_factors = (None, None) if out is None else out
    check_out(to_value, half, projection.dtype)
    check_out(to_factors, projection.shape, projection.dtype)
    value = _contiguous(to_value, projection, half)
    factors = _contiguous(to_factors, projection, projection.shape)
    projection = projection.contiguous()
    if value.numel():
        launch(
            native.geglu_forward,
            (value, factors, projection),
            value=value.data_ptr(),
            factors=factors.data_ptr(),
            projection=projection.data_ptr(),
            dtype=dtype_code(projection.dtype),
            tanh=approximate == "tanh",
            rows=half[:-1].numel(),
            columns=half[-1],
            threads=torch.get_num_threads(),
        )
    return deliver(value, to_value), deliver(factors, to_factors)


def geglu_tangent(tangent: Tensor, factors: Tensor, *, out: Tensor | None = None) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result is contiguous, and `out` written without a
    copy where each of its K results is."""
    return _apply("geglu_tangent", "tangent", tangent, factors, out)


def geglu_adjoint(cotangent: Tensor, factors: Tensor, *, out: Tensor | None = None) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result is contiguous, and `out` written without a
    copy where each of its K results is."""
    return _apply("geglu_adjoint", "cotangent", cotangent, factors, out)


def _apply(kernel: str, name: str, vectors: Tensor, factors: Tensor, out: Tensor | None) -> Tensor:
    native = extension()
    if native is None or not computable([vectors, factors] if out is None else [vectors, factors, out]):
        return reference.KERNELS[kernel](vectors, factors, out=out)
    half = narrow("factors", factors)
    given, returned = (factors.shape, half) if kernel == "geglu_tangent" else (half, factors.shape)
    check_vectors(name, vectors, given)
    shape = (vectors.shape[0], *returned)
    check_out(out, shape, vectors.dtype)
    direct = out is not None and is_dense(returned, out.stride()[1:]) and is_apart(out, 1)
    result: Tensor = out if direct else vectors.new_empty(shape)  # type: ignore[assignment]
    vectors, factors = dense_each(vectors), factors.contiguous()
    if result.numel():
        launch(
            getattr(native, kernel),
            (result, vectors, factors),
            out=result.data_ptr(),
            vectors=vectors.data_ptr(),
            factors=factors.data_ptr(),
            dtype=dtype_code(vectors.dtype),
            count=vectors.shape[0],
            rows=half[:-1].numel(),
            columns=half[-1],
            out_stride=result.stride(0),
            vector_stride=vectors.stride(0),
            threads=torch.get_num_threads(),
        )
    return deliver(result, out)


def _contiguous(out: Tensor | None, like: Tensor, shape: torch.Size) -> Tensor:
    return out if out is not None and out.is_contiguous() else like.new_empty(shape)


def narrow(name: str, wide: Tensor) -> torch.Size:
    """The shape of one half of [..., 2 C]."""
    if wide.ndim < 1 or wide.shape[-1] % 2:
        raise InvalidInput(f"{name}: expected shape [..., 2 C], got {list(wide.shape)}")
    return torch.Size((*wide.shape[:-1], wide.shape[-1] // 2))


def check_approximate(approximate: str) -> None:
    """Refuse the names of other functions."""
    if approximate not in ("none", "tanh"):
        raise InvalidInput(f"approximate: expected none or tanh, got {approximate!r}")


def check_vectors(name: str, vectors: Tensor, shape: torch.Size) -> None:
    """Refuse vectors of another shape than [K, *shape]."""
    if vectors.ndim < 1 or vectors.shape[1:] != shape:
        raise InvalidInput(f"{name}: expected shape [K, *{list(shape)}], got {list(vectors.shape)}")
