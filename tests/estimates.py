"""Matrices for tests of estimators, and how often error bars cover the truth."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpcore.krylov import Estimate

RUNS = 200


def rotation(d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    q = rotation(len(values), seed)
    matrix = (q * values) @ q.T
    return (matrix + matrix.T) / 2


def spectra(d: int = 40) -> dict[str, Tensor]:
    linear = torch.linspace(-1, 1, d, dtype=torch.float64)
    third = torch.arange(d) % 3
    return {
        "indefinite": linear,
        "clustered": -1 + 1e-6 * linear,
        "degenerate": torch.where(third == 0, 2.0, -1.0).double(),
        "outlier": torch.cat([linear[:-1] - 2, torch.tensor([50.0]).double()]),
        "decaying": 0.5 ** torch.arange(d, dtype=torch.float64),
        "rank one": torch.cat([torch.zeros(d - 1), torch.tensor([3.0])]).double(),
        "zero": torch.zeros(d, dtype=torch.float64),
    }


def runs_of(matrix: Tensor) -> Tensor:
    """The same matrix RUNS times: every sample has probes of its own."""
    return matrix.expand(RUNS, *matrix.shape)


def assert_within(estimate: Estimate, truth: Tensor | float, errors: float = 3.5) -> None:
    """Every value lies within so many standard errors of the truth, and nothing is NaN."""
    assert bool(torch.isfinite(estimate.value).all())
    assert bool(torch.isfinite(estimate.standard_error).all())
    distance = (estimate.value - truth).abs()
    within = distance <= errors * estimate.standard_error
    assert bool(within.all()), float((distance / estimate.standard_error).max())


def assert_nominal(estimate: Estimate, truth: Tensor | float) -> None:
    """One standard error covers the truth in about 68 % of RUNS runs, two in about 95 %.

    Limits: the binomial standard deviations of 200 runs are 3.3 % and 1.5 %; widening for few probes
    (Student) makes the first 74 % for eight of them.
    """
    ratio = (estimate.value - truth).abs() / estimate.standard_error
    one, two = float((ratio <= 1).double().mean()), float((ratio <= 2).double().mean())
    assert 0.59 <= one <= 0.83, one
    assert two >= 0.905, two
    # Not too large either: the bars are those of the estimate's own scatter.
    scatter = (estimate.value - truth).square().mean().sqrt()
    size = estimate.standard_error.square().mean().sqrt()
    assert 0.65 <= float(scatter / size) <= 1.2, float(scatter / size)


def assert_covered(estimate: Estimate, truth: Tensor | float) -> None:
    """Two standard errors cover the truth in most runs, where errors have long tails (nominal: 95 %)."""
    covered = (estimate.value - truth).abs() <= 2 * estimate.standard_error
    assert float(covered.double().mean()) >= 0.87, float(covered.double().mean())
