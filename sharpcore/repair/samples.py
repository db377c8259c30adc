"""Samples about to be generated: what a repair sees of them, may change, and has counted."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sharpcore import conditioning as text
from sharpcore.branches import Branch, predict, scale_model_input
from sharpcore.lowering import WeightCopies
from sharpcore.score import noise_level, prediction_type_of, score_factors
from sharpcore.trajectory import scaled_noise, trajectory_scheduler


class Work:
    """What was run for each of B samples: lists of B numbers.

    `forwards` counts passes of the network, one for each branch; `backwards` the same backwards, by autograd;
    `products` those with the Jacobian or its transpose, one for each branch. `seconds` is the sample's share
    of the wall time: what a batch takes is divided among those that are in it.
    """

    def __init__(self, count: int) -> None:
        self.forwards, self.backwards, self.products = [0] * count, [0] * count, [0] * count
        self.seconds = [0.0] * count

    def add(self, rows: Sequence[int], *, forwards: int = 0, backwards: int = 0, products: int = 0) -> None:
        """Count for each of the samples `rows`."""
        for row in rows:
            self.forwards[row] += forwards
            self.backwards[row] += backwards
            self.products[row] += products

    @contextmanager
    def timed(self, rows: Sequence[int]) -> Iterator[None]:
        """Share the time that passes meanwhile among the samples `rows`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            share = (time.perf_counter() - start) / max(1, len(rows))
            for row in rows:
                self.seconds[row] += share


class Samples:
    """B samples before their generation.

    Attributes
    ----------
    pipe, prompts, seeds, guidance_scale
        What is generated; one prompt and one seed for each sample. The pipeline must not be changed.
    noise
        The initial latents as they are given to `pipe(latents=...)`, [B, C, H, W], standard normal, float32
        (float64 where the UNet is). A repair may change them.
    conditional, unconditional
        Keyword arguments of the network with and without the prompt, B rows each. A repair may change them.
    timesteps, alpha, sigma
        Those of the scheduler; noise level of the first one.
    path, rounds, stopped
        For each sample what an optimization left: the loss at each point, how many steps it took, and whether
        it came below its threshold (None where there was none to come below).
    work
        What was run for each sample.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        seeds: Sequence[int],
        noise: Tensor,
        conditional: text.Conditioning,
        unconditional: text.Conditioning,
        *,
        num_inference_steps: int,
        guidance_scale: float,
        backend: str = "auto",
    ) -> None:
        self.pipe, self.prompts, self.seeds = pipe, tuple(prompts), tuple(seeds)
        self.noise, self.guidance_scale = noise, guidance_scale
        self.conditional, self.unconditional = dict(conditional), dict(unconditional)
        self._scheduler = trajectory_scheduler(pipe, num_inference_steps)
        self._prediction_type = prediction_type_of(self._scheduler)
        self.timesteps: list[float] = self._scheduler.timesteps.double().tolist()
        self.alpha, self.sigma = noise_level(self._scheduler, self._scheduler.timesteps[0])
        count = len(self.prompts)
        self.path: list[list[float]] = [[] for _ in range(count)]
        self.rounds: list[int] = [0] * count
        self.stopped: list[bool | None] = [None] * count
        self.work = Work(count)
        # Branches of a batch size each: a sample that stops leaves a smaller batch, which is traced anew.
        self._backend = backend
        self._branches: dict[int, Branch] = {}
        self._copies: WeightCopies = {}

    def __len__(self) -> int:
        return len(self.prompts)

    def seen(self, noise: Tensor) -> Tensor:
        """What the network sees of initial latents [b, C, H, W] at the first step, in its dtype."""
        latents = scaled_noise(self.pipe, noise, self._scheduler)
        return scale_model_input(self._scheduler, latents, self._scheduler.timesteps[0])

    def difference(
        self,
        x: Tensor,
        rows: Sequence[int],
        *,
        hidden: Tensor | None = None,
        units: str = "score",
    ) -> Tensor:
        """s_D of the samples `rows` at states x [b, C, H, W] of the first step, differentiable.

        `hidden` [b, tokens, channels] takes the place of the embedded prompts. Both branches are one batch:
        two forward passes for each sample.
        """
        pair = predict(
            self.pipe.unet, torch.cat([x, x]), self._times(2 * len(rows), x), self._both(rows, hidden)
        )
        self.work.add(rows, forwards=2)
        without, with_prompt = pair.chunk(2)
        return (with_prompt - without) * self._factor(x, units)

    def linearized(self, x: Tensor, rows: Sequence[int]) -> LinearizedDifference:
        """s_D of the samples `rows` at states x [b, C, H, W], with its exact Jacobian, until the next call.

        Score units; costs two forward passes for each sample.
        """
        branch = self._branches.get(len(rows))
        if branch is None:
            branch = Branch(self.pipe.unet, self._backend, "float32", self._copies)
            self._branches[len(rows)] = branch
        lin = branch.at(torch.cat([x, x]), self._times(2 * len(rows), x), self._both(rows, None))
        self.work.add(rows, forwards=2)
        return LinearizedDifference(lin, self._factor(x, "score"), rows, self.work)

    def _times(self, count: int, x: Tensor) -> Tensor:
        return self._scheduler.timesteps[0].to(x.device).expand(count)

    def _factor(self, x: Tensor, units: str) -> Tensor:
        return score_factors(x, self.alpha, self.sigma, self._prediction_type, units)[0].detach()

    def _both(self, rows: Sequence[int], hidden: Tensor | None) -> text.Conditioning:
        conditional = text.select_conditioning(self.conditional, rows)
        if hidden is not None:
            conditional["encoder_hidden_states"] = hidden
        return text.concat_conditioning([text.select_conditioning(self.unconditional, rows), conditional])


class LinearizedDifference:
    """s_D at a point, [b, ...], and the Jacobian J_D there: that with the prompt less that without."""

    def __init__(self, linearization: Any, factor: Tensor, rows: Sequence[int], work: Work) -> None:
        self._linearization, self._factor = linearization, factor
        self._rows, self._work = rows, work
        without, with_prompt = linearization.value.chunk(2)
        self.value: Tensor = (with_prompt - without) * factor

    def jvp(self, tangents: Tensor) -> Tensor:
        """J_D times one vector for each sample, [b, ...]."""
        pair = torch.cat([tangents, tangents]).unsqueeze(0)
        without, with_prompt = self._linearization.jvp(pair).squeeze(0).chunk(2)
        self._work.add(self._rows, products=2)
        return (with_prompt - without) * self._factor

    def vjp(self, cotangents: Tensor) -> Tensor:
        """The transpose of J_D times one vector for each sample, [b, ...]."""
        scaled = cotangents * self._factor
        pair = torch.cat([-scaled, scaled]).unsqueeze(0)
        without, with_prompt = self._linearization.vjp(pair).squeeze(0).chunk(2)
        self._work.add(self._rows, products=2)
        return without + with_prompt
