"""Scoring a prompt with four seeds, both scores, against the procedure of the authors' released code.

    pytest benchmarks/bench_scoring.py -s

The unit is a sample-forward: a forward pass without gradients of four latents, divided by four.
"""

from __future__ import annotations

from typing import Any

import baselines
import configs
import pytest
import torch

import sharpcore

SEEDS = (42, 43, 44, 45)
PROMPT = "a bold upright handwritten three by nobody"


def _latents(pipe: Any, size: int) -> list[torch.Tensor]:
    shape = (1, pipe.unet.config.in_channels, size, size)
    return [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in SEEDS]


@torch.no_grad()
def _encode(pipe: Any, prompt: str) -> torch.Tensor:
    tokens = pipe.tokenizer(
        prompt,
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return pipe.text_encoder(tokens.input_ids)[0]


@pytest.mark.parametrize(("name", "size"), [("tiny", 16), ("mid", 32)])
def test_scoring(table: Any, benchmark: Any, name: str, size: int) -> None:
    pipe = configs.tiny_pipeline() if name == "tiny" else configs.mid_pipeline()
    pipe.scheduler.set_timesteps(50)
    timestep = pipe.scheduler.timesteps[0]
    sigma = float((1 - pipe.scheduler.alphas_cumprod[timestep]).sqrt())
    latents = _latents(pipe, size)
    batch = torch.cat(latents)
    prompt, empty = _encode(pipe, PROMPT), _encode(pipe, "")
    scorer = sharpcore.SharpnessScorer(pipe)

    def score(count: int) -> Any:
        return scorer([PROMPT] * count, seeds=list(SEEDS), latent_size=(size, size), squared=False)

    def authors() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [
            baselines.authors_procedure(pipe.unet, latent, timestep, prompt, empty, sigma)
            for latent in latents
        ]

    def forward() -> torch.Tensor:
        return pipe.unet(batch, timestep, prompt.expand(4, -1, -1), return_dict=False)[0]

    expected = authors()
    (row,) = score(1)
    for metric, index in (("score_difference", 0), ("hessian_score_difference", 1)):
        theirs = torch.stack([pair[index] for pair in expected])
        # Both float32; the quick one must be the same number before it is worth timing.
        torch.testing.assert_close(torch.tensor(row[f"{metric}_seeds"]), theirs, rtol=1e-3, atol=0)

    seeds = len(SEEDS)
    table.add("sample-forward", torch.no_grad()(forward), per=seeds)
    table.add("one prompt, per seed", lambda: score(1), per=seeds)
    table.add("five prompts, per prompt and seed", lambda: score(5), per=5 * seeds)
    table.add("authors' procedure, per prompt and seed", authors, per=seeds)
    benchmark.pedantic(table.measure, rounds=1)

    ratios = {row.what: row.ratio() for row in table.rows}
    one, five = ratios["one prompt, per seed"], ratios["five prompts, per prompt and seed"]
    further = (5 * five - one) / 4
    summary = {
        "sample-forwards per seed, first prompt": one,
        "sample-forwards per seed, each further prompt": further,
        "authors' procedure over ours, each further prompt": ratios["authors' procedure, per prompt and seed"]
        / further,
    }
    print("".join(f"\n{what}: {number:.2f}" for what, number in summary.items()))
    benchmark.extra_info.update(summary)
