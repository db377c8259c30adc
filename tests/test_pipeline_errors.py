"""SharpnessScorer on bad input, networks that are not finite, and memory that runs out."""

from __future__ import annotations

import functools
import warnings
from types import SimpleNamespace

import diffusers
import pytest
import torch
from pipelines import METRICS

from sharpcore import InvalidInput, NonFiniteError, OutOfMemory, SharpnessScorer, UnsupportedModel
from sharpcore.conditioning import dropped_tokens
from sharpcore.memory import is_out_of_memory

PROMPTS = ["a thin upright handwritten zero by birick", "a bold slanted nine", "one"]
LONG = "a bold slanted handwritten three by nobody " * 6


@pytest.fixture(scope="module")
def scorer(tiny_pipe):
    return SharpnessScorer(tiny_pipe, num_inference_steps=4)


# --- arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"steps": value} for value in ([], [4], [-1], [0, 0], [True], [0.0], ["0"], "0", 4, 0.5, None)
    ] + [
        {"seeds": value} for value in ([], 0, -1, True, [1, 1], [-1], [2**63], [1.5], "4", 2.0, None, 10**9)
    ] + [
        {"metrics": value} for value in ([], ["sharp"], "sharp", [METRICS[0]] * 2, None, 1, [None], [[]])
    ] + [
        {"units": value} for value in ("noise", None, 1)
    ] + [
        {"on_error": value} for value in ("ignore", None)
    ] + [
        {"latent_size": value} for value in (16, (16,), (0, 16), (16.5, 16), "16", (16, True), (4, 16, 16))
    ],
    ids=lambda options: ", ".join(f"{name}={value!r}" for name, value in options.items()),
)  # fmt: skip
def test_bad_arguments_of_a_call(scorer, options):
    with pytest.raises(InvalidInput, match=f"^{next(iter(options))}: expected"):
        scorer(PROMPTS[:1], **options)


@pytest.mark.parametrize(
    "options",
    [
        *({"guidance_scale": value} for value in (-1, float("nan"), float("inf"), "7.5", None, True)),
        *({"memory_budget": value} for value in (0, -5, "8G", float("nan"), True)),
        *({"num_inference_steps": value} for value in (0, -1, 1.5, "50", None, 2000)),
        *({"backend": value} for value in ("gpu", None)),
    ],
    ids=lambda options: ", ".join(f"{name}={value!r}" for name, value in options.items()),
)
def test_bad_arguments_of_a_scorer(tiny_pipe, options):
    with pytest.raises(InvalidInput, match=f"^{next(iter(options))}: "):
        SharpnessScorer(tiny_pipe, **options)


@pytest.mark.parametrize("prompts", [[], (), "a bold nine", None, 3, {"a"}])
def test_prompts_must_be_a_list_with_something_in_it(scorer, prompts):
    with pytest.raises(InvalidInput, match=r"^prompts: expected"):
        scorer(prompts)


@pytest.mark.parametrize("bad", ["", "  \n\t", None, 3, b"one", float("nan")])
def test_a_bad_prompt_raises_or_is_recorded(scorer, work, bad):
    with pytest.raises(InvalidInput, match=r"^prompts\[1\]: expected"):
        scorer([PROMPTS[0], bad, PROMPTS[1]])
    assert work.forwards == 0
    table = scorer([PROMPTS[0], bad, PROMPTS[1]], steps=(0, 1), seeds=1, on_error="record")
    assert [row["step"] for row in table] == [0, 1] * 3
    assert [row["error"] is None for row in table] == [True, True, False, False, True, True]
    for row in table.rows[2:4]:
        assert row["error"].startswith("prompts[1]: expected")
        assert all(row[f"{metric}{suffix}"] is None for metric in METRICS for suffix in ("", "_se", "_seeds"))
    assert [row for row in table if row["error"] is None] == scorer(PROMPTS[:2], steps=(0, 1), seeds=1).rows


def test_only_bad_prompts(scorer, work):
    table = scorer(["", " "], on_error="record")
    assert [row["error"] is None for row in table] == [False, False]
    assert work.forwards == 0


def test_a_prompt_beyond_the_window_is_cut_with_a_warning(tiny_pipe, scorer):
    dropped = dropped_tokens(tiny_pipe, LONG)
    assert dropped > 0
    with pytest.warns(UserWarning, match=rf"^prompts\[1\] is longer .* last {dropped} tokens") as caught:
        table = scorer([PROMPTS[0], LONG, PROMPTS[1]], seeds=1)
    assert len(caught) == 1
    assert all(row["error"] is None for row in table)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer(PROMPTS, seeds=1)


# --- pipelines ----------------------------------------------------------------------------------------------


def test_pipelines_whose_scores_are_not_defined(fresh_pipe):
    with pytest.raises(UnsupportedModel, match="no UNet"):
        SharpnessScorer(SimpleNamespace(encode_prompt=print))
    with pytest.raises(UnsupportedModel, match="no UNet"):
        SharpnessScorer(None)
    fresh_pipe.scheduler.register_to_config(prediction_type="flux")
    with pytest.raises(UnsupportedModel, match="prediction type 'flux'"):
        SharpnessScorer(fresh_pipe)
    fresh_pipe.scheduler.register_to_config(prediction_type="epsilon")
    fresh_pipe.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(UnsupportedModel, match="time_cond_proj_dim=8"):
        SharpnessScorer(fresh_pipe)


def test_a_scheduler_without_a_known_noise_level(fresh_pipe):
    fresh_pipe.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(UnsupportedModel, match="EDMEulerScheduler"):
        SharpnessScorer(fresh_pipe)(PROMPTS[:1])


