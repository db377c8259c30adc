"""trace, trace_power, frobenius: closed forms, error bars that hold, batches, bad input."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from estimates import (
    RUNS,
    assert_covered,
    assert_nominal,
    assert_within,
    rotation,
    runs_of,
    spectra,
    with_spectrum,
)
from test_analytic import SIGMAS, mixture, points, score_function

from sharpcore import Hessian, HessianDifference, ScoreJacobian, linearize
from sharpcore.errors import InvalidInput, NonFiniteError
from sharpcore.krylov import BatchedOperator, flipd, frobenius, probes, trace, trace_power
from sharpcore.krylov.estimation import student

METHODS = ("xtrace", "hutch++", "hutchinson")
KINDS = ("rademacher", "normal", "sphere")
SPECTRA = spectra()


def unsymmetric(d: int = 40) -> torch.Tensor:
    """A Jacobian's like: an identity, a symmetric and an antisymmetric part."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(d, d, generator=generator, dtype=torch.float64) / 8 - torch.eye(d, dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SPECTRA)
def test_prescribed_spectra(name, method):
    values = SPECTRA[name]
    estimate = trace(with_spectrum(values), method, products=24)
    # Errors have long tails in decaying spectra: 2 % are beyond 3.5 standard errors.
    assert_within(estimate, values.sum(), 5)
    assert estimate.value.shape == estimate.standard_error.shape == (1,)
    assert estimate.products == 24


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_error_bars_hold(method, kind):
    matrix = unsymmetric()
    assert_nominal(trace(runs_of(matrix), method, products=24, kind=kind), matrix.trace())


@pytest.mark.parametrize("kind", KINDS)
def test_error_bars_of_xtrace_hold_where_its_estimates_depend_on_each_other(kind):
    """The spread of the leave-one-out estimates alone is 1.8 times too small here."""
    values = torch.cat([torch.ones(20), torch.full((80,), 1e-3)]).double()
    assert_nominal(trace(runs_of(with_spectrum(values)), products=32, kind=kind), values.sum())


def test_few_probes_are_widened_by_student():
    # t / 2 at 95.45 % for 3, 7, 15 degrees of freedom, from tables of Student's distribution.
    for count, exact in ((4, 1.6534), (8, 1.2145), (16, 1.0887)):
        assert abs(student(count) / exact - 1) < 0.01


@pytest.mark.parametrize("method", ["xtrace", "hutch++"])
def test_low_rank_is_exact(method):
    """Rank 5 in a sketch of 8: nothing is left to chance."""
    values = torch.cat([torch.tensor([5.0, -3, 2, 1, 1]), torch.zeros(95)]).double()
    estimate = trace(with_spectrum(values), method, products=24)
    assert float((estimate.value - 6).abs()) <= 1e-12
    assert float(estimate.standard_error) <= 1e-11


