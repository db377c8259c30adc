"""Score functions: parameterizations, noise levels of schedulers, units, and what the border refuses."""

from __future__ import annotations

import copy
import inspect
import json
import math
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sharpcore
from sharpcore import InvalidInput, ScoreFunction, UnsupportedModel
from sharpcore.score import noise_level, prediction_type_of, schedule, score_from_prediction
from sharpcore.testing import relative_error

MODEL = Path(sharpcore.__file__).parent / "models" / "tiny-sd-eps"
REFERENCE = Path(__file__).parent / "data" / "tiny-sd-eps" / "reference_scores.json"

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- from prediction to score -------------------------------------------------------------------------------


@pytest.mark.parametrize("units", ["score", "eps"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow"])
def test_every_prediction_of_one_noise_gives_one_score(prediction_type, per_sample, units):
    """For x = alpha x0 + sigma e and a network that knows both, the noise is e, the score -e / sigma."""
    clean, noise = normal(3, 2, 5, seed=1), normal(3, 2, 5, seed=2)
    sigma = torch.tensor([0.9, 0.5, 0.01], dtype=torch.float64) if per_sample else 0.6
    alpha = 1 - sigma if prediction_type == "flow" else (1 - sigma**2) ** 0.5
    a, s = (value[:, None, None] if per_sample else value for value in (alpha, sigma))
    prediction = {
        "epsilon": noise,
        "v_prediction": a * noise - s * clean,
        "sample": clean,
        "flow": noise - clean,
    }[prediction_type]
    found = score_from_prediction(prediction, a * clean + s * noise, alpha, sigma, prediction_type, units)
    # Measured 2e-14, at sigma = 0.01 of "sample", where x - alpha x0 cancels.
    assert relative_error(found, noise if units == "eps" else -noise / s) <= 1e-13


def test_coefficients_are_rounded_last():
    """The coefficient is formed in float64 and rounded once to the float32 of x."""
    sigma = torch.tensor([0.9], dtype=torch.float64) / 7
    alpha = (1 - sigma**2).sqrt()
    x, prediction = normal(1, 8, seed=1).float(), normal(1, 8, seed=2).float()
    found = score_from_prediction(prediction, x, alpha, sigma, "epsilon")
    assert found.dtype == torch.float32
    assert torch.equal(found, prediction * (-1 / sigma).float())


@pytest.mark.parametrize("change", [{"prediction_type": "noise"}, {"units": "sigma"}])
def test_unknown_names_are_refused(change):
    arguments = {"alpha": 0.8, "sigma": 0.6, "prediction_type": "epsilon", "units": "score"}
    with pytest.raises(InvalidInput, match=f"{next(iter(change))}: expected one of"):
        score_from_prediction(torch.ones(1, 2), torch.ones(1, 2), **{**arguments, **change})


# --- schedulers ---------------------------------------------------------------------------------------------

FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
KARRAS = {"use_karras_sigmas": True}
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {"steps_offset": 1, "clip_sample": False}),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "lcm": (diffusers.LCMScheduler, {}),
    "dpm++": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpm-single": (diffusers.DPMSolverSinglestepScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "deis": (diffusers.DEISMultistepScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler-leading": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "leading"}),
    "euler-karras": (diffusers.EulerDiscreteScheduler, KARRAS),
    "euler-ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "lms": (diffusers.LMSDiscreteScheduler, {}),
    "lms-karras": (diffusers.LMSDiscreteScheduler, KARRAS),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "heun-karras": (diffusers.HeunDiscreteScheduler, KARRAS),
}


