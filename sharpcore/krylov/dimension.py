"""Local intrinsic dimension at a point, from the curvature of log p_t there: FLIPD and LHSD."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpcore.errors import InvalidInput
from sharpcore.krylov.density import Density
from sharpcore.krylov.solution import Estimate


def flipd(
    trace: Estimate | Tensor | float,
    score_norm_squared: Tensor | float,
    sigma: Tensor | float,
    dimension: int,
) -> Estimate:
    """d + sigma^2 (tr H + ||s||^2), [B]: the local intrinsic dimension by Fokker and Planck's equation.

    `trace` of the Hessian H of log p_t in score units, an `Estimate` or numbers taken for exact;
    `score_norm_squared` ||s||^2 in score units; `sigma` = sqrt(1 - abar_t), a number or [B]; `dimension` d.
    The standard error is that of the trace. Kamkari, Ross, Hosseinzadeh, Cresswell and Loaiza-Ganem 2024
    (arXiv 2406.03537). Raises InvalidInput where sigma is not positive or shapes do not fit.
    """
    if not isinstance(trace, Estimate):
        value = torch.as_tensor(trace, dtype=torch.float64)
        trace = Estimate(value, torch.zeros_like(value), 0, 0)
    like = trace.value
    square = _like(like, "score_norm_squared", score_norm_squared)
    level = _like(like, "sigma", sigma)
    if not bool((level > 0).all()):
        raise InvalidInput(f"sigma: expected positive numbers; got {sigma!r}")
    value = dimension + level.square() * (like + square)
    return Estimate(value, level.square() * trace.standard_error, trace.probes, trace.products)


def lhsd(density: Density, sigma: Tensor | float, *, cutoff: float = 0.7, order: float = 4.0) -> Estimate:
    """The local Hessian spectral dimension, [B]: eigenvalues of H that are small beside those of pure noise.

    Sum of 1 / (1 + (|l| sigma^2 / cutoff)^order): directions along the data have |l| of the order of 1, those
    across it 1 / sigma^2, and the filter's edge cutoff / sigma^2 lies between (Osada 2026, arXiv
    2605.01221, section 3; `cutoff` and `order` as in the author's code, of which the former is to be
    chosen such that few eigenvalues are near the edge). `density` is of H, `sigma` a number or [B].
    """
    level = _like(density.rules.free, "sigma", sigma)
    if not bool((level > 0).all()):
        raise InvalidInput(f"sigma: expected positive numbers; got {sigma!r}")
    if not cutoff > 0:
        raise InvalidInput(f"cutoff: expected a positive number; got {cutoff!r}")
    return density.smooth_count(cutoff / level.square(), order)


def _like(like: Tensor, name: str, value: Tensor | float) -> Tensor:
    numbers = torch.as_tensor(value, dtype=torch.float64, device=like.device)
    if numbers.shape not in ((), like.shape) or not bool(torch.isfinite(numbers).all()):
        raise InvalidInput(f"{name}: expected a finite number or {list(like.shape)} of them; got {value!r}")
    return numbers.expand(like.shape)
