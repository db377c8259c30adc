"""What solvers and estimators return: values with their residuals or standard errors, and how they were
got."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Result(str, Enum):
    """How a solver ended; each value is a sentence."""

    converged = "converged: every residual is within the tolerance"
    invariant_subspace = "stopped: an invariant subspace was found that holds fewer pairs than were asked for"
    not_converged = "not converged: the products allowed were used up; the best pairs are returned"
    stagnated = "not converged: the operator's own rounding is larger than the tolerance asked for"

    @property
    def ok(self) -> bool:
        """Whether the pairs are what was asked for."""
        return self is Result.converged


@dataclass(frozen=True)
class Stats:
    """What a solver spent and saw.

    `products`: vectors multiplied for each sample (transposed products included); `steps`: calls of the
    operator; `restarts`: how often a basis was contracted; `norm` [B]: the largest magnitude of a Ritz value,
    an estimate of ||A||; `asymmetry` [B]: ||T - T^T|| / ||T|| of the projection (0 for singular values);
    `deflated` [B]: vectors that lay in the basis already; `breakdowns` [B]: invariant subspaces found;
    `seconds` in all, `operator_seconds` in products.
    """

    products: int
    steps: int
    restarts: int
    norm: Tensor
    asymmetry: Tensor
    deflated: Tensor
    breakdowns: Tensor
    seconds: float
    operator_seconds: float

    @property
    def overhead(self) -> float:
        """The share of the time that was not spent in products."""
        return 1 - self.operator_seconds / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Solution:
    """Eigenpairs (or singular triplets) of B operators.

    `values` [B, k] float64, ascending (complex128 for `arnoldi`); `vectors` [B, k, *sample_shape] float64
    rows of norm 1, None where not asked for; `residuals` [B, k]: ||A v - l v||, in the operator's units;
    `result` is the worst of `results`, one a sample. A sample with fewer than k pairs has NaN in the places
    left.
    """

    values: Tensor
    vectors: Tensor | None
    residuals: Tensor
    result: Result
    results: tuple[Result, ...]
    stats: Stats

    def __repr__(self) -> str:
        samples, count = self.values.shape
        return (
            f"Solution({samples} x {count} values, {self.result.name}, largest residual "
            f"{_largest(self.residuals):.2g}, {self.stats.products} products)"
        )


@dataclass(frozen=True)
class Estimate:
    """A stochastic estimate for each of B samples: `value` [B] or [B, ...] and its `standard_error`, float64.

    `probes` is how many random vectors it rests on, `products` how many vectors were multiplied per sample.
    """

    value: Tensor
    standard_error: Tensor
    probes: int
    products: int

    def interval(self, z: float = 1.96) -> tuple[Tensor, Tensor]:
        """value -+ z standard errors."""
        return self.value - z * self.standard_error, self.value + z * self.standard_error


def worst(results: tuple[Result, ...]) -> Result:
    """The result of a batch: the first of the samples' that is not the best there is."""
    order = (Result.stagnated, Result.not_converged, Result.invariant_subspace, Result.converged)
    return min(results, key=order.index, default=Result.converged)


def _largest(residuals: Tensor) -> float:
    finite = residuals[torch.isfinite(residuals)]
    return float(finite.max()) if finite.numel() else float("nan")