def make(name: str, **options):
    kind, own = SCHEDULERS[name]
    return schedule(kind(**BETAS, **own, **options), 20)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_levels_are_the_training_schedule(name):
    """alpha and sigma at the schedule's timesteps, integer or not, against the schedule's definition."""
    scheduler = make(name)
    timesteps = scheduler.timesteps.double()
    alpha, sigma = noise_level(scheduler, scheduler.timesteps)
    assert alpha.dtype == sigma.dtype == torch.float64
    assert alpha.shape == timesteps.shape
    assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=1e-14, atol=0)
    ratio = ((1 - ABAR) / ABAR) ** 0.5
    place = np.arange(1000)
    # Between rows of the table a sampler interpolates either sigma or its logarithm; the two differ by 3e-4.
    linear = torch.from_numpy(np.interp(timesteps, place, ratio))
    logarithmic = torch.from_numpy(np.interp(timesteps, place, np.log(ratio))).exp()
    found = sigma / alpha
    # The schedulers' tables are float32: abar is off by up to 2e-7, which counts most where 1 - abar is
    # small.
    tolerance = 4e-6 + 2e-7 / sigma**2
    near = [(found - expected).abs() <= tolerance * expected for expected in (linear, logarithmic)]
    assert bool((near[0] | near[1]).all())
    whole = timesteps == timesteps.floor()
    assert bool(near[0][whole].all())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_network_sees_that_level(name):
    """add_noise followed by scale_model_input is alpha x0 + sigma e, over the steps of the sampler."""
    scheduler = make(name)
    clean, noise = normal(1, 4), normal(1, 4, seed=1)
    for timestep in scheduler.timesteps.unique()[::3]:
        fresh = copy.deepcopy(scheduler)
        noisy = fresh.add_noise(clean, noise, timestep[None])
        seen = fresh.scale_model_input(noisy, timestep)
        alpha, sigma = noise_level(scheduler, timestep)
        assert relative_error(seen, alpha * clean + sigma * noise) <= 5e-7  # float32 tables; measured 7e-8


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler-karras", "lms", "heun"])
def test_denoised_sample_is_the_schedulers_own(name, prediction_type):
    """Tweedie's (x + sigma^2 s) / alpha is the scheduler's predicted x_0: same signs, same affine terms."""
    scheduler = make(name, prediction_type=prediction_type)
    assert prediction_type_of(scheduler) == prediction_type
    sample, prediction = normal(1, 2, 4, 4), normal(1, 2, 4, 4, seed=1)
    for timestep in scheduler.timesteps[[0, 7, 15]]:
        fresh = copy.deepcopy(scheduler)
        x = fresh.scale_model_input(sample, timestep)
        try:
            expected = fresh.step(prediction, timestep, sample).pred_original_sample
        except NotImplementedError:
            pytest.skip(f"{name} has no {prediction_type}")
        alpha, sigma = noise_level(scheduler, timestep)
        score = score_from_prediction(prediction, x, alpha, sigma, prediction_type_of(scheduler))
        assert (
            relative_error((x + sigma**2 * score) / alpha, expected) <= 4e-6
        )  # float32 tables; measured 7e-7


@pytest.mark.parametrize("kind", [diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler])
@pytest.mark.parametrize(
    "options", [{"prediction_type": "v_prediction"}, {"prediction_type": "sample"}, FLOW_SIGMAS]
)
def test_solvers_convert_to_the_same_denoised_sample(kind, options):
    scheduler = schedule(kind(**BETAS, **options), 20)
    x, prediction = normal(1, 2, 4, 4), normal(1, 2, 4, 4, seed=1)
    for step in (0, 9, 19):
        timestep = scheduler.timesteps[step]
        scheduler._init_step_index(timestep)
        expected = scheduler.convert_model_output(prediction, sample=x)
        alpha, sigma = noise_level(scheduler, timestep)
        score = score_from_prediction(prediction, x, alpha, sigma, prediction_type_of(scheduler))
        denoised = (x + sigma**2 * score) / alpha
        assert relative_error(denoised, expected) <= 1e-6  # float32 sigmas; measured 5e-8


@pytest.mark.parametrize(
    "kind", [diffusers.FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchHeunDiscreteScheduler]
)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching(kind, shift):
    scheduler = schedule(kind(shift=shift), 20)
    assert prediction_type_of(scheduler) == "flow"
    linear = np.linspace(kind(shift=shift).sigma_max, kind(shift=shift).sigma_min, 20)
    expected = torch.from_numpy(shift * linear / (1 + (shift - 1) * linear))
    alpha, sigma = noise_level(scheduler, scheduler.timesteps.unique().flip(0))
    assert relative_error(sigma, expected) <= 1e-6  # float32 sigmas; measured 5e-8
    assert torch.equal(alpha, 1 - sigma)
    clean, noise = normal(1, 4), normal(1, 4, seed=1)
    timestep = scheduler.timesteps[5]
    alpha, sigma = noise_level(scheduler, timestep)
    seen = scheduler.scale_noise(clean, timestep[None], noise)
    assert relative_error(seen, alpha * clean + sigma * noise) <= 1e-6
    assert noise_level(scheduler, 500)[1].item() == 0.5  # not a step of this schedule, yet a noise level


