"""Curvature operators of a pipeline: the trajectory, the affine terms, batches, given states, bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpcore import curvature_along, curvature_at
from sharpcore.conditioning import encode_prompts, encode_unconditional
from sharpcore.errors import InvalidInput, NonFiniteError, UnsupportedModel
from sharpcore.krylov.operator import as_batched

SPECTRA = np.load(Path(__file__).parent / "data" / "tiny-sd-eps" / "spectra.npz")
PROMPTS = ["a bold one", "a thin two"]


def recorded(key: str, name: str) -> torch.Tensor:
    return torch.from_numpy(SPECTRA[f"{key}_{name}"])


@pytest.fixture
def double_sd2(sd2_pipe):
    """The pipeline with v-prediction in float64, undone afterwards."""
    sd2_pipe.unet.double()
    yield sd2_pipe
    sd2_pipe.unet.float()


def test_recorded_states_and_scores_along_the_trajectory(fresh_pipe):
    fresh_pipe.unet.double()
    keys = ("mem10", "non88")
    prompts = [str(SPECTRA[f"{key}_step0_prompt"]) for key in keys]
    found = list(curvature_along(fresh_pipe, prompts, steps=(49, 0, 25)))
    assert [c.step for c in found] == [0, 25, 49]
    for c in found:
        assert c.prompts == tuple(prompts)
        assert c.seeds == (42, 42)
        for i, key in enumerate(keys):
            assert c.timestep == int(SPECTRA[f"{key}_step{c.step}_t"])
            # Measured 2.2e-7 and 8.4e-6: the float32 text embeddings were made on another machine.
            assert float((c.x[i] - recorded(f"{key}_step{c.step}", "x")[0]).abs().max()) < 2e-6
            assert float((c.score[i] - recorded(f"{key}_step{c.step}", "score")[0]).abs().max()) < 1e-4
        # An object stays what it was when the walk has gone on: its scores are those at its own states.
        assert torch.equal(c.jacobian.linearization.x, c.x)


@pytest.mark.parametrize("name", ["sd2_pipe", "small_xl_pipe"])
def test_states_are_those_of_the_pipeline_itself(request, name):
    """The latent that enters step 3 of diffusers' own sampling loop, as the network sees it."""
    pipe = request.getfixturevalue(name)
    seen = {}

    def keep(pipe, step, timestep, tensors):
        seen[step + 1] = tensors["latents"]
        return tensors

    noise = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    size = 8 * pipe.vae_scale_factor
    pipe(PROMPTS, latents=noise.clone(), num_inference_steps=5, height=size, width=size, output_type="latent",
         guidance_scale=7.5, callback_on_step_end=keep)  # fmt: skip
    found = curvature_at(pipe, PROMPTS, step=3, latents=noise, num_inference_steps=5)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(5)
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index = 3
    expected = scheduler.scale_model_input(seen[3], scheduler.timesteps[3])
    assert found.seeds is None
    # Measured 0 and 7.5e-7 (float32).
    assert float((found.x - expected).norm() / expected.norm()) < 1e-5
    assert found.alpha**2 + found.sigma**2 == pytest.approx(1)


