"""The analytic score networks: exact in all parameterizations, and the identities that a score must obey."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from sharpcore import InvalidInput, ScoreFunction
from sharpcore.testing import (
    GaussianMixtureScoreNetwork,
    GaussianScoreNetwork,
    assert_error_at_most,
    relative_error,
)

PREDICTION_TYPES = ["epsilon", "v_prediction", "sample", "flow"]
# Largest relative error measured over this file's closed-form comparisons: 4e-14, at sigma = 0.05.
EXACT = 1e-12


def levels(prediction_type: str, sigmas: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """(alpha, sigma) [B]: alpha = 1 - sigma for flow, variance preserving for the others."""
    sigma = torch.tensor(sigmas, dtype=torch.float64)
    return (1 - sigma if prediction_type == "flow" else (1 - sigma**2).sqrt()), sigma


def mixture_parameters(d: int = 3, count: int = 4, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(count, d, d, generator=generator, dtype=torch.float64)
    covariances = root @ root.mT / d
    covariances[1:2] = 0  # a memorized point: the data has a peak of no width
    weights = torch.rand(count, generator=generator, dtype=torch.float64) + 0.1
    return weights, torch.randn(count, d, generator=generator, dtype=torch.float64), covariances


def mixture(prediction_type: str, sigmas: list[float], **options) -> GaussianMixtureScoreNetwork:
    alpha, sigma = levels(prediction_type, sigmas)
    return GaussianMixtureScoreNetwork(
        *mixture_parameters(**options), alpha=alpha, sigma=sigma, prediction_type=prediction_type
    )


def score_function(network, condition=None, units="score") -> ScoreFunction:
    return ScoreFunction(
        network,
        prediction_type=network.prediction_type,
        alpha=network.alpha,
        sigma=network.sigma,
        timestep=0,
        conditioning={} if condition is None else {"condition": condition},
        units=units,
    )


def points(batch: int, *shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def per_sample_jacobian(f, x: torch.Tensor, jacobian=torch.func.jacrev) -> torch.Tensor:
    """[B, d, d] from the Jacobian of the whole batch, whose off-diagonal blocks must vanish."""
    full = jacobian(f)(x).reshape(len(x), x[0].numel(), len(x), x[0].numel())
    blocks = full.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    assert full.norm() == pytest.approx(blocks.norm().item(), rel=1e-13)
    return blocks


SIGMAS = [0.9999, 0.7, 0.25, 0.05]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("jacobian", [torch.func.jacfwd, torch.func.jacrev])
def test_score_and_jacobian_are_the_closed_forms(prediction_type, jacobian):
    network = mixture(prediction_type, SIGMAS, d=6)
    x = points(4, 2, 3)
    score = score_function(network)
    assert relative_error(score(x), network.score(x)) <= EXACT
    assert relative_error(per_sample_jacobian(score, x, jacobian), network.hessian(x)) <= EXACT


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_zero_terminal_snr_needs_no_division_by_alpha(prediction_type):
    network = mixture(prediction_type, [1.0])
    x = points(1, 3)
    assert network.alpha.item() == 0
    score = score_function(network)
    assert relative_error(score(x), -x) <= EXACT
    assert relative_error(per_sample_jacobian(score, x), -torch.eye(3, dtype=torch.float64)[None]) <= EXACT


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow"])
def test_log_density_against_torch_distributions(prediction_type):
    network = mixture(prediction_type, [0.6])
    a, s = network.alpha.item(), network.sigma.item()
    identity = torch.eye(3, dtype=torch.float64)
    density = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(network.weights),
        torch.distributions.MultivariateNormal(
            a * network.means, a**2 * network.covariances + s**2 * identity
        ),
    )
    x = points(1, 3)
    assert relative_error(network.log_density(x), density.log_prob(x)) <= EXACT
    gradient = torch.func.grad(lambda y: density.log_prob(y).sum())(x)
    hessian = torch.func.hessian(lambda y: density.log_prob(y[None]).sum())(x[0])
    assert relative_error(network.score(x), gradient) <= EXACT
    assert relative_error(network.hessian(x)[0], hessian) <= EXACT
    assert relative_error(network.eigenvalues(x)[0], torch.linalg.eigvalsh(hessian)) <= EXACT


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_gaussian_has_one_hessian_everywhere(prediction_type):
    _, means, covariances = mixture_parameters(d=5, count=1, seed=3)
    alpha, sigma = levels(prediction_type, [0.8, 0.3])
    network = GaussianScoreNetwork(
        means[0], covariances[0], alpha=alpha, sigma=sigma, prediction_type=prediction_type
    )
    x = points(2, 5)
    scales = alpha[:, None, None] ** 2, sigma[:, None, None] ** 2
    precision = torch.linalg.inv(scales[0] * covariances[0] + scales[1] * torch.eye(5, dtype=torch.float64))
    score = -(precision @ (x - alpha[:, None] * means[0])[..., None])[..., 0]
    function = score_function(network)
    assert relative_error(function(x), score) <= EXACT
    assert relative_error(per_sample_jacobian(function, x), -precision) <= EXACT
    assert relative_error(network.eigenvalues(x), torch.linalg.eigvalsh(-precision)) <= EXACT


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_conditional_branches_and_the_hessian_difference(prediction_type):
    network = mixture(prediction_type, [0.9, 0.5, 0.2])
    x = points(3, 3)
    component = torch.tensor([1, 0, 3])
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0.5, 0, 0, 2]], dtype=torch.float64)
    for condition in (component, mask, mask > 0):
        conditional, unconditional = score_function(network, condition), score_function(network)
        difference = conditional(x) - unconditional(x)
        closed_difference = network.score(x, condition=condition) - network.score(x)
        assert relative_error(difference, closed_difference) <= EXACT

        closed_hessian = network.hessian(x, condition=condition) - network.hessian(x)
        closed = torch.einsum("bij,bj->bi", closed_hessian, closed_difference)
        _, along_c = torch.func.jvp(conditional, (x,), (difference,))
        _, along_u = torch.func.jvp(unconditional, (x,), (difference,))
        assert relative_error(along_c - along_u, closed) <= EXACT


def test_condition_restricts_the_mixture_as_building_it_anew_does():
    weights, means, covariances = mixture_parameters()
    kept = torch.tensor([2, 3])
    options = {"alpha": 0.8, "sigma": 0.6, "prediction_type": "v_prediction"}
    whole = GaussianMixtureScoreNetwork(weights, means, covariances, **options)
    part = GaussianMixtureScoreNetwork(weights[kept], means[kept], covariances[kept], **options)
    mask = torch.tensor([[False, False, True, True]]).expand(2, 4)
    x = points(2, 3)
    assert relative_error(whole(x, condition=mask), part(x)) <= EXACT
    assert relative_error(whole.log_density(x, condition=mask), part.log_density(x)) <= EXACT
    single = GaussianScoreNetwork(means[2], covariances[2], **options)
    assert relative_error(whole.hessian(x, condition=torch.tensor([2, 2])), single.hessian(x)) <= EXACT


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_levels_looked_up_by_timestep(prediction_type):
    alpha, sigma = levels(prediction_type, [0.1, 0.4, 0.7, 0.95])
    parameters = mixture_parameters()
    table = GaussianMixtureScoreNetwork(
        *parameters, alpha=alpha, sigma=sigma, prediction_type=prediction_type, by_timestep=True
    )
    steps = torch.tensor([2, 0])
    fixed = GaussianMixtureScoreNetwork(
        *parameters, alpha=alpha[steps], sigma=sigma[steps], prediction_type=prediction_type
    )
    x = points(2, 3)
    assert relative_error(table(x, steps), fixed(x)) <= EXACT
    assert relative_error(table.hessian(x, steps), fixed.hessian(x)) <= EXACT
    assert relative_error(table(x[:1], 2), fixed(x)[:1]) <= EXACT


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_tweedie(prediction_type):
    network = mixture(prediction_type, [0.95, 0.6, 0.3])
    x = points(3, 3)
    a, s = network.alpha[:, None], network.sigma[:, None]
    assert relative_error((x + s**2 * network.score(x)) / a, network.posterior_mean(x)) <= EXACT
    identity = torch.eye(3, dtype=torch.float64)
    scale, noise = (s**2 / a**2)[..., None], s[..., None] ** 2
    covariance = scale * (identity + noise * network.hessian(x))
    assert relative_error(covariance, network.posterior_covariance(x)) <= EXACT


# --- identities, by quadrature ------------------------------------------------------------------------------


def gauss_hermite(mean: torch.Tensor, covariance: torch.Tensor, order: int):
    """Nodes [N, d], weights [N], exact for polynomials of degree 2 order - 1 against N(mean, covariance)."""
    node, weight = np.polynomial.hermite_e.hermegauss(order)
    weight = weight / math.sqrt(2 * math.pi)
    d = len(mean)
    grid = torch.tensor(list(itertools.product(node, repeat=d)), dtype=torch.float64)
    weights = torch.tensor(list(itertools.product(weight, repeat=d)), dtype=torch.float64).prod(-1)
    return mean + grid @ torch.linalg.cholesky(covariance).mT, weights


def mixture_expectation(network, value, order: int) -> float:
    """E_{x ~ p_t} value(x), component by component, for one fixed noise level."""
    total = 0.0
    identity = torch.eye(network.means.shape[1], dtype=torch.float64)
    for weight, mean, covariance in zip(network.weights, network.means, network.covariances, strict=True):
        x, w = gauss_hermite(
            network.alpha * mean, network.alpha**2 * covariance + network.sigma**2 * identity, order
        )
        total += weight.item() * (w * value(x)).sum().item()
    return total


@pytest.mark.parametrize(("d", "order"), [(1, 160), (2, 120)])
def test_mean_squared_score_is_minus_mean_trace(d, order):
    """E ||s||^2 = -E tr H for a mixture (integration by parts)."""
    weights, means, covariances = mixture_parameters(d=d, count=3, seed=5)
    network = GaussianMixtureScoreNetwork(weights, 0.7 * means, covariances, alpha=0.8, sigma=0.6)
    squared = mixture_expectation(network, lambda x: network.score(x).square().sum(-1), order)
    trace = mixture_expectation(network, lambda x: network.hessian(x).diagonal(dim1=1, dim2=2).sum(-1), order)
    # No polynomial, so the order decides: measured 7e-16 (d = 1) and 7e-14 (d = 2); 40 nodes give 2e-8
    # for d = 2.
    assert squared == pytest.approx(-trace, rel=1e-10)


def test_gaussian_mean_squared_hessian_score():
    """E ||H s||^2 = -tr H^3 for a Gaussian; the integrand is a quadratic, two nodes an axis are exact."""
    _, means, covariances = mixture_parameters(d=3, count=1, seed=2)
    network = GaussianScoreNetwork(means[0], covariances[0], alpha=0.6, sigma=0.8)
    h = network.hessian(points(1, 3))[0]

    def squared(x):
        return torch.einsum("ij,bj->bi", h, network.score(x)).square().sum(-1)

    assert mixture_expectation(network, squared, 2) == pytest.approx(-(h @ h @ h).trace().item(), rel=1e-13)


def test_commuting_gaussians():
    """E ||s_D||^2 and E ||H_D s_D||^2 over the conditional, for Gaussians of common axes and mean."""
    _, means, covariances = mixture_parameters(d=3, count=1, seed=4)
    axes = torch.linalg.eigh(covariances[0]).eigenvectors
    wide, narrow = torch.tensor([[2.0, 1.0, 0.5], [0.1, 0.7, 0.5]], dtype=torch.float64)
    options = {"alpha": 0.8, "sigma": 0.6}
    plain = GaussianScoreNetwork(means[0], (axes * wide) @ axes.mT, **options)
    conditional = GaussianScoreNetwork(means[0], (axes * narrow) @ axes.mT, **options)
    free = -1 / (0.64 * wide + 0.36)
    bound = -1 / (0.64 * narrow + 0.36)
    origin = torch.zeros(1, 3, dtype=torch.float64)
    hd = conditional.hessian(origin)[0] - plain.hessian(origin)[0]

    def sd(x):
        return conditional.score(x) - plain.score(x)

    first = mixture_expectation(conditional, lambda x: sd(x).square().sum(-1), 2)
    second = mixture_expectation(conditional, lambda x: (sd(x) @ hd).square().sum(-1), 2)
    assert first == pytest.approx(((free - bound) ** 2 / bound.abs()).sum().item(), rel=1e-13)
    assert second == pytest.approx(((free - bound) ** 4 / bound.abs()).sum().item(), rel=1e-13)


def test_flipd_tends_to_the_dimension_of_the_data():
    """d + s^2 (tr H + ||s||^2) tends to 2 for data on a plane in 5 dimensions, else to 5."""
    _, means, covariances = mixture_parameters(d=5, count=1, seed=6)
    variances, axes = torch.linalg.eigh(covariances[0])
    plane = (axes[:, -2:] * variances[-2:]) @ axes[:, -2:].mT

    def dimension(covariance, sigma):
        alpha = math.sqrt(1 - sigma**2)
        network = GaussianScoreNetwork(means[0], covariance, alpha=alpha, sigma=sigma)
        x = alpha * means[:1]
        trace = network.hessian(x).diagonal(dim1=1, dim2=2).sum(-1)
        return (5 + sigma**2 * (trace + network.score(x).square().sum(-1))).item()

    # What is left is s^2 tr (a^2 Sigma + s^2)^-1 over the directions with variance: of the order of s^2.
    assert dimension(plane, 1e-4) == pytest.approx(2, abs=1e-6)
    assert dimension(covariances[0] + torch.eye(5), 1e-4) == pytest.approx(5, abs=1e-6)


# --- dtypes and errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_float32_network(prediction_type):
    network = mixture(prediction_type, [0.7, 0.3])
    x = points(2, 3).float()
    reference = network.score(x.double())
    single = network.float()
    assert single(x).dtype == torch.float32
    # Measured: up to 6e-7 (float32 rounding is 6e-8).
    assert relative_error(score_function(single)(x), reference) <= 4e-6
    assert relative_error(single.score(x), reference) <= 4e-6


@pytest.mark.parametrize(
    "change",
    [
        {"means": torch.zeros(3)},
        {"weights": torch.tensor([1.0, 0.0])},
        {"weights": torch.ones(3)},
        {"covariances": torch.zeros(2, 3, 2)},
        {"covariances": -torch.eye(3).expand(2, 3, 3)},
        {"covariances": torch.ones(2, 3, 3).triu()},
        {"alpha": [0.5, 0.5]},
        {"sigma": 0.0},
        {"sigma": float("nan")},
        {"by_timestep": True},
        {"prediction_type": "noise"},
    ],
)
def test_parameters_that_do_not_fit(change):
    arguments = {
        "weights": torch.ones(2),
        "means": torch.zeros(2, 3),
        "covariances": torch.eye(3).expand(2, 3, 3),
        "alpha": 0.8,
        "sigma": 0.6,
    }
    GaussianMixtureScoreNetwork(**arguments)
    with pytest.raises(InvalidInput):
        GaussianMixtureScoreNetwork(**{**arguments, **change})


def test_inputs_that_do_not_fit():
    network = mixture("epsilon", [0.7, 0.3])
    table = GaussianMixtureScoreNetwork(*mixture_parameters(), alpha=[0.8], sigma=[0.6], by_timestep=True)
    with pytest.raises(InvalidInput, match="float64"):
        network(points(2, 3).float())
    with pytest.raises(InvalidInput, match="3 entries"):
        network(points(2, 4))
    with pytest.raises(InvalidInput, match="2 samples"):
        network(points(3, 3))
    with pytest.raises(InvalidInput, match="condition"):
        network(points(2, 3), condition=torch.ones(2, 3))
    with pytest.raises(InvalidInput, match="timestep"):
        table(points(2, 3))


# --- the accuracy rules -------------------------------------------------------------------------------------


def test_relative_error():
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(reference.clone(), reference) == 0
    assert relative_error(torch.tensor([3.0, 5.0]), reference) == pytest.approx(0.2)
    assert relative_error(torch.tensor([3.0, math.nan]), reference) == math.inf
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf
    with pytest.raises(InvalidInput, match="equal shapes"):
        relative_error(torch.ones(2, 1), torch.ones(2))
    with pytest.raises(InvalidInput, match="finite"):
        relative_error(torch.ones(1), torch.tensor([math.inf]))


def test_assert_error_at_most():
    assert_error_at_most(2e-7, 1e-7)
    assert_error_at_most(3e-7, 0.0, floor=3e-7)
    for error in (2.1e-7, math.inf, math.nan):
        with pytest.raises(AssertionError, match="exceeds"):
            assert_error_at_most(error, 1e-7)
    with pytest.raises(AssertionError):
        assert_error_at_most(1e-9, 0.0)
    with pytest.raises(InvalidInput):
        assert_error_at_most(0.0, math.nan)
