"""The Krylov decomposition A V = V H + R of B symmetric operators in lock-step: grow, Ritz pairs, thick
restart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sharpcore.backends import get_backend
from sharpcore.krylov.operator import BatchedOperator

# Couplings below this many roundings of the products end a Krylov sequence: what follows is rounding.
_BREAKDOWN = 64


@dataclass(frozen=True)
class Ritz:
    """Approximate eigenpairs of some samples that stand at the same place of the recursion.

    On the CPU, as the projections are. `values` [G, p] ascending; `weights` [G, p, p]: columns give the
    vectors in terms of the basis; `noise` [G, p]: the part of the residual that more steps do not reduce
    (rounding and asymmetry of the products); `residuals` [G, p] all of it; `fresh` [G, p]: the pair belongs
    to the sequence begun at the last breakdown.
    """

    samples: Tensor
    values: Tensor
    weights: Tensor
    noise: Tensor
    residuals: Tensor
    fresh: Tensor

    def of(self, group: Tensor | slice) -> Ritz:
        """The pairs of a part of the samples."""
        return Ritz(*(getattr(self, field.name)[group] for field in fields(self)))


class Decomposition:
    """Bases V_i of B problems with their projections H_i = V_i^T A_i V_i.

    Of sample i the rows [0, p_i) of `basis` have been multiplied, the rows [p_i, n_i) are the active block:
    A v_j = sum_m basis[i, m] projected[i, m, j] for j < p_i, up to `lost[i, j]` (deflated remainders, and
    what a restart leaves out). All columns are kept, not three blocks: H then tells how symmetric the
    operator is, and residuals are those of the products as they were computed.
    """

    def __init__(self, samples: int, dimension: int, rows: int, block: int, device: torch.device) -> None:
        self.block, self.limit = block, min(rows, dimension)
        self.basis = torch.zeros(samples, rows, dimension, dtype=torch.float64, device=device)
        self.projected = torch.zeros(samples, rows, rows, dtype=torch.float64)
        self.lost = torch.zeros(samples, rows, dtype=torch.float64)
        self.processed = torch.zeros(samples, dtype=torch.int64)
        self.sizes = torch.zeros(samples, dtype=torch.int64)
        self.start = torch.zeros(samples, dtype=torch.int64)  # where the last sequence begins
        self.sequences = torch.zeros(samples, dtype=torch.int64)
        self.breakdowns = torch.zeros(samples, dtype=torch.int64)
        self.deflated = torch.zeros(samples, dtype=torch.int64)
        self.frozen = torch.zeros(samples, dtype=torch.bool)
        self.norm = torch.zeros(samples, dtype=torch.float64)
        self.restarts = 0
        self._grow = get_backend("auto", device=device, dtype=torch.float64).grow_basis

    def append(self, vectors: Tensor, samples: Tensor | None = None) -> None:
        """Begin a sequence with the parts of `vectors` [K, B, d] that the bases do not hold yet."""
        sizes = self.sizes.clone()
        if samples is not None:
            mask = torch.ones_like(self.frozen)
            mask[samples] = False
            sizes[mask] = -1
        growth = self._grow(self.basis, sizes, vectors, floor=torch.zeros_like(self.norm), limit=self.limit)
        begun = sizes >= 0
        self.start = torch.where(begun, self.processed, self.start)
        self.sequences += begun
        self.sizes += growth.ranks

    def active(self) -> Tensor:
        """The block to multiply next, [K, B, d]; zero rows where a sample has fewer vectors than others."""
        left = torch.where(self.frozen, 0, self.sizes - self.processed)
        count = int(left.max())
        rows = self.processed[:, None] + torch.arange(count)
        missing = (torch.arange(count) >= left[:, None]).to(self.basis.device)
        rows = rows.clamp_max(self.basis.shape[1] - 1).to(self.basis.device)
        samples = torch.arange(len(rows), device=self.basis.device)[:, None]
        block = self.basis[samples, rows]
        return block.masked_fill_(missing[..., None], 0).transpose(0, 1)

    def extend(self, products: Tensor, operator: BatchedOperator, tolerance: float) -> None:
        """Take the products [K, B, d] with the active block into the decomposition."""
        count = len(products)
        counts = torch.where(self.frozen, 0, self.sizes - self.processed)
        largest = torch.linalg.vector_norm(products, dim=2, dtype=torch.float64).amax(0).cpu()
        self.norm = torch.where(self.frozen, self.norm, torch.maximum(self.norm, largest))
        broken = _BREAKDOWN * operator.rounding * self.norm
        sizes = torch.where(self.frozen, -1, self.sizes)
        growth = self._grow(
            self.basis, sizes, products, floor=broken.minimum(tolerance / 4 * self.norm), limit=self.limit
        )
        # Columns of H: coefficients in the old basis, and the triangle in the rows that are new.
        coefficients, triangle, dropped = (part.cpu() for part in growth[:2] + growth[3:])
        steps = torch.arange(count)
        where, source = (steps < counts[:, None]).nonzero(as_tuple=True)
        to = self.processed[where] + source
        self.projected[where, :, to] = coefficients[where, :, source]
        self.lost[where, to] = dropped[where, source]
        entry, row = (steps < growth.ranks[where, None]).nonzero(as_tuple=True)
        i = where[entry]
        self.projected[i, self.sizes[i] + row, to[entry]] = triangle[i, row, source[entry]]
        self.deflated += (counts - growth.ranks).clamp_min(0)
        self.processed = torch.where(self.frozen, self.processed, self.sizes)
        self.sizes = self.sizes + growth.ranks
        ended = (torch.linalg.matrix_norm(triangle) <= broken) & ~self.frozen
        self.breakdowns += ended
        for i in ended.nonzero().flatten().tolist():
            # A coupling of rounding alone is no direction of the old sequence: the next one begins afresh.
            n = int(self.processed[i])
            self.lost[i, :n] += torch.linalg.vector_norm(self.projected[i, n:, :n], dim=0)
            self.projected[i, n:] = 0
            self.sizes[i] = n

    @property
    def ended(self) -> Tensor:
        """[B] bool: samples whose sequence has closed (an invariant subspace), and that are not frozen."""
        return (self.processed == self.sizes) & ~self.frozen

    @property
    def full(self) -> Tensor:
        """[B] bool: samples without room for what the next product, or a fresh block, may add."""
        coming = torch.where(self.ended, self.block, self.sizes - self.processed)
        return (self.sizes + coming > self.limit) & (self.limit < self.basis.shape[2])

    def asymmetry(self, samples: Tensor) -> Tensor:
        """||H - H^T|| / ||H|| over the multiplied part, for `samples`; 0 for H = 0."""
        count = int(self.processed[samples].max())
        h = self.projected[samples, :count, :count]
        inside = torch.arange(count) < self.processed[samples][:, None]
        h = h * (inside[:, :, None] & inside[:, None, :]).to(h)
        skew = torch.linalg.matrix_norm(h - h.mT)
        return skew / torch.linalg.matrix_norm(h).clamp_min(torch.finfo(h.dtype).tiny)

    def ritz(self, samples: Tensor) -> Iterator[Ritz]:
        """Ritz pairs of `samples`, in groups of those with equal sizes."""
        places = torch.stack([self.start, self.processed, self.sizes], dim=1)[samples]
        for place in torch.unique(places, dim=0):
            group = samples[(places == place).all(1)]
            yield self._ritz(group, *place.tolist())

    def _ritz(self, group: Tensor, start: int, processed: int, size: int) -> Ritz:
        h = self.projected[group, :size, :processed]
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
        noise = noise + (weights.abs() * self.lost[group, :processed, None]).sum(1)
        return Ritz(group, values, weights, noise, coupling.hypot(noise), order >= start)

    def vectors(self, ritz: Ritz, chosen: Tensor) -> Tensor:
        """The vectors [G, k, d] of the pairs whose places are `chosen` [k] or [G, k]."""
        processed = ritz.values.shape[1]
        picked = _columns(ritz.weights, chosen).to(self.basis.device)
        vectors = picked.mT @ self.basis[ritz.samples.to(self.basis.device), :processed]
        vectors /= torch.linalg.vector_norm(vectors, dim=2, keepdim=True)
        # An eigenvector's sign is free: its largest entry is made positive, whatever the batch.
        peak = vectors.gather(2, vectors.abs().argmax(2, keepdim=True))
        return torch.where(peak < 0, -vectors, vectors)

    def restart(self, ritz: Ritz, kept: Tensor) -> None:
        """Contract the bases of a group to the Ritz vectors at the places `kept` [G, q], ascending.

        The active block stays, after them. Thick restart of Wu and Simon, SIAM J. Matrix Anal. Appl. 22
        (2000).
        """
        group = ritz.samples
        where = group.to(self.basis.device)
        processed, size = ritz.values.shape[1], int(self.sizes[group[0]])
        count, active = kept.shape[1], size - processed
        # Pairs of the closed part first, so that the sequence begun after it stays in one piece.
        fresh = ritz.fresh.gather(1, kept)
        kept = kept.gather(1, fresh.to(torch.int8).sort(dim=1, stable=True).indices)
        weights = _columns(ritz.weights, kept)
        image = self.projected[group, :size, :processed] @ weights
        inner = weights.mT @ image[:, :processed]
        left_out = torch.linalg.vector_norm(image[:, :processed] - weights @ inner, dim=1)
        lost = left_out + (weights.abs() * self.lost[group, :processed, None]).sum(1)
        following = self.basis[where, processed:size]
        self.basis[where, :count] = weights.mT.to(self.basis.device) @ self.basis[where, :processed]
        self.basis[where, count : count + active] = following
        self.projected[group] = 0
        self.projected[group, :count, :count] = inner
        self.projected[group, count : count + active, :count] = image[:, processed:]
        self.lost[group] = 0
        self.lost[group, :count] = lost
        self.processed[group] = count
        self.sizes[group] = count + active
        self.start[group] = (~fresh).sum(1)
        self.restarts += 1

    def state(self) -> dict[str, Any]:
        """All that a later process needs to go on; see `load_state`."""
        rows = int(self.sizes.max())
        return {
            "basis": self.basis[:, :rows].clone(),
            "projected": self.projected[:, :rows, :rows].clone(),
            "lost": self.lost[:, :rows].clone(),
            **{name: getattr(self, name) for name in _COUNTERS},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        rows = state["basis"].shape[1]
        self.basis[:, :rows] = state["basis"]
        self.projected[:, :rows, :rows] = state["projected"]
        self.lost[:, :rows] = state["lost"]
        for name in _COUNTERS:
            setattr(self, name, state[name])


_COUNTERS = (
    "processed",
    "sizes",
    "start",
    "sequences",
    "breakdowns",
    "deflated",
    "frozen",
    "norm",
    "restarts",
)


def _columns(weights: Tensor, chosen: Tensor) -> Tensor:
    """Columns [G, p, k] of [G, p, p]."""
    chosen = chosen.expand(len(weights), chosen.shape[-1])
    return weights.gather(2, chosen[:, None, :].expand(-1, weights.shape[1], -1))
