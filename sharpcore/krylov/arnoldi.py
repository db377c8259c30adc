"""arnoldi: extremal eigenvalues of B Jacobians as they are, not symmetrized, in lock-step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import scipy.linalg
import torch
from torch import Tensor

from sharpcore.krylov.decomposition import Ritz
from sharpcore.krylov.operator import BatchedOperator, as_batched
from sharpcore.krylov.run import Progress, Run, make_plan
from sharpcore.krylov.solution import Solution
from sharpcore.operators import CurvatureOperator


def arnoldi(
    operator: CurvatureOperator | BatchedOperator | Tensor,
    k: int = 6,
    which: str = "both",
    *,
    block: int = 1,
    tolerance: float | None = None,
    max_products: int | None = None,
    max_basis: int | None = None,
    on_breakdown: str = "continue",
    vectors: bool = True,
    seed: int = 0,
    sample_ids: Sequence[int] | None = None,
    batched: bool | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Solution:
    """The k eigenvalues of smallest, largest, or both extreme real parts of each of B operators on d entries.

    Block Arnoldi with Krylov-Schur restarts (Stewart, SIAM J. Matrix Anal. Appl. 23, 2001), for
    `ScoreJacobian`: the eigenvalues of the paper (arXiv 2412.04140), which took the Jacobian of the score as
    it is. Those of its symmetric part, the Hessian, are `block_lanczos`'s.

    Args:
        operator: a curvature operator (B samples: x's first dimension), a matrix [d, d] or [B, d, d], or a
            `BatchedOperator`; only products are needed, no transposed ones.
        k, which: as in `block_lanczos`, by the real part; of a conjugate pair that the last place splits, one
            is given.
        block, tolerance, max_products, max_basis, on_breakdown, vectors, seed, sample_ids, batched,
        checkpoint, progress: as in `block_lanczos`.

    Returns:
        A `Solution`: values [B, k] complex128, ordered by real and then imaginary part; vectors [B, k,
        *sample_shape] complex128 of norm 1 (right eigenvectors); residuals ||A v - l v|| in the operator's
        units. The eigenvalues of a strongly non-normal matrix can be much less exact than its residuals.

    Raises:
        InvalidInput: bad arguments, or a checkpoint of another run.
        NonFiniteError: a product is NaN or infinite.
    """
    began = time.perf_counter()
    op = as_batched(operator, batched)
    plan = make_plan(
        op, k, which, block, tolerance, max_products, max_basis, on_breakdown, seed, sample_ids, None
    )
    run = _Arnoldi(op, plan, vectors, None if checkpoint is None else Path(checkpoint), progress)
    run.go()
    return run.solution(began)


class _Arnoldi(Run):
    """One call of `arnoldi`."""

    name = "arnoldi"
    values_dtype = torch.complex128

    def pairs(self, samples: Tensor) -> Iterator[Ritz]:
        for group, start, processed, size in self.krylov.groups(samples):
            yield self._pairs(group, start, processed, size)

    def _pairs(self, group: Tensor, start: int, processed: int, size: int) -> Ritz:
        h = self.krylov.projected[group, :size, :processed]
        square = h[:, :processed]
        # H is block triangular over a breakdown: the part since has eigenvalues of its own.
        closed = torch.linalg.eigvals(square[:, :start, :start])
        values, weights = torch.linalg.eig(square)
        order = _order(values)
        values = values.gather(1, order)
        weights = weights.gather(2, order[:, None, :].expand_as(weights))
        image = h.to(weights.dtype) @ weights
        coupling = torch.linalg.vector_norm(image[:, processed:], dim=1)
        noise = torch.linalg.vector_norm(image[:, :processed] - weights * values[:, None, :], dim=1)
        noise = noise.hypot(self.krylov.carried(group, weights))
        norm = torch.linalg.matrix_norm(square, 2)
        fresh = _not_among(values, closed)
        return Ritz(group, values, values.real, weights, noise, coupling.hypot(noise), fresh, norm)

    def contract(self, samples: Tensor) -> None:
        for group, _, processed, size in self.krylov.groups(samples):
            count = min(self.kept, processed - (size - processed) - 1)
            schur = [self._schur(self.krylov.projected[i, :processed, :processed], count) for i in group]
            for i, basis in zip(group, schur, strict=True):
                # Of a sequence begun after a breakdown no part can be told from the others any more.
                self.krylov.contract(i[None], basis[None], torch.zeros(1, dtype=torch.int64))

    def _schur(self, square: Tensor, count: int) -> Tensor:
        """Schur vectors [p, q] of the `count` outermost eigenvalues, conjugate pairs whole."""
        parts = torch.linalg.eigvals(square).real.sort().values
        low = {"smallest": count, "largest": 0, "both": (count + 1) // 2}[self.plan.which]
        high = count - low
        below = float(parts[low - 1]) if low else -float("inf")
        above = float(parts[len(parts) - high]) if high else float("inf")
        slack = 1e-10 * float(parts.abs().max())
        _, vectors, kept = scipy.linalg.schur(
            square.numpy(), output="real", sort=lambda re, im=0.0: re <= below + slack or re >= above - slack
        )
        return torch.from_numpy(vectors[:, : min(kept, len(square) - 1)].copy())

    def check(self, samples: Tensor) -> None:
        """Any square operator will do."""


def _order(values: Tensor) -> Tensor:
    """Places [G, p] by real part, then imaginary part; equal real parts of a pair stay together."""
    first = values.imag.argsort(dim=1, stable=True)
    return first.gather(1, values.real.gather(1, first).argsort(dim=1, stable=True))


def _not_among(values: Tensor, closed: Tensor) -> Tensor:
    """Which of the values [G, p] are left when every one of `closed` [G, c] has taken the nearest to it."""
    fresh = torch.ones(values.shape, dtype=torch.bool)
    for row, taken in enumerate(closed):
        for value in taken:
            distance = (values[row] - value).abs().masked_fill(~fresh[row], float("inf"))
            fresh[row, distance.argmin()] = False
    return fresh
