"""block_lanczos: extremal eigenpairs of known spectra and of analytic scores, and bad input."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

import sharpcore
from sharpcore import Hessian, InvalidInput, NonFiniteError, ScoreJacobian, linearize
from sharpcore.krylov import BatchedOperator, Result, as_batched, block_lanczos
from sharpcore.krylov.decomposition import Decomposition
from sharpcore.krylov.probes import probes
from sharpcore.testing.analytic import GaussianMixtureScoreNetwork

SPECTRA = {
    "line": torch.linspace(-1, 1, 100),
    "clustered": torch.cat([torch.linspace(-1, -1 + 1e-6, 20), torch.linspace(0, 1, 60)]),
    "degenerate": torch.cat([torch.full((5,), -2.0), torch.zeros(60), torch.full((7,), 3.0)]),
    "degenerate end of many": torch.cat([torch.full((6,), -2.0), torch.linspace(-1, 1, 50)]),
    "indefinite": torch.cat([-torch.logspace(-3, 2, 30), torch.logspace(-4, 1, 35)]),
    "one outlier": torch.cat([torch.tensor([100.0]), torch.linspace(-1, 1, 99)]),
    "rank one": torch.cat([torch.tensor([5.0]), torch.zeros(39)]),
    "rank two": torch.cat([torch.tensor([-1.0, 4.0]), torch.zeros(31)]),
    "zero": torch.zeros(10),
    "identity": torch.ones(30),
    "tiny numbers": 1e-100 * torch.linspace(-1, 2, 40, dtype=torch.float64),
    "1x1": torch.tensor([-3.0]),
    "2x2": torch.tensor([-3.0, 4.0]),
    "3x3 with a pair": torch.tensor([-3.0, 1.0, 1.0]),
}


def matrix(spectrum: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with this spectrum and random eigenvectors."""
    d = len(spectrum)
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    dense = (axes * spectrum.double()) @ axes.mT
    return (dense + dense.mT) / 2


def extremes(values: Tensor, k: int, which: str) -> Tensor:
    """The wanted ones of ascending values [..., d]."""
    d = values.shape[-1]
    low = {"smallest": k, "largest": 0, "both": min(k, d)}[which]
    high = {"smallest": 0, "largest": k, "both": min(k, d - low)}[which]
    return torch.cat([values[..., :low], values[..., d - high :]], dim=-1)


def check_pairs(a: Tensor, solution: sharpcore.krylov.Solution, truth: Tensor, bound: float) -> None:
    """Values, vectors and residuals of one problem."""
    norm = float(torch.linalg.matrix_norm(a, 2))
    values, vectors = solution.values[0], solution.vectors[0]
    assert float((values - truth).abs().max()) <= bound * norm
    image = torch.linalg.vector_norm(vectors @ a - values[:, None] * vectors, dim=1)
    assert bool((image <= 1.01 * solution.residuals[0] + 1e-13 * norm).all())
    gram = vectors @ vectors.mT - torch.eye(len(vectors), dtype=a.dtype)
    # The decomposition is orthonormal to 1e-14; so are its Ritz vectors.
    assert float(gram.abs().max()) <= 1e-12


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("block", [1, 2, 5])
@pytest.mark.parametrize("which", ["smallest", "largest", "both"])
def test_extremal_pairs_of_known_spectra(name: str, block: int, which: str) -> None:
    a = matrix(SPECTRA[name])
    truth = torch.linalg.eigvalsh(a)
    k = min(4, len(a))
    solution = block_lanczos(a, k, which, block=block)
    assert solution.result is Result.converged
    assert solution.values.shape == solution.residuals.shape == (1, len(extremes(truth, k, which)))
    assert bool((solution.values.diff(dim=1) >= 0).all())
    # Residuals within 1e-10 give eigenvalues to that at worst; rounding is what was seen (2e-13).
    check_pairs(a, solution, extremes(truth, k, which), 1e-10)