def test_operators_are_those_of_the_score_with_its_affine_term(double_sd2):
    """v-prediction: the identity belongs to each Hessian. The oracle is torch.func.jvp."""
    pipe = double_sd2
    c = curvature_at(pipe, PROMPTS, step=3, seeds=[5], num_inference_steps=5)
    abar = float(pipe.scheduler.alphas_cumprod[int(c.timestep)])
    alpha, sigma = abar**0.5, (1 - abar) ** 0.5
    assert (c.alpha, c.sigma) == (pytest.approx(alpha, rel=1e-7), pytest.approx(sigma, rel=1e-7))
    with_prompt = encode_prompts(pipe, PROMPTS)
    without = {name: tensor.repeat(2, 1, 1) for name, tensor in encode_unconditional(pipe).items()}

    def score(x, condition):
        return -(alpha * pipe.unet(x, c.timestep, **condition).sample + sigma * x) / sigma

    vectors = torch.randn((3, *c.x.shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        products = [
            [torch.func.jvp(lambda x, k=kind: score(x, k), (c.x,), (v,))[1] for v in vectors]
            for kind in (with_prompt, without)
        ]
        jacobian, unconditional = (torch.stack(pair) for pair in products)
        # Measured 2e-15, of products too.
        assert float((c.score - score(c.x, with_prompt)).abs().max()) < 1e-12
    assert float((c.jacobian @ vectors - jacobian).abs().max()) < 1e-12
    plain = c.hessian_difference.jacobian
    assert float((plain @ vectors - (jacobian - unconditional)).abs().max()) < 1e-12
    for name, operator in (("prompt", c.hessian), ("none", c.unconditional_hessian)):
        j = c.jacobian if name == "prompt" else c.unconditional_hessian.jacobian
        assert torch.allclose(operator @ vectors, (j @ vectors + j.T @ vectors) / 2, atol=1e-12)
        assert torch.equal(c.operator(name) @ vectors, operator @ vectors)
    assert torch.allclose(
        c.operator("difference") @ vectors,
        c.hessian @ vectors - c.unconditional_hessian @ vectors,
        atol=1e-12,
    )


def test_eps_units(double_sd2):
    score, eps = (
        curvature_at(double_sd2, PROMPTS[0], step=2, units=units, num_inference_steps=5)
        for units in ("score", "eps")
    )
    assert torch.allclose(eps.score, -score.sigma * score.score, rtol=1e-12)
    assert score.noise_curvature == pytest.approx(-1 / score.sigma**2)
    assert eps.noise_curvature == pytest.approx(-score.sigma * score.noise_curvature)
    v = torch.ones_like(score.x)
    assert torch.allclose(eps.hessian @ v, -score.sigma * (score.hessian @ v), atol=1e-12)
    with pytest.raises(InvalidInput, match='posterior_mean: expected units="score"'):
        _ = eps.posterior_mean


def test_a_sample_does_not_depend_on_its_batch(double_sd2):
    many = curvature_at(double_sd2, PROMPTS, step=2, seeds=(7, 8), num_inference_steps=5)
    assert many.prompts == (PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1])
    assert many.seeds == (7, 8, 7, 8)
    one = curvature_at(double_sd2, PROMPTS[1], step=2, seeds=[8], num_inference_steps=5)
    # Measured 6e-15.
    assert torch.allclose(many.x[3:], one.x, atol=1e-12)
    block = torch.randn(
        (2, 4, one.x.numel()), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    several = as_batched(many.hessian).multiply(block)[:, 3:]
    assert torch.allclose(several, as_batched(one.hessian).multiply(block[:, 3:]), atol=1e-12)


def test_given_states_and_latents(sd2_pipe):
    seeded = curvature_at(sd2_pipe, PROMPTS, step=2, seeds=1, num_inference_steps=5)
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(42))
    from_noise = curvature_at(
        sd2_pipe, PROMPTS, step=2, latents=noise.repeat(2, 1, 1, 1), num_inference_steps=5
    )
    assert torch.equal(from_noise.x, seeded.x)
    given = curvature_at(sd2_pipe, PROMPTS, step=2, x=seeded.x, num_inference_steps=5)
    assert torch.equal(given.score, seeded.score)
    assert given.step == 2
    by_timestep = curvature_at(sd2_pipe, PROMPTS[0], x=seeded.x, timestep=given.timestep)
    assert (by_timestep.step, by_timestep.prompts) == (None, (PROMPTS[0],) * 2)
    assert torch.equal(by_timestep.score[0], seeded.score[0])


def test_nothing_is_linearized_before_it_is_asked_for(sd2_pipe, work):
    for c in curvature_along(sd2_pipe, PROMPTS, steps=(1, 4), num_inference_steps=5):
        last = c
    # Four steps of two prompts with both branches, none after the last state.
    assert work.forwards == 4 * 4
    _ = last.hessian_difference
    assert work.forwards == 4 * 4 + 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 5}, "steps: expected different indices from 0 to 4"),
        ({"step": True}, "steps: expected different indices"),
        ({"timestep": 3}, "timestep: expected the states x with it"),
        ({"x": torch.zeros(2, 3, 8, 8)}, r"x: expected shape \[B, 4, height, width\]; got \[2, 3, 8, 8\]"),
        ({"x": torch.zeros(3, 4, 8, 8)}, "x: expected 2 samples, one for each prompt; got 3"),
        ({"x": torch.zeros(2, 4, 8, 8, dtype=torch.long)}, "x: expected a tensor of a floating dtype"),
        ({"x": torch.zeros(2, 4, 8, 8), "latents": torch.zeros(2, 4, 8, 8)}, "either x .* or latents"),
        ({"latents": [1.0]}, "latents: expected a tensor of a floating dtype; got list"),
        ({"latents": torch.zeros(2, 4, 8, 8), "latent_size": (8, 8)}, "latent_size: expected none"),
        ({"seeds": 0}, "seeds: expected a number from 1"),
        ({"units": "sigma"}, "units: expected one of score, eps"),
        ({"guidance_scale": float("nan")}, "guidance_scale: expected a number of at least 0"),
        ({"latent_size": (8,)}, "latent_size: expected"),
        ({"memory_budget": -1}, "memory_budget: expected a positive number"),
        ({"precision": "float8"}, "precision: expected"),
        ({"x": torch.zeros(2, 4, 8, 8), "timestep": 1001}, "timestep: expected 0 to 999"),
    ],
)
def test_bad_arguments(sd2_pipe, options, message):
    with pytest.raises(InvalidInput, match=message):
        curvature_at(sd2_pipe, PROMPTS, num_inference_steps=5, **options)


def test_bad_prompts_and_states(sd2_pipe):
    with pytest.raises(InvalidInput, match=r"prompts\[1\]: expected words"):
        curvature_along(sd2_pipe, ["a", " "])
    with pytest.raises(NonFiniteError, match="x: expected finite numbers"):
        curvature_at(sd2_pipe, "a", x=torch.full((1, 4, 8, 8), float("nan")))
    with pytest.raises(InvalidInput, match="condition: expected one of prompt, none, difference"):
        curvature_at(sd2_pipe, "a", x=torch.zeros(1, 4, 8, 8)).operator("both")
    with pytest.raises(UnsupportedModel, match="it has no UNet"):
        curvature_at(object(), "a")
