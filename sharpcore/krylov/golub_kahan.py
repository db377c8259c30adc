"""golub_kahan: singular values and vectors of B Jacobians, or differences of Hessians, in lock-step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sharpcore.errors import InvalidInput
from sharpcore.krylov.decomposition import Decomposition, Ritz, columns
from sharpcore.krylov.operator import BatchedOperator, as_batched
from sharpcore.krylov.run import Progress, Run, make_plan
from sharpcore.krylov.solution import Result, Solution
from sharpcore.operators import CurvatureOperator


@dataclass(frozen=True, repr=False)
class SingularSolution(Solution):
    """Singular triplets of B operators: a `Solution` whose `vectors` are the right ones, and `left` beside
    them.

    `values` [B, k] ascending, all >= 0; `residuals` sqrt(||A v - s u||^2 + ||A^T u - s v||^2).
    """

    left: Tensor | None


def golub_kahan(
    operator: CurvatureOperator | BatchedOperator | Tensor,
    k: int = 6,
    which: str = "largest",
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
) -> SingularSolution:
    """The k largest, smallest, or both ends' singular triplets A v = s u, A^T u = s v of B square operators.

    Block Golub-Kahan bidiagonalization (SIAM J. Numer. Anal. 2, 1965) with both bases re-orthogonalized and
    thick restarts (Baglama and Reichel, SIAM J. Sci. Comput. 27, 2005): no product with A^T A, whose small
    singular values would be lost to rounding. For J (`ScoreJacobian`) and H_D (`HessianDifference`).

    Args:
        operator: one with transposed products; else as in `block_lanczos`, and so are the other arguments. A
            step takes `block` products and as many transposed ones; `max_products` (default: 20 d + 200)
            counts both.

    Returns:
        A `SingularSolution`: values [B, k] float64 ascending, `vectors` and `left` [B, k, *sample_shape].

    Raises:
        InvalidInput: bad arguments; an operator without transposed products; a checkpoint of another run.
        NonFiniteError: a product is NaN or infinite.
    """
    op = as_batched(operator, batched)
    if not op.has_transpose:
        raise InvalidInput(f"operator: expected one with transposed products; {op.name} has none")
    if max_products is None:
        max_products = 20 * op.dimension + 200
    plan = make_plan(
        op, k, which, block, tolerance, max_products, max_basis, on_breakdown, seed, sample_ids, None
    )
    run = _GolubKahan(op, plan, vectors, None if checkpoint is None else Path(checkpoint), progress)
    run.go()
    solution, left = run.solution(), None
    if run.left is not None and solution.vectors is not None:
        left = run.left.reshape(solution.vectors.shape).to(op.device)
    fields = {name: getattr(solution, name) for name in Solution.__dataclass_fields__}
    return SingularSolution(**fields, left=left)


@dataclass(frozen=True)
class _Triplets(Ritz):
    """Ritz values s with the weights of the right vectors; `left` [G, p, p] are those of the left ones."""

    left: Tensor


class _Bidiagonalization(Decomposition):
    """Bases V (`basis`) and U (`left`) with A V = U P and A^T U = V H: `forward` is P, `projected` is H.

    `draw` gives random vectors of some samples, as `Run` does; `around` is entered for transposed products.
    """

    of_rows: ClassVar[tuple[str, ...]] = (*Decomposition.of_rows, "left", "forward", "forward_lost")

    def __init__(
        self,
        *arguments: Any,
        draw: Callable[[Tensor, int], Tensor],
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__(*arguments)
        self.left = torch.zeros_like(self.basis)
        self.forward = torch.zeros_like(self.projected)
        self.forward_lost = torch.zeros_like(self.lost)
        self._draw, self._around = draw, around

    @property
    def goes_ahead(self) -> bool:
        """A step has two products."""
        return False

    def extend(self, products: Tensor, operator: BatchedOperator, tolerance: float) -> None:
        """Take the products [K, B, d] in, multiply what is new in them with A^T, and take that in."""
        counts = torch.where(self.frozen, 0, self.sizes - self.processed)
        self.observe(products)
        floor = self.closing(operator).minimum(tolerance / 4 * self.norm)
        sizes = torch.where(self.frozen, -1, self.processed)
        growth = self._grow(self.left, sizes, products, floor=floor, limit=self.limit)
        self.record(self.forward, self.forward_lost, growth, counts, self.processed)
        missing = counts - growth.ranks
        for number in torch.unique(missing[missing > 0]).tolist():
            # A v lies in the span of U: any u that is orthogonal to U keeps both bases of one size.
            these = (missing == number).nonzero().flatten()
            sizes = torch.full_like(self.sizes, -1)
            sizes[these] = (self.processed + growth.ranks)[these]
            zero = torch.zeros_like(self.norm)
            self._grow(self.left, sizes, self._draw(these, number), floor=zero, limit=self.limit)
        # What is written up to here is written again, the same, by a later call with the same products.
        with self._around():
            images = operator.multiply_transposed(self.rows(self.left, self.processed, counts))
        super().extend(images, operator, tolerance)

    def shrink(self, group: Tensor, right: Tensor, left: Tensor, start: Tensor) -> None:
        """Contract both bases of a group to V Y and U X, Y = `right` and X = `left` [G, p, q]."""
        where = group.to(self.basis.device)
        processed, count, size = *right.shape[1:], int(self.sizes[group[0]])
        active = size - processed
        image = self.projected[group, :size, :processed] @ left
        forward = left.mT @ self.forward[group, :processed, :processed] @ right
        inner = right.mT @ image[:, :processed]
        left_out = torch.linalg.vector_norm(image[:, :processed] - right @ inner, dim=1)
        lost = left_out.hypot(self.carried(group, left))
        forward_lost = torch.linalg.vector_norm(
            right.abs() * self.forward_lost[group, :processed, None], dim=1
        )
        following = self.basis[where, processed:size]
        for basis, weights in ((self.basis, right), (self.left, left)):
            basis[where, :count] = weights.mT.to(basis.device) @ basis[where, :processed]
        self.basis[where, count : count + active] = following
        for kept, matrix in ((self.forward, forward), (self.projected, inner)):
            kept[group] = 0
            kept[group, :count, :count] = matrix
        self.projected[group, count : count + active, :count] = image[:, processed:]
        for kept, vector in ((self.forward_lost, forward_lost), (self.lost, lost)):
            kept[group] = 0
            kept[group, :count] = vector
        self.processed[group], self.sizes[group], self.start[group] = count, count + active, start
        self.restarts += 1


class _GolubKahan(Run):
    """One call of `golub_kahan`."""

    name = "golub_kahan"
    products_a_vector = 2
    saved: ClassVar[tuple[str, ...]] = (*Run.saved, "left")
    krylov: _Bidiagonalization

    def __init__(self, op: BatchedOperator, *arguments: Any) -> None:
        super().__init__(op, *arguments)
        self.krylov = _Bidiagonalization(
            op.samples, op.dimension, self.plan.rows, self.plan.block, op.device,
            draw=self._random, around=self.saving,
        )  # fmt: skip
        self.left = None if self.vectors is None else self.vectors.clone()

    @property
    def verification(self) -> float:
        # Small singular values are inner ones, eigenvalues of both signs: copies show as late as they did.
        # With an eighth, copies were missed in 8 of 8 skew-symmetric matrices (all values double), with half
        # in none.
        return super().verification if self.plan.which == "largest" else 1 / 2

    def pairs(self, samples: Tensor) -> Iterator[_Triplets]:
        for group, start, processed, size in self.krylov.groups(samples):
            yield self._triplets(group, start, processed, size)

    def _triplets(self, group: Tensor, start: int, processed: int, size: int) -> _Triplets:
        krylov = self.krylov
        forward = krylov.forward[group, :processed, :processed]
        backward = krylov.projected[group, :size, :processed]
        right, left = torch.zeros_like(forward), torch.zeros_like(forward)
        values = []
        # The parts before and after a breakdown apart: equal singular values must not mix them.
        for a, b in ((0, start), (start, processed)):
            part = torch.linalg.svd(forward[:, a:b, a:b])
            left[:, a:b, a:b], right[:, a:b, a:b] = part.U, part.Vh.mT
            values.append(part.S)
        sizes, order = torch.cat(values, dim=1).sort(dim=1, stable=True)
        across = order[:, None, :].expand_as(right)
        right, left = right.gather(2, across), left.gather(2, across)
        image = backward @ left
        coupling = torch.linalg.vector_norm(image[:, processed:], dim=1)
        noise = torch.linalg.vector_norm(image[:, :processed] - right * sizes[:, None, :], dim=1)
        noise = noise.hypot(torch.linalg.vector_norm(forward @ right - left * sizes[:, None, :], dim=1))
        noise = noise.hypot(krylov.carried(group, left))
        carried = torch.linalg.vector_norm(right.abs() * krylov.forward_lost[group, :processed, None], dim=1)
        noise = noise.hypot(carried)
        norm = sizes.amax(1)
        return _Triplets(group, sizes, sizes, right, noise, coupling.hypot(noise), order >= start, norm, left)

    def contract(self, samples: Tensor) -> None:
        for ritz in self.pairs(samples):
            kept, closed = self.outermost(ritz)
            right, left = columns(ritz.weights, kept), columns(ritz.left, kept)
            self.krylov.shrink(ritz.samples, right, left, closed)

    def first_image(self) -> Tensor:
        return self.op.multiply_transposed(self.krylov.left[:, :1].transpose(0, 1))

    def check(self, samples: Tensor) -> None:
        """Any square operator will do."""

    def keep(self, i: int, ritz: Ritz, chosen: Tensor, result: Result) -> None:
        super().keep(i, ritz, chosen, result)
        if self.left is not None and self.vectors is not None and isinstance(ritz, _Triplets):
            weights = columns(ritz.left, chosen.expand(1, -1)).mT.to(self.krylov.left.device)
            left = weights @ self.krylov.left[i : i + 1, : ritz.values.shape[1]]
            # The sign that the right vector was given, for the left one as well.
            plain = columns(ritz.weights, chosen.expand(1, -1)).mT.to(left.device)
            plain = plain @ self.krylov.basis[i : i + 1, : ritz.values.shape[1]]
            sign = (plain * self.vectors[i : i + 1, : len(chosen)].to(plain)).sum(2, keepdim=True).sign()
            self.left[i, : len(chosen)] = (left * sign)[0].cpu()