@pytest.mark.parametrize("name", ["line", "indefinite", "one outlier", "degenerate end of many"])
def test_eigenvalues_are_those_of_scipy(name: str) -> None:
    a = matrix(SPECTRA[name], seed=3)
    ours = block_lanczos(a, 3, "both").values[0]
    low = np.sort(eigsh(a.numpy(), k=3, which="SA", return_eigenvectors=False))
    high = np.sort(eigsh(a.numpy(), k=3, which="LA", return_eigenvectors=False))
    theirs = torch.from_numpy(np.concatenate([low, high]))
    # Relative to the norm; the spectra have norms 1 to 100.
    assert float((ours - theirs).abs().max()) <= 1e-10 * float(theirs.abs().max())


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("block", [1, 3])
def test_all_pairs_and_no_copies(name: str, block: int) -> None:
    a = matrix(SPECTRA[name], seed=1)
    d = len(a)
    solution = block_lanczos(a, d, "both", block=block)
    assert solution.values.shape == (1, d)
    assert solution.result is Result.converged
    check_pairs(a, solution, torch.linalg.eigvalsh(a), 1e-10)
    assert solution.stats.products <= d + block


@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("which", ["smallest", "both"])
def test_thick_restarts_keep_memory_bounded(block: int, which: str) -> None:
    a = matrix(torch.linspace(-1, 1, 300).sign() * torch.linspace(-1, 1, 300).abs() ** 0.7)
    solution = block_lanczos(a, 3, which, block=block, max_basis=40, tolerance=1e-9)
    assert solution.result is Result.converged
    assert solution.stats.restarts > 0
    check_pairs(a, solution, extremes(torch.linalg.eigvalsh(a), 3, which), 1e-10)


def test_restarts_find_every_copy() -> None:
    a = matrix(torch.cat([torch.full((9,), -1.0), torch.linspace(0, 1, 8).repeat(6)]))
    solution = block_lanczos(a, 9, "smallest", max_basis=22)
    assert solution.result is Result.converged
    assert solution.stats.restarts > 0
    check_pairs(a, solution, torch.linalg.eigvalsh(a)[:9], 1e-10)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("max_basis", [None, 16])
def test_copies_of_a_rare_eigenvalue_are_not_missed(k: int, max_basis: int | None) -> None:
    # A second sequence's first Ritz value is near 0, farther from 0.9 than its residual: that proves nothing.
    a = matrix(torch.tensor([0.0] * 46 + [0.9] + [1.0] * 3))
    solution = block_lanczos(a, k, "largest", max_basis=max_basis)
    assert solution.result is Result.converged
    assert float((solution.values[0] - 1).abs().max()) < 1e-10


@pytest.mark.parametrize("block", [1, 3])
def test_fresh_blocks_have_room_in_a_bounded_basis(block: int) -> None:
    a = matrix(torch.arange(3.0).repeat(8)[:22])
    solution = block_lanczos(a, 6, "largest", block=block, max_basis=6 + 3 * block)
    # Products that were cut off would leave residuals of 0.1, called stagnation.
    assert solution.result is Result.converged
    check_pairs(a, solution, torch.full((6,), 2.0).double(), 1e-9)