def test_flow_direction_is_that_of_the_sampler():
    """One Euler step from sigma to 0 along u = e - x0 lands on x0."""
    scheduler = schedule(diffusers.FlowMatchEulerDiscreteScheduler(), 8)
    x, prediction = normal(1, 4), normal(1, 4, seed=1)
    timestep = scheduler.timesteps[-1]
    landed = scheduler.step(prediction, timestep, x).prev_sample
    alpha, sigma = noise_level(scheduler, timestep)
    score = score_from_prediction(prediction, x, alpha, sigma, "flow")
    assert (
        relative_error((x + sigma**2 * score) / alpha, landed) <= 1e-6
    )  # the step computes in float32; measured 1.4e-8


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_zero_terminal_snr(prediction_type):
    scheduler = diffusers.DDIMScheduler(**BETAS, rescale_betas_zero_snr=True, prediction_type=prediction_type)
    alpha, sigma = noise_level(scheduler, 999)
    assert alpha < 1e-6
    assert sigma == 1
    x, prediction = normal(1, 4), normal(1, 4, seed=1)
    score = score_from_prediction(prediction, x, 0.0, 1.0, prediction_type)
    assert torch.equal(score, -prediction if prediction_type == "epsilon" else -x)


def test_video_euler_numbers_steps_by_log_sigma():
    scheduler = schedule(
        diffusers.EulerDiscreteScheduler(
            **BETAS,
            timestep_type="continuous",
            prediction_type="v_prediction",
            use_karras_sigmas=True,
            sigma_max=700.0,
        ),
        10,
    )
    alpha, sigma = noise_level(scheduler, scheduler.timesteps)
    assert relative_error(sigma / alpha, (4 * scheduler.timesteps.double()).exp()) <= 4e-6


def test_a_sampler_with_rounded_timesteps_keeps_the_networks_level():
    """DPM++ with Karras sigmas rounds its timesteps: the network's own noise level at the integer counts."""
    scheduler = schedule(diffusers.DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True), 20)
    timestep = int(scheduler.timesteps[6])
    alpha, _ = noise_level(scheduler, timestep)
    assert alpha.item() == pytest.approx(ABAR[timestep] ** 0.5, rel=1e-6)


def test_noise_level_takes_numbers_lists_and_tensors():
    scheduler = make("ddim")
    single = noise_level(scheduler, 321)
    assert single[0].shape == ()
    for many in ([321, 1], torch.tensor([321, 1]), np.array([321, 1])):
        alpha, sigma = noise_level(scheduler, many)
        assert alpha.shape == (2,)
        assert alpha[0] == single[0]
        assert sigma[0] == single[1]


@pytest.mark.parametrize(
    "timestep", [-1, 1000, 500.5, math.nan, math.inf, [1, 2000], [], [[1, 2]], "ten", None, True], ids=str
)
@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_timesteps_outside_the_schedule(name, timestep):
    with pytest.raises(InvalidInput, match="timestep"):
        noise_level(make(name), timestep)


def test_levels_without_noise_are_refused():
    with pytest.raises(InvalidInput, match="sigma"):
        noise_level(schedule(diffusers.FlowMatchEulerDiscreteScheduler(), 4), 0)
    clean = SimpleNamespace(alphas_cumprod=torch.ones(3), config=SimpleNamespace(prediction_type="epsilon"))
    with pytest.raises(InvalidInput, match="sigma"):
        noise_level(clean, 1)


def test_flow_sigmas_exist_only_after_set_timesteps():
    scheduler = diffusers.UniPCMultistepScheduler(**BETAS, **FLOW_SIGMAS)
    with pytest.raises(InvalidInput, match="set_timesteps"):
        noise_level(scheduler, 500)


def test_midpoints_kept_in_another_list_are_an_error_not_a_number():
    scheduler = schedule(diffusers.KDPM2DiscreteScheduler(**BETAS), 10)
    assert noise_level(scheduler, scheduler.timesteps[0])[1] > 0.99
    with pytest.raises(UnsupportedModel, match="KDPM2DiscreteScheduler"):
        noise_level(scheduler, scheduler.timesteps[1])


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (diffusers.EDMEulerScheduler(), "EDMEulerScheduler.*alphas_cumprod"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
        (diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "go together"),
        (diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True), "go together"),
        (diffusers.DDIMScheduler(prediction_type="score"), "'score'"),
        (object(), "prediction type None"),
    ],
)
def test_unknown_schedules(scheduler, words):
    with pytest.raises(UnsupportedModel, match=words):
        noise_level(scheduler, 5)


