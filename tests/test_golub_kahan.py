"""golub_kahan: singular triplets against LAPACK, of Jacobians and of differences of Hessians."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import svds
from small_network import normal, small_network
from torch import Tensor

from sharpcore import HessianDifference, InvalidInput, NonFiniteError, ScoreJacobian, linearize
from sharpcore.krylov import BatchedOperator, Result, as_batched, dense, golub_kahan, probes
from sharpcore.krylov.golub_kahan import _Bidiagonalization
from sharpcore.testing.analytic import GaussianMixtureScoreNetwork


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


@pytest.mark.parametrize("name", ["line", "clustered", "degenerate", "rank one"])
@pytest.mark.parametrize("block", [1, 3])
def test_decomposition_identities(name: str, block: int) -> None:
    a = matrix(VALUES[name])
    d = len(a)
    matrices = torch.stack([a, 2 * a.mT, a + torch.eye(d)])
    operator = as_batched(matrices)

    def draw(samples: Tensor, count: int) -> Tensor:
        return probes("normal", 99, samples=range(3), first=next(drawn), count=count, dimension=d)

    drawn = itertools.count(0, 4)
    krylov = _Bidiagonalization(3, d, 17, block, operator.device, draw=draw)
    krylov.append(probes("normal", 0, samples=range(3), count=block, dimension=d), torch.arange(3))
    for step in range(45):
        for group, _, processed, _ in krylov.groups(krylov.full.nonzero().flatten()):
            part = torch.linalg.svd(krylov.forward[group, :processed, :processed])
            kept = part.Vh.mT[..., : 6 + block].contiguous(), part.U[..., : 6 + block].contiguous()
            krylov.shrink(group, *kept, torch.zeros(len(group), dtype=torch.int64))
        krylov.extend(operator.multiply(krylov.active()), operator, 1e-10)
        ended = krylov.ended.nonzero().flatten()
        if len(ended):
            fresh = probes("normal", 1 + step, samples=range(3), count=block, dimension=d)
            krylov.append(fresh, ended)
        for i, whole in enumerate(matrices):
            p, n = int(krylov.processed[i]), int(krylov.sizes[i])
            v, u = krylov.basis[i, :n], krylov.left[i, :p]
            norm = float(torch.linalg.matrix_norm(whole, 2))
            # A V = U P and A^T U = V H.
            assert float((v[:p] @ whole.mT - krylov.forward[i, :p, :p].mT @ u).norm()) <= 1e-12 * norm
            assert float((u @ whole - krylov.projected[i, :n, :p].mT @ v).norm()) <= 1e-12 * norm
            for rows in (v, u):
                assert float((rows @ rows.mT - torch.eye(len(rows))).abs().max()) <= 1e-12
            assert n <= 17
    assert krylov.restarts > 2


@pytest.mark.parametrize("max_basis", [None, 20])
def test_values_are_those_of_scipy(max_basis: int | None) -> None:
    # As far from normal as can be: all eigenvalues of a shift are 0.
    a = torch.linspace(1, 2, 79, dtype=torch.float64).diag(1)
    ours = golub_kahan(a, 5, max_basis=max_basis).values[0]
    theirs = np.sort(svds(a.numpy(), k=5, return_singular_vectors=False, v0=np.ones(80)))
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-10, atol=0)


def test_double_small_values_are_not_missed() -> None:
    # All singular values of a skew-symmetric matrix of even size are double.
    root = random(100, 100)
    a = root - root.mT
    solution = golub_kahan(a, 5, "smallest")
    assert solution.result is Result.converged
    truth = torch.linalg.svdvals(a).flip(0)
    assert float((solution.values[0] - truth[:5]).abs().max()) <= 1e-10 * float(truth[-1])


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("max_basis", [None, 16])
def test_copies_of_a_rare_value_are_not_missed(k: int, max_basis: int | None) -> None:
    a = matrix(torch.tensor([0.0] * 46 + [0.9] + [1.0] * 3))
    solution = golub_kahan(a, k, max_basis=max_basis)
    assert solution.result is Result.converged
    assert float((solution.values[0] - 1).abs().max()) < 1e-10


@pytest.mark.parametrize("block", [1, 3])
def test_fresh_blocks_have_room_in_a_bounded_basis(block: int) -> None:
    a = matrix(torch.arange(3.0).repeat(8)[:22])
    solution = golub_kahan(a, 6, block=block, max_basis=12 + 2 * block)
    assert solution.result is Result.converged
    assert float((solution.values[0] - 2).abs().max()) <= 1e-9


@pytest.mark.parametrize("name", ["1x1", "2x2", "zero", "orthogonal"])
def test_blocks_larger_than_the_problem(name: str) -> None:
    a = matrix(VALUES[name])
    solution = golub_kahan(a, len(a), "both", block=len(a) + 3)
    assert solution.values.shape == (1, len(a))
    assert solution.result is Result.converged
    assert solution.stats.products == 2 * len(a)
    assert float((solution.values[0] - torch.linalg.svdvals(a).flip(0)).abs().max()) <= 1e-12 * 3


def test_float32_products() -> None:
    a = matrix(VALUES["line"])
    solution = golub_kahan(a.float(), 3)
    assert solution.result is Result.converged
    assert solution.values.dtype is solution.left.dtype is torch.float64
    assert float((solution.values[0] - extremes(VALUES["line"], 3, "largest")).abs().max()) < 1e-6
    below = golub_kahan(a.float(), 3, tolerance=1e-13)
    assert below.result is Result.stagnated
    assert float(below.residuals.max()) < 1e-5


@pytest.mark.parametrize("which", ["smallest", "largest", "both"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_copies_are_found_with_a_tolerance_below_rounding(dtype, which: str) -> None:
    a = matrix(VALUES["degenerate"])
    solution = golub_kahan(a.to(dtype), 2, which, tolerance=0.0 if dtype is torch.float64 else 1e-8)
    assert solution.result is Result.stagnated
    truth = extremes(torch.linalg.svdvals(a).flip(0), 2, which)
    assert float((solution.values[0] - truth).abs().max()) <= 100 * torch.finfo(dtype).eps
    assert solution.stats.products < 2 * len(a)


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize("block", [1, 3])
def test_a_run_goes_on_from_where_a_product_raised(tmp_path, block: int) -> None:
    """Products and transposed ones, with restarts in a batch and with bases of different sizes."""
    a, path = (
        torch.stack([matrix(VALUES["line"]), matrix(VALUES["degenerate"].repeat(3)[:60])]),
        tmp_path / "run.pt",
    )
    options = {"k": 3, "max_basis": 24, "block": block, "tolerance": 1e-8}
    whole, verifying = golub_kahan(a, **options), 0
    assert whole.stats.restarts > 0
    for when in range(0, whole.stats.steps, 3):
        count = itertools.count()

        def product(matrices: Tensor, count=count, when=when):
            def multiply(block: Tensor) -> Tensor:
                if next(count) == when:
                    raise _Interrupted
                return (block.transpose(0, 1) @ matrices).transpose(0, 1)

            return multiply

        operator = BatchedOperator(
            product(a.mT), product(a), samples=2, dimension=60, dtype=torch.float64, name="matrix"
        )
        with pytest.raises(_Interrupted):
            golub_kahan(operator, **options, checkpoint=path)
        verifying += bool((torch.load(path)["state"]["verified"] >= 0).any())
        if when == 12:
            with pytest.raises(InvalidInput, match="another operator"):
                golub_kahan(a.flip(0), **options, checkpoint=path)
            with pytest.raises(InvalidInput, match=r"other arguments .*plan"):
                golub_kahan(a, 4, max_basis=24, block=block, tolerance=1e-8, checkpoint=path)
        resumed = golub_kahan(a, **options, checkpoint=path)
        assert resumed.results == whole.results == (Result.converged,) * 2
        torch.testing.assert_close(resumed.values, whole.values, rtol=1e-8, atol=1e-8)
        # Of equal values the vectors are random.
        torch.testing.assert_close(resumed.left[0], whole.left[0], rtol=1e-6, atol=1e-6)
        # One product checks the operator. Those before a transposed one that raised are made again: a block,
        # and the vector that verifies.
        assert resumed.stats.products <= whole.stats.products + 1 + block + 1
        assert not path.exists()
    assert verifying > 0


def test_an_invariant_subspace_is_named_where_it_stops() -> None:
    stopped = golub_kahan(matrix(VALUES["orthogonal"]), 3, on_breakdown="stop")
    assert stopped.result is Result.invariant_subspace
    assert int(torch.isfinite(stopped.values).sum()) == 1
    assert bool(torch.isnan(stopped.left[0, 1:]).all())


def test_the_best_triplets_where_products_are_used_up() -> None:
    a = matrix(VALUES["line"])
    solution = golub_kahan(a, 3, max_products=24)
    s, v, u = solution.values[0], solution.vectors[0], solution.left[0]
    residuals = torch.hypot((v @ a.mT - s[:, None] * u).norm(dim=1), (u @ a - s[:, None] * v).norm(dim=1))
    torch.testing.assert_close(residuals, solution.residuals[0], rtol=1e-8, atol=1e-12)
    assert float((s - extremes(VALUES["line"], 3, "largest")).abs().max()) < 0.2


def test_problems_that_end_at_different_steps() -> None:
    matrices = torch.stack([matrix(VALUES["line"]), torch.zeros(60, 60).double(), torch.eye(60).double()])
    solution = golub_kahan(matrices, 3, "both")
    assert solution.results == (Result.converged,) * 3
    truth = torch.linalg.svdvals(matrices).flip(1)
    wanted = torch.cat([truth[:, :3], truth[:, -3:]], dim=1)
    assert float((solution.values - wanted).abs().max()) <= 1e-9


def test_difference_of_hessians_of_an_analytic_mixture() -> None:
    d = 12
    roots = normal(3, d, d) / d**0.5
    network = GaussianMixtureScoreNetwork(
        torch.ones(3), normal(3, d, seed=2), roots @ roots.mT, alpha=0.8, sigma=0.6
    )
    x, one = normal(2, d, seed=3), torch.tensor([0, 2])
    lins = [linearize(lambda x, c=c: -network(x, None, c) / 0.6, x) for c in (one, None)]
    truth = torch.linalg.eigvalsh(network.hessian(x, None, one) - network.hessian(x)).abs()
    truth = truth.sort(dim=1).values[:, -3:]
    for operator in (HessianDifference(*lins), HessianDifference(*lins).jacobian):
        solution = golub_kahan(operator, 3)
        torch.testing.assert_close(solution.values, truth, rtol=1e-9, atol=1e-9)
        # The operator is symmetric: a left vector is the right one, up to its sign.
        along = (solution.left * solution.vectors).sum(2).abs()
        torch.testing.assert_close(along, torch.ones(2, 3).double(), rtol=1e-6, atol=0)


def test_jacobian_of_a_convolutional_network() -> None:
    jacobian = ScoreJacobian(linearize(small_network(), normal(2, 3, 2, 4)))
    truth = torch.linalg.svdvals(dense(jacobian)).flip(1)
    solution = golub_kahan(jacobian, 3, "both")
    wanted = torch.cat([truth[:, :3], truth[:, -3:]], dim=1)
    assert float((solution.values - wanted).abs().max()) <= 1e-9 * float(truth.max())
    assert solution.vectors.shape == solution.left.shape == (2, 6, 3, 2, 4)
    assert golub_kahan(jacobian, 1, vectors=False).left is None


def test_nan_in_a_transposed_product_is_named() -> None:
    a, calls = matrix(VALUES["line"]), itertools.count()

    def transposed(block: Tensor) -> Tensor:
        out = block @ a
        if next(calls) == 3:
            out[0, 1, 5] = float("inf")
        return out

    operator = BatchedOperator(
        lambda block: block @ a.mT, transposed, samples=2, dimension=60, dtype=torch.float64, name="mine"
    )
    with pytest.raises(NonFiniteError, match=r"mine: NaN or infinity in its transposed product .* sample 1"):
        golub_kahan(operator, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: expected an integer from 1"),
        ({"block": 0}, "block: expected an integer from 1"),
        ({"which": "magnitude"}, "which: expected one of smallest, largest, both;"),
        ({"tolerance": -1.0}, "tolerance: expected"),
        ({"max_products": 0}, "max_products: expected"),
        ({"max_basis": 4}, "max_basis: expected"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        golub_kahan(matrix(VALUES["line"]), **options)