@pytest.mark.parametrize(
    "name",
    ["line", "clustered", "degenerate", "indefinite", "rank one", "one outlier", "zero", "1x1", "2x2"],
)
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("restart", [False, True])
def test_decomposition_identity(name: str, block: int, restart: bool) -> None:
    a = matrix(SPECTRA[name], seed=2)
    d = len(a)
    matrices = torch.stack([a, 2 * a, a + torch.eye(d)])
    operator = as_batched(matrices)
    krylov = Decomposition(3, d, 24, block, operator.device)
    start = probes("normal", 0, samples=range(3), count=block, dimension=d)
    krylov.append(start, torch.arange(3))
    for step in range(14):
        if bool((krylov.processed == d).all()) or (bool(krylov.full.any()) and not restart):
            break
        for group, _, processed, _ in krylov.groups(krylov.full.nonzero().flatten()):
            h = krylov.projected[group, :processed, :processed]
            weights = torch.linalg.eigh((h + h.mT) / 2).eigenvectors[..., : 8 + block]
            krylov.contract(group, weights, torch.zeros(len(group), dtype=torch.int64))
        krylov.extend(operator.multiply(krylov.active()), operator, 1e-10)
        ended = krylov.ended.nonzero().flatten()
        if len(ended):
            krylov.append(probes("normal", 1 + step, samples=range(3), count=block, dimension=d), ended)
        for i, whole in enumerate(matrices):
            p, n = int(krylov.processed[i]), int(krylov.sizes[i])
            v, h = krylov.basis[i, :n], krylov.projected[i, :n, :p]
            norm = float(torch.linalg.matrix_norm(whole, 2))
            assert float((v[:p] @ whole - h.mT @ v).norm()) <= 1e-12 * norm
            assert float((v @ v.mT - torch.eye(n)).abs().max()) <= 1e-12
            assert n <= d


def test_a_sample_does_not_depend_on_its_batch() -> None:
    matrices = torch.stack([matrix(SPECTRA["line"], seed) * (1 + seed) for seed in range(5)])
    together = block_lanczos(matrices, 4, "both", sample_ids=[7, 3, 9, 1, 0])
    for place, (one, sample) in enumerate(zip(matrices, [7, 3, 9, 1, 0], strict=True)):
        alone = block_lanczos(one, 4, "both", sample_ids=[sample])
        # A batched matrix product may round differently from a single one.
        torch.testing.assert_close(alone.values[0], together.values[place], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(alone.vectors[0], together.vectors[place], rtol=1e-7, atol=1e-7)


def test_problems_that_end_at_different_steps() -> None:
    easy = torch.diag(torch.cat([torch.tensor([-50.0, 70.0]), torch.zeros(98)])).double()
    matrices = torch.stack([easy, matrix(SPECTRA["line"]), torch.zeros(100, 100).double()])
    solution = block_lanczos(matrices, 2, "both", block=2)
    truth = extremes(torch.linalg.eigvalsh(matrices), 2, "both")
    assert solution.results == (Result.converged,) * 3
    assert float((solution.values - truth).abs().max()) <= 1e-9


def test_the_same_seed_gives_the_same_numbers_and_the_global_generator_is_left_alone() -> None:
    a = matrix(SPECTRA["line"])
    before = torch.get_rng_state()
    first, second = (block_lanczos(a, 2, "both", seed=5) for _ in range(2))
    other = block_lanczos(a, 2, "both", seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.vectors, second.vectors)
    assert not torch.equal(first.residuals, other.residuals)


def test_float32_products_converge_to_their_precision() -> None:
    a = matrix(SPECTRA["line"])
    solution = block_lanczos(a.float(), 3, "both")
    assert solution.result is Result.converged
    assert solution.values.dtype is torch.float64
    # Rounding of the float32 matrix itself: 6e-8 was seen.
    assert float((solution.values[0] - extremes(torch.linalg.eigvalsh(a), 3, "both")).abs().max()) < 1e-6


def test_a_tolerance_below_the_operator_s_rounding_is_reported() -> None:
    solution = block_lanczos(matrix(SPECTRA["line"]).float(), 3, "both", tolerance=1e-13)
    assert solution.result is Result.stagnated
    assert not solution.result.ok
    assert float(solution.residuals.max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("which", ["smallest", "largest", "both"])
@pytest.mark.parametrize("block", [1, 2])
def test_copies_are_found_with_a_tolerance_below_rounding(dtype, which: str, block: int) -> None:
    """A closed sequence has no coupling left: it must not pass for all there is."""
    a = matrix(SPECTRA["degenerate"])
    tolerance = 0.0 if dtype is torch.float64 else 1e-8
    solution = block_lanczos(a.to(dtype), 2, which, block=block, tolerance=tolerance)
    assert solution.result is Result.stagnated
    truth = extremes(torch.linalg.eigvalsh(a), 2, which)
    # Measured 4e-15 and 1e-7.
    assert float((solution.values[0] - truth).abs().max()) <= 100 * torch.finfo(dtype).eps
    assert float(solution.residuals.max()) <= 100 * torch.finfo(dtype).eps
    assert solution.stats.products < 40


@pytest.mark.parametrize("max_basis", [None, 40])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 0.0), (torch.float32, 1e-13)])
def test_a_run_ends_where_nothing_can_be_improved(dtype, tolerance: float, max_basis: int | None) -> None:
    a = matrix(torch.linspace(-1, 1, 400).sign() * torch.linspace(-1, 1, 400).abs() ** 0.7).to(dtype)
    solution = block_lanczos(a, 2, "smallest", tolerance=tolerance, max_basis=max_basis)
    assert solution.result is Result.stagnated
    assert float((solution.values[0] - torch.linalg.eigvalsh(a.double())[:2]).abs().max()) < 1e-6
    # 4100 are allowed.
    assert solution.stats.products < (300 if max_basis is None else 1500)


