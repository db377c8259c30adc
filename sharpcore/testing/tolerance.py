"""Accuracy rules: how far a result may be from the truth, judged by what plain PyTorch reaches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import InvalidInput


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| over all entries, in float64, of a result ``a`` against a reference ``b``.

    Both have the same shape; any floating dtypes. A result that is not finite has an infinite error, so
    that no comparison lets it pass; against a zero reference the error is 0 or infinite. Raises
    InvalidInput for different shapes or a reference that is not finite.
    """
    if a.shape != b.shape:
        raise InvalidInput(f"a, b: expected equal shapes, got {tuple(a.shape)} and {tuple(b.shape)}")
    result, reference = (value.detach().to("cpu", torch.float64) for value in (a, b))
    if not bool(torch.isfinite(reference).all()):
        raise InvalidInput("b: expected a finite reference, got NaN or infinite entries")
    if not bool(torch.isfinite(result).all()):
        return math.inf
    distance, scale = (result - reference).norm().item(), reference.norm().item()
    if scale == 0.0:
        return 0.0 if distance == 0.0 else math.inf
    return distance / scale


def assert_error_at_most(
    error: float, reference_error: float, factor: float = 2.0, floor: float = 0.0
) -> None:
    """Assert that a kernel is about as accurate as the plain computation in the same dtype.

    ``error`` is the kernel's relative error and ``reference_error`` that of plain PyTorch in the same dtype,
    both against float64; the bound is ``factor * reference_error``, or ``floor`` where that is larger (for
    cases in which the plain computation happens to be nearly exact; a few units of the dtype's rounding are
    meant). The rule is that of flash-attention's tests. Raises AssertionError above the bound and for a NaN
    error, InvalidInput when ``reference_error`` is not a finite number of at least 0.
    """
    if not (math.isfinite(reference_error) and reference_error >= 0):
        raise InvalidInput(f"reference_error: expected a finite number of at least 0, got {reference_error}")
    bound = max(factor * reference_error, floor)
    if not error <= bound:
        raise AssertionError(
            f"relative error {error:.3e} exceeds {bound:.3e} = max({factor:g} x {reference_error:.3e}, "
            f"{floor:.1e}), where {reference_error:.3e} is the error of the plain computation in this dtype"
        )
