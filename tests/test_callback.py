"""SharpnessCallback: scores while a pipeline generates, leaves the images alone, stops above a threshold."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from pipelines import METRICS, latent, oracle_scores

from sharpcore import (
    InvalidInput,
    NonFiniteError,
    ScoreTable,
    SharpnessCallback,
    SharpnessScorer,
    UnsupportedModel,
)

PROMPT = "a bold slanted handwritten zero by hounard"
OTHER = "a thin upright handwritten four by nobody"


def generate(pipe, callback=None, prompt=PROMPT, **options):
    options = {"num_inference_steps": 4, "height": 32, "width": 32, "output_type": "latent", **options}
    if callback is not None:
        options["callback_on_step_end"] = callback
        options["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
    return pipe(prompt, **options).images


def seeded(seed=3):
    return torch.Generator("cpu").manual_seed(seed)


# --- what it records ----------------------------------------------------------------------------------------


def test_scores_are_those_of_the_scorer(tiny_pipe):
    callback = SharpnessCallback(tiny_pipe, steps=(0, 1, 3), latents=latent(3))
    generate(tiny_pipe, callback, generator=seeded())  # the pipeline draws the same latent from the generator
    scored = SharpnessScorer(tiny_pipe, num_inference_steps=4)([PROMPT], steps=(0, 1, 3), seeds=[3])
    assert [row["step"] for row in callback.rows] == [0, 1, 3]
    for row, other in zip(callback.rows, scored, strict=True):
        assert row["timestep"] == other["timestep"]
        # Measured 1e-7 and 1e-6 (float32; the pipeline's batches differ from the scorer's).
        assert row["score_difference"] == pytest.approx(other["score_difference"], rel=1e-5)
        assert row["hessian_score_difference"] == pytest.approx(other["hessian_score_difference"], rel=1e-4)


def test_table(tiny_pipe):
    callback = SharpnessCallback(tiny_pipe, steps=(1, 2), metrics=["score_difference"])
    assert callback.rows == []
    generate(tiny_pipe, callback, prompt=[PROMPT, OTHER])
    table = callback.table()
    assert isinstance(table, ScoreTable)
    assert list(table.columns) == ["sample", "step", "timestep", "score_difference"]
    assert [(row["sample"], row["step"]) for row in table] == [(0, 1), (1, 1), (0, 2), (1, 2)]
    frame = table.to_pandas()
    assert len(frame) == 4
    assert (frame["score_difference"] > 0).all()


def test_units_and_square(tiny_pipe):
    rows = {}
    for name, options in {
        "paper": {},
        "plain": {"squared": False},
        "eps": {"units": "eps", "squared": False},
    }.items():
        callback = SharpnessCallback(tiny_pipe, steps=1, **options)
        generate(tiny_pipe, callback, latents=latent(3))
        rows[name] = callback.rows[0]
    abar = float(tiny_pipe.scheduler.alphas_cumprod.double()[int(rows["paper"]["timestep"])])
    sigma = (1 - abar) ** 0.5
    # Measured 1e-7 (float32 factors).
    assert rows["plain"]["hessian_score_difference"] ** 2 == pytest.approx(
        rows["paper"]["hessian_score_difference"]
    )
    assert rows["plain"]["score_difference"] * sigma == pytest.approx(rows["eps"]["score_difference"])
    assert rows["plain"]["hessian_score_difference"] * sigma**2 == pytest.approx(
        rows["eps"]["hessian_score_difference"]
    )


def test_several_images_a_prompt(tiny_pipe):
    """Samples in the pipeline's order: all images of the first prompt, then those of the second."""
    start = torch.cat([latent(k) for k in (1, 2, 1, 2)])
    callback = SharpnessCallback(tiny_pipe, steps=(0, 2), latents=start)
    generate(tiny_pipe, callback, prompt=[PROMPT, OTHER], num_images_per_prompt=2, latents=start)
    scored = SharpnessScorer(tiny_pipe, num_inference_steps=4)([PROMPT, OTHER], steps=(0, 2), seeds=[1, 2])
    expected = {
        (2 * i + j, row["step"]): [row[f"{metric}_seeds"][j] for metric in METRICS]
        for i, prompt in enumerate((PROMPT, OTHER))
        for row in scored
        for j in range(2)
        if row["prompt"] == prompt
    }
    assert [(row["sample"], row["step"]) for row in callback.rows] == [
        (s, i) for i in (0, 2) for s in range(4)
    ]
    for row in callback.rows:
        score, hessian = expected[row["sample"], row["step"]]
        # Measured 1e-6 and 3e-6 (float32).
        assert row["score_difference"] == pytest.approx(score, rel=1e-5)
        assert row["hessian_score_difference"] == pytest.approx(hessian, rel=1e-4)


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_without_guidance(tiny_pipe, guidance):
    """The pipeline then runs the conditional branch only; the scores still compare both."""
    callback = SharpnessCallback(tiny_pipe, steps=(0, 2), latents=latent(3))
    generate(tiny_pipe, callback, latents=latent(3), guidance_scale=guidance)
    scored = SharpnessScorer(tiny_pipe, num_inference_steps=4, guidance_scale=1)(
        [PROMPT], steps=(0, 2), seeds=[3]
    )
    for row, other in zip(callback.rows, scored, strict=True):
        # Measured 1e-7 and 1e-6 (float32).
        assert row["score_difference"] == pytest.approx(other["score_difference"], rel=1e-5)
        assert row["hessian_score_difference"] == pytest.approx(other["hessian_score_difference"], rel=1e-4)


