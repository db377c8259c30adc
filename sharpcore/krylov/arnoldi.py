"""arnoldi: extremal eigenvalues of B Jacobians as they are, not symmetrized, in lock-step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpcore.krylov.decomposition import Ritz
from sharpcore.krylov.operator import BatchedOperator, as_batched
from sharpcore.krylov.run import ENDS, Progress, Run, make_plan
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
    """The k eigenvalues of extreme real part, or largest magnitude, of each of B operators on d entries.

    Block Arnoldi with Krylov-Schur restarts (Stewart, SIAM J. Matrix Anal. Appl. 23, 2001), for
    `ScoreJacobian`: the eigenvalues of the paper (arXiv 2412.04140), which took the Jacobian of the score as
    it is. Those of its symmetric part, the Hessian, are `block_lanczos`'s.

    Args:
        operator: a curvature operator (B samples: x's first dimension), a matrix [d, d] or [B, d, d], or a
            `BatchedOperator`; only products are needed, no transposed ones.
        k, which: as in `block_lanczos`, by the real part ("smallest", "largest", "both"), or "magnitude": the
            k largest ones. Of a conjugate pair that the last place splits, one is given.
        block, tolerance, max_products, max_basis, on_breakdown, vectors, seed, sample_ids, batched,
        checkpoint, progress: as in `block_lanczos`.

    Returns:
        A `Solution`: values [B, k] complex128, ascending by real part (or magnitude), pairs together; vectors
        [B, k, *sample_shape] complex128 of norm 1 (right eigenvectors); residuals ||A v - l v|| in the
        operator's units. Eigenvalues of a strongly non-normal matrix can be much less exact than its
        residuals.

    Raises:
        InvalidInput: bad arguments, or a checkpoint of another run.
        NonFiniteError: a product is NaN or infinite.
    """
    op = as_batched(operator, batched)
    plan = make_plan(
        op, k, which, block, tolerance, max_products, max_basis, on_breakdown, seed, sample_ids, None,
        ends=(*ENDS, "magnitude"),
    )  # fmt: skip
    run = _Arnoldi(op, plan, vectors, None if checkpoint is None else Path(checkpoint), progress)
    run.go()
    return run.solution()


class _Arnoldi(Run):
    """One call of `arnoldi`."""

    name = "arnoldi"
    values_dtype = torch.complex128

    def pairs(self, samples: Tensor) -> Iterator[Ritz]:
        for group, start, processed, size in self.krylov.groups(samples):
            yield self._pairs(group, start, processed, size)

    def _pairs(self, group: Tensor, start: int, processed: int, size: int) -> Ritz:
        h = self.krylov.projected[group.to(self.krylov.projected.device), :size, :processed].cpu()
        square = h[:, :processed]
        # H is block triangular over a breakdown: the part since has eigenvalues of its own.
        closed, _ = _eig(square[:, :start, :start])
        values, weights = _eig(square)
        order = _order(values, _keys(values, self.plan.which))
        values = values.gather(1, order)
        weights = weights.gather(2, order[:, None, :].expand_as(weights))
        image = h.to(weights.dtype) @ weights
        coupling = torch.linalg.vector_norm(image[:, processed:], dim=1)
        noise = torch.linalg.vector_norm(image[:, :processed] - weights * values[:, None, :], dim=1)
        norm = torch.linalg.matrix_norm(square, 2)
        # A projection without symmetry does not show what the products themselves were rounded by.
        noise = noise.hypot(self.krylov.carried(group, weights)).hypot(self.op.rounding * norm[:, None])
        keys, fresh = _keys(values, self.plan.which), _not_among(values, closed)
        return Ritz(group, values, keys, weights, noise, coupling.hypot(noise), fresh, norm)

    def contract(self, samples: Tensor) -> None:
        for group, start, processed, size in self.krylov.groups(samples):
            count = self.kept(size - processed)
            most = self.krylov.limit - 2 * (size - processed or self.plan.block)
            for i in group:
                square = self.krylov.projected[int(i), :processed, :processed].cpu()
                weights, closed = outermost(square, start, count, most, self.plan.which)
                self.krylov.contract(i[None], weights[None], torch.tensor([closed]))

    def check(self, samples: Tensor) -> None:
        self.asymmetry[samples] = self.krylov.asymmetry(samples)


def _eig(square: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [G, p] and eigenvectors [G, p, p] of real matrices [G, p, p], backward stable.

    LAPACK scales rows and columns first. After a restart a projection is nearly triangular and those scales
    reach 1e8, with residuals of 1e-8 ||H||. In the basis of the Hartley transform, its own inverse, all rows
    and columns are of one size and nothing is scaled.
    """
    p = square.shape[-1]
    places = torch.arange(p)
    angles = torch.outer(places, places).remainder(max(p, 1)).to(square.dtype) * (2 * math.pi / max(p, 1))
    hartley = (angles.cos() + angles.sin()) / math.sqrt(max(p, 1))
    values, weights = torch.linalg.eig(hartley @ square @ hartley)
    return values, hartley.to(weights.dtype) @ weights


def outermost(square: Tensor, start: int, count: int, most: int, which: str) -> tuple[Tensor, int]:
    """Orthonormal columns [p, q] whose span `square` [p, p] maps into itself, with its outermost eigenvalues.

    `count` of them, or one more or less, and at most `most`: conjugate pairs are taken or left whole. Where
    `square` is block triangular over a breakdown at `start`, eigenvalues of its first block come first; how
    many of the columns are theirs is returned as well.
    """
    import scipy.linalg

    whole, p = square.numpy(), len(square)
    triangle, vectors = np.zeros((p, p)), np.zeros((p, p))
    blocks = [slice(a, b) for a, b in ((0, start), (start, p)) if a < b]
    for block in blocks:
        triangle[block, block], vectors[block, block] = scipy.linalg.schur(whole[block, block], "real")
    for first, second in pairwise(blocks):
        triangle[first, second] = vectors[first, first].T @ whole[first, second] @ vectors[second, second]
    select = _selected(triangle, count, most, which)
    # dtrsen moves the selected ones to the front and keeps their order, whatever ties there are: no test of
    # eigenvalues that rounding may answer otherwise after a move.
    triangle, vectors, _, _, q, _, _, failed = scipy.linalg.lapack.dtrsen(select, triangle, vectors, job="N")
    # Eigenvalues too close to change places end it early, with a Schur form all the same.
    closed = 0 if failed else int(select[:start].sum())
    if 0 < q < p and triangle[q, q - 1] != 0:
        q -= 1
    return torch.from_numpy(np.ascontiguousarray(vectors[:, :q])), closed


def _selected(triangle: Any, count: int, most: int, which: str) -> Any:
    """[p] bool: the outermost diagonal blocks of a real Schur form, until they hold `count` eigenvalues."""
    p = len(triangle)
    below = np.append(np.diagonal(triangle, -1), 0.0)
    starts = np.flatnonzero(np.append(0.0, below[:-1]) == 0)
    # In LAPACK's form both diagonal entries of a pair are its real part.
    above = np.append(np.diagonal(triangle, 1), 0.0)
    imaginary = np.sqrt(np.abs(below)) * np.sqrt(np.abs(above))
    values = torch.from_numpy(np.diagonal(triangle) + 1j * imaginary)[starts]
    rising = _keys(values, which).argsort(stable=True).tolist()
    falling = rising[::-1]
    ranked = {"smallest": rising, "both": [i for ends in zip(rising, falling, strict=True) for i in ends]}
    select = np.zeros(p, dtype=bool)
    for i in ranked.get(which, falling):
        block = slice(starts[i], starts[i] + 1 + int(below[starts[i]] != 0))
        if select.sum() >= count:
            break
        if select.sum() + block.stop - block.start <= most:
            select[block] = True
    return select


def _keys(values: Tensor, which: str) -> Tensor:
    """What eigenvalues are ranked by: their real part or their magnitude.

    By single operations, not abs(), so that those of a conjugate pair are equal to the last bit.
    """
    if which != "magnitude":
        return values.real
    return (values.real.square() + values.imag.square()).sqrt()


def _order(values: Tensor, keys: Tensor) -> Tensor:
    """Places [G, p] by key, then real, then imaginary part, so that conjugate pairs stay together."""
    places = values.imag.argsort(dim=1, stable=True)
    for key in (values.real, keys):
        places = places.gather(1, key.gather(1, places).argsort(dim=1, stable=True))
    return places


def _not_among(values: Tensor, closed: Tensor) -> Tensor:
    """Which of the values [G, p] are left when every one of `closed` [G, c] has taken the nearest to it."""
    fresh = torch.ones(values.shape, dtype=torch.bool)
    for row, taken in enumerate(closed):
        for value in taken:
            distance = (values[row] - value).abs().masked_fill(~fresh[row], float("inf"))
            fresh[row, distance.argmin()] = False
    return fresh
