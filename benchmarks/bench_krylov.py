"""Extremal eigenpairs of the Hessian, 10 at both ends, by block_lanczos and every rival.

    pytest benchmarks/bench_krylov.py -s            # minutes with -m quick, else an hour

The unit is block_lanczos itself, to the same pairs: a ratio is how many times as long a rival takes, measured
with ours right before it. `products` are vectors multiplied for one sample. The error of a row is its largest
residual in units of ||A||; every row reaches 1e-6, with the loosest tolerance of its solver that does, and is
compared with the whole spectrum. Linearizations are there before: they are not part of a turn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import eigensolvers
import pytest
import torch
from eigensolvers import DEPTHS, Operator, Pairs, Solve, loosest
from hessians import TOLERANCE, Hessians
from measure import Run, Table
from problems import Problem

import sharpcore
from sharpcore.krylov import arnoldi, block_lanczos

COUNT = 10  # pairs at each end
BATCH = 8
OURS = "block_lanczos, b={}"


@dataclass(frozen=True)
class Rival:
    """A solver, with the tolerances from which the loosest is taken that reaches the residuals."""

    solve: Solve
    tolerances: tuple[float, ...] = (TOLERANCE, 0.3 * TOLERANCE)


RIVALS = {
    "eigsh": Rival(eigensolvers.eigsh, eigensolvers.TOLERANCES),
    "eigsh, ncv=60": Rival(functools.partial(eigensolvers.eigsh, ncv=60), eigensolvers.TOLERANCES),
    "eigsh, a call an end": Rival(eigensolvers.eigsh_ends, eigensolvers.TOLERANCES),
    "PRIMME": Rival(eigensolvers.primme),
    "PRIMME, blocks of 10": Rival(functools.partial(eigensolvers.primme, block=10)),
    "lobpcg": Rival(eigensolvers.lobpcg, (TOLERANCE,)),
}
USUAL = "{}, by torch.func.jvp and vjp"


@functools.cache
def _hessians(samples: int) -> Hessians:
    return Hessians(samples)


@pytest.mark.quick
def test_krylov_quick(table: Table, benchmark: Any) -> None:
    hessians = _hessians(1)
    _add_ours(table, hessians, 0, 1, 2)
    for name in ("eigsh", "PRIMME, blocks of 10"):
        _add_rival(table, hessians, name, (0,))
    benchmark.pedantic(table.measure, rounds=1)


def test_krylov_one(table: Table, benchmark: Any) -> None:
    hessians = _hessians(1)
    _add_ours(table, hessians, 0, 1, 2, 4)
    for name in RIVALS:
        _add_rival(table, hessians, name, (0,), turns=2 if name == "lobpcg" else None)
    for name in ("eigsh", "PRIMME, blocks of 10", "lobpcg"):
        _add_rival(table, hessians, name, (0,), usual=True, turns=2 if name == "eigsh" else 1)
    benchmark.pedantic(table.measure, rounds=1)


def test_krylov_batch(table: Table, benchmark: Any) -> None:
    """Rivals have no batch: they solve for one sample after the other. lobpcg reaches no residuals of one."""
    hessians, samples = _hessians(BATCH), tuple(range(BATCH))
    table.turns = min(table.turns, 3)
    _add_ours(table, hessians, None, 1, 2, 4)
    for name in ("eigsh", "PRIMME, blocks of 10"):
        _add_rival(table, hessians, name, samples)
    benchmark.pedantic(table.measure, rounds=1)


def test_krylov_paper(table: Table, benchmark: Any) -> None:
    """Single-vector Arnoldi on torch.func.jvp: pairs of J, then of its symmetric part, as ours are."""
    hessians = _hessians(1)
    norm, jacobian = hessians.norm(0), hessians.usual(0, symmetric=False)
    _add_ours(table, hessians, 0, 1)

    def add(what: str, operator: Operator, error: Callable[[Pairs], float]) -> None:
        def run() -> Pairs:
            operator.products = 0
            pairs = eigensolvers.arnoldi_procedure(operator, COUNT, TOLERANCE, norm)
            row.labels["products"] = operator.products
            return pairs

        row = table.add(what, run, error=error, turns=2)

    def ours() -> Any:
        return arnoldi(hessians.hessian(0).jacobian, COUNT, tolerance=TOLERANCE, seed=0)

    def of_ours(solution: Any) -> float:
        own.labels["products"] = solution.stats.products
        return hessians.residual(0, _pairs(solution, 0), jacobian)

    own = table.add("arnoldi, pairs of J", ours, error=of_ours)
    add(
        "paper's procedure, Arnoldi on torch.func.jvp",
        jacobian,
        lambda pairs: hessians.residual(0, pairs, jacobian),
    )
    add(
        "the same on the symmetric part, by torch.func.jvp and vjp",
        hessians.usual(0),
        lambda pairs: hessians.check(0, pairs),
    )
    add("the same on sharpcore's Hessian", hessians.ours(0), lambda pairs: hessians.check(0, pairs))
    benchmark.pedantic(table.measure, rounds=1)


@pytest.mark.quick
def test_krylov_packages(table: Table, benchmark: Any) -> None:
    """The packages on a dense matrix in float64, that of the Hessian, as far as each can express the task."""
    hessians = _hessians(1)
    matrix, norm = hessians.matrices[0], hessians.norm(0)
    dense = torch.from_numpy(matrix)
    multiply = functools.partial(Operator, lambda columns: matrix @ columns, len(matrix))

    def error(pairs: Pairs) -> float:
        return hessians.check(0, pairs, multiply())

    def reached(pairs: Pairs) -> bool:
        return hessians.reached(0, pairs, multiply())

    def solved(name: str, make: Callable[[], Operator]) -> Callable[[], Run]:
        def prepare() -> Run:
            rival, operator = RIVALS[name], make()
            tolerance = loosest(rival.solve, operator, COUNT, norm, reached, rival.tolerances)
            return lambda: rival.solve(operator, COUNT, tolerance, norm)

        return prepare

    def of_depth(make: Callable[[Any, int], Callable[[int], Pairs]]) -> Callable[[], Run]:
        """The packages without a test of convergence: the smallest depth that gives the pairs."""

        def prepare() -> Run:
            depth = next((m for m in DEPTHS if reached(make(matrix, m)(COUNT))), None)
            if depth is None:
                raise RuntimeError(f"not converged at depth {DEPTHS[-1]}")
            return functools.partial(make(matrix, depth), COUNT)

        return prepare

    def ours() -> Any:
        return block_lanczos(dense, COUNT, block=1, tolerance=TOLERANCE, seed=0)

    table.add(OURS.format(1), ours, error=lambda solution: error(_pairs(solution, 0)))
    for name in ("eigsh", "PRIMME", "lobpcg"):
        table.add(name, prepare=solved(name, multiply), error=error)
    table.add("matfree, Lanczos", prepare=of_depth(eigensolvers.matfree_lanczos), error=error)
    table.add("hessian-eigenthings, Lanczos", prepare=of_depth(eigensolvers.eigenthings_lanczos), error=error)
    table.add(
        "curvlinops' Hessian, eigsh",
        prepare=solved("eigsh", lambda: eigensolvers.curvlinops_operator(matrix)),
        error=error,
    )
    table.add_row("curvlinops, its own", status="skipped: it has no eigensolver, its operators go to scipy's")
    table.add_row(
        "hessian-eigenthings, power iteration",
        status="skipped: finds eigenvalues of largest magnitude, which are those of one end here",
    )
    benchmark.pedantic(table.measure, rounds=1)


@pytest.mark.parametrize("rows", [64, 256])
def test_krylov_overhead(table: Table, benchmark: Any, rows: int) -> None:
    """What block_lanczos takes beside its products on "mid", b = 4, with a basis of so many rows, filled."""
    problem = Problem("mid")
    hessian, vectors = sharpcore.Hessian(problem.linearization()), problem.tangents[:4]
    shares: list[float] = []

    def solve() -> Any:
        solution = block_lanczos(
            hessian, COUNT, block=4, max_basis=rows, max_products=rows + 16, tolerance=0.0, seed=0
        )
        shares.append(solution.stats.overhead)
        row.per = solution.stats.products
        row.labels["products"] = solution.stats.products
        return solution

    table.add("product, K=4, per vector", lambda: hessian @ vectors, per=4)
    row = table.add("block_lanczos, b=4, per vector", solve, turns=2)
    benchmark.pedantic(table.measure, rounds=1)
    share = sorted(shares)[len(shares) // 2] if shares else None
    table.add_row("outside of products, share", derived=share, status=row.status)


def _add_ours(table: Table, hessians: Hessians, sample: int | None, *blocks: int) -> None:
    for block in blocks:
        _add_our(table, hessians, sample, block)


def _add_our(table: Table, hessians: Hessians, sample: int | None, block: int) -> None:
    samples = range(hessians.samples) if sample is None else (sample,)

    def prepare() -> Run:
        hessian = hessians.hessian(sample)
        return lambda: block_lanczos(hessian, COUNT, block=block, tolerance=TOLERANCE, seed=0)

    def error(solution: Any) -> float:
        row.labels["products"] = solution.stats.products
        return max(hessians.check(s, _pairs(solution, i)) for i, s in enumerate(samples))

    row = table.add(OURS.format(block), prepare=prepare, error=error)


def _pairs(solution: Any, index: int) -> Pairs:
    vectors = solution.vectors[index].flatten(1).T
    return Pairs(solution.values[index].numpy(), vectors.numpy())


def _add_rival(
    table: Table,
    hessians: Hessians,
    name: str,
    samples: tuple[int, ...],
    *,
    usual: bool = False,
    turns: int | None = None,
) -> None:
    rival = RIVALS[name]

    def prepare() -> Run:
        tolerances = [_tolerance(hessians, name, sample) for sample in samples]
        operators = [hessians.usual(s) if usual else hessians.ours(s) for s in samples]

        def run() -> list[Pairs]:
            found = []
            for sample, operator, tolerance in zip(samples, operators, tolerances, strict=True):
                operator.products = 0
                found.append(rival.solve(operator, COUNT, tolerance, hessians.norm(sample)))
            row.labels["products"] = sum(operator.products for operator in operators) / len(operators)
            return found

        return run

    def error(found: list[Pairs]) -> float:
        return max(hessians.check(sample, pairs) for sample, pairs in zip(samples, found, strict=True))

    row = table.add(USUAL.format(name) if usual else name, prepare=prepare, error=error, turns=turns)


@functools.cache
def _tolerance(hessians: Hessians, name: str, sample: int) -> float:
    """Found once, with sharpcore's products: the usual ones differ from them by rounding alone."""
    rival = RIVALS[name]
    reached = functools.partial(hessians.reached, sample)
    operator, norm = hessians.ours(sample), hessians.norm(sample)
    return loosest(rival.solve, operator, COUNT, norm, reached, rival.tolerances)