def test_a_negative_prompt_changes_the_trajectory_but_not_what_is_compared(tiny_pipe):
    latents = []

    class Keeping(SharpnessCallback):
        def __call__(self, pipe, step, timestep, tensors):
            latents.append(tensors["latents"])
            return super().__call__(pipe, step, timestep, tensors)

    callback = Keeping(tiny_pipe, steps=(1,))
    generate(tiny_pipe, callback, latents=latent(3), negative_prompt=OTHER)
    t = tiny_pipe.scheduler.timesteps[1]
    conditions = [{"encoder_hidden_states": e} for e in tiny_pipe.encode_prompt(PROMPT, "cpu", 1, True)]
    abar = float(tiny_pipe.scheduler.alphas_cumprod.double()[t])
    difference, product = oracle_scores(tiny_pipe.unet, latents[0], t, *conditions, abar=abar)
    # Measured 1e-7 and 3e-7 (float32).
    assert callback.rows[0]["score_difference"] == pytest.approx(float(difference), rel=1e-5)
    assert callback.rows[0]["hessian_score_difference"] == pytest.approx(float(product) ** 2, rel=1e-4)


def test_the_table_is_that_of_the_latest_generation(tiny_pipe):
    callback = SharpnessCallback(tiny_pipe, steps=(1,))
    generate(tiny_pipe, callback, latents=latent(3))
    first = callback.rows
    generate(tiny_pipe, callback, prompt=OTHER, latents=latent(3))
    assert len(callback.rows) == 1
    assert callback.rows != first
    generate(tiny_pipe, callback, latents=latent(3))
    assert callback.rows == first


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_network_that_changes_between_two_generations(fresh_pipe, part):
    def run(callback):
        generate(fresh_pipe, callback, latents=latent(3))
        return callback.rows

    callback = SharpnessCallback(fresh_pipe, steps=(1,))
    before = run(callback)
    list(getattr(fresh_pipe, part).parameters())[-2].data.mul_(1.3)
    after = run(callback)
    assert after != before
    assert after == run(SharpnessCallback(fresh_pipe, steps=(1,)))


# --- what it costs, and what it leaves alone ----------------------------------------------------------------


