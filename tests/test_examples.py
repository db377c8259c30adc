"""The toy experiments: small runs through their public functions, and what must hold in them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import experiments  # noqa: E402
import gaussian_mixture.run as mixture  # noqa: E402
import mnist.run as mnist  # noqa: E402

SMALL_MNIST = mnist.Settings(
    size=14,
    channels=(8, 16),
    training_steps=2,
    batch=4,
    sampling_steps=3,
    samples=2,
    identity_samples=2,
    identity_steps=2,
)


@pytest.fixture(scope="module")
def exact_mixture(tmp_path_factory: pytest.TempPathFactory) -> mixture.Results:
    """The experiment on the mixture with the network that is exact, in float64."""
    scheduler = experiments.new_scheduler(50)
    settings = mixture.Settings(samples=512, identity_samples=4096, identity_steps=3)
    out = tmp_path_factory.mktemp("mixture")
    results = mixture.analyse(mixture.exact_network(scheduler), scheduler, settings, out, torch.float64)
    for name in ("spectra.png", "spectra.csv", "identities.png", "identities.csv"):
        assert (out / name).stat().st_size > 0
    return results


def test_eigenvalues_of_the_exact_mixture(exact_mixture: mixture.Results) -> None:
    for key, found in exact_mixture.curvatures.items():
        expected = torch.linalg.eigvalsh(exact_mixture.exact[key])
        # Measured: 5e-13 where eigenvalues are near -554.
        torch.testing.assert_close(found.eigenvalues, expected, rtol=1e-11, atol=1e-11)


def test_signs_and_sizes_on_the_mixture(exact_mixture: mixture.Results) -> None:
    rows = {(row.group, row.step): row for row in exact_mixture.spectra}
    first, middle, last = (rows["memorized", step] for step in (0, 25, 49))
    assert first.all_negative == last.all_negative == 1
    assert middle.negative > 0.9
    assert middle.median == pytest.approx(middle.bound, rel=0.02)
    # -1 / (0.9983 * 1e-4 + 0.0017): the noise of the last step and the point's own variance.
    assert last.largest == pytest.approx(-554, abs=1)
    other = rows["other", 49]
    assert -2.1 < other.smallest <= other.largest < 0
    for row in rows.values():
        assert row.smallest >= row.bound


def test_identities_on_the_mixture(exact_mixture: mixture.Results) -> None:
    for row in exact_mixture.identities:
        error = row.squared_score_se + row.minus_trace_se
        assert row.squared_score == pytest.approx(row.minus_trace, abs=4 * error)
    for found, exact in zip(exact_mixture.identities, exact_mixture.exact_identities, strict=True):
        assert found.minus_cubic_trace == pytest.approx(exact.minus_cubic_trace, rel=1e-9)


@pytest.mark.parametrize("timestep", [981, 1])
@pytest.mark.parametrize("mode", [mixture.MEMORIZED, mixture.OTHER])
def test_second_identity_holds_for_one_gaussian(mode: int, timestep: int) -> None:
    scheduler = experiments.new_scheduler(50)
    network = mixture.exact_network(scheduler)
    generator = torch.Generator().manual_seed(0)
    modes = torch.full((4096,), mode)
    noise = torch.randn(4096, 2, generator=generator, dtype=torch.float64)
    clean = mixture.draw_modes(modes, generator)
    x = experiments.add_noise(clean, torch.tensor(timestep), scheduler, noise)
    sides = experiments.dense_sides(network.score(x, timestep, modes), network.hessian(x, timestep, modes))
    row = experiments.identity_row("one mode", timestep, sides)
    assert row.squared_score == pytest.approx(row.minus_trace, abs=4 * row.squared_score_se)
    assert row.squared_product == pytest.approx(row.minus_cubic_trace, abs=4 * row.squared_product_se)


def test_estimated_sides_equal_dense_sides_where_signs_are_exact() -> None:
    """The point's Hessian is a multiple of the identity, whose trace every sign vector gives."""
    scheduler = experiments.new_scheduler(50)
    network = mixture.exact_network(scheduler)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    condition = torch.full((5,), mixture.MEMORIZED)
    estimated = experiments.sides(network, scheduler, x, 481, {"condition": condition})
    dense = experiments.dense_sides(network.score(x, 481, condition), network.hessian(x, 481, condition))
    for found, expected in zip(estimated, dense, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_training_repeats_learns_and_is_cached(tmp_path: Path) -> None:
    scheduler = experiments.new_scheduler(50)

    def train(name: str, settings: str, steps: int = 60) -> tuple[torch.nn.Module, list[float]]:
        with experiments.initialised_from(3):
            network = mixture.Denoiser(16, scheduler)
        losses = experiments.train(
            network,
            mixture.draw,
            scheduler,
            steps=steps,
            batch=64,
            rate=5e-3,
            seed=3,
            cache=tmp_path / name,
            settings=settings,
        )
        return network, losses

    before = torch.get_rng_state()
    first, losses = train("a", "x")
    second, again = train("b", "x")
    assert torch.equal(torch.get_rng_state(), before)
    assert losses == again
    # Measured: from 1.03 to 0.45.
    assert sum(losses[-10:]) / 10 < 0.75 * losses[0]
    loaded, kept = train("a", "x", steps=10**9)
    assert kept == losses
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, first.state_dict()[name])
        assert torch.equal(value, second.state_dict()[name])
    assert len(train("a", "other", steps=2)[1]) == 2


