"""Scores on other schedulers and pipelines: the pipeline's own trajectory, independent formulas."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
from pipelines import METRICS, latent, oracle_scores

from sharpcore import SharpnessCallback, SharpnessScorer

PROMPT = "a bold slanted handwritten three by nobody"


def with_scheduler(pipe, name, **options):
    """The same pipeline, networks shared, with another scheduler."""
    other = copy.copy(pipe)
    other.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    return other


def generate(pipe, seed, steps, num_inference_steps, shape=(4, 16, 16), prompt=PROMPT, **options):
    """One generation with a callback; one generator draws the initial latent and all later noise."""
    generator = torch.Generator("cpu").manual_seed(seed)
    start = torch.randn((1, *shape), generator=generator)
    callback = SharpnessCallback(pipe, steps=steps, latents=start, **options)
    pipe(
        prompt,
        num_inference_steps=num_inference_steps,
        latents=start,
        height=shape[1] * pipe.vae_scale_factor,
        width=shape[2] * pipe.vae_scale_factor,
        generator=generator,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=callback.tensor_inputs,
        output_type="latent",
    )
    return callback


def assert_same(rows, others, score, hessian):
    for row, other in zip(rows, others, strict=True):
        assert (row["step"], row["timestep"]) == (other["step"], other["timestep"])
        for metric, tolerance in zip(METRICS, (score, hessian), strict=True):
            assert row[metric] == pytest.approx(other[metric], rel=tolerance), (metric, row["step"])


# DDIM, PNDM and DPM-Solver++ (deterministic, with a history), Euler (scaled latents, fractional timesteps),
# DDPM and ancestral Euler (drawn noise), Heun (two network calls a step), TCD (its own eta would draw noise
# where a pipeline draws none).
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", {}),
        ("PNDMScheduler", {}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
        ("DDPMScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("TCDScheduler", {}),
    ],
)
def test_the_trajectory_is_the_pipelines_own(tiny_pipe, name, options):
    pipe = with_scheduler(tiny_pipe, name, **options)
    scored = SharpnessScorer(pipe, num_inference_steps=6)([PROMPT], steps=(0, 3), seeds=[11]).rows
    seen = generate(pipe, 11, (0, 3), 6)
    # Measured up to 1.2e-5, at step 3 of the squared product (float32; the batch sizes differ).
    assert_same(seen.rows, scored, 1e-5, 1e-4)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_float64_on_scaled_latents(fresh_pipe, name):
    """The unconditional branch and the conditional one stand at the same x, to the last bits of float64.

    The initial latent is scaled up by sqrt(sigma^2 + 1) and down again for the network: together by one.
    """
    fresh_pipe.scheduler = getattr(diffusers, name).from_config(fresh_pipe.scheduler.config)
    fresh_pipe.unet.double()
    row = SharpnessScorer(fresh_pipe, num_inference_steps=6)([PROMPT], seeds=[3], squared=False).rows[0]
    scheduler = copy.deepcopy(fresh_pipe.scheduler)
    scheduler.set_timesteps(6)
    x = latent(3).double()
    conditions = [
        {"encoder_hidden_states": e.double()} for e in fresh_pipe.encode_prompt(PROMPT, "cpu", 1, True)
    ]
    t = scheduler.timesteps[0]
    abar = float(scheduler.alphas_cumprod.double()[int(t)])
    difference, product = oracle_scores(fresh_pipe.unet, x, t, *conditions, abar=abar)
    # Measured 7e-16.
    assert row["score_difference"] == pytest.approx(float(difference), rel=1e-10)
    assert row["hessian_score_difference"] == pytest.approx(float(product), rel=1e-10)


def oracle_along_the_way(pipe, seed, steps, num_inference_steps, shape, conditions):
    """Rows of the formula at the latents that the pipeline itself goes through."""
    generator = torch.Generator("cpu").manual_seed(seed)
    latents = [torch.randn((1, *shape), generator=generator)]

    def keep(pipe, step, timestep, tensors):
        latents.append(tensors["latents"])
        return tensors

    pipe(
        PROMPT,
        num_inference_steps=num_inference_steps,
        latents=latents[0],
        height=shape[1] * pipe.vae_scale_factor,
        width=shape[2] * pipe.vae_scale_factor,
        generator=generator,
        callback_on_step_end=keep,
        output_type="latent",
    )
    rows = []
    for step in steps:
        t = pipe.scheduler.timesteps[step]
        x = latents[step]
        if isinstance(pipe.scheduler, diffusers.EulerDiscreteScheduler):
            sigma = float(pipe.scheduler.sigmas[step])
            start = float(pipe.scheduler.init_noise_sigma) if step == 0 else 1.0
            x, abar = x * start / (1 + sigma**2) ** 0.5, 1 / (1 + sigma**2)
        else:
            abar = float(pipe.scheduler.alphas_cumprod.double()[int(t)])
        kind = pipe.scheduler.config.prediction_type
        difference, product = oracle_scores(pipe.unet, x, t, *conditions, abar=abar, prediction_type=kind)
        rows.append(
            {
                "step": step,
                "timestep": float(t),
                "score_difference": float(difference),
                "hessian_score_difference": float(product) ** 2,
            }
        )
    return rows


def text_conditions(pipe):
    prompt, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    return {"encoder_hidden_states": prompt}, {"encoder_hidden_states": negative}


def xl_conditions(pipe, pixels):
    prompt, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPT, device="cpu")
    ids = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], dtype=torch.float32)
    return tuple(
        {"encoder_hidden_states": hidden, "added_cond_kwargs": {"text_embeds": vector, "time_ids": ids}}
        for hidden, vector in ((prompt, pooled), (negative, negative_pooled))
    )


def test_v_prediction_on_linear_projections(sd2_pipe):
    """As Stable Diffusion 2, by an independent formula at the pipeline's own latents."""
    expected = oracle_along_the_way(sd2_pipe, 5, (0, 2), 5, (4, 8, 8), text_conditions(sd2_pipe))
    scored = SharpnessScorer(sd2_pipe, num_inference_steps=5)([PROMPT], steps=(0, 2), seeds=[5]).rows
    # Measured up to 9e-7 (float32).
    assert_same(scored, expected, 1e-5, 1e-4)
    assert_same(generate(sd2_pipe, 5, (0, 2), 5, (4, 8, 8)).rows, expected, 1e-5, 1e-4)


