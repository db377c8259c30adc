"""golub_kahan: singular triplets against LAPACK, of Jacobians and of differences of Hessians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sharpcore import HessianDifference, InvalidInput, ScoreJacobian, linearize
from sharpcore.krylov import BatchedOperator, Result, dense, golub_kahan


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(values: Tensor, seed: int = 0) -> Tensor:
    """A matrix with these singular values and random singular vectors."""
    d = len(values)
    left, right = (torch.linalg.qr(random(d, d, seed=seed + i)).Q for i in (1, 2))
    return (left * values.double()) @ right.mT


VALUES = {
    "line": torch.linspace(0, 2, 60),
    "clustered": torch.cat([torch.linspace(1, 1 + 1e-6, 10), torch.linspace(0, 0.5, 30)]),
    "degenerate": torch.cat([torch.full((4,), 3.0), torch.ones(20), torch.zeros(5)]),
    "outlier": torch.cat([torch.tensor([100.0]), torch.linspace(0.1, 1, 49)]),
    "rank one": torch.cat([torch.tensor([5.0]), torch.zeros(19)]),
    "zero": torch.zeros(8),
    "orthogonal": torch.ones(15),
    "1x1": torch.tensor([3.0]),
    "2x2": torch.tensor([3.0, 0.5]),
}


def extremes(values: Tensor, k: int, which: str) -> Tensor:
    d = len(values)
    low = {"smallest": k, "largest": 0, "both": min(k, d)}[which]
    high = {"smallest": 0, "largest": k, "both": min(k, d - low)}[which]
    return torch.cat([values[:low], values[d - high :]])


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("which", ["smallest", "largest", "both"])
def test_triplets_of_known_matrices(name: str, block: int, which: str) -> None:
    a = matrix(VALUES[name])
    k = min(4, len(a))
    solution = golub_kahan(a, k, which, block=block)
    truth = extremes(torch.linalg.svdvals(a).flip(0), k, which)
    norm = max(float(truth.max()), float(torch.linalg.matrix_norm(a, 2)))
    assert solution.result is Result.converged
    assert float((solution.values[0] - truth).abs().max()) <= 1e-9 * norm
    s, v, u = solution.values[0], solution.vectors[0], solution.left[0]
    residuals = torch.hypot((v @ a.mT - s[:, None] * u).norm(dim=1), (u @ a - s[:, None] * v).norm(dim=1))
    assert bool((residuals <= 1.01 * solution.residuals[0] + 1e-13 * norm).all())
    for rows in (u, v):
        assert float((rows @ rows.mT - torch.eye(len(rows))).abs().max()) <= 1e-12


@pytest.mark.parametrize("name", ["line", "degenerate", "rank one"])
def test_all_triplets(name: str) -> None:
    a = matrix(VALUES[name], seed=5)
    solution = golub_kahan(a, len(a), "largest", block=2)
    assert float((solution.values[0] - torch.linalg.svdvals(a).flip(0)).abs().max()) <= 1e-12 * 5


def test_small_singular_values_are_not_lost_to_a_square() -> None:
    a = matrix(torch.logspace(-10, 0, 30, dtype=torch.float64))
    solution = golub_kahan(a, 30, "smallest", tolerance=1e-14)
    # Through A^T A everything below 1e-8 would be rounding.
    torch.testing.assert_close(solution.values[0], torch.linalg.svdvals(a).flip(0), rtol=1e-4, atol=1e-15)


def test_restarts() -> None:
    # Small singular values amid many others are out of reach of a basis as short as this one.
    a = matrix(torch.linspace(0.05, 1, 200) ** 2)
    solution = golub_kahan(a, 3, "largest", max_basis=30, tolerance=1e-8)
    assert solution.result is Result.converged
    assert solution.stats.restarts > 0
    truth = extremes(torch.linalg.svdvals(a).flip(0), 3, "largest")
    assert float((solution.values[0] - truth).abs().max()) <= 1e-8


def test_batches() -> None:
    matrices = torch.stack([matrix(VALUES["line"], seed) for seed in (0, 7, 20)])
    together = golub_kahan(matrices, 3, sample_ids=[5, 1, 2])
    alone = golub_kahan(matrices[2], 3, sample_ids=[2])
    torch.testing.assert_close(together.values[2], alone.values[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together.left[2], alone.left[0], rtol=1e-6, atol=1e-6)


def test_jacobian_and_difference_of_hessians() -> None:
    first, second, x = random(7, 7), random(7, 7, seed=1), random(2, 7, seed=2)
    lins = [linearize(lambda x, w=w: torch.tanh(x @ w), x) for w in (first, second)]
    for operator in (ScoreJacobian(lins[0]), HessianDifference(*lins), HessianDifference(*lins).jacobian):
        truth = torch.linalg.svdvals(dense(operator)).flip(1)
        solution = golub_kahan(operator, 2, "both")
        wanted = torch.cat([truth[:, :2], truth[:, -2:]], dim=1)
        torch.testing.assert_close(solution.values, wanted, rtol=1e-9, atol=1e-9)


def test_bad_input_and_products_used_up() -> None:
    a = matrix(VALUES["line"])
    with pytest.raises(InvalidInput, match="k: expected an integer from 1 to 60"):
        golub_kahan(a, 61)
    forward = BatchedOperator(lambda v: v @ a, samples=1, dimension=60, dtype=torch.float64, name="mine")
    with pytest.raises(InvalidInput, match="mine has none"):
        golub_kahan(forward)
    few = golub_kahan(a, 3, max_products=16)
    assert few.result is Result.not_converged
    assert few.stats.products <= 16
