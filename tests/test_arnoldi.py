"""arnoldi: eigenvalues of matrices that are not symmetric, against LAPACK, and of a score's Jacobian."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigs
from small_network import normal, small_network
from torch import Tensor

from sharpcore import InvalidInput, NonFiniteError, ScoreJacobian, linearize
from sharpcore.krylov import BatchedOperator, Result, arnoldi, as_batched, dense, eigenvalues, probes
from sharpcore.krylov.arnoldi import outermost
from sharpcore.krylov.decomposition import Decomposition
from sharpcore.testing.analytic import GaussianMixtureScoreNetwork


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


def ranked(values: Tensor, which: str) -> Tensor:
    """What eigenvalues are ranked by."""
    return values.abs() if which == "magnitude" else values.real


def truth_of(a: Tensor, k: int, which: str) -> Tensor:
    """Real parts, or magnitudes, of the wanted eigenvalues, ascending."""
    parts = ranked(torch.linalg.eigvals(a), which).sort().values
    d = len(parts)
    low = {"smallest": k, "both": min(k, d)}.get(which, 0)
    high = {"smallest": 0, "both": min(k, d - low)}.get(which, k)
    return torch.cat([parts[:low], parts[d - high :]])


def check(a: Tensor, solution, k: int, which: str, bound: float = 1e-8) -> None:
    norm = max(float(torch.linalg.matrix_norm(a, 2)), 1e-300)
    values, vectors = solution.values[0], solution.vectors[0]
    image = torch.linalg.vector_norm(vectors @ a.mT.to(vectors.dtype) - values[:, None] * vectors, dim=1)
    assert bool((image <= 1.01 * solution.residuals[0] + 1e-12 * norm).all())
    torch.testing.assert_close(torch.linalg.vector_norm(vectors, dim=1), torch.ones(len(values)).double())
    # Condition numbers of these eigenvalues are below 100.
    assert float((ranked(values, which) - truth_of(a, k, which)).abs().max()) <= bound * norm
    every = torch.linalg.eigvals(a)
    assert float((values[:, None] - every).abs().min(1).values.max()) <= bound * norm


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("which", ["smallest", "largest", "both", "magnitude"])
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


@pytest.mark.parametrize("which", ["smallest", "both", "magnitude"])
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


def skew_symmetric(d: int) -> Tensor:
    root = normal(d, d)
    return root - root.mT


def pair(real: float, imaginary: float) -> Tensor:
    return torch.tensor([[real, -imaginary], [imaginary, real]], dtype=torch.float64)


HARD = {
    # Real parts are all zero, or all one: which eigenvalues are outermost is decided by rounding.
    "skew-symmetric": skew_symmetric(60),
    "equal real parts": similar([pair(1.0, 0.1 + i / 10) for i in range(30)]),
    # LAPACK's scaling spoiled the eigenvectors of its projections: residuals of 1e-9 instead of 1e-15.
    "close pairs": similar(
        [*(pair(1e-7 * i - 1, 1e-5 * (i + 1)) for i in range(10)), *numbers(torch.linspace(0, 1, 100))]
    ),
    "Grcar": torch.ones(60, 60).double().tril(3).triu() - torch.ones(59).double().diag(-1),
    "Jordan block": torch.ones(59).double().diag(1) - 2 * torch.eye(60).double(),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("which", ["smallest", "both", "magnitude"])
def test_residuals_are_true_through_many_restarts(name: str, block: int, which: str) -> None:
    a = HARD[name]
    solution = arnoldi(a, 3, which, block=block, max_basis=20, max_products=120)
    norm = float(torch.linalg.matrix_norm(a, 2))
    values, vectors = solution.values[0], solution.vectors[0]
    assert solution.stats.restarts > 5
    image = torch.linalg.vector_norm(vectors @ a.mT.to(vectors.dtype) - values[:, None] * vectors, dim=1)
    # Reported and true residuals differ by 1e-14 of the norm at most, converged or not.
    assert float((image - solution.residuals[0]).abs().max()) <= 1e-12 * norm
    assert solution.result in (Result.converged, Result.not_converged)
    assert solution.result is Result.not_converged or float(image.max()) <= 1e-10 * norm


def test_close_pairs_converge_through_restarts() -> None:
    a = HARD["close pairs"]
    solution = arnoldi(a, 4, "smallest", max_basis=36)
    assert solution.result is Result.converged
    assert solution.stats.restarts > 0
    check(a, solution, 4, "smallest")


@pytest.mark.parametrize("name", ["pairs", "mixed", "degenerate"])
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("which", ["smallest", "both", "magnitude"])
def test_decomposition_identity(name: str, block: int, which: str) -> None:
    matrices = torch.stack([MATRICES[name], 2 * MATRICES[name].mT, -MATRICES[name]])
    d = matrices.shape[1]
    operator = as_batched(matrices)
    krylov = Decomposition(3, d, 24, block, operator.device)
    krylov.append(probes("normal", 0, samples=range(3), count=block, dimension=d), torch.arange(3))
    for step in range(50):
        for group, start, processed, _ in krylov.groups(krylov.full.nonzero().flatten()):
            for i in group:
                square = krylov.projected[i, :processed, :processed]
                weights, closed = outermost(square, start, 12, 13, which)
                krylov.contract(i[None], weights[None], torch.tensor([closed]))
        krylov.extend(operator.multiply(krylov.active()), operator, 1e-10)
        ended = krylov.ended.nonzero().flatten()
        if len(ended):
            fresh = probes("normal", 1 + step, samples=range(3), count=block, dimension=d)
            krylov.append(fresh, ended)
        for i, a in enumerate(matrices):
            p, n, start = int(krylov.processed[i]), int(krylov.sizes[i]), int(krylov.start[i])
            v, h = krylov.basis[i, :n], krylov.projected[i, :n, :p]
            norm = float(torch.linalg.matrix_norm(a, 2))
            assert float((v[:p] @ a.mT - h.mT @ v).norm()) <= 1e-12 * norm
            assert float((v @ v.mT - torch.eye(n)).abs().max()) <= 1e-12
            # Block triangular over the last breakdown, through restarts as well.
            assert float(h[start:, :start].norm()) <= 1e-12 * norm
            assert n <= 24
    assert krylov.restarts > 3


@pytest.mark.parametrize(
    ("which", "count", "most", "expected", "of_first"),
    [
        ("largest", 2, 3, [2.94, 2.94], 0),
        ("largest", 3, 4, [2.94, 2.94, 1.755, 1.755], 2),
        # There is no room for a second pair: the outermost real one is taken.
        ("largest", 3, 3, [2.94, 2.94, 0.3], 0),
        ("smallest", 2, 2, [-3.0, -1.0], 1),
        ("both", 4, 4, [-3.0, -1.0, 2.94, 2.94], 1),
        ("magnitude", 3, 3, [-3.0, 2.94, 2.94], 1),
    ],
)
def test_outermost_takes_whole_pairs(which, count, most, expected, of_first) -> None:
    first = similar([rotation(0.5, 2.0), rotation(1.0, 1.5), *numbers(torch.tensor([0.1, -3.0]))], seed=1)
    second = similar([rotation(0.2, 3.0), *numbers(torch.tensor([-1.0, 0.2, 0.3]))], seed=2)
    square = torch.block_diag(first, second)
    square[:6, 6:] = normal(6, 5)
    weights, closed = outermost(square, 6, count, most, which)
    inner = weights.mT @ square @ weights
    assert float((weights.mT @ weights - torch.eye(len(expected))).abs().max()) <= 1e-13
    assert float((square @ weights - weights @ inner).norm()) <= 1e-13 * float(square.norm())
    parts = torch.linalg.eigvals(inner).real.sort().values
    torch.testing.assert_close(parts, torch.tensor(sorted(expected)).double(), rtol=0, atol=1e-3)
    # Those of the first block come first.
    assert closed == of_first
    assert float(inner[closed:, :closed].norm()) <= 1e-13 * float(square.norm())
    among = torch.linalg.eigvals(first).real
    assert all(float((among - part).abs().min()) < 1e-10 for part in inner.diagonal()[:closed])


@pytest.mark.parametrize(("which", "theirs"), [("smallest", "SR"), ("largest", "LR"), ("magnitude", "LM")])
def test_eigenvalues_are_those_of_scipy(which: str, theirs: str) -> None:
    a = similar([pair(-2 + i / 10, 0.3 + i / 50) for i in range(40)], seed=3)
    ours = arnoldi(a, 6, which).values[0]
    found = eigs(a.numpy(), k=6, which=theirs, v0=np.ones(80), return_eigenvectors=False)
    # A pair is two conjugates to the last bit, and never torn apart.
    assert torch.equal(ours[::2], ours[1::2].conj())
    distances = (ours[:, None] - torch.from_numpy(found)).abs()
    assert sorted(distances.argmin(1).tolist()) == list(range(6))
    assert float(distances.min(1).values.max()) <= 1e-9


def test_a_pair_that_the_last_place_splits() -> None:
    a = similar([pair(3.0, 1.0), pair(2.0, 0.5), *numbers(torch.linspace(-1, 1, 20))])
    for k in (1, 2, 3):
        solution = arnoldi(a, k, "largest")
        assert solution.values.shape == (1, k)
        check(a, solution, k, "largest")


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("max_basis", [None, 16])
def test_copies_of_a_rare_eigenvalue_are_not_missed(k: int, max_basis: int | None) -> None:
    # A second sequence's first Ritz value is near 0, farther from 0.9 than its residual: that proves nothing.
    a = similar(numbers(torch.tensor([0.0] * 46 + [0.9] + [1.0] * 3)))
    solution = arnoldi(a, k, "largest", max_basis=max_basis)
    assert solution.result is Result.converged
    assert float((solution.values[0] - 1).abs().max()) < 1e-10


@pytest.mark.parametrize("block", [1, 3])
def test_fresh_blocks_have_room_in_a_bounded_basis(block: int) -> None:
    a = similar(numbers(torch.arange(3.0).repeat(8)[:22]))
    solution = arnoldi(a, 6, "largest", block=block, max_basis=6 + 3 * block)
    # Products that were cut off left residuals of 0.1, called stagnation.
    assert solution.result is Result.converged
    check(a, solution, 6, "largest")


@pytest.mark.parametrize("name", ["1x1", "2x2", "zero", "pairs"])
def test_blocks_larger_than_the_problem(name: str) -> None:
    a = MATRICES[name]
    solution = arnoldi(a, len(a), "both", block=len(a) + 3)
    assert solution.values.shape == (1, len(a))
    assert solution.result is Result.converged
    assert solution.stats.products == len(a)
    check(a, solution, len(a), "both")


def test_an_invariant_subspace_is_named_where_it_stops() -> None:
    a = MATRICES["degenerate"]
    stopped = arnoldi(a, 5, "largest", on_breakdown="stop")
    assert stopped.result is Result.invariant_subspace
    assert int(stopped.stats.breakdowns) == 1
    found = stopped.values[0][~stopped.values[0].isnan()]
    torch.testing.assert_close(found.real, torch.tensor([-2.0, 0.0, 1.0]).double(), rtol=0, atol=1e-12)
    assert arnoldi(a, 5, "largest").result is Result.converged


def test_a_tolerance_below_the_operator_s_rounding_is_reported() -> None:
    solution = arnoldi(MATRICES["mixed"].float(), 2, "largest", tolerance=1e-13)
    assert solution.result is Result.stagnated
    assert float(solution.residuals.max()) < 1e-4


@pytest.mark.parametrize("which", ["smallest", "largest", "magnitude"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_copies_are_found_with_a_tolerance_below_rounding(dtype, which: str) -> None:
    a = MATRICES["degenerate"]
    solution = arnoldi(a.to(dtype), 3, which, tolerance=0.0 if dtype is torch.float64 else 1e-8)
    assert solution.result is Result.stagnated
    off = (ranked(solution.values[0], which) - truth_of(a, 3, which)).abs()
    # Measured 7e-15 and 2e-6 (their condition number is 3).
    assert float(off.max()) <= 100 * torch.finfo(dtype).eps
    assert float(solution.residuals.max()) <= 100 * torch.finfo(dtype).eps
    assert solution.stats.products < len(a)


def test_problems_that_end_at_different_steps() -> None:
    matrices = torch.stack([MATRICES["real"], 0 * MATRICES["real"], MATRICES["pairs"]])
    solution = arnoldi(matrices, 3, "both")
    assert solution.results == (Result.converged,) * 3
    for a, values in zip(matrices, solution.values, strict=True):
        assert float((values.real - truth_of(a, 3, "both")).abs().max()) <= 1e-8


class _Interrupted(Exception):
    pass


def test_a_run_goes_on_from_its_checkpoint(tmp_path) -> None:
    a, path = similar(numbers(torch.linspace(-1, 1, 150))), tmp_path / "run.pt"

    def interrupt(at) -> None:
        if path.exists() and at.products > 80:
            raise _Interrupted

    options = {"k": 3, "which": "magnitude", "max_basis": 20}
    with pytest.raises(_Interrupted):
        arnoldi(a, **options, checkpoint=path, progress=interrupt)
    with pytest.raises(InvalidInput, match=r"other arguments .*plan"):
        arnoldi(a, 3, "largest", max_basis=20, checkpoint=path)
    resumed, whole = arnoldi(a, **options, checkpoint=path), arnoldi(a, **options)
    torch.testing.assert_close(resumed.values, whole.values, rtol=1e-9, atol=1e-9)
    assert not path.exists()


def test_a_run_is_saved_where_a_product_raises(tmp_path) -> None:
    a, path = similar([pair(1.0 + i / 5, 0.1 * i) for i in range(40)]), tmp_path / "run.pt"
    options = {"k": 3, "which": "largest", "max_basis": 24, "tolerance": 1e-8}
    whole, verifying = arnoldi(a, **options), 0
    assert whole.stats.restarts > 0
    for when in range(0, whole.stats.steps, 5):
        count = itertools.count()

        def multiply(block: Tensor, count=count, when=when) -> Tensor:
            if next(count) == when:
                raise _Interrupted
            return block @ a.mT

        operator = BatchedOperator(multiply, samples=1, dimension=80, dtype=torch.float64, name="matrix")
        with pytest.raises(_Interrupted):
            arnoldi(operator, **options, checkpoint=path)
        verifying += int(torch.load(path)["state"]["verified"][0]) >= 0
        resumed = arnoldi(a, **options, checkpoint=path)
        torch.testing.assert_close(resumed.values, whole.values, rtol=1e-7, atol=1e-7)
        assert resumed.stats.products <= whole.stats.products + 1
    assert verifying > 0


def test_asymmetry_is_that_of_the_matrix_once_all_is_multiplied() -> None:
    a = MATRICES["mixed"]
    solution = arnoldi(a, len(a), "smallest")
    expected = torch.linalg.matrix_norm(a - a.mT) / torch.linalg.matrix_norm(a)
    torch.testing.assert_close(solution.stats.asymmetry, expected[None], rtol=1e-10, atol=0)


def test_score_of_an_analytic_mixture() -> None:
    d = 16
    roots = normal(3, d, d) / d**0.5
    network = GaussianMixtureScoreNetwork(
        torch.ones(3), normal(3, d, seed=2), roots @ roots.mT, alpha=0.8, sigma=0.6
    )
    x = normal(3, d, seed=3)
    solution = arnoldi(ScoreJacobian(linearize(lambda x: -network(x) / 0.6, x)), 3, "both")
    every = network.eigenvalues(x)
    truth = torch.cat([every[:, :3], every[:, -3:]], dim=1)
    torch.testing.assert_close(solution.values.real, truth, rtol=1e-9, atol=1e-9)
    assert float(solution.values.imag.abs().max()) <= 1e-9
    assert solution.vectors.shape == (3, 6, d)


def test_jacobian_of_a_convolutional_network() -> None:
    jacobian = ScoreJacobian(linearize(small_network(), normal(2, 3, 2, 4)))
    solution, every = arnoldi(jacobian, 4, "magnitude"), eigenvalues(jacobian)
    sizes = every.abs().sort(dim=1).values[:, -4:]
    torch.testing.assert_close(solution.values.abs(), sizes, rtol=1e-9, atol=1e-9)
    assert solution.vectors.shape == (2, 4, 3, 2, 4)
    vectors = solution.vectors.flatten(2)
    image = (dense(jacobian).to(vectors.dtype) @ vectors.mT).mT - solution.values[..., None] * vectors
    assert float(torch.linalg.vector_norm(image, dim=2).max()) <= 1e-9 * float(every.abs().max())


def test_nan_in_a_product_is_named() -> None:
    a, calls = MATRICES["real"], itertools.count()

    def multiply(block: Tensor) -> Tensor:
        out = block @ a.mT
        if next(calls) == 5:
            out[0, 1, 17] = float("nan")
        return out

    operator = BatchedOperator(multiply, samples=2, dimension=60, dtype=torch.float64, name="mine")
    with pytest.raises(NonFiniteError, match="mine: NaN or infinity in its product number 5 of sample 1"):
        arnoldi(operator, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 61}, "k: expected an integer from 1 to 60"),
        ({"k": 0}, "k: expected"),
        ({"block": 0}, "block: expected an integer from 1"),
        ({"which": "LM"}, "which: expected one of smallest, largest, both, magnitude"),
        ({"tolerance": float("inf")}, "tolerance: expected"),
        ({"max_basis": 3}, "max_basis: expected an integer from"),
        ({"max_products": 0}, "max_products: expected"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        arnoldi(MATRICES["real"], **options)
    with pytest.raises(NonFiniteError, match="NaN"):
        arnoldi(torch.full((4, 4), float("nan")))