def test_schedule_leaves_the_scheduler_alone():
    scheduler = diffusers.DDIMScheduler(**BETAS)
    before = scheduler.timesteps.clone()
    assert len(schedule(scheduler, 7).timesteps) == 7
    assert torch.equal(scheduler.timesteps, before)
    assert scheduler.num_inference_steps is None
    for steps in (0, -1, 2.5, True, 5000):
        with pytest.raises(InvalidInput, match="num_inference_steps"):
            schedule(scheduler, steps)


# --- the score function -------------------------------------------------------------------------------------


class Recorder(torch.nn.Module):
    """A network that remembers how it was called and answers in a chosen form."""

    def __init__(self, answer=lambda y: y):
        super().__init__()
        self.answer = answer

    def forward(self, sample, timestep, scale=None, labels=None, return_dict=True):
        self.call = inspect.currentframe().f_locals.copy()
        return self.answer(sample * 2 if scale is None else sample * scale["by"].reshape(-1, 1))


def make_score(network=None, **options) -> ScoreFunction:
    arguments = {"prediction_type": "epsilon", "alpha": 0.8, "sigma": 0.5, "timestep": 3, **options}
    return ScoreFunction(network or Recorder(), **arguments)


@pytest.mark.parametrize(
    "answer", [lambda y: y, lambda y: (y, 1), lambda y: [y], lambda y: SimpleNamespace(sample=y)]
)
def test_forms_of_a_networks_answer(answer):
    x = normal(2, 3)
    assert torch.equal(make_score(Recorder(answer)).predict(x), 2 * x)


@pytest.mark.parametrize(
    "answer", [lambda y: None, lambda y: (), lambda y: {"sample": y}, lambda y: y[:, :2]]
)
def test_answers_that_are_no_prediction(answer):
    with pytest.raises(UnsupportedModel, match="network"):
        make_score(Recorder(answer))(normal(2, 3))


def test_how_the_network_is_called():
    network = Recorder()
    labels = torch.tensor([4, 5])
    scale = {"by": torch.tensor([3.0, -1.0], dtype=torch.float64)}
    score = make_score(network, timestep=[7, 8], conditioning={"labels": labels, "scale": scale})
    x = normal(2, 3)
    assert torch.equal(score.epsilon(x), x * scale["by"][:, None])
    assert network.call["return_dict"] is False
    assert network.call["labels"] is labels
    assert torch.equal(network.call["timestep"], torch.tensor([7, 8]))
    make_score(network, timestep=9)(x)
    assert torch.equal(network.call["timestep"], torch.tensor([9, 9]))
    make_score(network, timestep=9.25)(x)
    assert network.call["timestep"].dtype == torch.float64

    plain = make_score(lambda sample, timestep: sample + timestep[:, None])
    assert torch.equal(plain.predict(x), x + 3)


def test_units():
    x = normal(2, 3)
    score = make_score()
    assert torch.equal(score(x), -2 * x / 0.5)
    assert torch.equal(score.with_units("eps")(x), 2 * x)
    assert torch.equal(score.epsilon(x), score.with_units("eps").epsilon(x))
    assert score.units == "score"
    assert score.with_units("eps").with_units("score").units == "score"
    with pytest.raises(InvalidInput, match="units"):
        score.with_units("nats")


def test_samples_of_different_timesteps_are_those_of_single_calls():
    scheduler = make("ddim", prediction_type="v_prediction")
    x = normal(3, 5)
    steps = torch.tensor([1, 500, 981])

    def network(sample, timestep):
        return torch.sin(sample * timestep[:, None] / 300)

    together = ScoreFunction.from_scheduler(network, scheduler, steps)(x)
    for row in range(3):
        single = ScoreFunction.from_scheduler(network, scheduler, int(steps[row]))(x[row : row + 1])
        assert torch.equal(single[0], together[row])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow"])
def test_nothing_depends_on_the_data(prediction_type):
    """Under fake tensors any .item() or branch on data raises; derivatives of both directions agree."""
    score = make_score(
        lambda sample, timestep: sample.sin(),
        prediction_type=prediction_type,
        alpha=[0.8, 0.6],
        sigma=[0.6, 0.8],
        timestep=[1, 2],
    )
    x, tangent = normal(2, 3), normal(2, 3, seed=1)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert score(mode.from_tensor(x)).shape == x.shape
    value, forward = torch.func.jvp(score, (x,), (tangent,))
    _, pull = torch.func.vjp(score, x)
    assert torch.equal(value, score(x))
    assert relative_error(pull(tangent)[0], forward) <= 1e-14  # this Jacobian is diagonal