def test_products_used_up_returns_the_best_pairs() -> None:
    a = matrix(SPECTRA["line"])
    solution = block_lanczos(a, 3, "both", max_products=20)
    assert solution.result is Result.not_converged
    assert solution.stats.products <= 20
    assert bool(torch.isfinite(solution.values).all())
    check_pairs(a, solution, extremes(torch.linalg.eigvalsh(a), 3, "both"), 0.1)
    few = block_lanczos(a, 6, "both", max_products=4)
    assert few.result is Result.not_converged
    assert int(torch.isfinite(few.values).sum()) == 4


def test_an_invariant_subspace_is_named_where_it_stops() -> None:
    a = matrix(SPECTRA["rank one"])
    solution = block_lanczos(a, 3, "largest", on_breakdown="stop")
    assert solution.result is Result.invariant_subspace
    assert int(solution.stats.breakdowns) == 1
    found = solution.values[0][torch.isfinite(solution.values[0])]
    torch.testing.assert_close(found, torch.tensor([0.0, 5.0]).double(), rtol=0, atol=1e-12)
    assert block_lanczos(a, 3, "largest").result is Result.converged


def test_progress_is_told() -> None:
    seen = []
    block_lanczos(matrix(SPECTRA["line"]), 3, "both", progress=seen.append)
    products = [at.products for at in seen]
    assert products == sorted(products)
    assert seen[-1].converged == (True,)
    assert seen[-1].residual[0] <= 1e-10
    assert not seen[0].converged[0]


class _Interrupted(Exception):
    pass


def interrupted(a: Tensor, when: int, error: BaseException) -> BatchedOperator:
    """The operator of matrices [B, d, d], whose call number `when` raises, the transposed ones included."""
    count = itertools.count()

    def product(matrices: Tensor) -> Callable[[Tensor], Tensor]:
        def multiply(block: Tensor) -> Tensor:
            if next(count) == when:
                raise error
            return (block.transpose(0, 1) @ matrices).transpose(0, 1)

        return multiply

    return BatchedOperator(
        product(a.mT), product(a), samples=len(a), dimension=a.shape[1], dtype=a.dtype, name="matrix"
    )


