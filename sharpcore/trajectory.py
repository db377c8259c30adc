"""The guided trajectory of a text-to-image pipeline: its scheduler, initial latents and states."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpcore import conditioning as text
from sharpcore.branches import advance, predict, scale_model_input
from sharpcore.score import schedule


def trajectory_scheduler(pipe: Any, num_inference_steps: int) -> Any:
    """A scheduler of its own (multistep ones keep a history), in float64 where the network is."""
    scheduler = schedule(pipe.scheduler, num_inference_steps)
    if next(pipe.unet.parameters()).dtype is torch.float64:
        # Schedulers hold float32 tables; their square roots would limit a float64 trajectory to single
        # precision.
        for name, table in vars(scheduler).items():
            if isinstance(table, Tensor) and table.dtype is torch.float32 and name != "timesteps":
                setattr(scheduler, name, table.double())
    return scheduler


def initial_latents(
    pipe: Any, generators: Sequence[torch.Generator], scheduler: Any, shape: tuple[int, int, int]
) -> Tensor:
    """The latents [B, C, H, W] that a trajectory starts from, one drawn from each generator."""
    # Drawn the same whatever the process's default dtype and device are.
    noise = [
        torch.randn((1, *shape), generator=generator, dtype=torch.float32, device="cpu")
        for generator in generators
    ]
    return scaled_noise(pipe, torch.cat(noise), scheduler)


def scaled_noise(pipe: Any, noise: Tensor, scheduler: Any) -> Tensor:
    """Standard normal noise [B, C, H, W] as the scheduler's first latents, in the UNet's dtype and place."""
    place = next(pipe.unet.parameters())
    return noise.to(place.device, place.dtype) * getattr(scheduler, "init_noise_sigma", 1.0)


def seeded_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """A generator for each sample, as if it were alone; stochastic schedulers go on drawing from them."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def guided_states(
    pipe: Any,
    latents: Tensor,
    generators: list[torch.Generator],
    scheduler: Any,
    conditional: text.Conditioning,
    unconditional: text.Conditioning,
    guidance_scale: float,
    steps: Sequence[int],
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(step, timestep [], x [B, C, H, W] as the network sees it) at each of the steps, in ascending order.

    The step after the last one has the finished latents. Between them the trajectory is that of
    classifier-free guidance, both branches in one batch of 2 B.
    """
    both = text.concat_conditioning([unconditional, conditional])
    last = max(steps)
    count = len(scheduler.timesteps)
    for step, t in enumerate(scheduler.timesteps[: last + 1]):
        x = scale_model_input(scheduler, latents, t)
        if step in steps:
            yield step, t, x
        if step < last:
            with torch.no_grad():
                pair = torch.cat([x, x])
                timestep = t.to(x.device).expand(pair.shape[0])
                without, with_prompt = predict(pipe.unet, pair, timestep, both).chunk(2)
                guided = without + guidance_scale * (with_prompt - without)
                latents = advance(scheduler, guided, t, latents, generators)
    if count in steps:
        yield count, scheduler.timesteps[-1], latents


def warn_if_cut(pipe: Any, index: int, prompt: str) -> None:
    """Warn where a prompt is longer than the tokenizer's window."""
    dropped = text.dropped_tokens(pipe, prompt)
    if dropped:
        warnings.warn(
            f"prompts[{index}] is longer than the tokenizer's window: its last {dropped} tokens are "
            "ignored, as the pipeline itself does",
            UserWarning,
            stacklevel=3,
        )


def pixels(pipe: Any, shape: tuple[int, int, int]) -> dict[str, int]:
    """Height and width of the image that a latent of this shape [C, H, W] is of."""
    return {"height": shape[1] * pipe.vae_scale_factor, "width": shape[2] * pipe.vae_scale_factor}
