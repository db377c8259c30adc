"""Each repair against a few independent lines of its published rule, in float64 where it has a gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from pipelines import latent
from torch.nn.attention import SDPBackend, sdpa_kernel

import sharpcore
from sharpcore import conditioning as text
from sharpcore.repair import Sail, SailExact, SailReleased, Samples
from sharpcore.repair.descent import Descent
from sharpcore.repair.sail import with_norm_of, with_spectrum_of

PROMPT = "a bold slanted handwritten zero by hounard"
STEPS = 5


@pytest.fixture(scope="module")
def double_pipe(tiny_pipe):
    pipe = copy.deepcopy(tiny_pipe)
    pipe.unet.double()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_samples(pipe, prompts=(PROMPT,), seeds=(3,), steps=STEPS, **more):
    noise = torch.cat([latent(seed) for seed in seeds]).to(pipe.unet.dtype)
    prompts = [prompt for prompt in prompts for _ in seeds]
    return Samples(
        pipe,
        prompts,
        seeds * (len(prompts) // len(seeds)),
        noise.repeat(len(prompts) // len(seeds), 1, 1, 1),
        text.encode_prompts(pipe, prompts),
        text.repeat_conditioning(text.encode_unconditional(pipe), len(prompts)),
        num_inference_steps=steps,
        guidance_scale=7.5,
        **more,
    )


def plain_difference(pipe, x, embedding=None, units="score"):
    """e_D or s_D of PROMPT at the first step, by nothing of the package but the embedding."""
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    t = scheduler.timesteps[0]
    given = text.encode_prompts(pipe, [PROMPT])["encoder_hidden_states"] if embedding is None else embedding
    none = text.encode_unconditional(pipe)["encoder_hidden_states"]
    eps = [pipe.unet(x, t, hidden.expand(len(x), -1, -1)).sample for hidden in (none, given)]
    sigma = (1 - scheduler.alphas_cumprod[int(t)].double()).sqrt()
    return (eps[1] - eps[0]) * (1.0 if units == "eps" else -1 / sigma)


# --- sail ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", [True, False])
def test_gradient_of_sail(double_pipe, through):
    repair = Sail(alpha=0.01, delta=0.7, through_direction=through)
    samples = make_samples(double_pipe)
    x = samples.noise
    loss, curvature, gradient = repair.objective(samples)(x, [0], True)

    def reference(x):
        here = plain_difference(double_pipe, x)
        there = plain_difference(double_pipe, x + 0.7 * (here if through else fixed))
        return (there - here).square().sum() + 0.01 * x.square().sum()

    with torch.no_grad():
        fixed = plain_difference(double_pipe, x)
        value = reference(x)
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
        slope = (reference(x + 1e-4 * direction) - reference(x - 1e-4 * direction)) / 2e-4
    assert float(loss) == pytest.approx(float(value), rel=1e-5)
    assert float(curvature) == pytest.approx((float(value) - 0.01 * float(x.square().sum())) / 0.49, rel=1e-4)
    # The central difference's own error.
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-5)


@pytest.mark.parametrize("through", [True, False])
def test_gradient_of_the_exact_product(double_pipe, through):
    """The value against a double backward pass, the gradient against its central differences, in float64."""
    repair = SailExact(alpha=0.01, through_direction=through)
    samples = make_samples(double_pipe)
    x = samples.noise
    loss, curvature, gradient = repair.objective(samples)(x, [0], True)

    def product(x, direction=None):
        x = x.clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            here = plain_difference(double_pipe, x)
            # J v as the derivative, in u, of J^T u, times v. (Another derivative of it by autograd differs by
            # 3 % from the central differences: PyTorch's third derivatives are not to be trusted here.)
            u = torch.zeros_like(here, requires_grad=True)
            (pulled,) = torch.autograd.grad(here, x, u, create_graph=True)
            along = here.detach() if direction is None else direction
            return torch.autograd.grad(pulled, u, along)[0]

    def value(x):
        square = product(x, None if through else fixed).square().sum()
        return float(square + 0.01 * x.square().sum())

    with torch.no_grad():
        fixed = plain_difference(double_pipe, x)
    assert float(curvature) == pytest.approx(float(product(x).square().sum()), rel=1e-6)
    assert float(loss) == pytest.approx(value(x), rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    for direction in (torch.randn(x.shape, generator=generator, dtype=x.dtype), gradient):
        step = 1e-3 * direction / direction.norm()
        slope = (value(x + step) - value(x - step)) / 2
        assert float((gradient * step).sum()) == pytest.approx(slope, rel=1e-3, abs=1e-7)


def test_gradient_of_the_exact_product_in_float32(tiny_pipe, double_pipe):
    found = SailExact(alpha=0.0).objective(make_samples(tiny_pipe))(latent(3), [0], True)
    exact = SailExact(alpha=0.0).objective(make_samples(double_pipe))(latent(3).double(), [0], True)
    assert float(found[1]) == pytest.approx(float(exact[1]), rel=1e-4)
    error = float((found[2] - exact[2]).norm() / exact[2].norm())
    assert error < 2e-2, error


def test_finite_difference_tends_to_the_exact_product(double_pipe):
    x = latent(3).double()
    exact = SailExact(alpha=0.0).objective(make_samples(double_pipe))(x, [0], True)
    for delta in (1e-2, 1e-4):
        found = Sail(alpha=0.0, delta=delta).objective(make_samples(double_pipe))(x, [0], True)
        # Errors of first order in delta; measured 2.2 delta and 7 delta.
        assert float(found[1]) == pytest.approx(float(exact[1]), rel=5 * delta)
        assert float((found[2] / delta**2 - exact[2]).norm() / exact[2].norm()) < 15 * delta


def test_curvature_is_the_scorers(tiny_pipe):
    scored = sharpcore.SharpnessScorer(tiny_pipe, num_inference_steps=STEPS)([PROMPT], seeds=[3])
    (expected,) = scored.rows[0]["hessian_score_difference_seeds"]
    found = sharpcore.repair_latents(
        tiny_pipe, PROMPT, method="sail_exact", seeds=[3], num_inference_steps=STEPS, rounds=1, alpha=0.0
    )
    assert found.path[0][0] == pytest.approx(expected, rel=1e-4)


def test_the_released_loss(double_pipe):
    """With its direction from the drawn noise, against the same in plain torch."""
    samples = make_samples(double_pipe)
    repair = SailReleased(rounds=2, threshold=None)
    repair.prepare(samples)
    x = latent(3).double().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    frozen, expected = x.detach().clone(), []
    for number in range(3):
        copied = frozen + (x - x.detach())  # those values, this gradient
        along = plain_difference(double_pipe, copied, units="eps")
        there = plain_difference(double_pipe, x + along / along.norm(), units="eps")
        loss = there.norm() + 0.05 * x.norm()
        expected.append(float(loss))
        if number < 2:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert samples.path[0] == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(samples.noise, x.detach(), rtol=0, atol=1e-5)
    double_pipe.unet.zero_grad(set_to_none=True)


def test_what_is_kept(tiny_pipe):
    """Norms, or the amplitude of every frequency, are those of the drawn noise after each round."""
    for keep in ("nothing", "norm", "spectrum"):
        found = sharpcore.repair_latents(tiny_pipe, PROMPT, seeds=1, rounds=2, alpha=0.01, keep=keep)
        assert not torch.equal(found.latents, found.initial)
        before, after = (noise.flatten(1).norm(dim=1) for noise in (found.initial, found.latents))
        assert bool(torch.isclose(before, after, rtol=1e-5).all()) == (keep != "nothing")
        before, after = (torch.fft.fft2(noise).abs() for noise in (found.initial, found.latents))
        assert torch.allclose(before, after, rtol=1e-3, atol=1e-3) == (keep == "spectrum")
    x = latent(1)
    torch.testing.assert_close(with_norm_of(5 * x, x), x)
    torch.testing.assert_close(with_spectrum_of(5 * x, x), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(with_spectrum_of(torch.zeros_like(x), x), x, rtol=0, atol=1e-5)


# --- the descent --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_descent_is_adamw_for_each_sample(double_pipe, decay):
    samples = make_samples(double_pipe, seeds=(1, 2, 3))
    start = torch.tensor([[1.0, -2.0], [0.3, 0.1], [5.0, 2.0]], dtype=torch.float64)

    def objective(point, rows, wanted):
        scale = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)[list(rows)]
        loss = scale * point.pow(4).sum(1)
        return loss, loss, 4 * scale[:, None] * point.pow(3) if wanted else None

    found = Descent(0.1, 5, None, decay).run(start, objective, samples)
    for row in range(3):
        x = start[row].clone().requires_grad_()
        optimizer = torch.optim.AdamW([x], lr=0.1, weight_decay=decay)
        for _ in range(5):
            optimizer.zero_grad()
            ((row + 1) * x.pow(4).sum()).backward()
            optimizer.step()
        torch.testing.assert_close(found[row], x.detach(), rtol=1e-6, atol=1e-8)
    assert samples.rounds == [5] * 3
    assert samples.stopped == [None] * 3
    assert [len(path) for path in samples.path] == [6] * 3


# --- the others ---------------------------------------------------------------------------------------------


def test_prompt_embedding(double_pipe):
    samples = make_samples(double_pipe)
    sharpcore.repair.PromptEmbedding(rounds=2, target=None).prepare(samples)
    given = text.encode_prompts(double_pipe, [PROMPT])["encoder_hidden_states"]
    hidden = given.clone().requires_grad_()
    optimizer = torch.optim.AdamW([hidden], lr=0.05, weight_decay=0.01)
    for _ in range(2):
        loss = plain_difference(double_pipe, latent(3).double(), hidden, "eps").norm()
        optimizer.zero_grad()
        loss.backward()
        hidden.grad[:, 0] = 0
        optimizer.step()
    torch.testing.assert_close(
        samples.conditional["encoder_hidden_states"], hidden.detach(), rtol=0, atol=1e-6
    )
    double_pipe.unet.zero_grad(set_to_none=True)
    assert torch.equal(samples.noise, latent(3).double())


def test_per_sample_noise(double_pipe):
    samples = make_samples(double_pipe)
    sharpcore.repair.PerSampleNoise(rounds=2, target=None).prepare(samples)
    x = latent(3).double().requires_grad_()
    optimizer = torch.optim.AdamW([x], lr=0.01, weight_decay=0.01)
    for _ in range(2):
        loss = plain_difference(double_pipe, x, units="eps").norm()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(samples.noise, x.detach(), rtol=0, atol=1e-6)
    double_pipe.unet.zero_grad(set_to_none=True)


@torch.no_grad()
def test_batch_noise(double_pipe):
    samples = make_samples(double_pipe)
    repair = sharpcore.repair.BatchNoise(moves=2, strength=0.5)
    repair.prepare(samples)
    x = latent(3).double()
    for _ in range(2):
        here = plain_difference(double_pipe, x, units="eps")
        there = plain_difference(double_pipe, x + 12.5 * here / here.norm(), units="eps")
        x = x - 0.5 * (there - here)
    torch.testing.assert_close(samples.noise, x, rtol=0, atol=1e-8)
    guide = repair.guide(samples)
    assert samples.timesteps[0] > 900 or repair.start == 900
    scales = [guide(step, x) for step in range(STEPS)]
    assert scales == [7.5 if t <= 900 else 0.0 for t in samples.timesteps]


def test_token_masking(tiny_pipe):
    tokenizer = tiny_pipe.tokenizer
    ids = tokenizer(PROMPT).input_ids
    given = text.encode_prompts(tiny_pipe, [PROMPT])["encoder_hidden_states"]
    samples = make_samples(tiny_pipe)
    sharpcore.repair.TokenMasking(share=0.5).prepare(samples)
    found = samples.conditional["encoder_hidden_states"]
    masked = int((given.shape[1] - len(ids)) * 0.5)
    assert masked > 2
    zero = [bool((found[0, i] == 0).all()) for i in range(given.shape[1])]
    assert zero == [len(ids) <= i < len(ids) + masked for i in range(given.shape[1])]
    assert torch.equal(found[0, : len(ids)], given[0, : len(ids)])
    samples = make_samples(tiny_pipe)
    sharpcore.repair.TokenMasking(variant="replace").prepare(samples)
    found = samples.conditional["encoder_hidden_states"][0]
    other = ids + [tokenizer.convert_tokens_to_ids("!")] * (given.shape[1] - len(ids))
    expected = tiny_pipe.text_encoder(torch.tensor([other]))[0][0].detach()
    expected[len(ids) - 1] = 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(found[len(ids) :], given[0, len(ids) :], atol=1e-2)


def test_attention_rescaling(tiny_pipe):
    """The network's output is that with the logits written out."""
    length = len(tiny_pipe.tokenizer(PROMPT).input_ids)
    samples = make_samples(tiny_pipe)
    repair = sharpcore.repair.AttentionRescaling(factor=1.7)
    repair.prepare(samples)
    x, t = latent(5), torch.tensor(500)
    with torch.no_grad(), repair.running(samples):
        found = tiny_pipe.unet(x, t, **samples.conditional).sample

    class Written:
        def __call__(self, attn, hidden, encoder_hidden_states=None, attention_mask=None, **rest):
            context = hidden if encoder_hidden_states is None else encoder_hidden_states
            parts = attn.to_q(hidden), attn.to_k(context), attn.to_v(context)
            query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts)
            logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
            if encoder_hidden_states is not None:
                logits[..., 0] *= 1.7
                logits[..., length:] = -torch.inf
            mixed = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
            return attn.to_out[0](mixed)

    before = tiny_pipe.unet.attn_processors
    tiny_pipe.unet.set_attn_processor(Written())
    try:
        with torch.no_grad():
            expected = tiny_pipe.unet(
                x, t, text.encode_prompts(tiny_pipe, [PROMPT])["encoder_hidden_states"]
            ).sample
    finally:
        tiny_pipe.unet.set_attn_processor(before)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(samples.unconditional["encoder_attention_mask"].sum(1), torch.tensor([float(length)]))


