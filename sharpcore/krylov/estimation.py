"""What stochastic estimators share: probes of A - shift I or of a difference, and means with their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharpcore.backends import get_backend
from sharpcore.errors import InvalidInput
from sharpcore.krylov.operator import BatchedOperator, Multiply, as_batched
from sharpcore.krylov.probes import probes
from sharpcore.krylov.run import check_count, sample_numbers
from sharpcore.operators import CurvatureOperator

Operator = CurvatureOperator | BatchedOperator | Tensor

KINDS = ("rademacher", "normal", "sphere")
# A product's error beside the lengths of its factors: roundings of the operator's dtype, and what networks
# with cancellations were seen to lose in float64 (4e-14, analytic mixtures at low noise).
_ROUNDINGS, _CANCELLATION = 32, 5e-14


class Sketch(NamedTuple):
    """An orthonormal basis of Y's columns: see `Probed.orthonormal`."""

    basis: Tensor  # [k, B, d]; rows from the rank on are zero
    triangle: Tensor  # [B, k, k] float64: Y = basis^T triangle
    ranks: Tensor  # [B]


class Probed:
    """The operators that an estimator multiplies probes with: R = A - shift I of B samples, in float64.

    `block` vectors are multiplied at once, however many are asked for. `products` counts them.
    """

    def __init__(
        self,
        operator: Operator,
        *,
        kind: str,
        seed: int,
        sample_ids: Sequence[int] | Tensor | None,
        shift: float | Sequence[float] | Tensor | None,
        block: int,
        batched: bool | None,
    ) -> None:
        self.op = as_batched(operator, batched)
        if kind not in KINDS:
            raise InvalidInput(f"kind: expected one of {', '.join(KINDS)}; got {kind!r}")
        self.kind, self.seed = kind, check_count("seed", seed, 0, 2**63 - 1, "")
        self.block = check_count("block", block, 1, None, "")
        self.samples, self.dimension, self.device = self.op.samples, self.op.dimension, self.op.device
        self.sample_ids = sample_numbers(sample_ids, self.samples)
        self.shift = _shifts(shift, self.samples, self.device)
        self.rounding = _rounding(self.op)
        self.grow_basis = get_backend("auto", device=self.device, dtype=torch.float64).grow_basis

    @property
    def products(self) -> int:
        """Vectors multiplied for each sample so far."""
        return self.op.products

    def probes(self, first: int, count: int) -> Tensor:
        """Probes first .. first + count - 1 of every sample, [count, B, d] float64."""
        return probes(
            self.kind,
            self.seed,
            samples=self.sample_ids,
            first=first,
            count=count,
            dimension=self.dimension,
            device=self.device,
        )

    def units(self, first: int, count: int) -> Tensor:
        """Unit vectors first .. first + count - 1, [count, B, d]: in place of probes they give exact sums."""
        out = torch.zeros(count, self.samples, self.dimension, dtype=torch.float64, device=self.device)
        places = torch.arange(count, device=self.device)
        out[places, :, first + places] = 1
        return out

    def multiply(self, vectors: Tensor) -> Tensor:
        """R times [K, B, d]."""
        parts = [self.op.multiply(part).to(torch.float64) for part in vectors.split(self.block)]
        return self._shifted(parts, vectors)

    def multiply_transposed(self, vectors: Tensor) -> Tensor:
        """R^T times [K, B, d]; raises InvalidInput where the operator has no transposed product."""
        parts = [self.op.multiply_transposed(part).to(torch.float64) for part in vectors.split(self.block)]
        return self._shifted(parts, vectors)

    def _shifted(self, parts: list[Tensor], vectors: Tensor) -> Tensor:
        out = torch.cat(parts) if len(parts) != 1 else parts[0]
        # The multiplied vector is the one that was rounded to the operator's dtype.
        return out if self.shift is None else out - self.shift[:, None] * vectors.to(self.op.dtype).double()

    def size(self, vectors: Tensor, image: Tensor) -> Tensor:
        """A bound of ||A v|| from v and R v: what the rounding of a product is relative to."""
        size = length(image)
        return size if self.shift is None else size + self.shift.abs() * length(vectors)

    def orthonormal(self, vectors: Tensor) -> Sketch:
        """An orthonormal basis of the span of [k, B, d], k at most d, with deflation of what is dependent."""
        count = len(vectors)
        basis = torch.zeros(self.samples, count, self.dimension, dtype=torch.float64, device=self.device)
        growth = self.grow_basis(
            basis,
            torch.zeros(self.samples, dtype=torch.int64),
            vectors.contiguous(),
            floor=torch.zeros(self.samples, dtype=torch.float64),
            limit=count,
        )
        return Sketch(basis.transpose(0, 1), growth.triangle, growth.ranks)


