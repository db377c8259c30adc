"""spectral_density: exact spectra, counts, functions, curves, LHSD; error bars that hold; bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from estimates import RUNS, assert_nominal, assert_within, runs_of, spectra, with_spectrum
from test_analytic import SIGMAS, mixture, points, score_function

from sharpcore import Hessian, ScoreJacobian, linearize
from sharpcore.errors import InvalidInput, NonFiniteError
from sharpcore.krylov import BatchedOperator, Density, block_lanczos, lhsd, spectral_density

DATA = Path(__file__).parent / "data" / "tiny-sd-eps"
SPECTRA = spectra()
KINDS = ("sphere", "normal", "rademacher")


def diagonal_operator(values: torch.Tensor) -> BatchedOperator:
    """Matrices with these eigenvalues [B, d]; rademacher probes would see too much of a diagonal one."""
    samples, dimension = values.shape
    return BatchedOperator(
        lambda block: block * values,
        lambda block: block * values,
        samples=samples,
        dimension=dimension,
        dtype=values.dtype,
    )


def checks(density: Density, values: torch.Tensor, errors: float) -> None:
    """Every estimate of one sample against its eigenvalues."""
    middle = float(values.min() + values.max()) / 2 + 0.0123
    assert_within(density.count_above(middle), (values >= middle).sum(), errors)
    assert_within(density.count_below(middle), (values < middle).sum(), errors)
    assert_within(density.mass_above(middle), (values - middle).clamp_min(0).sum(), errors)
    assert_within(density.apply(torch.sin), values.sin().sum(), errors)
    assert_within(density.effective_dimension(0.5), (values.abs() / (values.abs() + 0.5)).sum(), errors)
    assert_within(density.smooth_count(0.7, 3), (1 / (1 + (values.abs() / 0.7) ** 3)).sum(), errors)
    top = float(values.max()) + 0.5
    assert_within(density.log_det(top), (top - values).log().sum(), errors)
    grid, curve, error = density.curve(width=0.3)
    kernels = torch.exp(-((grid[:, None] - values) ** 2) / 0.18) / (0.3 * (2 * torch.pi) ** 0.5)
    assert bool(((curve[0] - kernels.mean(1)).abs() <= errors * error[0]).all())
    assert abs(float(torch.trapezoid(curve[0], grid)) - 1) < 5e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPECTRA)
def test_prescribed_spectra(name, kind):
    values = SPECTRA[name]
    density = spectral_density(with_spectrum(values), steps=12, kind=kind)
    assert density.nodes.shape == density.weights.shape == (1, 8, 12)
    assert bool(torch.isfinite(density.nodes).all())
    assert bool((density.weights >= 0).all())
    total = density.weights.sum(-1) + density.multiplicities.sum(1)
    torch.testing.assert_close(total, torch.full_like(total, 40), rtol=1e-12, atol=0)
    checks(density, values, 4)


@pytest.mark.parametrize("steps", [8, 64])
@pytest.mark.parametrize("name", SPECTRA)
def test_all_eigenvalues_of_small_operators(name, steps):
    """As many steps as entries find all of them, each as often as it occurs, and no copies."""
    values = spectra(8)[name].sort().values
    density = spectral_density(with_spectrum(values), probes=10, steps=steps)
    assert density.multiplicities.sum() == 8
    assert float(density.weights.sum()) == 0
    assert density.products <= 10 * 8
    known = density.multiplicities[0] > 0
    found = density.eigenvalues[0][known].repeat_interleave(density.multiplicities[0][known].long())
    torch.testing.assert_close(found.sort().values, values, rtol=0, atol=1e-12)
    for x in (-1.5, -0.3, 0.4, 1.7):
        count = density.count_above(x)
        assert float(count.value) == pytest.approx(float((values >= x).sum()), abs=1e-9)
    assert_within(density.apply(torch.exp), values.exp().sum(), 2)


@pytest.mark.parametrize("value", [-2.5, 0.0, 1e-30, 1e30])
def test_one_by_one(value):
    density = spectral_density(torch.tensor([[value]], dtype=torch.float64))
    assert density.apply(lambda values: values).value.tolist() == [value]
    assert density.count_above(0.0).value.tolist() == [float(value >= 0)]
    _, curve, error = density.curve()
    assert bool(torch.isfinite(curve).all())
    assert bool(torch.isfinite(error).all())


def test_zero_operator_has_non_negative_eigenvalues_only():
    density = spectral_density(torch.zeros(3, 50, 50, dtype=torch.float64))
    for count in (density.count_above(0.0), density.count_below(1e-9)):
        assert count.value.tolist() == [50.0] * 3
        assert count.standard_error.tolist() == [0.0] * 3
    assert density.count_below(0.0).value.tolist() == [0.0] * 3
    assert density.products == 8


def test_eigenvalues_within_rounding_of_the_threshold_are_uncertain():
    """The zeros of a rank-one matrix are not told from small negative numbers: the error bar says so."""
    density = spectral_density(with_spectrum(SPECTRA["rank one"]))
    count = density.count_above(0.0)
    assert float((count.value - 40).abs()) <= 2 * float(count.standard_error)
    assert float((count.value - 1).abs()) <= 2 * float(count.standard_error)
    assert float(density.count_above(1e-9).value) == pytest.approx(1, abs=1e-9)


FUNCTIONS = {
    "exp": (lambda density: density.apply(torch.exp), lambda v: v.exp().sum()),
    "mass": (lambda density: density.mass_above(0.0), lambda v: v.clamp_min(0).sum()),
    "dimension": (
        lambda density: density.effective_dimension(0.3),
        lambda v: (v.abs() / (v.abs() + 0.3)).sum(),
    ),
    "hill": (lambda density: density.smooth_count(0.4), lambda v: (1 / (1 + (v / 0.4) ** 4)).sum()),
    "log det": (lambda density: density.log_det(1.5), lambda v: (1.5 - v).log().sum()),
}


@pytest.fixture(scope="module", params=KINDS)
def many_runs(request):
    values = torch.cat([torch.linspace(-1, 0.6, 78, dtype=torch.float64), torch.tensor([0.8, 1.0]).double()])
    return spectral_density(runs_of(with_spectrum(values)), steps=24, kind=request.param), values


@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_bars_hold(name, many_runs):
    density, values = many_runs
    estimate, truth = FUNCTIONS[name]
    assert_nominal(estimate(density), truth(values))


def test_error_bars_of_counts_and_curves_hold(many_runs):
    """At least nominal: how rules of different probes cut a cell is not known."""
    density, values = many_runs
    for x in (-0.5, 0.0, 0.7):
        count, truth = density.count_above(x), float((values >= x).sum())
        covered = (count.value - truth).abs() <= 2 * count.standard_error + 1e-9
        assert float(covered.double().mean()) >= 0.92
        # Not without bound: a cell holds 3 to 5 eigenvalues.
        assert float(count.standard_error.mean()) <= 4
    grid, curve, error = density.curve(torch.linspace(-1.2, 1.2, 9), width=0.15)
    kernels = torch.exp(-((grid[:, None] - values) ** 2) / 0.045) / (0.15 * (2 * torch.pi) ** 0.5)
    covered = (curve - kernels.mean(1)).abs() <= 2 * error
    assert float(covered.double().mean()) >= 0.92
    assert bool((covered.double().mean(0) >= 0.87).all())


def test_two_probes_have_nominal_errors():
    """The variance of sphere probes is known: two of them need no widening."""
    values = torch.linspace(-1, 1, 80, dtype=torch.float64)
    density = spectral_density(runs_of(with_spectrum(values)), probes=2, steps=20)
    assert_nominal(density.apply(torch.exp), values.exp().sum())


def spectra_of_the_trained_network() -> tuple[list[str], torch.Tensor]:
    stored = np.load(DATA / "spectra.npz")
    keys = sorted(key for key in stored.files if key.endswith("_eig"))
    return keys, torch.from_numpy(np.stack([stored[key] for key in keys])).double()


def test_counts_of_a_trained_network():
    """Non-negative eigenvalues of 30 Hessians, 0 to 7 of 1,024: within two standard errors of the truth."""
    keys, values = spectra_of_the_trained_network()
    truth = (values >= 0).sum(1).double()
    assert len(keys) == 30
    assert (int(truth.min()), int(truth.max())) == (0, 7)
    for seed in (0, 1):
        density = spectral_density(diagonal_operator(values), seed=seed)
        count = density.count_above(0.0)
        distance = (count.value - truth).abs()
        # Of ten seeds 99 % of the counts are that near; those beyond are 2.6 errors away at most.
        assert int((distance > 2 * count.standard_error + 1e-9).sum()) <= 1
        assert bool((distance <= 3 * count.standard_error + 1e-9).all())
        assert float(count.standard_error.max()) <= 2.5
        # Ends with gaps are resolved: no error is left.
        early = torch.tensor(["step49" not in key for key in keys])
        assert float(count.standard_error[early].max()) <= 0.05
        assert bool((count.value[early].round() == truth[early]).all())
        mass, sums = density.mass_above(0.0), values.clamp_min(0).sum(1)
        assert float(((mass.value - sums).abs() <= 2 * mass.standard_error + 1e-9).double().mean()) >= 0.9


def test_deflation_makes_counts_exact():
    """With the largest pairs of block_lanczos taken out, counts of non-negative eigenvalues are exact."""
    keys, values = spectra_of_the_trained_network()
    chosen = [i for i, key in enumerate(keys) if "step49" in key][-3:]
    values = values[chosen]
    solution = block_lanczos(diagonal_operator(values), k=12, which="largest", tolerance=1e-8)
    density = spectral_density(diagonal_operator(values), deflate=solution, probes=4, steps=32)
    assert bool((density.multiplicities.sum(1) >= 12).all())
    count = density.count_above(0.0)
    truth = (values >= 0).sum(1).double()
    assert float((count.value - truth).abs().max()) <= 1e-6
    assert float(count.standard_error.max()) <= 0.5
    weights = density.weights.sum(-1) + density.multiplicities.sum(1, keepdim=True)
    torch.testing.assert_close(weights, torch.full_like(weights, 1024), rtol=1e-12, atol=0)
    assert_within(density.apply(lambda v: v), values.sum(1))


def test_everything_deflated():
    matrix = with_spectrum(SPECTRA["indefinite"][::5])
    solution = block_lanczos(matrix, k=8, which="both")
    density = spectral_density(matrix, deflate=solution)
    assert float(density.weights.sum()) == 0
    assert_within(density.apply(torch.exp), SPECTRA["indefinite"][::5].exp().sum(), 2)


def test_locked_ends_reduce_the_error():
    """Outliers that every run has found have no variance left."""
    values = torch.cat([torch.linspace(-1, 0, 95, dtype=torch.float64), torch.tensor([3.0, 4, 5, 5, 9])])
    matrix = with_spectrum(values)
    locked, plain = (spectral_density(matrix, steps=20, lock=flag) for flag in (True, False))
    assert float(locked.count_above(1.0).value) == pytest.approx(5, abs=1e-9)
    assert float(locked.count_above(1.0).standard_error) <= 1e-6
    assert float(plain.multiplicities.sum()) == 0
    assert_within(plain.count_above(1.0), 5.0)
    pairs = dict(zip(locked.eigenvalues[0].tolist(), locked.multiplicities[0].tolist(), strict=True))
    doubles = [value for value, multiplicity in pairs.items() if multiplicity == 2]
    assert doubles == pytest.approx([5.0], abs=1e-8)


def test_spectra_that_are_narrow_beside_their_distance_from_zero():
    """-0.36 and 1e-9 around it: the variance is not lost in the rounding of the squares."""
    values = -0.36 + 1e-9 * torch.linspace(-1, 1, 58, dtype=torch.float64)
    density = spectral_density(runs_of(with_spectrum(values)), steps=8)
    estimate = density.apply(lambda v: v)
    assert_nominal(estimate, values.sum())
    assert float(estimate.standard_error.mean()) < 1e-8


def test_multiplicities_are_not_misjudged():
    """Nine runs in eigenspaces of 5 to 10 dimensions: what they tell is right, the rest is estimated."""
    for multiplicity in range(5, 11):
        values = torch.cat([torch.full((multiplicity,), 1.0), torch.linspace(-1, -0.5, 10)]).double()
        density = spectral_density(runs_of(with_spectrum(values)).float(), probes=9, steps=8)
        count = density.count_above(0.5)
        known = count.standard_error < 1e-3
        assert bool((count.value[known] - multiplicity).abs().le(1e-3).all())
        assert multiplicity > 5 or float(known.double().mean()) > 0.9
        assert multiplicity < 8 or not bool(known.any())
        assert_within(count, float(multiplicity), 4.5)


def test_multiplicity_above_the_number_of_runs_is_estimated():
    values = torch.cat([torch.linspace(-1, 0, 60, dtype=torch.float64), torch.full((20,), 2.0).double()])
    density = spectral_density(with_spectrum(values), probes=4, steps=20)
    count = density.count_above(1.0)
    assert_within(count, 20.0)
    assert float(count.standard_error) > 0.5


def test_float32_products():
    values = torch.cat([torch.linspace(-1, 0.5, 78, dtype=torch.float64), torch.tensor([0.8, 1.0]).double()])
    density = spectral_density(runs_of(with_spectrum(values)).float(), steps=24, probes=4)
    assert_nominal(density.apply(torch.exp), values.exp().sum())
    assert_within(density.count_above(0.9), 1.0)
    zero = spectral_density(torch.zeros(30, 30))
    assert zero.count_above(0.0).value.tolist() == [30.0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_does_not_depend_on_its_batch(kind):
    matrices = torch.stack([with_spectrum(values, i) for i, values in enumerate(SPECTRA.values())])
    together = spectral_density(matrices, steps=10, kind=kind, seed=4)
    for i in range(len(matrices)):
        alone = spectral_density(matrices[i], steps=10, kind=kind, seed=4, sample_ids=[i], block=3)
        for f in (torch.exp, lambda values: (1 + values.square()).log()):
            first, second = alone.apply(f), together.apply(f)
            torch.testing.assert_close(first.value[0], second.value[i], rtol=1e-9, atol=1e-9)


def test_log_det():
    values = torch.linspace(-3, -0.5, 60, dtype=torch.float64)
    density = spectral_density(with_spectrum(values), steps=30)
    truth = values.abs().log().sum()
    assert_within(density.log_det(), truth)
    assert_within(density.log_det(0.0), truth)
    # The same f at the same nodes.
    torch.testing.assert_close(density.log_det().value, density.log_det(0.0).value)
    indefinite = spectral_density(with_spectrum(SPECTRA["indefinite"] + 0.003), steps=20)
    assert_within(indefinite.log_det(), (SPECTRA["indefinite"] + 0.003).abs().log().sum())
    for name in ("rank one", "zero"):
        with pytest.raises(InvalidInput, match="singular"):
            spectral_density(with_spectrum(SPECTRA[name])).log_det()
    with pytest.raises(InvalidInput, match=r"shift: .* of sample 0"):
        indefinite.log_det(0.5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_gaussian_mixture_network(prediction_type):
    """Density, counts, log det and LHSD of a network equal the closed form within the stated error."""
    network = mixture(prediction_type, SIGMAS, d=6)
    x = points(len(SIGMAS), 2, 3)
    values = network.eigenvalues(x)
    operator = Hessian(linearize(score_function(network), x, backend="reference"))
    sigma = torch.as_tensor(SIGMAS, dtype=torch.float64)
    truth = 1 / (1 + (values.abs() * sigma.square()[:, None] / 0.7) ** 4)
    for steps in (6, 64):
        density = spectral_density(operator, steps=steps)
        assert_within(lhsd(density, sigma), truth.sum(1), 2)
        assert_within(density.apply(lambda v: v), values.sum(1), 2)
        assert_within(density.log_det(), values.abs().log().sum(1), 2)
        assert_within(density.count_above(-1.0), (values >= -1).sum(1), 2)
        per_sample = values.mean(1) + 1e-3
        assert_within(density.count_below(per_sample), (values < per_sample[:, None]).sum(1), 2)
        grid, curve, error = density.curve(width=0.5)
        kernels = torch.exp(-2 * (grid - values[:, :, None]) ** 2) / (0.5 * (2 * torch.pi) ** 0.5)
        assert bool(((curve - kernels.mean(1)).abs() <= 2 * error + 1e-14).all())
    few = spectral_density(operator, steps=3, probes=32)
    assert_within(few.apply(lambda v: v), values.sum(1))


def test_lhsd_counts_directions_along_the_data():
    """Data on a subspace of 10 of 60 dimensions, little noise: ten eigenvalues of order 1, the others 1e4."""
    sigma = 0.01
    values = torch.cat(
        [torch.linspace(-1.5, -0.5, 10, dtype=torch.float64), torch.full((50,), -1 / sigma**2)]
    )
    density = spectral_density(with_spectrum(values), steps=16)
    # The filter is 1 - 1e-15 below and (0.7)^4 / (1 + 0.7^4) = 0.19 at the noise's curvature.
    expected = 10 + 50 * 0.7**4 / (1 + 0.7**4)
    assert_within(lhsd(density, sigma), expected)
    assert float(lhsd(density, sigma, cutoff=0.1).value) == pytest.approx(10, abs=0.02)


def test_grid_and_width_of_curves():
    density = spectral_density(with_spectrum(SPECTRA["indefinite"]), steps=12)
    grid = torch.tensor([0.0, 0.5])
    curve = density.curve(grid, width=0.2)
    assert curve.grid.tolist() == [0.0, 0.5]
    assert curve.density.shape == curve.standard_error.shape == (1, 2)
    # Narrower than the nodes are apart: the error says that nothing is known.
    narrow = density.curve(torch.linspace(-0.9, 0.9, 50), width=1e-5)
    assert bool((narrow.standard_error >= 0.5 * narrow.density).float().mean() > 0.9)
    assert density.curve(torch.zeros(0)).density.shape == (1, 0)


def test_curves_of_samples_on_grids_of_their_own():
    values = torch.stack([SPECTRA["indefinite"], SPECTRA["indefinite"] * 10 - 3])
    density = spectral_density(torch.stack([with_spectrum(each) for each in values]), steps=16)
    grid, widths = torch.tensor([[-0.5, 0.0], [-8.0, 2.0]]).double(), torch.tensor([0.2, 2.0]).double()
    curve = density.curve(grid, widths)
    assert torch.equal(curve.grid, grid)
    for i in range(2):
        alone = density.curve(grid[i], float(widths[i]))
        torch.testing.assert_close(curve.density[i], alone.density[i])
        torch.testing.assert_close(curve.standard_error[i], alone.standard_error[i])


def test_numbers_of_each_sample():
    values = torch.stack([SPECTRA["indefinite"], SPECTRA["indefinite"] * 10 - 3])
    density = spectral_density(torch.stack([with_spectrum(each) for each in values]), steps=16)
    for name, numbers in (
        ("mass_above", [0.5, -8.0]), ("effective_dimension", [0.5, 8.0]), ("smooth_count", [0.5, 8.0]),
        ("log_det", [8.0, 9.0]), ("count_below", [0.5, -8.0]),
    ):  # fmt: skip
        estimator = getattr(density, name)
        estimate = estimator(torch.tensor(numbers))
        for i, number in enumerate(numbers):
            alone = estimator(number)
            assert float(estimate.value[i]) == float(alone.value[i])
            assert float(estimate.standard_error[i]) == float(alone.standard_error[i])
    with pytest.raises(InvalidInput, match=r"shift: .*; 5 is not above .* of sample 1"):
        density.log_det(torch.tensor([2.0, 5.0]))


def test_a_whole_spectrum_has_no_errors():
    values = torch.stack([SPECTRA["degenerate"], SPECTRA["indefinite"] - 0.2])
    density = Density.of(values)
    assert torch.equal(density.count_above(0.0).value, (values >= 0).sum(1).double())
    assert torch.equal(density.count_below(-1.0).value, (values < -1).sum(1).double())
    sigma = torch.tensor([0.9, 1.5]).double()
    filtered = 1 / (1 + (values.abs() * sigma[:, None].square() / 0.7) ** 4)
    for estimate, truth in (
        (density.mass_above(0.1), (values - 0.1).clamp_min(0)),
        (density.apply(torch.exp), values.exp()),
        (density.log_det(3.0), (3 - values).log()),
        (density.effective_dimension(0.3), values.abs() / (values.abs() + 0.3)),
        (lhsd(density, sigma), filtered),
    ):
        torch.testing.assert_close(estimate.value, truth.sum(1), rtol=1e-14, atol=1e-14)
        assert estimate.standard_error.tolist() == [0.0, 0.0]
    grid, curve, error = density.curve(width=0.3)
    kernels = torch.exp(-((grid[:, None] - values[:, None]) ** 2) / 0.18) / (0.3 * (2 * torch.pi) ** 0.5)
    torch.testing.assert_close(curve, kernels.mean(2), rtol=1e-13, atol=1e-15)
    assert float(error.max()) == 0
    for bad in (values[0], values.to(torch.complex128), values * float("nan"), [[1.0]], values[:, :0]):
        with pytest.raises(InvalidInput, match=r"eigenvalues: expected \[B, d\]"):
            Density.of(bad)


def test_repr():
    density = spectral_density(with_spectrum(SPECTRA["outlier"]), steps=12)
    assert "1 x 40 eigenvalues, 8 rules of 12 nodes" in repr(density)


MATRIX = torch.diag(torch.tensor([1.0, 2, 3, 4, 5, 6]).double())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: spectral_density(MATRIX, probes=0), "probes"),
        (lambda: spectral_density(MATRIX, probes=1, kind="rademacher"), "probes"),
        (lambda: spectral_density(MATRIX, steps=0), "steps"),
        (lambda: spectral_density(MATRIX, kind="uniform"), "kind"),
        (lambda: spectral_density(MATRIX, block=0), "block"),
        (lambda: spectral_density(MATRIX, sample_ids=[0, 1]), "sample_ids"),
        (lambda: spectral_density(MATRIX, deflate=3), "deflate"),
        (lambda: spectral_density(MATRIX, deflate=block_lanczos(MATRIX, k=1, vectors=False)), "deflate"),
        (lambda: spectral_density(MATRIX, deflate=block_lanczos(MATRIX[:4, :4], k=1)), "deflate"),
        (lambda: spectral_density(MATRIX.triu() + MATRIX.roll(1)), "not: "),
        (lambda: spectral_density(MATRIX).count_above("0"), "x"),
        (lambda: spectral_density(MATRIX).count_above(float("nan")), "x"),
        (lambda: spectral_density(MATRIX).count_above(torch.zeros(2)), "x"),
        (lambda: spectral_density(MATRIX).apply(3), "f"),
        (lambda: spectral_density(MATRIX).apply(torch.sum), "f"),
        (lambda: spectral_density(MATRIX).mass_above(float("inf")), "x"),
        (lambda: spectral_density(MATRIX).mass_above(torch.zeros(2)), "x"),
        (lambda: spectral_density(MATRIX).effective_dimension(torch.zeros(1)), "scale"),
        (lambda: spectral_density(MATRIX).log_det(torch.full((1,), torch.inf)), "shift"),
        (lambda: spectral_density(MATRIX).effective_dimension(0.0), "scale"),
        (lambda: spectral_density(MATRIX).smooth_count(-1.0), "threshold"),
        (lambda: spectral_density(MATRIX).smooth_count(1.0, 0), "order"),
        (lambda: spectral_density(MATRIX).log_det(3.0), "shift"),
        (lambda: spectral_density(MATRIX).curve(width=0.0), "width"),
        (lambda: spectral_density(MATRIX).curve(grid=[1.0]), "grid"),
        (lambda: spectral_density(MATRIX).curve(grid=torch.zeros(2, 3)), "grid"),
        (lambda: lhsd(spectral_density(MATRIX), 0.0), "sigma"),
        (lambda: lhsd(spectral_density(MATRIX), 1.0, cutoff=0.0), "cutoff"),
    ],
)
def test_bad_input(call, said):
    with pytest.raises(InvalidInput, match=said):
        call()


def test_networks_that_are_not_symmetric():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    linearization = linearize(lambda x: torch.tanh(x @ weights.T), torch.zeros(3, 12).double())
    with pytest.raises(InvalidInput, match="ScoreJacobian is not"):
        spectral_density(ScoreJacobian(linearization))
    density = spectral_density(Hessian(linearization))
    assert_within(density.apply(lambda v: v), weights.trace(), 2)


def test_values_that_are_not_finite():
    density = spectral_density(MATRIX - 7 * torch.eye(6, dtype=torch.float64))
    with pytest.raises(NonFiniteError, match="node"):
        density.apply(torch.log)

    def broken(block: torch.Tensor) -> torch.Tensor:
        return block * float("inf")

    operator = BatchedOperator(broken, broken, samples=1, dimension=8, dtype=torch.float64, name="broken")
    with pytest.raises(NonFiniteError, match="broken"):
        spectral_density(operator)
    assert RUNS == 200
