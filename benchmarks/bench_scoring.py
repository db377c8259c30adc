"""Scoring prompts with four seeds, both scores, against the procedure of the authors' released code.

    pytest benchmarks/bench_scoring.py -s            # "tiny" and "mid"
    pytest benchmarks/bench_scoring.py -s -m sd14    # Stable Diffusion 1.4's UNet at 64x64

The unit is a sample-forward: a forward pass without gradients of four latents, divided by four. The error of
a row is the largest relative difference of its per-seed values to those of the authors' procedure in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import baselines
import pytest
import torch
from scoring_pipelines import PIPELINES
from torch import Tensor

import sharpcore

SEEDS = (42, 43, 44, 45)
PROMPT = "a bold upright handwritten three by nobody"
AUTHORS = "authors' procedure, per prompt and seed"
METRICS = ("score_difference", "hessian_score_difference")


@pytest.mark.parametrize(
    ("name", "size", "prompts", "compared"),
    [
        ("tiny", 16, 5, 4),
        ("mid", 32, 5, 4),
        pytest.param("sd14", 64, 3, 1, marks=pytest.mark.sd14),
    ],
    ids=("tiny", "mid", "sd14"),
)
def test_scoring(table: Any, benchmark: Any, name: str, size: int, prompts: int, compared: int) -> None:
    """`prompts` of a call share the unconditional branch; the authors' code runs for `compared` seeds."""
    pipe = PIPELINES[name]()
    benchmark.pedantic(lambda: score(table, pipe, size, prompts, compared), rounds=1)


def score(table: Any, pipe: Any, size: int, prompts: int, compared: int) -> None:
    """All rows of one pipeline."""
    forward, authors = _plain(pipe, size, compared)
    expected: list[tuple[Tensor, Tensor]] = []
    slow = 2 if compared < len(SEEDS) else None
    table.add("sample-forward", forward, per=len(SEEDS))
    table.add(AUTHORS, authors, per=compared, error=expected.extend, turns=slow)
    table.measure()
    for precision in ("float32", "bfloat16"):
        prefix = "" if precision == "float32" else f"{precision}: "
        _score_with(table, pipe, size, prompts, precision, prefix, expected, slow)
        further = _further(table, prefix, prompts)
        table.add_row(f"{prefix}each further prompt, per seed", **further)
        theirs = table.ratio(AUTHORS)
        if further["derived"] and theirs:
            further["derived"] = theirs / further["derived"]
        table.add_row(f"{prefix}authors' procedure over each further prompt", **further)


def _score_with(
    table: Any,
    pipe: Any,
    size: int,
    prompts: int,
    precision: str,
    prefix: str,
    expected: list[tuple[Tensor, Tensor]],
    slow: int | None,
) -> None:
    scorer: list[Any] = []

    def prepare(count: int) -> Callable[[], Any]:
        if not scorer:
            scorer.append(sharpcore.SharpnessScorer(pipe, precision=precision))
        # The first prompt is the one that the authors' procedure scores.
        texts = [PROMPT, *(f"{PROMPT}, number {i}" for i in range(1, count))]
        return lambda: scorer[0](texts, seeds=list(SEEDS), latent_size=(size, size), squared=False)

    def difference(scores: Any) -> float | None:
        row = next(iter(scores))
        pairs = [
            (row[f"{metric}_seeds"][seed], float(values[index]))
            for seed, values in enumerate(expected)
            for index, metric in enumerate(METRICS)
        ]
        return max((abs(ours - theirs) / theirs for ours, theirs in pairs), default=None)

    seeds = len(SEEDS)
    for count, what in ((1, "one prompt, per seed"), (prompts, f"{prompts} prompts, per prompt and seed")):
        table.add(
            f"{prefix}{what}",
            prepare=lambda count=count: prepare(count),
            per=count * seeds,
            error=difference,
            turns=slow,
        )
    table.measure()


def _further(table: Any, prefix: str, prompts: int) -> dict[str, Any]:
    """What a prompt costs in a call that has others: the unconditional branch is computed once for all."""
    names = f"{prefix}one prompt, per seed", f"{prefix}{prompts} prompts, per prompt and seed"
    one, many = (table.ratio(name) for name in names)
    if one is None or many is None:
        return {"derived": None, "status": next(row.status for row in table.rows if row.what == names[0])}
    return {"derived": (prompts * many - one) / (prompts - 1), "status": "ok"}


def _plain(pipe: Any, size: int, compared: int) -> tuple[Callable[[], Tensor], Callable[[], Any]]:
    """The unit, and the authors' procedure for the first `compared` seeds."""
    pipe.scheduler.set_timesteps(50)
    timestep = pipe.scheduler.timesteps[0]
    sigma = float((1 - pipe.scheduler.alphas_cumprod[timestep]).sqrt())
    shape = (1, pipe.unet.config.in_channels, size, size)
    latents = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in SEEDS]
    prompt, empty = _encode(pipe, PROMPT), _encode(pipe, "")
    batch, prompts = torch.cat(latents), prompt.expand(len(SEEDS), -1, -1)

    def forward() -> Tensor:
        with torch.no_grad():
            return pipe.unet(batch, timestep, prompts, return_dict=False)[0]

    def authors() -> list[tuple[Tensor, Tensor]]:
        return [
            baselines.authors_procedure(pipe.unet, latent, timestep, prompt, empty, sigma)
            for latent in latents[:compared]
        ]

    return forward, authors


@torch.no_grad()
def _encode(pipe: Any, prompt: str) -> Tensor:
    tokens = pipe.tokenizer(
        prompt,
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return pipe.text_encoder(tokens.input_ids)[0]