def test_v_prediction_with_zero_terminal_signal(sd2_pipe):
    """In pure noise the score is -x whatever the prompt: the difference is exactly zero, but not later."""
    pipe = with_scheduler(sd2_pipe, "DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert float(pipe.scheduler.alphas_cumprod[-1]) == 0
    scored = SharpnessScorer(pipe, num_inference_steps=5)([PROMPT], steps=(0, 1), seeds=[5]).rows
    assert scored[0]["timestep"] == 999
    assert [scored[0][metric] for metric in METRICS] == [0, 0]
    expected = oracle_along_the_way(pipe, 5, (0, 1), 5, (4, 8, 8), text_conditions(pipe))
    # Measured up to 4e-7 (float32).
    assert_same(scored[1:], expected[1:], 1e-5, 1e-4)


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DDIMScheduler"])
def test_sd_xl(small_xl_pipe, scheduler, zeros):
    pipe = with_scheduler(small_xl_pipe, scheduler)
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    expected = oracle_along_the_way(pipe, 5, (0, 2), 5, (4, 8, 8), xl_conditions(pipe, 64))
    scored = SharpnessScorer(pipe, num_inference_steps=5, guidance_scale=5.0)(
        [PROMPT], steps=(0, 2), seeds=[5]
    ).rows
    # Measured up to 1.2e-5 for the squared product (float32).
    assert_same(scored, expected, 2e-5, 2e-4)
    assert_same(generate(pipe, 5, (0, 2), 5, (4, 8, 8)).rows, expected, 2e-5, 2e-4)


def test_sd_xl_image_size_is_a_condition(small_xl_pipe):
    scorer = SharpnessScorer(small_xl_pipe)
    row = scorer([PROMPT], seeds=[5], latent_size=(6, 6)).rows[0]
    small_xl_pipe.scheduler.set_timesteps(50)
    sigma = float(small_xl_pipe.scheduler.sigmas[0])
    x = latent(5, (4, 6, 6)) * float(small_xl_pipe.scheduler.init_noise_sigma) / (1 + sigma**2) ** 0.5
    t, abar = small_xl_pipe.scheduler.timesteps[0], 1 / (1 + sigma**2)
    found = {}
    for pixels in (48, 64):
        conditions = xl_conditions(small_xl_pipe, pixels)
        found[pixels] = float(oracle_scores(small_xl_pipe.unet, x, t, *conditions, abar=abar)[0])
    # Measured 6e-8 (float32).
    assert row["score_difference"] == pytest.approx(found[48], rel=1e-5)
    assert abs(found[64] / found[48] - 1) > 1e-3
