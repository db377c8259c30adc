"""diagonal: closed forms, error bars that hold entry by entry, batches, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from estimates import RUNS, assert_nominal, assert_within, runs_of, spectra, with_spectrum
from test_analytic import SIGMAS, mixture, points, score_function

from sharpcore import Hessian, ScoreJacobian, linearize
from sharpcore.errors import InvalidInput, NonFiniteError
from sharpcore.krylov import BatchedOperator, diagonal, probes, trace
from sharpcore.krylov.estimation import student

METHODS = ("xdiag", "hutchinson")
SPECTRA = spectra()


def unsymmetric(d: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(d, d, generator=generator, dtype=torch.float64) / 8 - torch.eye(d, dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SPECTRA)
def test_prescribed_spectra(name, method):
    matrix = with_spectrum(SPECTRA[name])
    estimate = diagonal(matrix, method, products=24)
    assert estimate.value.shape == estimate.standard_error.shape == (1, 40)
    assert estimate.products == 24
    # Largest seen over the 40 entries and all spectra: 4.7, where few eigenvalues make the error.
    assert_within(estimate, matrix.diagonal(), 5.5)


@pytest.mark.parametrize("shift", [None, -1.0])
@pytest.mark.parametrize("method", METHODS)
def test_error_bars_hold(method, shift):
    matrix = unsymmetric()
    estimate = diagonal(runs_of(matrix), method, products=24, shift=shift)
    assert_nominal(estimate, matrix.diagonal())


def test_error_bars_of_xdiag_hold_where_its_estimates_depend_on_each_other():
    """The spread of the leave-one-out estimates alone is too small by half here."""
    values = torch.cat([torch.ones(20), torch.full((60,), 1e-3)]).double()
    matrix = with_spectrum(values)
    assert_nominal(diagonal(runs_of(matrix), products=32), matrix.diagonal())


def test_low_rank_is_exact():
    matrix = with_spectrum(torch.cat([torch.tensor([5.0, -3, 2, 1, 1]), torch.zeros(95)]).double())
    estimate = diagonal(matrix, products=16)
    assert float((estimate.value - matrix.diagonal()).abs().max()) <= 1e-13
    assert float(estimate.standard_error.max()) <= 1e-11


def test_shift_lets_the_sketch_see_the_rest():
    rest = with_spectrum(0.3 ** torch.arange(60, dtype=torch.float64))
    matrix = rest - torch.eye(60, dtype=torch.float64)
    without, shifted = diagonal(matrix, products=24), diagonal(matrix, products=24, shift=-1.0)
    assert_within(without, matrix.diagonal())
    assert float((shifted.value - matrix.diagonal()).abs().max()) <= 1e-3
    # Measured: 2e-5 beside 0.12.
    assert float(shifted.standard_error.mean()) < 1e-2 * float(without.standard_error.mean())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("d", [1, 2, 5])
def test_small_operators(d, method):
    matrix = unsymmetric(d)
    estimate = diagonal(matrix, method, products=32)
    assert_within(estimate, matrix.diagonal(), 5)
    if method == "xdiag":
        assert estimate.products == d
        assert torch.equal(estimate.value[0], matrix.diagonal())


def test_diagonal_matrices_are_exact_by_hutchinson():
    matrix = torch.diag(SPECTRA["indefinite"])
    estimate = diagonal(matrix, "hutchinson", products=2)
    assert torch.equal(estimate.value[0], matrix.diagonal())
    assert float(estimate.standard_error.max()) <= 1e-12


def test_hutchinson_is_the_mean_over_probes():
    matrix = unsymmetric()
    z = probes("rademacher", 3, samples=[0], count=37, dimension=40)[:, 0]
    values = z * (z @ matrix.T)
    estimate = diagonal(matrix, "hutchinson", products=37, seed=3)
    torch.testing.assert_close(estimate.value[0], values.mean(0), rtol=1e-12, atol=1e-14)
    error = student(37) * values.std(0) / 37**0.5
    torch.testing.assert_close(estimate.standard_error[0], error, rtol=1e-10, atol=0)


def leave_out(matrix: torch.Tensor, omega: torch.Tensor, out: list[int], i: int) -> torch.Tensor:
    """XDiag's estimate with probe i from a sketch without the probes `out`, word for word."""
    kept = [j for j in range(omega.shape[1]) if j not in out]
    q = torch.linalg.qr(matrix @ omega[:, kept])[0]
    sketch = q @ (q.T @ matrix)
    return sketch.diagonal() + omega[:, i] * ((matrix - sketch) @ omega[:, i])