def test_multiples_of_the_identity_leave_nothing_to_chance():
    """What a probe has beyond the sketch is normalized: its length says nothing about the trace."""
    for method in ("xtrace", "hutch++"):
        estimate = trace(runs_of(-0.3 * torch.eye(41, dtype=torch.float64)), method, products=4)
        assert float((estimate.value + 12.3).abs().max()) <= 1e-12
        assert_within(estimate, -12.3, 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("d", [1, 2, 5])
def test_small_operators(d, method):
    """Fewer entries than products: the trace is exact (hutchinson: of 1 x 1)."""
    matrix = unsymmetric(d)
    estimate = trace(matrix, method, products=32)
    assert_within(estimate, matrix.trace())
    if method != "hutchinson":
        assert estimate.products == d
        assert float((estimate.value - matrix.trace()).abs()) <= 1e-14


def test_hutchinson_is_the_mean_over_probes():
    matrix = unsymmetric()
    z = probes("normal", 3, samples=[0], count=10, dimension=40)[:, 0]
    values = torch.einsum("ki,ij,kj->k", z, matrix, z)
    estimate = trace(matrix, "hutchinson", products=10, kind="normal", seed=3)
    torch.testing.assert_close(estimate.value[0], values.mean(), rtol=1e-13, atol=0)
    torch.testing.assert_close(
        estimate.standard_error[0], student(10) * values.std() / 10**0.5, rtol=1e-10, atol=0
    )


def leave_out(matrix: torch.Tensor, omega: torch.Tensor, out: list[int], i: int, kind: str) -> torch.Tensor:
    """XTrace's estimate with probe i from a sketch without the probes `out`, word for word."""
    d = len(matrix)
    kept = [j for j in range(omega.shape[1]) if j not in out]
    q = torch.linalg.qr(matrix @ omega[:, kept])[0]
    z = omega[:, i] - q @ (q.T @ omega[:, i])
    if kind != "rademacher":
        z = z * ((d - len(kept)) / z.square().sum()).sqrt()
    return torch.trace(q.T @ matrix @ q) + z @ matrix @ z


@pytest.mark.parametrize("kind", KINDS)
def test_xtrace_is_the_mean_of_leave_one_out_estimates(kind):
    matrix, k = unsymmetric(), 6
    omega = probes(kind, 0, samples=[0], count=k, dimension=40)[:, 0].T
    values = torch.stack([leave_out(matrix, omega, [i], i, kind) for i in range(k)])
    estimate = trace(matrix, products=2 * k, kind=kind)
    torch.testing.assert_close(estimate.value[0], values.mean(), rtol=1e-11, atol=0)
    change = torch.zeros(k, k, dtype=torch.float64)
    for i, j in itertools.permutations(range(k), 2):
        change[i, j] = values[i] - leave_out(matrix, omega, [i, j], i, kind)
    covariance = (change * change.T).sum() / (k * (k - 1))
    error = student(k) * (values.var() / k + covariance.clamp_min(0)).sqrt()
    torch.testing.assert_close(estimate.standard_error[0], error, rtol=1e-8, atol=0)


def test_shift_lets_probes_see_the_rest():
    """-I and little besides: the sketch finds the rest only once the identity is gone."""
    few = torch.tensor([3.0, 2, 1, -1, -2, 1, 1]).double()
    rest = with_spectrum(torch.cat([torch.linspace(-1e-2, 1e-2, 53, dtype=torch.float64), few]))
    matrix = rest - torch.eye(60, dtype=torch.float64)
    truth = matrix.trace()
    without = trace(runs_of(matrix), "hutch++", products=24)
    shifted = trace(runs_of(matrix), "hutch++", products=24, shift=-1.0)
    assert_nominal(without, truth)
    # Measured: 1.8 and 0.026.
    assert float(shifted.standard_error.mean()) < 0.1 * float(without.standard_error.mean())
    assert_nominal(shifted, truth)
    each = trace(torch.stack([matrix, 2 * matrix]), "hutch++", products=24, shift=[-1.0, -2.0])
    assert_within(each, torch.stack([truth, 2 * truth]))


@pytest.mark.parametrize("method", METHODS)
def test_common_probes_for_differences(method):
    first, nudge = unsymmetric(), with_spectrum(torch.linspace(0, 1e-2, 40, dtype=torch.float64), 3)
    second = first - nudge
    paired = trace(runs_of(first), method, products=24, minus=runs_of(second))
    assert paired.products == 48
    assert_nominal(paired, nudge.trace())
    alone = trace(runs_of(first), method, products=24)
    # Measured: a difference of two estimates would be 60 to 200 times less certain.
    assert float(paired.standard_error.mean()) < 0.05 * float(alone.standard_error.mean())
    # What both have in common cancels, a shift as well.
    with_shift = trace(first, method, products=24, minus=second, shift=-1.0)
    same = trace(first, method, products=24, minus=second)
    assert torch.equal(with_shift.value, same.value)


@pytest.mark.parametrize("shift", [None, -1.0])
@pytest.mark.parametrize("power", [1, 2, 3])
def test_powers(power, shift):
    for matrix in (unsymmetric(), with_spectrum(SPECTRA["indefinite"] - 1.5)):
        truth = torch.linalg.matrix_power(matrix, power).trace()
        estimate = trace_power(runs_of(matrix), power, products=24 * power, shift=shift, symmetric=False)
        assert_nominal(estimate, truth)
        exact = trace_power(matrix, power, products=120, shift=shift)
        assert float((exact.value - truth).abs()) <= 1e-12 * 40
        assert_within(exact, truth, 1)


@pytest.mark.parametrize("power", [2, 3])
def test_powers_of_symmetric_operators_take_a_product_less(power):
    matrix = with_spectrum(SPECTRA["outlier"])
    cheap, plain = (
        trace_power(matrix, power, products=12 * cost, symmetric=flag)
        for cost, flag in ((power - 1, None), (power, False))
    )
    assert (cheap.products, plain.products) == (12 * (power - 1), 12 * power)
    torch.testing.assert_close(cheap.value, plain.value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("power", [2, 3])
def test_powers_without_a_transposed_product(power):
    matrix = unsymmetric()
    operator = BatchedOperator(
        lambda block: block @ matrix.T, samples=RUNS, dimension=40, dtype=torch.float64
    )
    truth = torch.linalg.matrix_power(matrix, power).trace()
    assert_nominal(trace_power(operator, power, products=24 * power), truth)
    shifted = trace_power(operator, power, products=24 * power, shift=-1.0)
    assert_nominal(shifted, truth)


def test_difference_of_powers():
    first = with_spectrum(SPECTRA["indefinite"] - 1)
    second = first + 0.01 * with_spectrum(SPECTRA["decaying"], 7)
    truth = torch.linalg.matrix_power(first, 3).trace() - torch.linalg.matrix_power(second, 3).trace()
    paired = trace_power(runs_of(first), 3, products=32, minus=runs_of(second))
    assert_covered(paired, truth)
    assert paired.products == 64
    apart = trace_power(first, 3, products=32)
    assert float(paired.standard_error.mean()) < 0.1 * float(apart.standard_error)


@pytest.mark.parametrize("shift", [None, -1.0])
def test_frobenius(shift):
    matrix = unsymmetric()
    assert_nominal(frobenius(runs_of(matrix), products=24, kind="normal", shift=shift), matrix.norm())
    exact = frobenius(matrix, products=40, shift=shift)
    assert_within(exact, matrix.norm(), 1)
    zero = frobenius(torch.zeros(3, 40, 40, dtype=torch.float64), products=8)
    assert zero.value.tolist() == zero.standard_error.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("method", METHODS)
def test_float32_products(method):
    """Errors hold the rounding of the products, which is all there is to an identity's."""
    matrix = unsymmetric()
    assert_nominal(trace(runs_of(matrix.float()), method, products=24), matrix.float().double().trace())
    third = torch.eye(64, dtype=torch.float32) / 3
    estimate = trace(third, method, products=16)
    assert_within(estimate, 64 * third.double()[0, 0], 2.5)
    assert float(trace(third, "hutchinson", products=16).standard_error) < 1e-3


@pytest.mark.parametrize(
    "estimator",
    [
        *(lambda op, method=method, **options: trace(op, method, **options) for method in METHODS),
        lambda op, **options: trace_power(op, 3, **options),
        frobenius,
    ],
)
def test_a_sample_does_not_depend_on_its_batch(estimator):
    matrices = torch.stack([with_spectrum(values, i) for i, values in enumerate(SPECTRA.values())])
    together = estimator(matrices, products=20, seed=11)
    for i in range(len(matrices)):
        alone = estimator(matrices[i], products=20, seed=11, sample_ids=[i], block=3)
        torch.testing.assert_close(alone.value[0], together.value[i], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(alone.standard_error[0], together.standard_error[i], rtol=1e-6, atol=1e-12)
    other = estimator(matrices[:1], products=20, seed=12)
    assert float(other.value[0]) != float(together.value[0])


def test_gaussian_mixture_network():
    """Trace, powers and FLIPD of a network equal the closed form within the stated error."""
    network = mixture("epsilon", SIGMAS, d=6)
    x = points(len(SIGMAS), 2, 3)
    hessian, score = network.hessian(x), network.score(x).flatten(1)
    linearization = linearize(score_function(network), x, backend="reference")
    truth = hessian.diagonal(dim1=1, dim2=2).sum(1)
    sigma = torch.as_tensor(SIGMAS, dtype=torch.float64)
    dimension = 6 + sigma.square() * (truth + score.square().sum(1))
    for operator in (Hessian(linearization), ScoreJacobian(linearization)):
        for method in METHODS:
            # "hutchinson" takes probes; the others have all six unit vectors.
            estimate = trace(operator, method, products=16)
            assert_within(estimate, truth)
            lid = flipd(estimate, score.square().sum(1), sigma, 6)
            assert_within(lid, dimension)
        for power in (2, 3):
            powers = torch.linalg.matrix_power(hessian, power).diagonal(dim1=1, dim2=2).sum(1)
            assert_within(trace_power(operator, power, products=32), powers, 2)
        assert_within(frobenius(operator), torch.linalg.matrix_norm(hessian), 2)
    plain = flipd(truth, score.square().sum(1), sigma, 6)
    torch.testing.assert_close(plain.value, dimension)


def test_gaussian_mixture_difference():
    network = mixture("epsilon", SIGMAS, d=6)
    x, condition = points(len(SIGMAS), 6), torch.arange(len(SIGMAS)) % 2
    conditional = linearize(score_function(network, condition), x, backend="reference")
    unconditional = linearize(score_function(network), x, backend="reference")
    matrices = network.hessian(x, condition=condition) - network.hessian(x)
    truth = matrices.diagonal(dim1=1, dim2=2).sum(1)
    # What the two Hessians have in common cancels: traces of 6 to 2,000 in rounding that small is exact.
    exact = trace(HessianDifference(conditional, unconditional))
    torch.testing.assert_close(exact.value, truth, rtol=1e-11, atol=1e-12)
    paired = trace(Hessian(conditional), "hutchinson", products=8, minus=Hessian(unconditional))
    assert_within(paired, truth)


def test_one_problem_of_all_samples():
    x = points(3, 2)
    lin = linearize(score_function(mixture("epsilon", SIGMAS[:3], d=2)), x, backend="reference")
    whole = trace(Hessian(lin), products=6, batched=False)
    each = trace(Hessian(lin), products=6)
    assert whole.value.shape == (1,)
    torch.testing.assert_close(whole.value[0], each.value.sum())


def test_integers_of_numpy_will_do():
    matrix, number = unsymmetric(), np.int64
    ours = trace(matrix, products=number(20), seed=number(3), block=number(4), sample_ids=[number(2)])
    assert torch.equal(ours.value, trace(matrix, products=20, seed=3, block=4, sample_ids=[2]).value)
    assert trace_power(matrix, number(2), products=number(8)).products == 8


MATRIX = torch.eye(8, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: trace(MATRIX, "hutch"), "method"),
        (lambda: trace(MATRIX, products=0), "products"),
        (lambda: trace(MATRIX, products=3), "products"),
        (lambda: trace(MATRIX, products=2.5), "products"),
        (lambda: trace(MATRIX, "hutchinson", products=1), "products"),
        (lambda: trace(MATRIX, kind="uniform"), "kind"),
        (lambda: trace(MATRIX, seed=-1), "seed"),
        (lambda: trace(MATRIX, block=0), "block"),
        (lambda: trace(MATRIX, shift=float("nan")), "shift"),
        (lambda: trace(MATRIX, shift="one"), "shift"),
        (lambda: trace(MATRIX, shift=[1.0, 2.0]), "shift"),
        (lambda: trace(MATRIX, sample_ids=[1, 2]), "sample_ids"),
        (lambda: trace(MATRIX, minus=torch.eye(7).double()), "minus"),
        (lambda: trace(MATRIX, minus=torch.eye(8).double().expand(2, 8, 8)), "minus"),
        (lambda: trace(MATRIX[:3]), "square"),
        (lambda: trace([[1.0]]), "operator"),
        (lambda: trace_power(MATRIX, 4), "power"),
        (lambda: trace_power(MATRIX, 2, products=1), "products"),
        (lambda: trace_power(MATRIX, 3, minus=torch.eye(7).double()), "minus"),
        (lambda: frobenius(MATRIX, products=1), "products"),
        (lambda: flipd(1.0, 1.0, 0.0, 4), "sigma"),
        (lambda: flipd(torch.ones(2), torch.ones(3), 1.0, 4), "score_norm_squared"),
    ],
)
def test_bad_input(call, said):
    with pytest.raises(InvalidInput, match=said):
        call()


@pytest.mark.parametrize("method", METHODS)
def test_products_that_are_not_finite(method):
    def multiply(block: torch.Tensor) -> torch.Tensor:
        return block.clone().index_fill_(2, torch.tensor([4]), float("nan"))

    operator = BatchedOperator(
        multiply, multiply, samples=2, dimension=64, dtype=torch.float64, name="broken"
    )
    with pytest.raises(NonFiniteError, match="broken"):
        trace(operator, method, products=8)


def test_rotation_is_orthogonal():
    """The matrices above have the spectra that they are said to have."""
    q = rotation(40)
    assert float((q.T @ q - torch.eye(40, dtype=torch.float64)).abs().max()) <= 1e-14
    for values in SPECTRA.values():
        found = torch.linalg.eigvalsh(with_spectrum(values))
        torch.testing.assert_close(found, values.sort().values, rtol=0, atol=1e-13)
