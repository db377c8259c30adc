"""arnoldi: eigenvalues of matrices that are not symmetric, against LAPACK, and of a score's Jacobian."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sharpcore import InvalidInput, NonFiniteError, ScoreJacobian, linearize
from sharpcore.krylov import Result, arnoldi, dense, eigenvalues


def rotation(angle: float, size: float) -> Tensor:
    c, s = torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))
    return size * torch.tensor([[c, -s], [s, c]])


def similar(blocks: list[Tensor], seed: int = 0, skew: float = 0.3) -> Tensor:
    """A matrix with these diagonal blocks in a basis that is `skew` away from orthonormal."""
    middle = torch.block_diag(*(block.double() for block in blocks))
    d = len(middle)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    basis = basis + skew * torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    return basis @ middle @ torch.linalg.inv(basis)


def numbers(values: Tensor) -> list[Tensor]:
    return [value.reshape(1, 1) for value in values]


MATRICES = {
    "real": similar(numbers(torch.linspace(-1, 1, 60))),
    "pairs": similar([rotation(0.1 * i, 1 + i / 30) for i in range(1, 31)]),
    "mixed": similar([*numbers(torch.linspace(-3, 0, 40)), rotation(0.3, 4.0), rotation(2.8, 5.0)]),
    "outlier": similar([*numbers(torch.linspace(-1, 1, 49)), torch.tensor([[50.0]])]),
    "rank one": torch.outer(torch.arange(1.0, 21), torch.linspace(-1, 2, 20)).double(),
    "zero": torch.zeros(12, 12).double(),
    "1x1": torch.tensor([[-3.0]]).double(),
    "2x2": rotation(0.7, 2.0).double(),
    "symmetric": similar(numbers(torch.linspace(-1, 1, 40)), skew=0.0),
    "degenerate": similar(numbers(torch.tensor([-2.0] * 4 + [0.0] * 20 + [1.0] * 3))),
}  # fmt: skip


def truth_of(a: Tensor, k: int, which: str) -> Tensor:
    """Real parts of the wanted eigenvalues, ascending."""
    parts = torch.linalg.eigvals(a).real.sort().values
    d = len(parts)
    low = {"smallest": k, "largest": 0, "both": min(k, d)}[which]
    high = {"smallest": 0, "largest": k, "both": min(k, d - low)}[which]
    return torch.cat([parts[:low], parts[d - high :]])


def check(a: Tensor, solution, k: int, which: str, bound: float = 1e-8) -> None:
    norm = max(float(torch.linalg.matrix_norm(a, 2)), 1e-300)
    values, vectors = solution.values[0], solution.vectors[0]
    image = torch.linalg.vector_norm(vectors @ a.mT.to(vectors.dtype) - values[:, None] * vectors, dim=1)
    assert bool((image <= 1.01 * solution.residuals[0] + 1e-12 * norm).all())
    torch.testing.assert_close(torch.linalg.vector_norm(vectors, dim=1), torch.ones(len(values)).double())
    # Condition numbers of these eigenvalues are below 100.
    assert float((values.real - truth_of(a, k, which)).abs().max()) <= bound * norm
    every = torch.linalg.eigvals(a)
    assert float((values[:, None] - every).abs().min(1).values.max()) <= bound * norm


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("which", ["smallest", "largest", "both"])
def test_eigenvalues_of_known_matrices(name: str, block: int, which: str) -> None:
    a = MATRICES[name]
    k = min(4, len(a))
    solution = arnoldi(a, k, which, block=block)
    assert solution.result is Result.converged
    assert solution.values.dtype is solution.vectors.dtype is torch.complex128
    check(a, solution, k, which)


@pytest.mark.parametrize("name", ["real", "pairs", "mixed"])
def test_all_eigenvalues_and_no_copies(name: str) -> None:
    a = MATRICES[name]
    solution = arnoldi(a, len(a), "smallest")
    assert solution.values.shape == (1, len(a))
    theirs = torch.linalg.eigvals(a)
    distances = (solution.values[0][:, None] - theirs).abs()
    assert sorted(distances.argmin(1).tolist()) == list(range(len(a)))
    assert float(distances.min(1).values.max()) < 1e-10


@pytest.mark.parametrize("which", ["smallest", "both"])
def test_restarts(which: str) -> None:
    pairs = [rotation(a, 0.5) for a in torch.linspace(0.2, 2.9, 60).tolist()]
    a = similar([*pairs, *numbers(torch.linspace(-4, 1.5, 40) ** 1.0)], skew=0.1)
    solution = arnoldi(a, 3, which, max_basis=40, tolerance=1e-9)
    assert solution.result is Result.converged
    assert solution.stats.restarts > 0
    check(a, solution, 3, which)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    matrices = torch.stack([similar(numbers(torch.linspace(-1, 1, 50)), seed) for seed in range(3)])
    together = arnoldi(matrices, 3, sample_ids=[4, 2, 7])
    alone = arnoldi(matrices[1], 3, sample_ids=[2])
    torch.testing.assert_close(alone.values[0], together.values[1], rtol=1e-9, atol=1e-9)


def test_products_used_up_and_float32() -> None:
    few = arnoldi(MATRICES["real"], 3, max_products=12)
    assert few.result is Result.not_converged
    assert bool(torch.isfinite(few.values.real).all())
    low = arnoldi(MATRICES["mixed"].float(), 2, "largest")
    assert low.result is Result.converged
    assert float((low.values[0].real - truth_of(MATRICES["mixed"], 2, "largest")).abs().max()) < 1e-3


def test_jacobian_of_a_network() -> None:
    weight = torch.randn(9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(3, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    jacobian = ScoreJacobian(linearize(lambda x: torch.tanh(x @ weight), x))
    solution = arnoldi(jacobian, 2, "largest")
    matrices = dense(jacobian)
    slope = 1 - torch.tanh(x @ weight).square()
    torch.testing.assert_close(matrices, slope[:, :, None] * weight.mT, rtol=1e-12, atol=1e-12)
    every = eigenvalues(jacobian)
    torch.testing.assert_close(solution.values.real, every.real[:, -2:], rtol=1e-8, atol=1e-8)


def test_bad_input() -> None:
    with pytest.raises(InvalidInput, match="k: expected an integer from 1 to 60"):
        arnoldi(MATRICES["real"], 61)
    with pytest.raises(InvalidInput, match="block: expected"):
        arnoldi(MATRICES["real"], block=0)
    with pytest.raises(NonFiniteError, match="NaN"):
        arnoldi(torch.full((4, 4), float("nan")))