class Difference(Probed):
    """A - B of two operators of the same samples, multiplied with the same probes."""

    def __init__(self, operator: Operator, second: Operator, *, batched: bool | None, **options: Any) -> None:
        super().__init__(operator, batched=batched, **options)
        # What both have in common cancels.
        self.shift = None
        self._longest = torch.zeros(self.samples, dtype=torch.float64, device=self.device)
        self.second = as_batched(second, batched)
        check_partner(self, self.second)
        self.rounding = max(self.rounding, _rounding(self.second))

    @property
    def products(self) -> int:
        """Vectors multiplied for each sample so far, with both operators."""
        return self.op.products + self.second.products

    def multiply(self, vectors: Tensor) -> Tensor:
        """(A - B) times [K, B, d]."""
        return self._difference(self.op.multiply, self.second.multiply, vectors)

    def multiply_transposed(self, vectors: Tensor) -> Tensor:
        """(A - B)^T times [K, B, d]."""
        return self._difference(self.op.multiply_transposed, self.second.multiply_transposed, vectors)

    def size(self, vectors: Tensor, image: Tensor) -> Tensor:
        """A bound of ||A v|| + ||B v||, by the longest products seen."""
        return length(image) + self._longest * length(vectors)

    def _difference(self, first: Multiply, second: Multiply, vectors: Tensor) -> Tensor:
        parts = []
        for part in vectors.split(self.block):
            a, b = first(part).to(torch.float64), second(part).to(torch.float64)
            stretch = (length(a) + length(b)) / length(part).clamp_min(torch.finfo(torch.float64).tiny)
            self._longest = torch.maximum(self._longest, stretch.amax(0))
            parts.append(a - b)
        return torch.cat(parts)


def check_partner(first: Probed, second: BatchedOperator) -> None:
    """Raise InvalidInput where `minus` is not an operator of the same samples."""
    if (second.samples, second.dimension) != (first.samples, first.dimension):
        raise InvalidInput(
            f"minus: expected {first.samples} samples of {first.dimension} entries; got {second.samples} of "
            f"{second.dimension}"
        )
    if second.device != first.device:
        raise InvalidInput(f"minus: expected an operator on {first.device}; got {second.device}")


def _rounding(op: BatchedOperator) -> float:
    return _ROUNDINGS * op.rounding + _CANCELLATION


def dot(first: Tensor, second: Tensor) -> Tensor:
    """Inner products over the last dimension."""
    return torch.linalg.vecdot(first, second)


def length(vectors: Tensor) -> Tensor:
    """Norms over the last dimension."""
    return torch.linalg.vector_norm(vectors, dim=-1)


def student(count: int) -> float:
    """By how much a standard error from `count` numbers is widened, so that +-2 of it hold 95.4 %.

    t / 2 at that level for count - 1 degrees of freedom, by the expansion of Student's quantiles in 1 / (n -
    1) (Fisher and Cornish 1960): 1.66 for four numbers, 1.22 for eight, 1.09 for sixteen.
    """
    n = count - 1
    return 1 + 1.25 / n + 1.53125 / n**2 + 1.4297 / n**3


def mean_and_error(values: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of independent values [n, ...] and its standard error, at least `floor` (rounding)."""
    count = len(values)
    error = values.std(0) * (student(count) / math.sqrt(count))
    return values.mean(0), torch.hypot(error, floor)


def _shifts(
    shift: float | Sequence[float] | Tensor | None, samples: int, device: torch.device
) -> Tensor | None:
    if shift is None:
        return None
    try:
        shifts = torch.as_tensor(shift, dtype=torch.float64, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"shift: expected a number or [B] numbers; got {shift!r}") from error
    if shifts.shape not in ((), (samples,)) or not bool(torch.isfinite(shifts).all()):
        raise InvalidInput(f"shift: expected a finite number or {samples} of them; got {shift!r}")
    return shifts.expand(samples)
