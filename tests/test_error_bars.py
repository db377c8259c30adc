"""Error bars of estimates on mixture networks cover the closed form at their nominal rate, over 200 runs."""

from __future__ import annotations

import pytest
import torch
from estimates import RUNS, assert_covered, assert_nominal
from test_analytic import points, score_function

from sharpcore import Hessian, ScoreJacobian, linearize
from sharpcore.eigenvalues import Numbers, _norms
from sharpcore.krylov import (
    Density,
    as_batched,
    diagonal,
    flipd,
    frobenius,
    lhsd,
    spectral_density,
    trace,
)
from sharpcore.testing import GaussianMixtureScoreNetwork

D, SIGMA = 40, 0.4
# The antisymmetric part that a trained network's Jacobian has as well, in shares of its norm.
SKEW = 0.05


def network(planes: bool) -> GaussianMixtureScoreNetwork:
    """Data spread in all directions, or near three planes of 8 dimensions: then most eigenvalues are
    -1 / sigma^2."""
    generator = torch.Generator().manual_seed(0)
    width = 8 if planes else D
    roots = torch.randn(3, D, width, generator=generator, dtype=torch.float64) / width**0.5
    return GaussianMixtureScoreNetwork(
        torch.tensor([1.0, 2.0, 3.0]),
        torch.randn(3, D, generator=generator, dtype=torch.float64) / 8,
        roots @ roots.mT + 1e-3 * torch.eye(D, dtype=torch.float64),
        alpha=(1 - SIGMA**2) ** 0.5,
        sigma=SIGMA,
    )


class State:
    """One state in RUNS samples, each with probes of its own, and the closed forms there."""

    def __init__(self, planes: bool) -> None:
        self.planes, mixture = planes, network(planes)
        x = points(1, D).expand(RUNS, D).contiguous()
        turn = torch.randn(D, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        self.hessian, self.values = mixture.hessian(x[:1])[0], mixture.eigenvalues(x[:1])[0]
        self.turn = (turn - turn.mT) * (SKEW * self.hessian.norm() / (turn - turn.mT).norm())
        self.square = mixture.score(x[:1]).square().sum()
        score = score_function(mixture)
        self.gradient = linearize(score, x)
        self.turned = linearize(lambda x: score(x) + x @ self.turn.mT, x)


@pytest.fixture(scope="module", params=["everywhere", "planes"])
def state(request) -> State:
    return State(request.param == "planes")


@pytest.fixture(scope="module")
def density(state) -> Density:
    return spectral_density(Hessian(state.gradient), steps=12)


@pytest.mark.parametrize("shift", [None, -1 / SIGMA**2])
@pytest.mark.parametrize("method", ["xtrace", "hutch++", "hutchinson"])
def test_trace_and_flipd(state, method, shift):
    for linearization in (state.gradient, state.turned):
        estimate = trace(ScoreJacobian(linearization), method, products=24, shift=shift)
        if state.planes and shift is not None:
            # A sketch of 8 to 12 vectors leaves little or nothing of a rank of 8: deviations have long tails.
            assert_covered(estimate, state.values.sum())
        else:
            assert_nominal(estimate, state.values.sum())
    lid = D + SIGMA**2 * (state.values.sum() + state.square)
    found = flipd(trace(Hessian(state.gradient), method, products=24), state.square.expand(RUNS), SIGMA, D)
    assert_nominal(found, lid)


@pytest.mark.parametrize("shift", [None, -1 / SIGMA**2])
@pytest.mark.parametrize("method", ["xdiag", "hutchinson"])
def test_diagonal(state, method, shift):
    estimate = diagonal(ScoreJacobian(state.turned), method, products=24, shift=shift)
    assert_nominal(estimate, state.hessian.diagonal())


def test_frobenius(state):
    truth = (state.hessian + state.turn).norm()
    assert_nominal(frobenius(ScoreJacobian(state.turned), products=24, kind="normal"), truth)


def test_trace_at_different_states(state):
    """One run at each of many states."""
    mixture = network(state.planes)
    x = 0.6 * points(RUNS, D)
    estimate = trace(Hessian(linearize(score_function(mixture), x)), products=24)
    assert_nominal(estimate, mixture.eigenvalues(x).sum(1))


def test_functions_and_lhsd(state, density):
    above = float(state.values[-1]) + 0.5
    assert_nominal(density.log_det(above), (above - state.values).log().sum())
    assert_nominal(density.apply(lambda v: (v * SIGMA**2).exp()), (state.values * SIGMA**2).exp().sum())
    filtered = 1 / (1 + (state.values.abs() * SIGMA**2 / 0.7) ** 4)
    assert_nominal(lhsd(density, SIGMA), filtered.sum())


def test_counts(state, density):
    """At least nominal on the whole, and not without bound: how the rules cut a cell is not known."""
    low, high = float(state.values[0]), float(state.values[-1])
    shares = []
    for x in torch.linspace(low + 0.1, high - 0.1, 7).tolist():
        count = density.count_above(x)
        covered = (count.value - float((state.values >= x).sum())).abs() <= 2 * count.standard_error + 1e-9
        shares.append(float(covered.double().mean()))
        assert float(count.standard_error.mean()) <= 4
    assert sum(shares) / 7 >= 0.92
    assert min(shares) >= 0.87


def test_norms_of_spectrum(state):
    """Trace, Frobenius norm and asymmetry of the table's columns."""
    how = Numbers(3, "lanczos", "prompt", 4, None, None, probes=8, depth=12, keep_eigenvalues=False)
    jacobian = state.hessian + state.turn
    found = _norms(as_batched(ScoreJacobian(state.turned)), how, range(RUNS))
    assert_nominal(found["trace"], jacobian.trace())
    assert_nominal(found["frobenius"], jacobian.norm())
    assert_nominal(found["asymmetry"], (jacobian - jacobian.mT).norm() / jacobian.norm())
    # The score of a density is a gradient.
    symmetric = _norms(as_batched(ScoreJacobian(state.gradient)), how, range(RUNS))["asymmetry"]
    assert float(symmetric.value.max()) < 1e-13