def test_xdiag_is_the_mean_of_leave_one_out_estimates():
    matrix, k = unsymmetric(), 6
    omega = probes("rademacher", 0, samples=[0], count=k, dimension=40)[:, 0].T
    values = torch.stack([leave_out(matrix, omega, [i], i) for i in range(k)])
    estimate = diagonal(matrix, products=2 * k)
    torch.testing.assert_close(estimate.value[0], values.mean(0), rtol=1e-11, atol=1e-13)
    change = torch.zeros(k, k, 40, dtype=torch.float64)
    for i, j in itertools.permutations(range(k), 2):
        change[i, j] = values[i] - leave_out(matrix, omega, [i, j], i)
    covariance = (change * change.transpose(0, 1)).sum((0, 1)) / (k * (k - 1))
    error = student(k) * (values.var(0) / k + covariance.clamp_min(0)).sqrt()
    torch.testing.assert_close(estimate.standard_error[0], error, rtol=1e-8, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_common_probes_for_differences(method):
    first, nudge = unsymmetric(), with_spectrum(torch.linspace(0, 1e-2, 40, dtype=torch.float64), 3)
    paired = diagonal(runs_of(first), method, products=24, minus=runs_of(first - nudge))
    assert paired.products == 48
    assert_nominal(paired, nudge.diagonal())
    alone = diagonal(first, method, products=24)
    assert float(paired.standard_error.mean()) < 0.05 * float(alone.standard_error.mean())


@pytest.mark.parametrize("method", METHODS)
def test_float32_products(method):
    matrix = unsymmetric()
    truth = matrix.float().double().diagonal()
    assert_nominal(diagonal(runs_of(matrix.float()), method, products=24), truth)


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_does_not_depend_on_its_batch(method):
    matrices = torch.stack([with_spectrum(values, i) for i, values in enumerate(SPECTRA.values())])
    together = diagonal(matrices, method, products=20, seed=11)
    for i in range(len(matrices)):
        alone = diagonal(matrices[i], method, products=20, seed=11, sample_ids=[i], block=3)
        torch.testing.assert_close(alone.value[0], together.value[i], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(alone.standard_error[0], together.standard_error[i], rtol=1e-6, atol=1e-11)


def test_gaussian_mixture_network():
    """Diagonals in the shape of x, equal to the closed form."""
    network = mixture("epsilon", SIGMAS, d=6)
    x = points(len(SIGMAS), 2, 3)
    truth = network.hessian(x).diagonal(dim1=1, dim2=2).reshape(x.shape)
    linearization = linearize(score_function(network), x, backend="reference")
    for operator in (Hessian(linearization), ScoreJacobian(linearization)):
        for method in METHODS:
            estimate = diagonal(operator, method)
            assert estimate.value.shape == x.shape
            assert_within(estimate, truth, 4)
        few = diagonal(operator, products=4)
        total = trace(operator, products=12)
        assert float((few.value.flatten(1).sum(1) / total.value - 1).abs().max()) < 1


MATRIX = torch.eye(8, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: diagonal(MATRIX, "xtrace"), "method"),
        (lambda: diagonal(MATRIX, products=0), "products"),
        (lambda: diagonal(MATRIX, products=3), "products"),
        (lambda: diagonal(MATRIX, "hutchinson", products=1), "products"),
        (lambda: diagonal(MATRIX, seed=1.5), "seed"),
        (lambda: diagonal(MATRIX, shift=[1.0, 2.0]), "shift"),
        (lambda: diagonal(MATRIX, sample_ids=[]), "sample_ids"),
        (lambda: diagonal(MATRIX, minus=torch.eye(7).double()), "minus"),
    ],
)
def test_bad_input(call, said):
    with pytest.raises(InvalidInput, match=said):
        call()


def test_operators_without_a_transposed_product():
    operator = BatchedOperator(lambda block: block, samples=RUNS, dimension=64, dtype=torch.float64)
    assert_within(diagonal(operator, "hutchinson", products=4), 1.0)
    with pytest.raises(InvalidInput, match="transposed"):
        diagonal(operator, products=8)


def test_products_that_are_not_finite():
    operator = BatchedOperator(
        lambda block: block / 0,
        lambda block: block,
        samples=1,
        dimension=64,
        dtype=torch.float64,
        name="broken",
    )
    with pytest.raises(NonFiniteError, match="broken"):
        diagonal(operator, products=8)