def test_delayed_guidance_static(tiny_pipe):
    made = sharpcore.generate(
        tiny_pipe, PROMPT, repair="delayed_guidance", transition=500, before=-1.0, seeds=[3],
        num_inference_steps=STEPS, decode=False,
    )  # fmt: skip
    scheduler = copy.deepcopy(tiny_pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    x = latent(3)
    given = text.encode_prompts(tiny_pipe, [PROMPT])["encoder_hidden_states"]
    none = text.encode_unconditional(tiny_pipe)["encoder_hidden_states"]
    for t in scheduler.timesteps:
        with torch.no_grad():
            without, with_prompt = (tiny_pipe.unet(x, t, hidden).sample for hidden in (none, given))
        scale = 7.5 if t <= 500 else -1.0
        x = scheduler.step(without + scale * (with_prompt - without), t, x).prev_sample
    torch.testing.assert_close(made.final, x, rtol=0, atol=1e-4)


def test_delayed_guidance_dynamic(tiny_pipe):
    """Each sample is guided from the step after its first local minimum on."""
    samples = make_samples(tiny_pipe, seeds=(1, 2, 3), steps=6)
    guide = sharpcore.repair.DelayedGuidance(before=0.5, latest=samples.timesteps[4]).guide(samples)
    norms = torch.tensor([[3, 2, 4, 1, 1, 1], [1, 2, 3, 2, 4, 1], [6, 5, 4, 3, 2, 1]], dtype=torch.float32)
    scales = torch.stack([guide(step, norms[:, step].reshape(3, 1, 1, 1)) for step in range(6)], 1)
    expected = [[0.5, 0.5, *[7.5] * 4], [*[0.5] * 4, 7.5, 7.5], [*[0.5] * 4, 7.5, 7.5]]
    assert scales.tolist() == expected
    assert samples.rounds == [2, 4, 4]
    assert samples.stopped == [True] * 3
    assert samples.path == norms.tolist()
    never = make_samples(tiny_pipe, steps=6)
    guide = sharpcore.repair.DelayedGuidance().guide(never)
    assert [float(guide(step, torch.full((1, 1, 1, 1), 9.0 - step))) for step in range(6)] == [0.0] * 6
    assert never.stopped == [False]
