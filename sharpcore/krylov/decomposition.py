"""The Krylov decomposition A V = V H + R of B operators in lock-step: how it grows and is contracted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sharpcore.backends import get_backend
from sharpcore.backends.reference.grow_basis import Growth
from sharpcore.backends.reference.lanczos_step import NOT_FINITE
from sharpcore.errors import InvalidInput, NonFiniteError
from sharpcore.krylov.device_steps import COUNTERS, DeviceSteps
from sharpcore.krylov.operator import BatchedOperator, closing_share


@dataclass(frozen=True)
class Ritz:
    """Approximate eigenpairs of some samples that stand at the same place of the recursion.

    On the CPU but for the `weights` [G, p, p], which lie where the projections do: their columns give the
    vectors in terms of the basis. `values` [G, p], ordered by `keys` ascending; `noise` [G, p]: the part of
    the residual that more steps do not reduce (rounding and asymmetry of the products); `residuals` [G, p]
    all of it; `fresh` [G, p]: the pair belongs to the sequence begun at the last breakdown; `norm` [G]: of
    the projection.
    """

    samples: Tensor
    values: Tensor
    keys: Tensor
    weights: Tensor
    noise: Tensor
    residuals: Tensor
    fresh: Tensor
    norm: Tensor

    def of(self, group: Tensor | slice) -> Ritz:
        """The pairs of a part of the samples."""
        return type(self)(*(getattr(self, field.name)[group] for field in fields(self)))

    def leading(self, count: int) -> Ritz:
        """The pairs at the first `count` places, whose vectors lie in as many rows of the basis."""
        parts = {
            name: getattr(self, name)[:, :count] for name in ("values", "keys", "noise", "residuals", "fresh")
        }
        return replace(self, **parts, weights=self.weights[:, :count, :count])


class Decomposition:
    """Bases V_i of B problems with their projections H_i = V_i^T A_i V_i.

    Of sample i the rows [0, p_i) of `basis` have been multiplied, the rows [p_i, n_i) are the active block:
    A v_j = sum_m basis[i, m] projected[i, m, j] for j < p_i, up to `lost[i, j]` (deflated remainders, and
    what a restart leaves out). All columns are kept, not three blocks: H then tells how symmetric the
    operator is, and residuals are those of the products as they were computed.

    Projections and `lost` lie on the CPU, or beside the bases where the device takes steps on its own
    (`goes_ahead`); counters always on the CPU.
    """

    #: What has a place for every row of the bases, [B, M, ...].
    of_rows: ClassVar[tuple[str, ...]] = ("basis", "projected", "lost")

    def __init__(self, samples: int, dimension: int, rows: int, block: int, device: torch.device) -> None:
        self.block, self.limit = block, min(rows, dimension)
        self.kernels = get_backend("auto", device=device, dtype=torch.float64)
        home = device if self.goes_ahead else torch.device("cpu")
        self.basis = torch.zeros(samples, rows, dimension, dtype=torch.float64, device=device)
        self.projected = torch.zeros(samples, rows, rows, dtype=torch.float64, device=home)
        self.lost = torch.zeros(samples, rows, dtype=torch.float64, device=home)
        self.processed = torch.zeros(samples, dtype=torch.int64)
        self.sizes = torch.zeros(samples, dtype=torch.int64)
        self.start = torch.zeros(samples, dtype=torch.int64)  # where the last sequence begins
        self.sequences = torch.zeros(samples, dtype=torch.int64)
        self.breakdowns = torch.zeros(samples, dtype=torch.int64)
        self.deflated = torch.zeros(samples, dtype=torch.int64)
        self.multiplied = torch.zeros(samples, dtype=torch.int64)
        self.frozen = torch.zeros(samples, dtype=torch.bool)
        self.norm = torch.zeros(samples, dtype=torch.float64)
        self.restarts = 0
        self._grow = self.kernels.grow_basis
        self.steps = (
            DeviceSteps(self.basis, self.projected, self.lost, self.kernels) if self.goes_ahead else None
        )

    def append(self, vectors: Tensor, samples: Tensor, *, sequence: bool = True) -> None:
        """Add the parts of `vectors` [K, B, d] that the bases of `samples` do not hold yet to the active
        blocks.

        They begin a new sequence, or (sequence=False) joins the one that goes on.
        """
        sizes = torch.full_like(self.sizes, -1)
        sizes[samples] = self.sizes[samples]
        floor = torch.zeros_like(self.norm)
        self.sizes += self._grow(self.basis, sizes, vectors, floor=floor, limit=self.limit).ranks
        if sequence:
            self.start[samples] = self.processed[samples]
            self.sequences[samples] += 1

    def active(self) -> Tensor:
        """The block to multiply next, [K, B, d]; zero rows where a sample has fewer vectors than others."""
        return self.rows(self.basis, self.processed, torch.where(self.frozen, 0, self.sizes - self.processed))

    def rows(self, basis: Tensor, first: Tensor, counts: Tensor) -> Tensor:
        """Rows [first, first + counts) of each of `basis` [B, M, d] as a block [K, B, d], then zeros."""
        steps = torch.arange(int(counts.max()))
        rows = (first[:, None] + steps).clamp_max(basis.shape[1] - 1).to(basis.device)
        missing = (steps >= counts[:, None]).to(basis.device)
        block = basis[torch.arange(len(rows), device=basis.device)[:, None], rows]
        return block.masked_fill_(missing[..., None], 0).transpose(0, 1)

    def observe(self, products: Tensor) -> None:
        """Let the products [K, B, d] with vectors of norm 1 raise the estimate of ||A||."""
        largest = torch.linalg.vector_norm(products, dim=2, dtype=torch.float64).amax(0).cpu()
        peak = products.abs().amax((0, 2)).cpu()
        if bool(((peak > 0) & ((peak > 1e140) | (peak < 1e-140))).any()):
            raise InvalidInput(f"{_OUT_OF_RANGE}; got entries up to {float(peak.max()):.2g}")
        self.norm = torch.where(self.frozen, self.norm, torch.maximum(self.norm, largest))

    def closing(self, operator: BatchedOperator) -> Tensor:
        """The coupling [B] below which a sequence counts as closed."""
        return closing_share(operator.rounding) * self.norm

    def extend(self, products: Tensor, operator: BatchedOperator, tolerance: float) -> None:
        """Take the products [K, B, d] with the active block into the decomposition."""
        counts = torch.where(self.frozen, 0, self.sizes - self.processed)
        self.observe(products)
        closing = self.closing(operator)
        floor = closing.minimum(tolerance / 4 * self.norm)
        sizes = torch.where(self.frozen, -1, self.sizes)
        growth = self._grow(self.basis, sizes, products, floor=floor, limit=self.limit)
        triangle = self.record(self.projected, self.lost, growth, counts, self.sizes)
        self.multiplied += counts
        self.deflated += (counts - growth.ranks).clamp_min(0)
        self.processed = torch.where(self.frozen, self.processed, self.sizes)
        self.sizes = self.sizes + growth.ranks
        ended = (torch.linalg.matrix_norm(triangle) <= closing) & ~self.frozen & (counts > 0)
        self.breakdowns += ended
        if bool(ended.any()):
            # A coupling of rounding alone is no direction of the old sequence: the next one begins afresh.
            below = torch.arange(self.projected.shape[1]) >= self.processed[ended, None]
            coupling = self.projected[ended] * below[:, :, None]
            self.lost[ended] = self.lost[ended].hypot(torch.linalg.vector_norm(coupling, dim=1))
            self.projected[ended] -= coupling
            self.sizes[ended] = self.processed[ended]

    @property
    def goes_ahead(self) -> bool:
        """Whether the device takes steps on its own: see `go_ahead`."""
        return self.kernels.name == "cuda"

    def go_ahead(self, operator: BatchedOperator, tolerance: float, steps: int) -> None:
        """Multiply and `extend` so many times without waiting for the device.

        There must be room for what that adds. A sequence that closes meanwhile waits for the end. Raises as
        the products and `observe` do, once all steps are done.
        """
        assert self.steps is not None
        found = self.steps.take(
            operator,
            self.active().to(operator.dtype).contiguous(),
            {name: getattr(self, name) for name in (*COUNTERS, "norm")},
            self.frozen,
            tolerance=tolerance,
            limit=self.limit,
            steps=steps,
        )
        faults = found.pop("faults")
        if bool((faults == NOT_FINITE).any()):
            sample = int((faults == NOT_FINITE).nonzero()[0])
            raise NonFiniteError(f"{operator.name}: NaN or infinity in a product of sample {sample}")
        if bool(faults.any()):
            raise InvalidInput(_OUT_OF_RANGE)
        for name, counter in found.items():
            setattr(self, name, counter)

    def record(self, matrix: Tensor, lost: Tensor, growth: Growth, counts: Tensor, sizes: Tensor) -> Tensor:
        """Write a growth into the columns processed, processed + 1, ... of `matrix` [B, M, M]: coefficients
        of the old rows, and the triangle from row `sizes` on. Returns the triangle [B, K, K] on the CPU."""
        coefficients, triangle, dropped = (part.cpu() for part in growth[:2] + growth[3:])
        steps = torch.arange(coefficients.shape[2])
        where, source = (steps < counts[:, None]).nonzero(as_tuple=True)
        to = self.processed[where] + source
        matrix[where, :, to] = coefficients[where, :, source]
        lost[where, to] = dropped[where, source]
        entry, row = (steps < growth.ranks[where, None]).nonzero(as_tuple=True)
        i = where[entry]
        matrix[i, sizes[i] + row, to[entry]] = triangle[i, row, source[entry]]
        return triangle

    @property
    def ended(self) -> Tensor:
        """[B] bool: samples whose sequence has closed (an invariant subspace), and that are not frozen."""
        return (self.processed == self.sizes) & ~self.frozen

    @property
    def full(self) -> Tensor:
        """[B] bool: samples without room for what the next product may add, or a fresh block and its
        product."""
        coming = torch.where(self.ended, 2 * self.block, self.sizes - self.processed)
        return (self.sizes + coming > self.limit) & (self.limit < self.basis.shape[2])

    def asymmetry(self, samples: Tensor) -> Tensor:
        """||H - H^T|| / ||H|| over the multiplied part, for `samples`; 0 for H = 0."""
        count = int(self.processed[samples].max())
        h = self.projected[samples.to(self.projected.device), :count, :count]
        inside = torch.arange(count) < self.processed[samples][:, None]
        h = h * (inside[:, :, None] & inside[:, None, :]).to(h)
        skew = torch.linalg.matrix_norm(h - h.mT)
        return (skew / torch.linalg.matrix_norm(h).clamp_min(torch.finfo(h.dtype).tiny)).cpu()

    def groups(self, samples: Tensor) -> Iterator[tuple[Tensor, int, int, int]]:
        """`samples` in groups of those with equal (start, processed, size), which come with them."""
        places = torch.stack([self.start, self.processed, self.sizes], dim=1)[samples]
        for place in torch.unique(places, dim=0):
            start, processed, size = place.tolist()
            yield samples[(places == place).all(1)], start, processed, size

    def vectors(self, ritz: Ritz, chosen: Tensor) -> Tensor:
        """The vectors [G, k, d] of the pairs at the places `chosen` [k], of norm 1."""
        basis = self.basis[ritz.samples.to(self.basis.device), : ritz.values.shape[1]]
        weights = columns(ritz.weights, chosen.expand(len(ritz.samples), -1)).mT.to(basis.device)
        if weights.is_complex():
            vectors = torch.complex(weights.real @ basis, weights.imag @ basis)
        else:
            vectors = weights @ basis
        vectors /= torch.linalg.vector_norm(vectors, dim=2, keepdim=True)
        # An eigenvector's phase is free: its largest entry is made positive, whatever the batch.
        peak = vectors.gather(2, vectors.abs().argmax(2, keepdim=True))
        return vectors * (peak.conj() / peak.abs())

    def carried(self, group: Tensor, weights: Tensor) -> Tensor:
        """What combinations W [G, p, q] of the bases carry of `lost`, [G, q]: remainders of different vectors
        have nothing to do with each other, so that their squares add."""
        lost = self.lost[group.to(self.lost.device), : weights.shape[1], None].to(weights.device)
        return torch.linalg.vector_norm(weights.abs() * lost, dim=1)

    def contract(self, group: Tensor, weights: Tensor, start: Tensor) -> None:
        """Replace the multiplied parts of the bases of a group by V W, W = `weights` [G, p, q] orthonormal.

        The active block stays, after them; the last sequence begins at `start` [G] from now on. Thick restart
        of Wu and Simon, SIAM J. Matrix Anal. Appl. 22 (2000), and of Stewart's Krylov-Schur, 23 (2001).
        """
        where, home = group.to(self.basis.device), group.to(self.projected.device)
        weights = weights.to(self.projected.device)
        processed, count, size = *weights.shape[1:], int(self.sizes[group[0]])
        active = size - processed
        image = self.projected[home, :size, :processed] @ weights
        inner = weights.mT @ image[:, :processed]
        left_out = torch.linalg.vector_norm(image[:, :processed] - weights @ inner, dim=1)
        lost = left_out.hypot(self.carried(group, weights))
        following = self.basis[where, processed:size]
        self.basis[where, :count] = weights.mT.to(self.basis.device) @ self.basis[where, :processed]
        self.basis[where, count : count + active] = following
        self.projected[home] = 0
        self.projected[home, :count, :count] = inner
        self.projected[home, count : count + active, :count] = image[:, processed:]
        self.lost[home] = 0
        self.lost[home, :count] = lost
        self.processed[group] = count
        self.sizes[group] = count + active
        self.start[group] = start
        self.restarts += 1

    def state(self) -> dict[str, Any]:
        """All that a later process needs to go on, on the CPU; see `load_state`."""
        rows = int(self.sizes.max())
        # One sample after the other, as this may be called when a device's memory is used up.
        parts = {
            name: torch.stack([each.cpu() for each in getattr(self, name)[:, :rows]]) for name in self.of_rows
        }
        return parts | {name: getattr(self, name) for name in _COUNTERS}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        for name in self.of_rows:
            getattr(self, name)[:, : state[name].shape[1]] = state[name]
        for name in _COUNTERS:
            setattr(self, name, state[name])


_OUT_OF_RANGE = (
    "operator: expected one whose products have entries between 1e-140 and 1e140, as their squares must be "
    "float64 numbers: scale it"
)
_COUNTERS = (
    "processed",
    "sizes",
    "start",
    "sequences",
    "breakdowns",
    "deflated",
    "multiplied",
    "frozen",
    "norm",
    "restarts",
)


def columns(weights: Tensor, chosen: Tensor) -> Tensor:
    """The columns `chosen` [G, k] of weights [G, p, p], [G, p, k]."""
    return weights.gather(2, chosen.to(weights.device)[:, None, :].expand(-1, weights.shape[1], -1))
