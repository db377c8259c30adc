"""block_lanczos: extremal eigenpairs of B symmetric operators in lock-step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sharpcore.backends.reference.symmetric_eigen import MOST_EIGEN_ROWS
from sharpcore.errors import InvalidInput
from sharpcore.krylov.decomposition import Ritz, columns
from sharpcore.krylov.operator import BatchedOperator, as_batched
from sharpcore.krylov.run import Progress, Run, make_plan
from sharpcore.krylov.solution import Solution
from sharpcore.operators import CurvatureOperator


def block_lanczos(
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
    symmetry_tolerance: float | None = None,
    batched: bool | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Solution:
    """The k smallest, k largest, or both ends' eigenpairs of each of B symmetric operators on d entries.

    Block Lanczos (Golub and Underwood, 1977) with full re-orthogonalization and thick restart (Wu and Simon,
    2000): bases and projections in float64, products in the operator's dtype, all samples multiplied at once.

    Args:
        operator: `Hessian` or `HessianDifference` (B samples: x's first dimension), a symmetric matrix
            [d, d] or [B, d, d], or a `BatchedOperator`.
        k: pairs at each end asked for, at most d. "both" gives 2k, or all d where those are fewer.
        which: "smallest", "largest" (algebraically), or "both".
        block: vectors multiplied at once for each sample. 1 needs the fewest products; more are cheaper each,
            and find eigenvalues of as many equal copies.
        tolerance: a pair has converged when ||A v - l v|| <= tolerance * ||A||. Default: 1e-10 for float64
            products, 1e-5 for float32, 2e-2 for 16 bits.
        max_products: vectors to multiply for each sample at most, a block or more (default: 10 d + 100); no
            block is begun that would pass it. In a batch the sample with most vectors counts.
        max_basis: rows of a basis at which it is contracted (default: 768, fewer above d = 21,845: 128 MiB a
            sample).
        on_breakdown: what to do when an invariant subspace is found: "continue" with a fresh random block,
            which also finds further copies of equal eigenvalues, or "stop". `stats.breakdowns` counts them.
        vectors: whether eigenvectors are returned.
        seed: of the random start; with `sample_ids` [B] (default 0, 1, ...), so that a sample's pairs do not
            depend on what else is in the batch.
        symmetry_tolerance: the asymmetry ||T - T^T|| / ||T|| of the projected operator beyond which it is
            refused (default: 1e-8, 1e-3 or 0.1 by the precision of the products).
        batched: see `as_batched`.
        checkpoint: a file that the run is saved to at every eighth look at the pairs and where a product
            raises (Ctrl-C, NaN, memory), and resumed from where it exists; deleted at the end.
        progress: called after each look at the Ritz pairs.

    Returns:
        A `Solution`: values [B, k] float64 ascending, vectors [B, k, *sample_shape], residuals ||A v - l v||
        in the operator's units. Where the tolerance was not reached, the best pairs there are and a `result`
        that says so.

    Raises:
        InvalidInput: bad arguments; an operator that is not symmetric; a checkpoint of another run.
        NonFiniteError: a product is NaN or infinite.
    """
    op = as_batched(operator, batched)
    plan = make_plan(
        op, k, which, block, tolerance, max_products, max_basis, on_breakdown, seed, sample_ids,
        symmetry_tolerance,
    )  # fmt: skip
    run = _Lanczos(op, plan, vectors, None if checkpoint is None else Path(checkpoint), progress)
    run.go()
    return run.solution()


class _Lanczos(Run):
    """One call of `block_lanczos`."""

    name = "block_lanczos"

    def pairs(self, samples: Tensor) -> Iterator[Ritz]:
        krylov = self.krylov
        if not krylov.goes_ahead or int(krylov.processed[samples].max()) > MOST_EIGEN_ROWS:
            for group, start, processed, size in krylov.groups(samples):
                yield self._pairs(group, start, processed, size)
            return
        found = self._pairs_at_once(samples)
        for group, _, processed, _ in krylov.groups(samples):
            places = (samples[:, None] == group).any(1).nonzero().flatten()
            yield found.of(places).leading(processed)

    def _pairs(self, group: Tensor, start: int, processed: int, size: int) -> Ritz:
        h = self.krylov.projected[group.to(self.krylov.projected.device), :size, :processed]
        symmetric = (h[:, :processed] + h[:, :processed].mT) / 2
        # The parts before and after a breakdown are diagonalized apart: equal eigenvalues must not mix them.
        parts = [torch.linalg.eigh(symmetric[:, a:b, a:b]) for a, b in ((0, start), (start, processed))]
        values, order = torch.cat([part.eigenvalues for part in parts], dim=1).sort(dim=1, stable=True)
        weights = torch.zeros_like(symmetric)
        weights[:, :start, :start], weights[:, start:, start:] = (part.eigenvectors for part in parts)
        weights = weights.gather(2, order[:, None, :].expand_as(weights))
        image = h @ weights
        coupling = torch.linalg.vector_norm(image[:, processed:], dim=1)
        noise = torch.linalg.vector_norm(image[:, :processed] - weights * values[:, None, :], dim=1)
        noise = noise.hypot(self.krylov.carried(group, weights))
        return _looked_at(group, values, weights, coupling, noise, order >= start)

    def _pairs_at_once(self, samples: Tensor) -> Ritz:
        """Those of all samples, wherever they stand, by the device's kernels: nothing waits but for one copy.

        Beyond the rows that a sample has multiplied there are no pairs: values of zero without a vector.
        """
        krylov, count = self.krylov, int(self.krylov.processed[samples].max())
        device = krylov.projected.device
        places = torch.stack(
            [samples, krylov.start[samples], krylov.processed[samples], krylov.sizes[samples]]
        )
        where, start, processed, sizes = places.to(device)
        h, lost, rows = krylov.projected[where], krylov.lost[where], torch.arange(count, device=device)
        # The parts before and after a breakdown are diagonalized apart: equal eigenvalues must not mix them.
        later = rows >= start[:, None]
        square = h[:, :count, :count]
        symmetric = torch.where(later[:, :, None] == later[:, None, :], (square + square.mT) / 2, 0.0)
        values, weights = krylov.kernels.symmetric_eigen(symmetric, processed)
        values = values.masked_fill(rows >= processed[:, None], 0.0)
        coupling, noise = krylov.kernels.ritz_residuals(h, lost, processed, sizes, values, weights)
        fresh = (weights.ne(0) & later[:, :, None]).any(1)
        return _looked_at(samples, values, weights, coupling, noise, fresh)

    def contract(self, samples: Tensor) -> None:
        for ritz in self.pairs(samples):
            kept, closed = self.outermost(ritz)
            self.krylov.contract(ritz.samples, columns(ritz.weights, kept), closed)

    def check(self, samples: Tensor) -> None:
        asymmetry = self.krylov.asymmetry(samples)
        self.asymmetry[samples] = asymmetry
        worst_one = int(asymmetry.argmax())
        if float(asymmetry[worst_one]) > self.plan.symmetry_tolerance:
            raise InvalidInput(
                f"operator: expected a symmetric one; {self.op.name} is not: ||T - T^T|| / ||T|| = "
                f"{float(asymmetry[worst_one]):.2g} on the vectors multiplied so far of sample "
                f"{int(samples[worst_one])} (allowed: {self.plan.symmetry_tolerance:.2g}). Take the "
                "symmetric part, Hessian(...), or arnoldi for the Jacobian as it is"
            )


def _looked_at(
    samples: Tensor, values: Tensor, weights: Tensor, coupling: Tensor, noise: Tensor, fresh: Tensor
) -> Ritz:
    """Pairs [G, p] whose residuals have these parts; all but the weights come to the CPU, in one copy."""
    found = torch.stack([values, noise, coupling.hypot(noise), fresh.to(values)]).cpu()
    values, noise, residuals, fresh = found
    return Ritz(samples, values, values, weights, noise, residuals, fresh != 0, values.abs().amax(1))