@pytest.mark.parametrize("max_basis", [None, 30])
def test_a_run_goes_on_from_its_checkpoint(tmp_path, max_basis) -> None:
    a = matrix(SPECTRA["line"])
    path = tmp_path / "run.pt"
    options = {"k": 3, "which": "both", "max_basis": max_basis, "checkpoint": path}

    def interrupt(at) -> None:
        if at.products > 60 and path.exists():
            raise _Interrupted

    with pytest.raises(_Interrupted):
        block_lanczos(a, progress=interrupt, **options)
    with pytest.raises(InvalidInput, match=r"other arguments .*plan"):
        block_lanczos(a, **{**options, "k": 4})
    with pytest.raises(InvalidInput, match="another operator"):
        block_lanczos(matrix(SPECTRA["line"], seed=9), **options)
    assert path.exists()
    whole = block_lanczos(a, **{**options, "checkpoint": None})
    resumed = block_lanczos(a, **options)
    torch.testing.assert_close(resumed.values, whole.values, rtol=1e-12, atol=1e-13)
    assert resumed.result is Result.converged
    # One product checks that the operator is the same.
    assert resumed.stats.products <= whole.stats.products + 1
    assert not path.exists()
    path.write_text("nothing")
    with pytest.raises(InvalidInput, match="expected a file that this solver wrote"):
        block_lanczos(a, **options)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError(), NonFiniteError("NaN")])
def test_a_run_is_saved_where_a_product_raises(tmp_path, error) -> None:
    """At any product: the first, while the pairs are verified, and with restarts in a batch."""
    a = torch.stack([matrix(SPECTRA["line"], seed=i) * (1 + i) for i in range(2)])
    path, verifying = tmp_path / "run.pt", 0
    options = {"k": 2, "which": "largest", "max_basis": 24, "block": 2, "tolerance": 1e-6}
    whole = block_lanczos(a, **options)
    assert whole.stats.restarts > 0
    for when in range(0, whole.stats.steps, 1 if isinstance(error, KeyboardInterrupt) else 9):
        with pytest.raises(type(error)):
            block_lanczos(interrupted(a, when, error), **options, checkpoint=path)
        verifying += bool((torch.load(path)["state"]["verified"] >= 0).any())
        resumed = block_lanczos(a, **options, checkpoint=path)
        assert resumed.results == (Result.converged,) * 2
        torch.testing.assert_close(resumed.values, whole.values, rtol=1e-11, atol=1e-11)
        # A product checks that the operator is the same; verification does not begin again.
        assert resumed.stats.products == whole.stats.products + (when > 0)
        assert not path.exists()
    assert verifying > 0


def test_times_of_a_resumed_run_are_those_of_all_its_parts(tmp_path) -> None:
    a, path = matrix(SPECTRA["line"])[None], tmp_path / "run.pt"
    slow, quick = interrupted(a, 40, KeyboardInterrupt()), interrupted(a, -1, KeyboardInterrupt())
    multiply = slow._multiply

    def sleeping(block: Tensor) -> Tensor:
        time.sleep(0.005)
        return multiply(block)

    slow._multiply = sleeping
    with pytest.raises(KeyboardInterrupt):
        block_lanczos(slow, 2, checkpoint=path)
    stats = block_lanczos(quick, 2, checkpoint=path).stats
    assert stats.seconds >= stats.operator_seconds >= 40 * 0.005
    assert 0 <= stats.overhead <= 1


def test_an_operator_that_is_not_symmetric_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    skewed = matrix(SPECTRA["line"]) + 1e-3 * torch.randn(100, 100, generator=generator, dtype=torch.float64)
    for block in (1, 4):
        with pytest.raises(InvalidInput, match=r"expected a symmetric one; matrix is not.*arnoldi"):
            block_lanczos(skewed, 2, block=block)
    with pytest.raises(InvalidInput, match="sample 1"):
        block_lanczos(torch.stack([matrix(SPECTRA["line"]), skewed]), 2)
    allowed = block_lanczos(skewed, 2, symmetry_tolerance=1, tolerance=1e-2)
    assert float(allowed.stats.asymmetry) > 1e-4


def test_a_jacobian_that_is_not_symmetric_is_refused_by_name() -> None:
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    lin = linearize(lambda x: torch.tanh(x @ weight), torch.ones(2, 6))
    with pytest.raises(InvalidInput, match="ScoreJacobian is not"):
        block_lanczos(ScoreJacobian(lin), 2)
    assert block_lanczos(Hessian(lin), 2).result is Result.converged


