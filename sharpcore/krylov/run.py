"""One run of an eigensolver: random starts, looks at the Ritz pairs, verification, restarts, checkpoints."""

from __future__ import annotations

import operator
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, SupportsIndex

import torch
from torch import Tensor

from sharpcore.errors import InvalidInput
from sharpcore.krylov.checkpoint import read_checkpoint, write_checkpoint
from sharpcore.krylov.decomposition import Decomposition, Ritz
from sharpcore.krylov.operator import BatchedOperator, closing_share, precision_defaults
from sharpcore.krylov.probes import probes
from sharpcore.krylov.solution import Result, Solution, Stats, worst

ENDS = ("smallest", "largest", "both")
# Entries of a sample's basis by default (128 MiB), and the most rows: beyond, the projected problems cost too
# much.
_BASIS_ENTRIES = 2**24
_BASIS_ROWS = 768
# Once all pairs have converged, a random vector joins the block while so many more vectors are multiplied (a
# share of the basis, and at least): what the start did not see, as further copies of an eigenvalue, shows
# then.
_VERIFICATION = 1 / 8
_LEAST_VERIFICATION = 8
# How much a basis grows between two looks at its Ritz pairs.
_GROWTH = 1 / 24
# The least steps between two looks where the device takes steps on its own, as a look waits for it.
_STRIDE = 4
# Looks at the Ritz pairs from one checkpoint to the next.
_LOOKS = 8


@dataclass(frozen=True)
class Progress:
    """What `progress=` is called with: `products` a sample so far, rows of the largest basis, and of every
    sample whether it has `converged` and its largest `residual` among the pairs wanted, relative to its norm
    (NaN before there are as many)."""

    products: int
    basis: int
    converged: tuple[bool, ...]
    residual: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """The checked arguments of a run; see `make_plan`."""

    k: int
    which: str
    block: int
    tolerance: float
    symmetry_tolerance: float
    max_products: int
    rows: int
    stop_at_breakdown: bool
    seed: int
    sample_ids: tuple[int, ...]

    def wanted(self, count: int) -> Tensor:
        """Places of the wanted ones among `count` ascending values."""
        low = min(self.k, count) if self.which in ("smallest", "both") else 0
        high = min(self.k, count - low) if self.which != "smallest" else 0
        return torch.cat([torch.arange(low), torch.arange(count - high, count)])

    def number(self, dimension: int) -> int:
        """How many pairs are wanted of a problem of this dimension."""
        return len(self.wanted(dimension))


