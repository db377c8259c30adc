"""The rivals of block Lanczos in the benchmarks give what they are compared by: pairs and products."""

# ruff: noqa: E402 (the imports follow a check of what this distribution holds)

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not part of the source distribution", allow_module_level=True)
sys.path.append(str(ROOT / "benchmarks"))
pytest.importorskip("scipy")

import eigensolvers
from eigensolvers import Operator, Pairs, loosest
from results import Results
from targets import TARGETS

COUNT, D = 3, 60
SPECTRUM = np.concatenate([np.linspace(-9, -4, D - 5), [1, 2, 3, 4, 5]])


def _matrix() -> np.ndarray:
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((D, D)))[0]
    matrix = (basis * SPECTRUM) @ basis.T
    return (matrix + matrix.T) / 2


def _check(pairs: Pairs) -> None:
    ends = np.concatenate([SPECTRUM[:COUNT], SPECTRUM[-COUNT:]])
    # Measured: residuals of 5e-8 and less, relative to ||A|| = 9.
    np.testing.assert_allclose(pairs.values.real, ends, atol=1e-8)
    matrix = _matrix()
    assert Operator(lambda v: matrix @ v, D).residuals(pairs).max() < 1e-5


@pytest.mark.parametrize("name", ["eigsh", "eigsh_ends", "lobpcg", "primme", "arnoldi_procedure"])
def test_solvers_find_both_ends(name: str) -> None:
    if name == "primme":
        pytest.importorskip("primme")
    matrix = _matrix()
    operator = Operator(lambda v: matrix @ v, D)
    _check(getattr(eigensolvers, name)(operator, COUNT, 1e-7, 9.0))
    assert operator.products >= 2 * COUNT


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("matfree", lambda matrix: eigensolvers.matfree_lanczos(matrix, D - 1)(COUNT)),
        ("hessian_eigenthings", lambda matrix: eigensolvers.eigenthings_lanczos(matrix, D - 1)(COUNT)),
        (
            "curvlinops",
            lambda matrix: eigensolvers.eigsh(eigensolvers.curvlinops_operator(matrix), COUNT, 1e-9, 9.0),
        ),
    ],
)
def test_packages_express_the_task(package: str, make: Callable[[np.ndarray], Pairs]) -> None:
    pytest.importorskip(package)
    _check(make(_matrix()))


def test_residuals_are_of_unit_vectors_and_complex_pairs() -> None:
    turn = np.array([[0.0, -2.0], [2.0, 0.0]])
    operator = Operator(lambda v: turn @ v, 2)
    values, vectors = np.linalg.eig(turn)
    assert operator.residuals(Pairs(values, 5 * vectors)).max() < 1e-14
    assert operator.products == 4
    np.testing.assert_allclose(operator.residuals(Pairs(values + 0.25, 5 * vectors)), 0.25)


@pytest.mark.parametrize("needed", [1e-1, 1e-3, 1e-6])
def test_the_loosest_tolerance_that_suffices_is_taken(needed: float) -> None:
    asked: list[float] = []

    def solve(operator: Any, count: int, tolerance: float, norm: float) -> Any:
        asked.append(tolerance)
        return tolerance

    grid = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    operator = Operator(lambda v: v, 2)
    assert loosest(solve, operator, 1, 1.0, lambda found: found <= needed, grid) == needed
    assert len(asked) <= 3
    with pytest.raises(RuntimeError, match="not reached"):
        loosest(solve, operator, 1, 1.0, lambda found: False, grid)


def test_targets_compare_with_the_best_rival_that_ran() -> None:
    def row(what: str, ratio: float | str, products: float | str) -> dict[str, Any]:
        return {"table": "krylov_one", "what": what, "status": "ok", "ratio": ratio, "products": products}

    rows = Results(
        [
            row("block_lanczos, b=1", 1, 150),
            row("eigsh", 1.25, 200),
            row("PRIMME", 3, 100),
            {**row("lobpcg", "", ""), "status": "failed: RuntimeError"},
        ]
    )
    verdicts = {target.what: target.judge(rows) for target in TARGETS}
    assert verdicts["over the fewest of eigsh and PRIMME"] == ("1.5", "missed")
    assert verdicts["over the fastest rival, one sample"] == ("0.8", "ok")
    assert verdicts["over the fastest rival, 8 samples"] == ("-", "not measured")