def test_nan_in_a_product_is_named() -> None:
    a = matrix(SPECTRA["line"])
    calls = itertools.count()

    def multiply(block: Tensor) -> Tensor:
        out = block @ a
        if next(calls) == 5:
            out[0, 1, 17] = float("nan")
        return out

    operator = BatchedOperator(multiply, samples=2, dimension=100, dtype=torch.float64, name="mine")
    with pytest.raises(NonFiniteError, match="mine: NaN or infinity in its product number 5 of sample 1"):
        block_lanczos(operator, 2)
    with pytest.raises(NonFiniteError, match="matrix has NaN"):
        block_lanczos(torch.full((3, 3), float("inf")), 1)


@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("more", [0, 1, 2, 4])
def test_the_smallest_bases_lose_nothing(k: int, block: int, more: int) -> None:
    a = matrix(torch.linspace(-3, 5, 100))
    rows = 2 * k + 3 * block + more
    solution = block_lanczos(a, k, "both", block=block, max_basis=rows, tolerance=1e-3, max_products=3000)
    assert solution.result in (Result.converged, Result.not_converged)
    image = solution.vectors[0] @ a - solution.values[0][:, None] * solution.vectors[0]
    assert bool((image.norm(dim=1) <= 1.01 * solution.residuals[0] + 1e-12).all())
    if solution.result.ok:
        truth = extremes(torch.linalg.eigvalsh(a), k, "both")
        # Residuals of 5e-3 beside gaps of 0.08.
        assert float((solution.values[0] - truth).abs().max()) < 5e-3


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-2), (torch.bfloat16, 0.15)])
def test_products_in_16_bits(dtype: torch.dtype, bound: float) -> None:
    outliers = torch.tensor([-8.0, -5.0, 0.5, 2.0])
    generator = torch.Generator().manual_seed(1)
    a = matrix(torch.cat([outliers, -1 + 0.1 * torch.randn(252, generator=generator)]))
    low = a.to(dtype)
    operator = BatchedOperator(lambda v: v @ low, samples=1, dimension=256, dtype=dtype, name="low")
    solution = block_lanczos(operator, 2)
    assert solution.result is Result.converged
    assert float((solution.values[0] - torch.tensor([-8.0, -5.0, 0.5, 2.0])).abs().max()) < bound


def test_matrices_that_require_gradients() -> None:
    a = matrix(SPECTRA["line"]).requires_grad_()
    solution = block_lanczos(a, 2)
    assert not solution.values.requires_grad
    assert solution.result is Result.converged


@pytest.mark.parametrize("scale", [1e-170, 1e160])
def test_norms_whose_squares_are_no_numbers(scale: float) -> None:
    with pytest.raises(InvalidInput, match="between 1e-140 and 1e140"):
        block_lanczos(scale * matrix(SPECTRA["line"]), 2)


