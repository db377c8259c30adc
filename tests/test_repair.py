"""Repairs: generation and its interface, noise that stays Gaussian, side effects, the registry."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import threading

import pytest
import scipy.stats
import torch
from diffusers import EulerDiscreteScheduler

import sharpcore
from sharpcore import InvalidInput
from sharpcore.errors import NonFiniteError, UnsupportedModel
from sharpcore.fingerprint import fingerprint
from sharpcore.repair import Repair, Sail, make_repair, register, registry, repairs

NAMES = tuple(repairs())
NOISE = ("sail", "sail_exact", "sail_released", "per_sample_noise")
MEMORIZED = ["a thin upright handwritten zero by jackova", "a bold slanted handwritten zero by hounard"]
# Few rounds, and no thresholds: those of Stable Diffusion are not those of these models.
QUICK = {
    "sail": {"rounds": 2},
    "sail_exact": {"rounds": 1},
    "sail_released": {"rounds": 1, "threshold": None},
    "per_sample_noise": {"rounds": 1, "target": None},
    "prompt_embedding": {"rounds": 1, "target": None},
    "batch_noise": {"moves": 1},
}


def options(name):
    return QUICK.get(name, {})


def quick(pipe, prompts, name, **more):
    settings = {"seeds": 2, "num_inference_steps": 3, "decode": False} | options(name) | more
    return sharpcore.generate(pipe, prompts, repair=name, **settings)


# --- generation ---------------------------------------------------------------------------------------------


def test_without_repair_it_is_the_pipelines_own_generation(tiny_pipe):
    made = sharpcore.generate(tiny_pipe, MEMORIZED, repair="none", seeds=[7, 9], num_inference_steps=4)
    assert made.prompts == tuple(prompt for prompt in MEMORIZED for _ in range(2))
    assert made.seeds == (7, 9, 7, 9)
    drawn = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(s)) for s in (7, 9)])
    assert torch.equal(made.latents, drawn.repeat(2, 1, 1, 1))
    assert torch.equal(made.initial, made.latents)
    own = tiny_pipe(
        list(made.prompts), latents=made.latents, num_inference_steps=4, height=32, width=32, output_type="pt"
    ).images  # fmt: skip
    # The rounding of the same sums; measured 0.
    torch.testing.assert_close(made.images, own, rtol=0, atol=1e-5)
    assert made.forwards == [8] * 4
    assert made.backwards == made.products == [0] * 4
    assert made.rounds == [0] * 4
    assert made.stopped == [None] * 4
    assert made.path == [[]] * 4
    assert len(made) == 4
    assert all(seconds > 0 for seconds in made.seconds)
    image = made.to_pil()[0]
    assert image.size == (32, 32)


def test_repaired_latents_plug_into_the_pipeline(tiny_pipe):
    found = sharpcore.repair_latents(tiny_pipe, MEMORIZED[0], seeds=2, num_inference_steps=4, rounds=2)
    made = quick(tiny_pipe, MEMORIZED[0], "sail", num_inference_steps=4)
    assert torch.equal(found.latents, made.latents)
    assert found.path == made.path
    assert [len(path) for path in found.path] == [3, 3]
    own = tiny_pipe(
        list(found.prompts), latents=found.latents, num_inference_steps=4, height=32, width=32,
        output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(made.final, own, rtol=0, atol=1e-5)


def test_another_scheduler_and_xl(tiny_pipe, sd2_pipe, small_xl_pipe):
    """Euler's latents are not what the network sees; v prediction; two text encoders."""
    assert isinstance(small_xl_pipe.scheduler, EulerDiscreteScheduler)
    for pipe in (sd2_pipe, small_xl_pipe):
        plain = quick(pipe, "a bold one", "none")
        for name in NAMES:
            made = quick(pipe, "a bold one", name)
            assert bool(torch.isfinite(made.final).all()), name
            if name != "none":
                assert not torch.equal(made.final, plain.final), name
    own = small_xl_pipe(
        "a bold one", latents=plain.latents[:1], num_inference_steps=3, guidance_scale=7.5, height=64,
        width=64, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(plain.final[:1], own, rtol=1e-4, atol=1e-3)
    with pytest.raises(UnsupportedModel, match="no decoder"):
        sharpcore.generate(small_xl_pipe, "a bold one", repair="none")
    with pytest.raises(UnsupportedModel, match="one text encoder"):
        quick(small_xl_pipe, "a bold one", "token_masking", variant="replace")


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_the_others_and_repeats(tiny_pipe, name):
    less = {"num_inference_steps": 2} | ({"rounds": 1} if "rounds" in options(name) else {})
    together = quick(tiny_pipe, MEMORIZED, name, seeds=[3, 4], **less)
    alone = quick(tiny_pipe, MEMORIZED[1], name, seeds=[4], **less)
    again = quick(tiny_pipe, MEMORIZED[1], name, seeds=[4], **less)
    assert torch.equal(alone.final, again.final)
    assert alone.path == again.path
    # Sums in another order; Adam's first step divides a gradient by its own size, so a rounding error of an
    # entry that is almost zero becomes one of the step. Measured: at most 2e-3, of latents of size 4.
    torch.testing.assert_close(together.final[3], alone.final[0], rtol=0, atol=2e-2)
    assert together.rounds[3] == alone.rounds[0]
    assert together.forwards[3] == alone.forwards[0]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_repair_changes_and_what_it_counts(tiny_pipe, name, work):
    made = quick(tiny_pipe, MEMORIZED[0], name)
    kind = repairs()[name]
    assert torch.equal(made.latents, made.initial) == ("noise" not in kind.changes)
    assert sum(made.forwards) == work.forwards
    assert (sum(made.backwards) > 0) == ("backward" in kind.cost)
    assert (sum(made.products) > 0) == ("product" in kind.cost)
    if name not in NOISE:
        return
    found = sharpcore.repair_latents(tiny_pipe, MEMORIZED[0], method=name, seeds=2, **options(name),
                                     num_inference_steps=3)  # fmt: skip
    assert torch.equal(found.latents, made.latents)
    assert found.repair == kind(**options(name))
    assert [a - b for a, b in zip(made.forwards, found.forwards, strict=True)] == [6, 6]


# --- the noise ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sail", "sail_exact"])
def test_the_noise_stays_gaussian(tiny_pipe, name):
    """Norms within their chi bounds, the first four moments, and the distribution of all entries."""
    rounds, seeds = (3, 8) if name == "sail" else (1, 4)
    found = sharpcore.repair_latents(tiny_pipe, MEMORIZED[0], method=name, seeds=seeds, rounds=rounds, lr=0.1)
    moved = (found.latents - found.initial).flatten(1).norm(dim=1)
    assert bool((moved > 1).all())
    for noise in (found.initial, found.latents):
        entries = noise.flatten().double()
        # Two-sided bounds of probability 1e-6 of the norm of 1,024 entries: 28.6 to 35.5.
        low, high = (scipy.stats.chi.ppf(p, 1024) for p in (5e-7, 1 - 5e-7))
        norms = noise.flatten(1).double().norm(dim=1)
        assert low < float(norms.min()) <= float(norms.max()) < high
        # The mean of each channel: shifts that no moment of all entries shows.
        assert float(noise.mean((2, 3)).abs().max()) * 16 < 4.5
        # Five standard errors of each moment of so many standard normal numbers.
        n = entries.numel()
        for power, expected, deviation in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs(float(entries.pow(power).mean()) - expected) < 5 * math.sqrt(deviation / n), power
        assert scipy.stats.kstest(entries.numpy(), "norm").pvalue > 1e-3


def test_no_two_seeds_end_at_the_same_latent(tiny_pipe):
    found = sharpcore.repair_latents(tiny_pipe, MEMORIZED[0], seeds=3, rounds=2)
    apart = torch.cdist(found.latents.flatten(1), found.latents.flatten(1)) + 100 * torch.eye(3)
    before = torch.cdist(found.initial.flatten(1), found.initial.flatten(1)) + 100 * torch.eye(3)
    assert float((apart / before).min()) > 0.9


def test_samples_stop_on_their_own(tiny_pipe):
    """A threshold between what the samples begin with leaves those below it as they were drawn."""
    start = sharpcore.repair_latents(tiny_pipe, MEMORIZED, seeds=2, rounds=1, alpha=0.0)
    first = [path[0] for path in start.path]
    threshold = sorted(first)[1] * 1.0001
    found = sharpcore.repair_latents(tiny_pipe, MEMORIZED, seeds=2, rounds=3, alpha=0.0, threshold=threshold)
    for i, value in enumerate(first):
        below = value <= threshold
        assert torch.equal(found.latents[i], found.initial[i]) == below
        assert (found.rounds[i] == 0) == below
        assert len(found.path[i]) == found.rounds[i] + 1
        assert found.stopped[i] == (found.path[i][-1] <= threshold)
    assert sum(rounds == 0 for rounds in found.rounds) == 2


@pytest.mark.parametrize("name", NOISE)
def test_the_loss_falls(tiny_pipe, name):
    more = {"threshold": None} if name == "sail_released" else {}
    more = {"target": None} if name == "per_sample_noise" else more
    found = sharpcore.repair_latents(tiny_pipe, MEMORIZED[0], method=name, seeds=1, rounds=2, **more)
    for path in found.path:
        assert path[-1] < path[0], (name, path)


# --- side effects -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_pipeline_is_not_changed(tiny_pipe, name):
    before = fingerprint(tiny_pipe.unet), fingerprint(tiny_pipe.text_encoder)
    pad = tiny_pipe.tokenizer.pad_token
    state = torch.random.get_rng_state()
    quick(tiny_pipe, MEMORIZED[0], name)
    assert (fingerprint(tiny_pipe.unet), fingerprint(tiny_pipe.text_encoder)) == before
    assert tiny_pipe.tokenizer.pad_token == pad
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in tiny_pipe.unet.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["sail", "attention_rescaling"])
def test_the_pipeline_is_restored_on_errors(fresh_pipe, name):
    before = fingerprint(fresh_pipe.unet)
    calls = []

    def fail(module, inputs, kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt

    handle = fresh_pipe.unet.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        quick(fresh_pipe, MEMORIZED[0], name)
    handle.remove()
    assert fingerprint(fresh_pipe.unet) == before


def test_hooks_leave_other_threads_alone(tiny_pipe):
    """A generation in another thread, while the keys are rescaled in this one, is a plain one."""
    plain = quick(tiny_pipe, MEMORIZED[0], "none").final
    found = []

    def other():
        found.append(quick(tiny_pipe, MEMORIZED[0], "none").final)

    repair = make_repair("attention_rescaling", {"factor": 3.0})
    with repair.running(type("Samples", (), {"pipe": tiny_pipe})):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        inside = quick(tiny_pipe, MEMORIZED[0], "none").final
    assert torch.equal(found[0], plain)
    assert not torch.equal(inside, plain)


def test_inference_mode(tiny_pipe):
    expected = quick(tiny_pipe, MEMORIZED[0], "sail").final
    with torch.inference_mode():
        found = quick(tiny_pipe, MEMORIZED[0], "sail").final
    assert torch.equal(found, expected)


# --- the registry -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Quieter(Repair):
    """Guides half as strongly."""

    name = "quieter"
    source = "nobody"
    changes = ("guidance",)
    cost = "none"

    share: float = 0.5

    def guide(self, samples):
        return lambda step, difference: self.share * samples.guidance_scale


@pytest.fixture
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def test_a_repair_of_ones_own(tiny_pipe, clean_registry):
    assert register(Quieter) is Quieter
    assert register(Quieter) is Quieter
    made = quick(tiny_pipe, MEMORIZED[0], "quieter", share=0.2)
    expected = quick(tiny_pipe, MEMORIZED[0], "none", guidance_scale=1.5)
    torch.testing.assert_close(made.final, expected.final, rtol=0, atol=1e-5)
    assert torch.equal(made.final, quick(tiny_pipe, MEMORIZED[0], Quieter(0.2)).final)
    with pytest.raises(InvalidInput, match="changes: guidance"):
        sharpcore.repair_latents(tiny_pipe, MEMORIZED[0], method="quieter")
    other = type("Other", (Quieter,), {})
    with pytest.raises(InvalidInput, match="'quieter' is taken by Quieter"):
        register(other)


def test_entry_points(monkeypatch, clean_registry):
    point = importlib.metadata.EntryPoint("quieter", f"{__name__}:Quieter", registry.ENTRY_POINTS)
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda *, group: [point] if group == "sharpcore.repairs" else []
    )
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda self: Quieter)
    assert repairs()["quieter"] is Quieter
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda self: dict)
    with pytest.raises(InvalidInput, match="entry point quieter: expected a subclass"):
        repairs()


