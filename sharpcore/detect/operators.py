"""Operators of the Jacobians at the states that detectors look at, for Krylov solvers and estimators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from sharpcore.operators import CurvatureOperator
from sharpcore.states import Side

if TYPE_CHECKING:
    from sharpcore.detect.evidence import Evidence


class EvidenceJacobian(CurvatureOperator):
    """The Jacobian of a score, or of the difference of two, from the sides of a state."""

    def __init__(self, x: Tensor, sides: Sequence[Side], factors: tuple[Tensor, Tensor]) -> None:
        self._template, self._sides, (self._factor, self._offset) = x, sides, factors

    @property
    def rounding(self) -> float:
        return max(side.rounding for side in self._sides)

    def _combine(self, vectors: Tensor, products: list[Tensor]) -> Tensor:
        if len(products) == 2:
            return self._factor * (products[0] - products[1])
        return self._factor * products[0] + self._offset * vectors

    def _multiply(self, vectors: Tensor) -> Tensor:
        return self._combine(vectors, [side.jvp(vectors) for side in self._sides])

    def _multiply_transposed(self, vectors: Tensor) -> Tensor:
        # The factor is one number a sample: it commutes with the Jacobian.
        return self._combine(vectors, [side.vjp(vectors) for side in self._sides])


class EvidenceHessian(CurvatureOperator):
    """The symmetric part of a Jacobian."""

    def __init__(self, jacobian: CurvatureOperator) -> None:
        self.jacobian, self._template = jacobian, jacobian._template

    @property
    def rounding(self) -> float:
        return self.jacobian.rounding

    def _multiply(self, vectors: Tensor) -> Tensor:
        return (self.jacobian._multiply(vectors) + self.jacobian._multiply_transposed(vectors)) / 2

    def _multiply_transposed(self, vectors: Tensor) -> Tensor:
        return self._multiply(vectors)


class EvidenceCurvature:
    """What `sharpcore.eigenvalues.compute` takes of a curvature, from evidence that is there."""

    def __init__(self, evidence: Evidence) -> None:
        self.x, self.seeds = evidence.state.x, tuple(evidence.state.seeds)
        self.sigma = float(evidence.level[1][0])
        self._evidence = evidence

    @property
    def score(self) -> Tensor:
        """s(x, prompt)."""
        return self._evidence.score

    @property
    def unconditional_score(self) -> Tensor:
        """s(x, no prompt)."""
        return self._evidence.unconditional_score

    def operator(self, condition: str = "prompt") -> EvidenceHessian:
        """The Hessian with the prompt, or of the difference."""
        return EvidenceHessian(self._evidence.jacobian(difference=condition == "difference"))
