"""What a metric sees of one batch at one step, and what a metric is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor


class Evidence:
    """The difference of B scores with and without their prompt, and the Hessian's product with it.

    `difference` is s_D = s(x, prompt) - s(x, no prompt), [B, ...] in the network's dtype; `product` makes H_D
    s_D, [B, ...], and runs at most once, when a metric asks for it. Both in the units that were asked for:
    score units, or eps units (where the score stands for the predicted noise and the Hessian for its
    Jacobian).
    """

    def __init__(self, difference: Tensor, product: Callable[[Tensor], Tensor]) -> None:
        self.difference = difference
        self._product = product

    @cached_property
    def hessian_difference_product(self) -> Tensor:
        """H_D s_D, [B, ...], by the network's plain (not symmetrized) Jacobians, as in arXiv 2412.04140."""
        return self._product(self.difference)


class Metric:
    """One number for each sample; subclasses define `name`, `needs_product` and `compute`."""

    name: ClassVar[str]
    source: ClassVar[str]
    needs_product: ClassVar[bool] = False

    def __init__(self, *, squared: bool = True) -> None:
        self.squared = squared

    def compute(self, evidence: Evidence) -> Tensor:
        """The metric of each sample, [B], float64."""
        raise TypeError(f"{type(self).__name__} defines no compute")


def sample_norms(x: Tensor) -> Tensor:
    """The Euclidean norm of each sample, [B, ...] to [B], accumulated in float64."""
    return torch.linalg.vector_norm(x.double().flatten(1), dim=1)