def test_every_repair_says_what_it_is():
    for name, kind in repairs().items():
        assert kind.name == name
        assert kind.source
        assert kind.cost
        assert kind() == kind()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repair": "sale"}, "repair: expected one of none, sail"),
        ({"repair": 3}, "repair: expected one of"),
        ({"threshhold": 1}, "threshhold: not an option of sail; its options are: threshold, rounds"),
        ({"repair": Sail(), "rounds": 3}, "rounds: expected no options beside an instance"),
        ({"rounds": 0}, "rounds: expected an integer of at least 1"),
        ({"lr": -1}, "lr: expected a positive number"),
        ({"alpha": float("nan")}, "alpha: expected a number of at least 0"),
        ({"threshold": True}, "threshold: expected a number of at least 0"),
        ({"repair": "token_masking", "variant": "all"}, "variant: expected one of partial, replace"),
        ({"repair": "token_masking", "share": 2}, "share: expected at most 1"),
        ({"repair": "token_masking", "pad": ""}, "pad: expected a token"),
        ({"repair": "token_masking", "variant": "replace", "pad": "no such token"}, "pad: expected a token"),
        ({"repair": "delayed_guidance", "before": "0"}, "before: expected a number"),
        ({"prompts": []}, "prompts: expected at least one prompt"),
        ({"prompts": [" "]}, "prompts\\[0\\]: expected words"),
        ({"seeds": 0}, "seeds: expected a number from 1"),
        ({"num_inference_steps": 0}, "num_inference_steps: expected"),
        ({"guidance_scale": "7"}, "guidance_scale: expected"),
        ({"latent_size": (0, 4)}, "latent_size: expected"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1"),
        ({"backend": "fast"}, "backend: expected one of"),
    ],
)
def test_bad_arguments(tiny_pipe, arguments, message):
    prompts = arguments.pop("prompts", "a bold one")
    with pytest.raises(InvalidInput, match=message):
        sharpcore.generate(tiny_pipe, prompts, **{"num_inference_steps": 2} | arguments)


def test_a_network_that_is_not_finite_is_named(fresh_pipe):
    fresh_pipe.unet.conv_out.bias.data[0] = float("nan")
    with pytest.raises(NonFiniteError, match="the loss of the repair"):
        quick(fresh_pipe, MEMORIZED[0], "sail")
    with pytest.raises(NonFiniteError, match="the final latents"):
        quick(fresh_pipe, MEMORIZED[0], "none")


def test_memory_that_runs_out_halves_the_batch(tiny_pipe, monkeypatch):
    expected = quick(tiny_pipe, MEMORIZED[0], "none", seeds=4)
    from sharpcore.repair import generation

    original = generation.predict

    def limited(network, x, timestep, conditioning):
        if len(x) > most:
            raise torch.OutOfMemoryError("no more")
        return original(network, x, timestep, conditioning)

    monkeypatch.setattr(generation, "predict", limited)
    most = 2
    found = quick(tiny_pipe, MEMORIZED[0], "none", seeds=4)
    torch.testing.assert_close(found.final, expected.final, rtol=0, atol=1e-4)
    most = 1
    with pytest.raises(sharpcore.OutOfMemory, match="one sample with a latent of"):
        quick(tiny_pipe, MEMORIZED[0], "none", seeds=4)