def test_a_pipeline_that_becomes_unsupported_after_the_scorer_was_made(fresh_pipe):
    scorer = SharpnessScorer(fresh_pipe)
    fresh_pipe.scheduler.register_to_config(prediction_type="flux")
    with pytest.raises(UnsupportedModel, match="prediction type 'flux'"):
        scorer(PROMPTS[:1])


# --- NaN ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metrics", [METRICS, METRICS[:1]])
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("on_error", ["raise", "record"])
def test_a_weight_that_is_not_finite_is_named(fresh_pipe, part, metrics, on_error):
    """It spoils every row, so it raises in either case."""
    network = getattr(fresh_pipe, part)
    name, weight = list(network.named_parameters())[-1]
    scorer = SharpnessScorer(fresh_pipe)
    scorer(PROMPTS[:1], seeds=1)
    weight.data[0] = float("nan" if on_error == "raise" else "inf")
    with pytest.raises(NonFiniteError, match=f"{type(network).__name__}.* {name} "):
        scorer(PROMPTS[:1], seeds=1, metrics=metrics, on_error=on_error)


@pytest.mark.parametrize("metrics", [METRICS, METRICS[:1]])
@pytest.mark.parametrize("steps", [[0], [2]])
def test_a_prompt_that_gives_nan_is_recorded_alone(fresh_pipe, metrics, steps):
    """An embedding beyond the range of a network, in the second of four prompts that share a batch."""
    encode = fresh_pipe.encode_prompt

    def spoil(prompt, **options):
        prompt_embeds, negative = encode(prompt=prompt, **options)
        return (prompt_embeds * float("nan") if prompt == "nan" else prompt_embeds), negative

    fresh_pipe.encode_prompt = spoil
    scorer = SharpnessScorer(fresh_pipe, num_inference_steps=4)
    prompts = [PROMPTS[0], "nan", PROMPTS[1], PROMPTS[2]]
    options = {"seeds": 1, "metrics": metrics, "steps": steps}
    with pytest.raises(NonFiniteError):
        scorer(prompts, **options)
    table = scorer(prompts, on_error="record", **options)
    assert [row["error"] is None for row in table] == [True, False, True, True]
    assert "NaN" in table.rows[1]["error"]
    assert table.rows[1]["score_difference"] is None
    alone = [scorer([prompt], **options).rows[0] for prompt in (PROMPTS[0], *PROMPTS[1:])]
    assert [row for row in table if row["error"] is None] == alone


# --- memory -------------------------------------------------------------------------------------------------

CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"


@pytest.fixture
def limit(monkeypatch):
    """A function that lets the UNet fail above a number of samples, and returns the batch sizes tried."""

    def set_limit(samples, error):
        tried = []
        forward = diffusers.UNet2DConditionModel.forward

        @functools.wraps(forward)
        def limited(self, sample, *args, **kwargs):
            tried.append(sample.shape[0])
            if sample.shape[0] > samples:
                raise error
            return forward(self, sample, *args, **kwargs)

        monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", limited)
        return tried

    return set_limit


@pytest.mark.parametrize(
    ("error", "metrics"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), METRICS),
        (RuntimeError(CPU_MESSAGE), METRICS),
        (MemoryError(), METRICS[:1]),
    ],
)
def test_the_batch_is_halved_when_memory_runs_out(tiny_pipe, limit, error, metrics):
    options = {"steps": (0, 1), "seeds": 4, "metrics": metrics}
    expected = SharpnessScorer(tiny_pipe, num_inference_steps=4)(PROMPTS[:1], **options).rows
    tried = limit(2, error)  # enough for one sample of both branches
    scorer = SharpnessScorer(tiny_pipe, num_inference_steps=4)
    found = scorer(PROMPTS[:1], **options).rows
    for metric in metrics:
        for row, other in zip(found, expected, strict=True):
            # Measured 3e-6 (float32): other batch sizes, and the coarse grid carries their rounding on to the
            # second step.
            assert row[f"{metric}_seeds"] == pytest.approx(other[f"{metric}_seeds"], rel=1e-4)
    assert max(tried) > 2
    tried.clear()
    assert scorer(PROMPTS[:1], **options).rows == found
    assert not tried or max(tried) <= 2, "what was learnt is kept"


def test_one_sample_that_does_not_fit(tiny_pipe, limit):
    limit(0, torch.OutOfMemoryError("CUDA out of memory"))
    scorer = SharpnessScorer(tiny_pipe)
    for options in ({}, {"metrics": ["score_difference"]}, {"steps": [1]}, {"on_error": "record"}):
        with pytest.raises(
            OutOfMemory, match=r"one sample with a latent of \(4, 16, 16\).* latent_size"
        ) as caught:
            scorer(PROMPTS, **options)
        assert "CUDA out of memory" in str(caught.value)


def test_a_pair_that_does_not_fit(tiny_pipe, limit):
    """One sample of one branch fits, but both branches in one pass, on the way to the third step, do not."""
    limit(1, MemoryError("no memory"))
    scorer = SharpnessScorer(tiny_pipe, num_inference_steps=4)
    scorer(PROMPTS[:1], seeds=2, steps=(0, 1))
    with pytest.raises(OutOfMemory, match="no memory"):
        scorer(PROMPTS[:1], seeds=2, steps=(0, 2))


def test_other_runtime_errors_are_not_taken_for_memory(tiny_pipe, limit):
    tried = limit(1, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        SharpnessScorer(tiny_pipe)(PROMPTS[:1])
    assert tried == [1, 4]


def test_signs_of_exhausted_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError(CPU_MESSAGE))
    assert is_out_of_memory(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    )
    assert not is_out_of_memory(RuntimeError("expected scalar type Float"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(real.value)