@pytest.mark.parametrize("metrics", [METRICS, METRICS[:1]])
def test_work(tiny_pipe, work, metrics):
    callback = SharpnessCallback(tiny_pipe, steps=(1, 3), metrics=metrics)
    generate(tiny_pipe, callback)
    products = len(metrics) == 2
    # The pipeline's own 4 steps of both branches, and both branches at the two scored steps.
    assert work.forwards == 4 * 2 + 2 * 2
    assert (work.products, work.traces) == ((2 * 2, 2) if products else (0, 0))


@pytest.mark.parametrize(
    ("scheduler", "output"),
    [
        ("DDIMScheduler", "np"),
        ("PNDMScheduler", "latent"),
        ("EulerAncestralDiscreteScheduler", "latent"),
        ("DPMSolverMultistepScheduler", "latent"),
    ],
)
def test_the_images_do_not_change_by_one_bit(fresh_pipe, scheduler, output):
    fresh_pipe.scheduler = getattr(diffusers, scheduler).from_config(fresh_pipe.scheduler.config)
    options = {"prompt": [PROMPT, OTHER], "output_type": output}
    plain = generate(fresh_pipe, generator=seeded(), **options)
    callback = SharpnessCallback(fresh_pipe, steps=(1, 2, 3))
    assert np.array_equal(generate(fresh_pipe, callback, generator=seeded(), **options), plain)
    assert len(callback.rows) == 6
    start = torch.cat([latent(1), latent(2)])
    callback = SharpnessCallback(fresh_pipe, steps=(0, 2), latents=start)
    with_callback = generate(fresh_pipe, callback, generator=seeded(), latents=start, **options)
    assert np.array_equal(with_callback, generate(fresh_pipe, generator=seeded(), latents=start, **options))


def test_the_global_generator_is_not_used(tiny_pipe):
    before = torch.get_rng_state()
    generate(tiny_pipe, SharpnessCallback(tiny_pipe, steps=(1, 2)), latents=latent(3))
    assert torch.equal(torch.get_rng_state(), before)


# --- stopping -----------------------------------------------------------------------------------------------


def test_generation_stops_above_the_threshold(tiny_pipe, work):
    free = SharpnessCallback(tiny_pipe, steps=(0, 1, 2), latents=latent(3))
    generate(tiny_pipe, free, latents=latent(3))
    assert free.stopped_at is None
    scores = [row["score_difference"] for row in free.rows]
    latents = []

    def stops_at(threshold, **options):
        callback = SharpnessCallback(
            tiny_pipe, steps=(0, 1, 2), latents=latent(3), threshold=threshold, **options
        )
        work.reset()
        latents.append(generate(tiny_pipe, callback, latents=latent(3)))
        return callback.stopped_at, len(callback.rows)

    assert scores[0] > scores[1], "otherwise the threshold below stops nothing"
    assert stops_at(max(scores) * 1.01) == (None, 3)
    assert stops_at(scores[0] * 0.99) == (0, 1)
    # Found at the end of the first step, of which 2 passes are the pipeline's and 2 the callback's.
    assert work.forwards == 2 + 2
    by_hessian = free.rows[0]["hessian_score_difference"]
    assert stops_at(by_hessian * 0.99, threshold_metric="hessian_score_difference")[0] == 0
    assert not torch.equal(latents[0], latents[1])
    generate(tiny_pipe, latents=latent(3))
    assert work.forwards > 4, "the next generation of the pipeline is not stopped"


