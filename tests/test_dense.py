"""dense, eigh and eigenvalues: whole matrices by products with unit vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_network import normal, small_network

from sharpcore import Hessian, HessianDifference, InvalidInput, NonFiniteError, ScoreJacobian, linearize
from sharpcore.krylov import BatchedOperator, dense, eigenvalues, eigh
from sharpcore.testing.analytic import GaussianMixtureScoreNetwork


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("block", [None, 1, 3, 100])
def test_matrices_are_those_of_the_operators(block: int | None) -> None:
    matrices = random(2, 7, 7)
    seen: list[int] = []
    assert torch.equal(dense(matrices, block=block, progress=seen.append), matrices)
    assert seen[-1] == 7
    assert torch.equal(dense(matrices[0], block=block)[0], matrices[0])


def test_jacobian_and_hessian_of_a_network() -> None:
    weight, x = random(6, 6), random(2, 2, 3, seed=1)
    lin = linearize(lambda x: (x.flatten(1) @ weight).sin().reshape(x.shape), x)
    jacobian = (x.flatten(1) @ weight).cos()[:, :, None] * weight.mT
    torch.testing.assert_close(dense(ScoreJacobian(lin)), jacobian, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(dense(Hessian(lin)), (jacobian + jacobian.mT) / 2, rtol=1e-13, atol=1e-13)
    whole = dense(ScoreJacobian(lin), batched=False)[0]
    torch.testing.assert_close(whole, torch.block_diag(*jacobian), rtol=1e-13, atol=1e-13)
    theirs = torch.linalg.eigvals(jacobian)
    ours = eigenvalues(ScoreJacobian(lin))
    torch.testing.assert_close(ours.real, theirs.real.sort(dim=1).values, rtol=1e-11, atol=1e-11)
    assert eigh(Hessian(lin)).vectors.shape == (2, 6, 2, 3)


def test_pairs_of_an_analytic_mixture() -> None:
    roots = random(2, 5, 5)
    network = GaussianMixtureScoreNetwork(
        torch.ones(2), random(2, 5, seed=1), roots @ roots.mT, alpha=0.6, sigma=0.8
    )
    x = random(3, 5, seed=2)
    solution = eigh(Hessian(linearize(lambda x: -network(x) / 0.8, x)))
    torch.testing.assert_close(solution.values, network.eigenvalues(x), rtol=1e-12, atol=1e-12)
    assert float(solution.residuals.max()) < 1e-12
    assert solution.stats.products == 5


def test_bad_input() -> None:
    with pytest.raises(InvalidInput, match=r"expected a symmetric one.*`eigenvalues`"):
        eigh(random(4, 4))
    with pytest.raises(InvalidInput, match=r"at most 3 entries a sample, got 4.*block_lanczos"):
        dense(random(4, 4), most=3)
    with pytest.raises(InvalidInput, match="block: expected an integer from 1"):
        dense(random(4, 4), block=0)


def test_rows_are_outputs_and_columns_inputs() -> None:
    # Output 0 depends on input 2 alone: one entry, in the first row and the third column.
    lin = linearize(lambda x: torch.stack([5 * x[:, 2], 0 * x[:, 0], 0 * x[:, 0]], dim=1), random(1, 3))
    expected = torch.zeros(3, 3).double()
    expected[0, 2] = 5
    assert torch.equal(dense(ScoreJacobian(lin))[0], expected)
    assert torch.equal(dense(ScoreJacobian(lin).T)[0], expected.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_matrices_of_a_convolutional_network(dtype: torch.dtype) -> None:
    network, x = small_network().to(dtype), normal(2, 3, 2, 4, dtype=dtype)
    operator = ScoreJacobian(linearize(network, x))
    ours = dense(operator)
    assert ours.dtype is torch.float64
    whole = torch.autograd.functional.jacobian(small_network().to(dtype).double(), x.double())
    theirs = torch.stack([whole[i, :, :, :, i].reshape(24, 24) for i in range(2)])
    # Relative errors of products: 1e-15 and 5e-7 were seen.
    bound = 1e-12 if dtype is torch.float64 else 1e-5
    assert float((ours - theirs).norm()) <= bound * float(theirs.norm())
    assert float((dense(operator.T) - theirs.mT).norm()) <= bound * float(theirs.norm())
    hessians = (theirs + theirs.mT) / 2
    hessian = dense(Hessian(linearize(network, x)), block=5)
    assert float((hessian - hessians).norm()) <= bound * float(theirs.norm())


def test_eigenvalues_are_those_of_numpy_pairs_together() -> None:
    a = random(3, 9, 9)
    ours = eigenvalues(a)
    assert ours.dtype is torch.complex128
    for one, values in zip(a, ours, strict=True):
        theirs = np.linalg.eigvals(one.numpy())
        distances = (values[:, None] - torch.from_numpy(theirs)).abs()
        assert sorted(distances.argmin(1).tolist()) == list(range(9))
        assert float(distances.min(1).values.max()) < 1e-12
        assert bool((values.real.diff() >= 0).all())
        upper = (values.imag > 0).nonzero().flatten()
        assert torch.equal(values[upper - 1], values[upper].conj())


def test_asymmetry_is_exact() -> None:
    a = random(2, 8, 8)
    solution = eigh(a, symmetry_tolerance=10)
    expected = torch.linalg.matrix_norm(a - a.mT) / torch.linalg.matrix_norm(a)
    torch.testing.assert_close(solution.stats.asymmetry, expected, rtol=1e-14, atol=0)
    # Residuals are those of the matrix itself, not of its symmetric part.
    vectors = solution.vectors
    image = vectors @ a.mT - solution.values[..., None] * vectors
    torch.testing.assert_close(solution.residuals, image.norm(dim=2), rtol=1e-10, atol=0)
    assert float(solution.residuals.max()) > 0.1
    assert float(eigh(torch.zeros(4, 4)).stats.asymmetry) == 0


def test_difference_of_hessians_and_one_entry() -> None:
    first, second, x = random(5, 5), random(5, 5, seed=1), random(2, 5, seed=2)
    lins = [linearize(lambda x, w=w: torch.tanh(x @ w), x) for w in (first, second)]
    difference = HessianDifference(*lins)
    expected = dense(Hessian(lins[0])) - dense(Hessian(lins[1]))
    torch.testing.assert_close(dense(difference), expected, rtol=1e-13, atol=1e-13)
    assert eigh(difference).result.ok
    one = linearize(lambda x: x**3, torch.tensor([[2.0]]))
    assert eigh(Hessian(one)).values.tolist() == [[12.0]]
    assert eigenvalues(ScoreJacobian(one)).tolist() == [[12.0 + 0.0j]]


def test_nothing_is_multiplied_where_the_matrix_is_too_large() -> None:
    def multiply(block: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    large = BatchedOperator(multiply, samples=1, dimension=4097, dtype=torch.float32)
    for function in (dense, eigh, eigenvalues):
        with pytest.raises(InvalidInput, match="at most 4096 entries a sample, got 4097"):
            function(large)


def test_nan_in_a_column_is_named() -> None:
    a = random(6, 6)

    def multiply(block: torch.Tensor) -> torch.Tensor:
        return torch.where(block[..., 4:5] == 1, float("nan"), block @ a)

    operator = BatchedOperator(multiply, samples=2, dimension=6, dtype=torch.float64, name="mine")
    with pytest.raises(NonFiniteError, match="mine: NaN or infinity in its product number 4 of sample 0"):
        dense(operator)