class Run(ABC):
    """One call of an eigensolver; subclasses say what Ritz pairs are, and how a basis is contracted."""

    name: ClassVar[str]
    values_dtype: ClassVar[torch.dtype] = torch.float64
    products_a_vector: ClassVar[int] = 1
    #: What a checkpoint holds of a run, beside its decomposition, results and times.
    saved: ClassVar[tuple[str, ...]] = (
        "values", "residuals", "vectors", "next_look", "looks", "drawn", "verified", "asymmetry",
    )  # fmt: skip

    def __init__(
        self,
        op: BatchedOperator,
        plan: Plan,
        vectors: bool,
        checkpoint: Path | None,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.began = time.perf_counter()
        self.op, self.plan, self.checkpoint, self.progress = op, plan, checkpoint, progress
        least = self.products_a_vector * plan.block
        if plan.max_products < least:
            raise InvalidInput(
                f"max_products: expected at least those of one block, {least}; got {plan.max_products}"
            )
        if checkpoint is not None and not checkpoint.parent.is_dir():
            raise InvalidInput(f"checkpoint: expected a file in a folder that exists; got {checkpoint}")
        self.krylov = Decomposition(op.samples, op.dimension, plan.rows, plan.block, op.device)
        count = plan.number(op.dimension)
        self.values = torch.full((op.samples, count), float("nan"), dtype=self.values_dtype)
        self.residuals = torch.full((op.samples, count), float("nan"), dtype=torch.float64)
        self.vectors = (
            self.values.new_full((*self.values.shape, op.dimension), float("nan")) if vectors else None
        )
        self.results: list[Result | None] = [None] * op.samples
        self.asymmetry = torch.zeros(op.samples, dtype=torch.float64)
        self.next_look = torch.full((op.samples,), min(count + plan.block, op.dimension))
        self.looks = 0
        self.drawn = torch.zeros(op.samples, dtype=torch.int64)  # random vectors used
        self.verified = torch.full((op.samples,), -1)  # vectors multiplied until the check ends; -1 before it

    def go(self) -> None:
        """Multiply and look until every sample is done."""
        krylov, op, plan = self.krylov, self.op, self.plan
        if not self._resume():
            everyone = torch.arange(op.samples)
            krylov.append(self._random(everyone, plan.block), everyone)
        while not bool(krylov.frozen.all()):
            if krylov.goes_ahead:
                with self.saving():
                    krylov.go_ahead(op, plan.tolerance, self._steps_ahead())
            else:
                with self.saving():
                    products = op.multiply(krylov.active())
                krylov.extend(products, op, plan.tolerance)
            last = op.products + self.products_a_vector * self._next_width() > plan.max_products
            going = ~krylov.frozen
            if op.calls <= 3 and bool(going.any()):
                self.check(going.nonzero().flatten())
            due = going & ((krylov.processed >= self.next_look) | krylov.ended | krylov.full | last)
            if bool(due.any()):
                self._look(due.nonzero().flatten(), last)
            self._refill()
            if self.checkpoint is not None and bool(due.any()) and self.looks % _LOOKS == 0:
                self._save()
        if self.checkpoint is not None:
            self.checkpoint.unlink(missing_ok=True)

    def _steps_ahead(self) -> int:
        """How many steps can go by before anything is decided."""
        krylov, op = self.krylov, self.op
        if op.calls < 3:  # the first products show whether the operator is of the solver's kind
            return 1
        going = ~krylov.frozen
        sizes, processed = krylov.sizes[going], krylov.processed[going]
        width = int((sizes - processed).max())
        until_look = -(-(self.next_look[going] - processed) // width)
        room = (krylov.limit - sizes) // width
        left = (self.plan.max_products - op.products) // (self.products_a_vector * width)
        return max(1, min(int(until_look.min()), int(room.min()), left))

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around a product: where it raises, the run is saved as it was before, to go on from there."""
        try:
            yield
        except BaseException:
            if self.checkpoint is not None:
                self._save()
            raise

    @property
    def seconds(self) -> float:
        """The time that the run has taken, in earlier processes as well."""
        return time.perf_counter() - self.began

    @property
    def verification(self) -> float:
        """How many more vectors are multiplied to look for missed pairs, a share of the basis."""
        return _VERIFICATION

    @abstractmethod
    def pairs(self, samples: Tensor) -> Iterator[Ritz]:
        """Ritz pairs of `samples`, in groups of those with equal sizes."""

    @abstractmethod
    def contract(self, samples: Tensor) -> None:
        """Thick restart of `samples`."""

    @abstractmethod
    def check(self, samples: Tensor) -> None:
        """Raise InvalidInput where the projections show that the operator is not of the solver's kind."""

    def kept(self, active: int) -> int:
        """How many Ritz vectors a full basis is contracted to, of those that have been multiplied.

        So few that the `active` block, or the one after a breakdown (0), and its products have room.
        """
        # Two thirds needed the fewest products on spectra of score networks, over bases of 60 to 120 rows.
        wanted, limit, block = self.values.shape[1], self.krylov.limit, self.plan.block
        return min(max(wanted + block, 2 * limit // 3), limit - 2 * (active or block))

    def outermost(self, ritz: Ritz) -> tuple[Tensor, Tensor]:
        """Places [G, q] of the Ritz pairs that a full basis keeps, and how many [G] are of its closed part.

        Those come first, so that the sequence begun after it stays in one piece.
        """
        processed = ritz.values.shape[1]
        count = self.kept(int(self.krylov.sizes[ritz.samples[0]]) - processed)
        ends = replace(self.plan, k=max(1, count // 2) if self.plan.which == "both" else count)
        kept = ends.wanted(processed).expand(len(ritz.samples), -1)
        fresh = ritz.fresh.gather(1, kept)
        return kept.gather(1, fresh.to(torch.int8).sort(dim=1, stable=True).indices), (~fresh).sum(1)

    def _next_width(self) -> int:
        """The most vectors that the next block has, a fresh one where a sequence has closed."""
        krylov = self.krylov
        active = torch.where(krylov.frozen, 0, krylov.sizes - krylov.processed)
        widths = torch.where(krylov.ended, self.plan.block, active)
        return int(widths.max())

    def _random(self, samples: Tensor, count: int) -> Tensor:
        """The next random vectors of the given samples, [count, B, d]; zeros for the others."""
        op, plan = self.op, self.plan
        out = torch.zeros(count, op.samples, op.dimension, dtype=torch.float64, device=op.device)
        for first in torch.unique(self.drawn[samples]).tolist():
            these = samples[self.drawn[samples] == first]
            ids = [plan.sample_ids[i] for i in these.tolist()]
            out[:, these.to(out.device)] = probes(
                "normal", plan.seed, samples=ids, first=first, count=count, dimension=op.dimension,
                device=op.device,
            )  # fmt: skip
        self.drawn[samples] += count
        return out

    def _look(self, samples: Tensor, last: bool) -> None:
        """Ritz pairs of `samples`: freeze those that are done, contract the bases that are full."""
        krylov, plan = self.krylov, self.plan
        self.check(samples)
        self.looks += 1
        worst_of = torch.full((self.op.samples,), float("nan"), dtype=torch.float64)
        for ritz in self.pairs(samples):
            group, processed = ritz.samples, ritz.values.shape[1]
            chosen = plan.wanted(processed)
            enough, whole = len(chosen) == self.values.shape[1], processed == self.op.dimension
            stops = plan.stop_at_breakdown and processed == int(krylov.sizes[group[0]])
            krylov.norm[group] = ritz.norm
            bound = plan.tolerance * ritz.norm
            within, final = (ritz.residuals <= bound[:, None])[:, chosen].all(1), self._is_final(ritz, bound)
            done = final[:, chosen].all(1) & enough
            self.verified[group[~done]] = -1
            ready = done & (self._is_complete(ritz, chosen, final, bound) | whole | stops)
            # What the others are if no more is multiplied.
            failure = Result.invariant_subspace if stops else Result.not_converged if last else None
            failure = Result.stagnated if whole else failure
            if failure is None:
                ready &= self._is_verified(group, ready)
            for place, i in enumerate(group.tolist()):
                reached = Result.converged if within[place] else Result.stagnated
                result = reached if ready[place] else failure
                if result is not None:
                    self.keep(i, ritz.of(slice(place, place + 1)), chosen, result)
            if enough:
                worst_of[group] = ritz.residuals[:, chosen].amax(1) / ritz.norm.clamp_min(1e-300)
            grown = max(plan.block, int(_GROWTH * processed))
            if krylov.goes_ahead:
                grown = max(grown, _STRIDE * plan.block)
            self.next_look[group] = krylov.processed[group] + grown
        full = samples[(krylov.full & ~krylov.frozen)[samples]]
        if len(full):
            self.contract(full)
        if self.progress is not None:
            converged = tuple(result is not None and result.ok for result in self.results)
            self.progress(
                Progress(self.op.products, int(krylov.sizes.max()), converged, tuple(worst_of.tolist()))
            )

    def _is_final(self, ritz: Ritz, bound: Tensor) -> Tensor:
        """Which pairs need no further steps, [G, p] bool: those within `bound` [G], and those whose residual
        is noise for the most part.

        More steps reduce the coupling to what is not in the basis yet, not the noise of the products. A
        coupling within the bound will do; where the noise is beyond it, one that would close a sequence, with
        a residual that no step can halve.
        """
        bound, closing = bound[:, None], (closing_share(self.op.rounding) * ritz.norm)[:, None]
        coupling = (ritz.residuals.square() - ritz.noise.square()).clamp_min(0).sqrt()
        noisy = (ritz.noise > bound) & (coupling <= closing) & (ritz.residuals <= 2 * ritz.noise)
        return (ritz.residuals <= bound) | (coupling <= bound) | noisy

    def _is_verified(self, group: Tensor, ready: Tensor) -> Tensor:
        """Which samples of a group, all at one place of the recursion, have been looked at with other eyes as
        well, [G] bool. For the others that are `ready` [G] this begins, if it has not."""
        krylov = self.krylov
        first = group[0]
        active = int(krylov.sizes[first] - krylov.processed[first]) + 1
        products = self.op.products + self.products_a_vector * active
        if self.values.shape[1] + 3 * active > krylov.limit or products > self.plan.max_products:
            return torch.ones_like(ready)
        end, multiplied = self.verified[group], krylov.multiplied[group]
        # A sequence begun after a breakdown has been such a check.
        verified = (krylov.sequences[group] > 1) | ((end >= 0) & (end <= multiplied))
        beginning = group[ready & ~verified & (end < 0)]
        if len(beginning):
            more = max(_LEAST_VERIFICATION, int(self.verification * int(krylov.processed[first])))
            self.verified[beginning] = krylov.multiplied[beginning] + more
            krylov.append(self._random(beginning, 1), beginning, sequence=False)
        return verified

    def _is_complete(self, ritz: Ritz, chosen: Tensor, final: Tensor, bound: Tensor) -> Tensor:
        """Whether no eigenvalue beyond the wanted ones can have been missed, [G] bool.

        Before any breakdown that is taken for granted, as by every Krylov method. A breakdown shows that a
        start did not see all eigenvalues; then a sequence begun since must have none that is better than the
        last one wanted: its outermost pair is final, and equal to that or farther in. Being farther in by
        more than its residual is not enough: a start holds little of the few vectors of a rare eigenvalue.
        """
        krylov, processed = self.krylov, ritz.values.shape[1]
        k = min(self.plan.k, processed)
        again = (krylov.sequences > 1)[ritz.samples]
        complete = torch.where(again, ritz.fresh.any(1), (krylov.breakdowns == 0)[ritz.samples])
        # Equal eigenvalues are found as different ones by their noise.
        apart = -bound.maximum(ritz.noise[:, chosen].amax(1))
        fresh = ritz.fresh.to(torch.int8)
        ends = [(fresh.argmax(1), k - 1, 1)] if self.plan.which in ("smallest", "both") else []
        if self.plan.which != "smallest":
            ends.append((processed - 1 - fresh.flip(1).argmax(1), -k, -1))
        for outermost, last, inwards in ends:
            key = ritz.keys.gather(1, outermost[:, None])[:, 0]
            farther = inwards * (key - ritz.keys[:, chosen[last]]) >= apart
            complete &= ~again | (farther & final.gather(1, outermost[:, None])[:, 0])
        return complete

    def keep(self, i: int, ritz: Ritz, chosen: Tensor, result: Result) -> None:
        """Freeze sample i with the chosen ones of its pairs."""
        count = len(chosen)
        self.values[i, :count], self.residuals[i, :count] = ritz.values[0, chosen], ritz.residuals[0, chosen]
        if self.vectors is not None:
            self.vectors[i, :count] = self.krylov.vectors(ritz, chosen)[0]
        self.results[i] = result
        self.krylov.frozen[i] = True

    def _refill(self) -> None:
        """A fresh random block for every sample whose sequence has closed."""
        samples = self.krylov.ended.nonzero().flatten()
        if len(samples):
            self.krylov.append(self._random(samples, self.plan.block), samples)

    def solution(self) -> Solution:
        """The pairs of all samples."""
        results = tuple(result for result in self.results if result is not None)
        shape = (self.op.samples, self.values.shape[1], *self.op.sample_shape)
        stats = Stats(
            products=self.op.products,
            steps=self.op.calls,
            restarts=self.krylov.restarts,
            norm=self.krylov.norm.clone(),
            asymmetry=self.asymmetry,
            deflated=self.krylov.deflated,
            breakdowns=self.krylov.breakdowns,
            seconds=self.seconds,
            operator_seconds=self.op.seconds,
        )
        device = self.op.device
        vectors = None if self.vectors is None else self.vectors.reshape(shape).to(device)
        return Solution(
            self.values.to(device), vectors, self.residuals.to(device), worst(results), results, stats
        )

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        op, plan = self.op, replace(self.plan, max_products=0)
        return {
            "solver": self.name, "plan": repr(plan), "samples": op.samples, "dimension": op.dimension,
            "dtype": str(op.dtype), "vectors": self.vectors is not None,
        }  # fmt: skip

    def _save(self) -> None:
        assert self.checkpoint is not None
        state = {name: getattr(self, name) for name in self.saved}
        state["krylov"] = self.krylov.state()
        state["results"] = [result and result.name for result in self.results]
        state["operator"] = (self.op.products, self.op.calls, self.op.seconds)
        state["seconds"] = self.seconds
        write_checkpoint(self.checkpoint, self._identity(), state)

    def _resume(self) -> bool:
        """Whether the run goes on from its checkpoint."""
        state = None if self.checkpoint is None else read_checkpoint(self.checkpoint, self._identity())
        if state is None:
            return False
        self.krylov.load_state(state["krylov"])
        for name in self.saved:
            setattr(self, name, state[name])
        self.results = [name and Result[name] for name in state["results"]]
        self.op.products, self.op.calls, self.op.seconds = state["operator"]
        self.began -= state["seconds"]
        self._check_operator()
        return True

    def first_image(self) -> Tensor:
        """The product [1, B, d] that the first columns of the projections are of."""
        return self.op.multiply(self.krylov.basis[:, :1].transpose(0, 1))

    def _check_operator(self) -> None:
        """One product tells whether the checkpoint's basis was made by this operator."""
        krylov = self.krylov
        known = (krylov.processed > 0) & ~krylov.frozen
        if not bool(known.any()):
            return
        image = self.first_image().to(torch.float64).transpose(0, 1)
        along = (krylov.basis @ image.mT)[..., 0].cpu()
        # Beyond a basis there are rows of earlier ones, where others in the batch are longer.
        inside = torch.arange(krylov.basis.shape[1]) < krylov.sizes[:, None]
        off = torch.linalg.vector_norm((along - krylov.projected[..., 0].cpu()) * inside, dim=1)
        allowed = 1e3 * self.op.rounding * krylov.norm + krylov.lost[:, 0].cpu()
        if bool(((off > allowed) & known).any()):
            raise InvalidInput(
                f"checkpoint: {self.checkpoint} is of another operator than this {self.op.name}"
            )


def make_plan(
    op: BatchedOperator, k: int, which: str, block: int, tolerance: float | None, max_products: int | None,
    max_basis: int | None, on_breakdown: str, seed: int, sample_ids: Sequence[int] | None,
    symmetry_tolerance: float | None, ends: Sequence[str] = ENDS,
) -> Plan:  # fmt: skip
    """The arguments of an eigensolver, checked, with their defaults. Raises InvalidInput."""
    d = op.dimension
    k = check_count("k", k, 1, d, "the dimension")
    block = min(check_count("block", block, 1, None, ""), d)
    if which not in ends:
        raise InvalidInput(f"which: expected one of {', '.join(ends)}; got {which!r}")
    if on_breakdown not in ("continue", "stop"):
        raise InvalidInput(f"on_breakdown: expected 'continue' or 'stop'; got {on_breakdown!r}")
    usual, usual_symmetry = precision_defaults(op.rounding)
    tolerance = usual if tolerance is None else tolerance
    symmetry_tolerance = usual_symmetry if symmetry_tolerance is None else symmetry_tolerance
    for name, value in (("tolerance", tolerance), ("symmetry_tolerance", symmetry_tolerance)):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise InvalidInput(f"{name}: expected a number >= 0; got {value!r}")
    wanted = min(2 * k, d) if which == "both" else k
    least = min(d, wanted + 3 * block)
    if max_basis is None:
        max_basis = default_basis(d, wanted, block)
    max_basis = check_count("max_basis", max_basis, least, None, "pairs + 3 blocks")
    if max_products is None:
        max_products = 10 * d + 100
    max_products = check_count("max_products", max_products, 1, None, "")
    seed = check_count("seed", seed, 0, 2**63 - 1, "")
    ids = tuple(sample_numbers(sample_ids, op.samples))
    return Plan(
        k, which, block, float(tolerance), float(symmetry_tolerance), max_products, min(max_basis, d),
        on_breakdown == "stop", seed, ids,
    )  # fmt: skip


def default_basis(dimension: int, wanted: int, block: int) -> int:
    """The most rows of a basis where nothing is said."""
    least = min(dimension, wanted + 3 * block)
    usual = min(_BASIS_ROWS, _BASIS_ENTRIES // dimension, dimension)
    return max(least, usual, min(dimension, 2 * wanted + 4 * block))


def sample_numbers(sample_ids: Sequence[int] | Tensor | None, samples: int) -> list[int]:
    """The numbers that tell the samples' probes apart, by default 0 .. B - 1. Raises InvalidInput."""
    if sample_ids is None:
        return list(range(samples))
    if not isinstance(sample_ids, (Sequence, Tensor)) or isinstance(sample_ids, str):
        raise InvalidInput(f"sample_ids: expected {samples} integers; got {sample_ids!r}")
    numbers = sample_ids.tolist() if isinstance(sample_ids, Tensor) else list(sample_ids)
    if len(numbers) != samples:
        raise InvalidInput(f"sample_ids: expected {samples}, one for each sample; got {len(numbers)}")
    return [check_count("sample_ids", number, 0, 2**63 - 1, "") for number in numbers]


def check_count(name: str, value: SupportsIndex, least: int, most: int | None, what: str) -> int:
    """`value` as an int; InvalidInput where it is no integer from `least` to `most` (`what` says why)."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        upto = "" if most is None else f" to {most}"
        reason = f" ({what})" if what else ""
        raise InvalidInput(f"{name}: expected an integer from {least}{upto}{reason}; got {value!r}")
    return number