def test_one_sample_above_the_threshold_stops_all(tiny_pipe):
    start = torch.cat([latent(3), latent(4)])
    options = {"prompt": [PROMPT, OTHER], "latents": start}
    callback = SharpnessCallback(tiny_pipe, steps=(1,))
    generate(tiny_pipe, callback, **options)
    low, high = sorted(row["score_difference"] for row in callback.rows)
    callback = SharpnessCallback(tiny_pipe, steps=(1,), threshold=(low + high) / 2)
    generate(tiny_pipe, callback, **options)
    assert callback.stopped_at == 1
    assert [row["step"] for row in callback.rows] == [1, 1]


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [
        *(({"steps": value}, "steps") for value in ([], [-1], [True], [0.5], None, 0.5, "1")),
        ({"steps": (0, 1)}, "steps"),
        ({"steps": 0}, "steps"),
        *(({"latents": value}, "latents") for value in ([1.0], torch.zeros(1, 4, 16, 16, dtype=torch.int64))),
        ({"metrics": ["sharpness"]}, "metrics"),
        ({"units": "noise"}, "units"),
        *(({"threshold": value}, "threshold") for value in ("high", float("nan"))),
        ({"threshold_metric": "sharpness"}, "threshold_metric"),
        (
            {"metrics": ["score_difference"], "threshold_metric": "hessian_score_difference"},
            "threshold_metric",
        ),
        ({"backend": "gpu"}, "backend"),
    ],
)
def test_bad_arguments(tiny_pipe, options, name):
    with pytest.raises(InvalidInput, match=f"^{name}: "):
        SharpnessCallback(tiny_pipe, **options)


def test_a_pipeline_without_scores(fresh_pipe):
    fresh_pipe.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(UnsupportedModel, match="time_cond_proj_dim"):
        SharpnessCallback(fresh_pipe)


def test_tensor_inputs_that_the_pipeline_does_not_hand_over(tiny_pipe):
    with pytest.raises(InvalidInput, match=r"callback_on_step_end_tensor_inputs: .* missing prompt_embeds"):
        tiny_pipe(
            PROMPT,
            num_inference_steps=2,
            height=32,
            width=32,
            callback_on_step_end=SharpnessCallback(tiny_pipe),
        )


def test_a_step_that_the_generation_does_not_have(tiny_pipe):
    with pytest.raises(InvalidInput, match=r"^steps: .* 0 to 3; got 4"):
        generate(tiny_pipe, SharpnessCallback(tiny_pipe, steps=(1, 4)))


def test_latents_of_another_generation(tiny_pipe):
    callback = SharpnessCallback(tiny_pipe, steps=(0,), latents=latent(3))
    with pytest.raises(InvalidInput, match=r"^latents: .*\(2, 4, 16, 16\); got \(1, 4, 16, 16\)"):
        generate(tiny_pipe, callback, prompt=[PROMPT, OTHER])


def test_another_pipeline(tiny_pipe, fresh_pipe):
    with pytest.raises(InvalidInput, match=r"^pipe: "):
        generate(fresh_pipe, SharpnessCallback(tiny_pipe))


def test_image_to_image(tiny_pipe):
    """Its steps begin in the middle of the schedule: wrong timesteps would give wrong scores."""
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**tiny_pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    callback = SharpnessCallback(pipe, steps=(1,))
    with pytest.raises(UnsupportedModel, match="image to image"):
        pipe(
            PROMPT,
            image=torch.zeros(1, 3, 32, 32),
            strength=0.5,
            num_inference_steps=8,
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=callback.tensor_inputs,
        )


@pytest.mark.parametrize("metrics", [METRICS, METRICS[:1]])
def test_latents_that_are_not_finite(tiny_pipe, metrics):
    start = latent(3)
    start[0, 1, 2, 3] = float("nan")
    callback = SharpnessCallback(tiny_pipe, steps=(1,), metrics=metrics)
    with pytest.raises(NonFiniteError):
        generate(tiny_pipe, callback, latents=start)


def test_half_precision(fresh_pipe):
    fresh_pipe.unet.to(torch.bfloat16)
    fresh_pipe.text_encoder.to(torch.bfloat16)
    callback = SharpnessCallback(fresh_pipe, steps=(0, 1), latents=latent(3))
    generate(fresh_pipe, callback, latents=latent(3).bfloat16())
    assert all(np.isfinite(row[metric]) for row in callback.rows for metric in METRICS)