def test_a_mixture_that_is_not_learned_is_refused(tmp_path: Path) -> None:
    settings = mixture.Settings(width=8, training_steps=1, batch=4, samples=16)
    with pytest.raises(SystemExit, match="of 16 samples end in the memorized mode"):
        mixture.run(tmp_path, settings)


def test_mnist_in_small(tmp_path: Path) -> None:
    results = mnist.run(tmp_path, SMALL_MNIST)
    for name in ("network.pt", "spectra.png", "spectra.csv", "identities.png", "identities.csv"):
        assert (tmp_path / name).stat().st_size > 0
    assert [(row.group, row.step) for row in results.spectra] == list(results.curvatures)
    assert len(results.spectra) == 6
    assert len(results.identities) == 4
    for row in results.spectra:
        found = results.curvatures[row.group, row.step]
        assert found.hessian.shape == (2, 196, 196)
        torch.testing.assert_close(found.hessian, found.hessian.mT)
        trace = found.hessian.diagonal(dim1=1, dim2=2).sum(1)
        torch.testing.assert_close(found.eigenvalues.sum(1), trace)
        assert 0 < row.negative <= 1
    again = mnist.run(tmp_path, SMALL_MNIST)
    assert again.spectra == results.spectra
    assert again.identities == results.identities


def test_hessians_are_those_of_autograd() -> None:
    scheduler = experiments.new_scheduler(3)
    network = mnist.new_network(SMALL_MNIST).eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 14, 14, generator=generator)
    condition = {"class_labels": torch.tensor([mnist.NINE, mnist.THREE])}
    timestep = int(scheduler.timesteps[-1])
    found = experiments.curvature(network, scheduler, x, timestep, condition, at_once=1).hessian
    sigma = (1 - float(scheduler.alphas_cumprod[timestep])) ** 0.5
    for _ in range(4):
        v = torch.randn(x.shape, generator=generator)
        x.requires_grad_(True)
        score = -network(x, timestep, **condition).sample / sigma
        (pulled,) = torch.autograd.grad(score, x, v)
        # Quadratic forms v.J^T v see the symmetric part alone.
        expected = (pulled * v).flatten(1).sum(1).double()
        flat = v.double().flatten(1)
        # Measured: a relative error of 5e-7.
        torch.testing.assert_close(
            torch.einsum("bi,bij,bj->b", flat, found, flat), expected, rtol=1e-5, atol=1e-5
        )


def test_mnist_draws_both_digits_and_hides_labels() -> None:
    images = mnist.load_images(28)
    assert images[mnist.THREE].shape == (500, 1, 28, 28)
    assert images[mnist.NINE].shape == (1, 1, 28, 28)
    draw = mnist.Sampler(images)
    clean, conditioning = draw(2000, torch.Generator().manual_seed(0))
    labels = conditioning["class_labels"]
    nines = (clean == images[mnist.NINE]).flatten(1).all(1)
    # Half and a tenth, within four standard deviations.
    assert 0.455 < nines.float().mean() < 0.545
    assert 0.073 < (labels == mnist.NO_CLASS).float().mean() < 0.127
    assert bool(nines[labels == mnist.NINE].all())
    assert not bool(nines[labels == mnist.THREE].any())


def test_copy_distances() -> None:
    training = torch.zeros(1, 1, 28, 28)
    samples = torch.stack([torch.full((1, 28, 28), value) for value in (0.5, -0.5)])
    row = mnist.copy_row("nine", samples, training)
    assert row.to_nearest_training_image == pytest.approx(0.5)
    assert row.to_each_other == pytest.approx(1.0)


@pytest.mark.parametrize("example", ["gaussian_mixture", "mnist"])
def test_examples_start(example: str) -> None:
    command = [sys.executable, str(EXAMPLES / example / "run.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--out" in result.stdout
