"""dense, eigh and eigenvalues: whole matrices by products with unit vectors."""

from __future__ import annotations

import pytest
import torch

from sharpcore import Hessian, InvalidInput, ScoreJacobian, linearize
from sharpcore.krylov import dense, eigenvalues, eigh
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