def test_the_input_is_left_alone():
    x = normal(2, 3)
    before = x.clone()
    make_score(prediction_type="v_prediction")(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.ones(2, 3, dtype=torch.long), "floating"),
        (torch.ones(2, 3, dtype=torch.complex64), "floating"),
        ([[1.0, 2.0]], "floating"),
        (torch.ones(3), "at least 2"),
        (torch.ones(3, 3), r"timestep: expected 3 rows.*got 2"),
    ],
)
def test_inputs_that_are_refused(x, words):
    score = make_score(timestep=[1, 2])
    with pytest.raises(InvalidInput, match=words):
        score(x)


def test_conditioning_rows_are_named():
    score = make_score(conditioning={"scale": {"by": torch.ones(3)}})
    with pytest.raises(InvalidInput, match=r"conditioning\['scale'\]\['by'\]: expected 2 rows.*got 3"):
        score(normal(2, 3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prediction_type": "x0"}, "prediction_type"),
        ({"units": "bits"}, "units"),
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": [0.5, -0.5]}, "sigma"),
        ({"alpha": math.nan}, "alpha"),
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": [[0.5]]}, "alpha"),
        ({"timestep": [[1]]}, "timestep"),
        ({"timestep": None}, "timestep"),
        ({"timestep": []}, "timestep"),
        ({"alpha": [0.1, 0.2], "sigma": [0.5, 0.5], "timestep": [1, 2, 3]}, "one batch size"),
        ({"network": 3}, "network"),
    ],
)
def test_arguments_that_are_refused(options, words):
    with pytest.raises(InvalidInput, match=words):
        make_score(**options)


# --- the shared model ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def double_pipe(pipe):
    pipe = copy.copy(pipe)
    pipe.unet = copy.deepcopy(pipe.unet).double()
    return pipe


def test_from_pipeline_reproduces_the_reference_scores(double_pipe):
    """||s_c - s_null|| at step 0 in float64, as recorded without this library (text encoder in float32)."""
    rows = json.loads(REFERENCE.read_text())["float64"]
    x = torch.cat(
        [torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(k)) for k in range(42, 46)]
    )
    x = x.double()
    with torch.no_grad():
        for row in (rows[0], rows[-1]):
            prompts = [row["prompt"]] * 4
            conditional = ScoreFunction.from_pipeline(double_pipe, prompts)
            unconditional = ScoreFunction.from_pipeline(double_pipe, prompts, unconditional=True)
            found = (conditional(x) - unconditional(x)).flatten(1).norm(dim=1)
            expected = torch.tensor(row["step0"]["wen"], dtype=torch.float64)
            # Measured 2e-15.
            assert torch.allclose(found, expected, rtol=1e-10, atol=0)


def test_from_pipeline_takes_steps_and_timesteps(pipe):
    prompts = ["a thin upright handwritten zero by birick", "a bold slanted handwritten nine"]
    state = copy.deepcopy(pipe.scheduler.__dict__)
    by_step = ScoreFunction.from_pipeline(pipe, prompts, step=[0, 10])
    assert by_step.timestep.tolist() == [981, 781]
    assert by_step.units == "score"
    assert by_step.prediction_type == "epsilon"
    assert by_step.conditioning["encoder_hidden_states"].shape == (2, 32, 64)
    by_timestep = ScoreFunction.from_pipeline(pipe, prompts, timestep=[981, 781], units="eps")
    x = normal(2, 4, 16, 16).float()
    with torch.no_grad():
        assert torch.equal(by_step.epsilon(x), by_timestep(x))
    one = ScoreFunction.from_pipeline(pipe, prompts[0], step=3, num_inference_steps=10)
    assert one.timestep.item() == 601
    assert str(pipe.scheduler.__dict__) == str(state)


@pytest.mark.parametrize(
    "options",
    [{"step": 50}, {"step": -1}, {"step": 0.5}, {"step": []}, {"step": "first"}, {"timestep": 1000}],
)
def test_steps_outside_the_pipelines_schedule(pipe, options):
    with pytest.raises(InvalidInput, match="step"):
        ScoreFunction.from_pipeline(pipe, ["a bold nine"], **options)
    with pytest.raises(InvalidInput, match="at least one prompt"):
        ScoreFunction.from_pipeline(pipe, [], unconditional=True)
