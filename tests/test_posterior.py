"""The posterior of clean data: its covariance and modes against closed form, and as images of a pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sharpcore import Hessian, PosteriorCovariance, ScoreFunction, curvature_at, linearize, posterior_modes
from sharpcore.errors import InvalidInput
from sharpcore.krylov.solution import Result
from sharpcore.posterior import decode
from sharpcore.report.spectra import plot_modes
from sharpcore.score import PREDICTION_TYPES
from sharpcore.testing import GaussianMixtureScoreNetwork

D = 12
# alpha and sigma of three samples, one of them nearly clean; those of flow matching add up to one.
ALPHA = torch.tensor([0.3, 0.8, 0.99], dtype=torch.float64)


def mixture(prediction_type="epsilon"):
    generator = torch.Generator().manual_seed(0)
    means = 2 * torch.randn((3, D), generator=generator, dtype=torch.float64)
    factors = torch.randn((3, D, D), generator=generator, dtype=torch.float64) / D**0.5
    covariances = factors @ factors.mT
    covariances[2] = 0  # a memorized point
    sigma = 1 - ALPHA if prediction_type == "flow" else (1 - ALPHA**2).sqrt()
    network = GaussianMixtureScoreNetwork(
        torch.tensor([0.5, 0.3, 0.2]),
        means,
        covariances,
        alpha=ALPHA,
        sigma=sigma,
        prediction_type=prediction_type,
    )
    clean = torch.randn((3, 3, 4), generator=generator, dtype=torch.float64)
    noise = torch.randn((3, 3, 4), generator=generator, dtype=torch.float64)
    return network, ALPHA[:, None, None] * clean + sigma[:, None, None] * noise, sigma


def covariance_of(network, x, sigma):
    score = ScoreFunction(
        network, prediction_type=network.prediction_type, alpha=ALPHA, sigma=sigma, timestep=0
    )
    lin = linearize(score, x)
    mean = (x + sigma[:, None, None] ** 2 * lin.value) / ALPHA[:, None, None]
    return PosteriorCovariance(Hessian(lin), ALPHA, sigma), mean


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_covariance_is_that_of_the_mixture(prediction_type):
    network, x, sigma = mixture(prediction_type)
    covariance, mean = covariance_of(network, x, sigma)
    expected = network.posterior_covariance(x)
    blocks = torch.eye(D, dtype=torch.float64)[:, None, :].expand(D, 3, D).reshape(D, 3, 3, 4)
    found = (covariance @ blocks).reshape(D, 3, D).permute(1, 2, 0)
    # Measured 2e-13 (nearly clean: s^2 / a^2 is small, but the score is large).
    assert float((found - expected).abs().max()) < 1e-11
    assert torch.allclose(mean, network.posterior_mean(x), atol=1e-11)
    assert torch.equal(covariance.T @ x, covariance @ x)
    assert covariance.asymmetry().value < 1e-12


def test_modes_are_the_main_axes():
    network, x, sigma = mixture()
    covariance, mean = covariance_of(network, x, sigma)
    modes = posterior_modes(covariance, 3, mean=mean)
    values, vectors = torch.linalg.eigh(network.posterior_covariance(x))
    assert modes.result is Result.converged
    assert torch.allclose(modes.variances, values.flip(1)[:, :3], atol=1e-10)
    assert torch.allclose(modes.standard_deviations, modes.variances.sqrt())
    assert float(modes.residuals.max()) < 1e-9
    along = torch.einsum("bki,bik->bk", modes.modes.flatten(2), vectors.flip(2)[:, :, :3])
    assert float((along.abs() - 1).abs().max()) < 1e-8
    latents = modes.latents([-1, 0, 2.5])
    assert latents.shape == (3, 3, 3, 3, 4)
    assert torch.allclose(latents[:, :, 1], mean[:, None].expand(3, 3, 3, 4))
    moved = (latents[:, :, 2] - latents[:, :, 1]).flatten(2).norm(dim=2)
    assert torch.allclose(moved, 2.5 * modes.standard_deviations)


def test_modes_of_a_pipeline_as_images(tiny_pipe, tmp_path):
    prompts = ["a bold slanted handwritten one by clearnick", "a thin upright handwritten eight by burnston"]
    c = curvature_at(tiny_pipe, prompts, step=40)
    scheduler = type(tiny_pipe.scheduler).from_config(tiny_pipe.scheduler.config)
    scheduler.set_timesteps(50)
    noise = -c.sigma * c.score
    clean = scheduler.step(noise, scheduler.timesteps[40], c.x).pred_original_sample
    assert torch.allclose(c.posterior_mean, clean, atol=1e-4)
    modes = posterior_modes(c, 2, tolerance=1e-3)
    assert modes.result is Result.converged
    assert modes.modes.shape == (2, 2, 4, 16, 16)
    # C v = variance v by the operator itself.
    product = (c.posterior_covariance @ modes.modes.transpose(0, 1).float()).double().transpose(0, 1)
    expected = modes.modes * modes.variances[:, :, None, None, None]
    assert float((product - expected).flatten(2).norm(dim=2).max()) < 2e-3 * float(modes.variances.max())
    images = modes.images(tiny_pipe, [-2, 0, 2])
    assert [[len(line) for line in sample] for sample in images] == [[3, 3]] * 2
    assert images[0][0][0].size == (32, 32)
    tensor = modes.images(tiny_pipe, [-2, 0, 2], output_type="pt")
    assert tensor.shape == (2, 2, 3, 3, 32, 32)
    assert 0 <= float(tensor.min()) <= float(tensor.max()) <= 1
    pixels = torch.from_numpy(np.array(images[1][1][2])).permute(2, 0, 1) / 255
    assert float((pixels - tensor[1, 1, 2]).abs().max()) < 0.51 / 255
    decoded = tiny_pipe.vae.decode(clean / tiny_pipe.vae.config.scaling_factor, return_dict=False)[0]
    assert torch.allclose(tensor[:, 0, 1], (decoded.detach() / 2 + 0.5).clamp(0, 1), atol=1e-4)
    figure = plot_modes(modes, tiny_pipe, sample=1, scales=[-2, 0, 2], path=tmp_path / "modes.png")
    assert len(figure.axes) == 6
    assert (tmp_path / "modes.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InvalidInput, match="sample: expected 0 to 1; got 2"):
        plot_modes(modes, tiny_pipe, sample=2)
    with pytest.raises(InvalidInput, match="output_type: expected 'pil' or 'pt'"):
        modes.images(tiny_pipe, output_type="np")


def test_negative_variances_of_a_learned_score_have_no_deviation():
    matrix = torch.diag(torch.tensor([-3.0, -0.5], dtype=torch.float64))
    lin = linearize(lambda x: x @ matrix, torch.ones((1, 2), dtype=torch.float64))
    modes = posterior_modes(PosteriorCovariance(Hessian(lin), 0.5, 1.0), 2)
    assert torch.allclose(modes.variances, torch.tensor([[2.0, -8.0]], dtype=torch.float64))
    assert torch.allclose(modes.standard_deviations, torch.tensor([[2.0**0.5, 0.0]], dtype=torch.float64))
    with pytest.raises(InvalidInput, match="mean: expected the posterior mean"):
        modes.latents()


def test_bad_arguments(small_xl_pipe):
    network, x, sigma = mixture()
    covariance, mean = covariance_of(network, x, sigma)
    for levels, message in (
        ((0.0, 1.0), "alpha: expected positive finite numbers"),
        ((1.0, float("nan")), "sigma: expected positive finite numbers"),
        ((ALPHA[:2], 1.0), "alpha: expected a number, or one for each of the 3 samples"),
    ):
        with pytest.raises(InvalidInput, match=message):
            PosteriorCovariance(covariance.hessian, *levels)
    with pytest.raises(InvalidInput, match="hessian: expected a curvature operator; got Tensor"):
        PosteriorCovariance(torch.eye(3), 1.0, 1.0)
    with pytest.raises(InvalidInput, match="source: expected a Curvature or a PosteriorCovariance"):
        posterior_modes(covariance.hessian)
    with pytest.raises(InvalidInput, match=r"mean: expected shape \[3, 3, 4\]"):
        posterior_modes(covariance, mean=mean[:1])
    with pytest.raises(InvalidInput, match="k: expected an integer from 1 to 12"):
        posterior_modes(covariance, 13)
    with pytest.raises(InvalidInput, match="scales: expected finite numbers"):
        posterior_modes(covariance, 1, mean=mean).latents([float("inf")])
    with pytest.raises(InvalidInput, match="pipe: expected a pipeline with a VAE"):
        decode(small_xl_pipe, torch.zeros(1, 4, 8, 8))