@pytest.mark.parametrize(("limit", "block"), [(4, 4), (11, 4), (17, 3), (30, 1)])
def test_no_more_products_than_allowed(limit: int, block: int) -> None:
    for name in ("line", "rank two", "degenerate"):
        stats = block_lanczos(matrix(SPECTRA[name]), 3, block=block, max_products=limit).stats
        assert stats.products <= limit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 101}, "k: expected an integer from 1 to 100"),
        ({"k": 0}, "k: expected"),
        ({"k": 2.0}, "k: expected"),
        ({"block": 0}, "block: expected an integer from 1"),
        ({"block": True}, "block: expected"),
        ({"which": "middle"}, "which: expected one of smallest, largest, both"),
        ({"tolerance": -1.0}, "tolerance: expected a number >= 0"),
        ({"tolerance": float("nan")}, "tolerance: expected"),
        ({"max_basis": 5}, "max_basis: expected an integer from"),
        ({"max_products": 0}, "max_products: expected"),
        ({"on_breakdown": "cry"}, "on_breakdown: expected 'continue' or 'stop'"),
        ({"seed": -1}, "seed: expected"),
        ({"sample_ids": [0, 1]}, "sample_ids: expected 1"),
        ({"sample_ids": 5}, "sample_ids: expected 1 integers"),
        ({"sample_ids": [-1]}, "sample_ids: expected an integer from 0"),
        ({"max_products": 3, "block": 4}, "max_products: expected at least those of one block, 4"),
        ({"checkpoint": "no/such/folder/run.pt"}, "checkpoint: expected a file in a folder that exists"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        block_lanczos(matrix(SPECTRA["line"]), **options)


def test_integers_of_numpy_will_do() -> None:
    a = matrix(SPECTRA["line"])
    options = {"k": 3, "block": 2, "max_basis": 40, "max_products": 90, "seed": 4, "sample_ids": [7]}
    same = {name: np.int64(value) for name, value in options.items() if name != "sample_ids"}
    ours = block_lanczos(a, **same, sample_ids=[np.int32(7)])
    assert torch.equal(ours.values, block_lanczos(a, **options).values)


@pytest.mark.parametrize(
    "operator", [torch.ones(3, 4), torch.ones(3), "H", torch.ones(2, 2, dtype=torch.int64)]
)
def test_bad_operators(operator) -> None:
    with pytest.raises(InvalidInput, match="operator: expected"):
        block_lanczos(operator, 1)


def test_hessian_of_an_analytic_mixture() -> None:
    generator = torch.Generator().manual_seed(0)
    d, count = 24, 3
    roots = torch.randn(count, d, d, generator=generator, dtype=torch.float64) / d**0.5
    network = GaussianMixtureScoreNetwork(
        torch.ones(count),
        torch.randn(count, d, generator=generator, dtype=torch.float64),
        roots @ roots.mT,
        alpha=0.8,
        sigma=0.6,
    )
    x = torch.randn(4, d, generator=generator, dtype=torch.float64)
    lin = linearize(lambda x: -network(x) / 0.6, x)
    solution = block_lanczos(Hessian(lin), 5, "both")
    truth = extremes(network.eigenvalues(x), 5, "both")
    assert float((solution.values - truth).abs().max()) <= 1e-10
    assert solution.vectors.shape == (4, 10, d)
    assert float(solution.stats.asymmetry.max()) < 1e-12


@pytest.mark.parametrize("key", ["mem10_step0", "non44_step25", "mem14_step49"])
def test_products_beside_scipy_on_spectra_of_a_score_network(key: str) -> None:
    recorded = np.load(Path(__file__).parent / "data" / "tiny-sd-eps" / "spectra.npz")
    values = torch.from_numpy(recorded[f"{key}_eig"])
    norm = float(values.abs().max())
    solution = block_lanczos(torch.diag(values), 10, "both", tolerance=1e-6)
    assert float(solution.residuals.max()) <= 1e-6 * norm
    assert float((solution.values[0] - extremes(values, 10, "both")).abs().max()) <= 1e-10 * norm
    fewest = min(_products_of_eigsh(values, tolerance, norm) for tolerance in (1e-4, 1e-5, 1e-6, 1e-7, 1e-8))
    # 0.85 to 1.00 over all thirty spectra, the check for missed copies included.
    assert solution.stats.products <= 1.2 * fewest


def _products_of_eigsh(values: Tensor, tolerance: float, norm: float) -> float:
    """Products of scipy's eigsh for ten pairs at both ends, or infinity where it misses the residuals."""
    count = 0
    diagonal = values.numpy()

    def multiply(vector: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return diagonal * vector.ravel()

    operator = LinearOperator((len(diagonal),) * 2, matvec=multiply, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(len(diagonal))
    found, vectors = eigsh(operator, k=20, which="BE", tol=tolerance, v0=start)
    residuals = np.linalg.norm(diagonal[:, None] * vectors - vectors * found, axis=0)
    return count if residuals.max() <= 1e-6 * norm else float("inf")
