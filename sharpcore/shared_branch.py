"""The unconditional branch at the first step: the same for every prompt, computed once for each seed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sharpcore import conditioning as text
from sharpcore.branches import predict, scale_model_input
from sharpcore.linearization import Linearization
from sharpcore.trajectory import initial_latents, pixels, seeded_generators, trajectory_scheduler

if TYPE_CHECKING:
    from sharpcore.pipeline import SharpnessScorer


class SharedBranch:
    """The unconditional branch at the first step: the same for every prompt, computed once for each seed."""

    def __init__(self, scorer: SharpnessScorer) -> None:
        self._scorer = scorer
        #: What depends on a seed alone, beside predictions: see `State.known`.
        self.known: dict[tuple[Hashable, int], Tensor] = {}
        #: Products of the linearizations with vectors that depend on the seeds alone.
        self.products: dict[Hashable, Tensor] = {}
        self._conditioning: text.Conditioning | None = None
        self._parts: list[tuple[tuple[int, ...], Linearization]] = []
        self._predictions: dict[int, Tensor] = {}

    def keep_only(self, seeds: Sequence[int]) -> None:
        """Forget what is known of other seeds, predictions excepted: it may be many times as much."""
        self.known = {key: value for key, value in self.known.items() if key[1] in seeds}

    def conditioning(self, shape: tuple[int, int, int]) -> text.Conditioning:
        if self._conditioning is None:
            self._conditioning = text.encode_unconditional(
                self._scorer.pipe, **pixels(self._scorer.pipe, shape)
            )
        return self._conditioning

    def _inputs(
        self, seeds: Sequence[int], shape: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor, text.Conditioning]:
        scorer = self._scorer
        scheduler = trajectory_scheduler(scorer.pipe, scorer.num_inference_steps)
        latents = initial_latents(scorer.pipe, seeded_generators(seeds), scheduler, shape)
        t = scheduler.timesteps[0]
        x = scale_model_input(scheduler, latents, t)
        conditioning = text.repeat_conditioning(self.conditioning(shape), len(seeds))
        return x, t.to(scorer._device).expand(len(seeds)), conditioning

    @torch.no_grad()
    def linearizations(self, seeds: tuple[int, ...], shape: tuple[int, int, int]) -> list[Linearization]:
        """Linearizations that together cover the seeds, in their order: the first alone, then the others."""
        done = tuple(seed for part, _ in self._parts for seed in part)
        if done != seeds:
            self.products = {}
            if done != seeds[:1]:
                self._parts = []
            parts = (seeds[:1], seeds[1:]) if done != seeds[:1] else (seeds[1:],)
            for part in filter(None, parts):
                lin = self._scorer._branch().at(*self._inputs(part, shape))
                if self._scorer._memory is None:
                    self._scorer._learn_memory(lin)
                self._parts.append((part, lin))
                self._predictions.update(zip(part, lin.value, strict=True))
        return [lin for _, lin in self._parts]

    @property
    def linearized(self) -> bool:
        """Whether residuals are kept."""
        return bool(self._parts)

    def drop_linearizations(self) -> None:
        """Free the residuals; predictions stay."""
        self._parts, self.products = [], {}

    @torch.no_grad()
    def prediction(self, seeds: tuple[int, ...], shape: tuple[int, int, int]) -> Tensor:
        """The unconditional predictions alone, [S, C, H, W], without a linearization."""
        missing = tuple(seed for seed in seeds if seed not in self._predictions)
        if missing:
            x, timestep, conditioning = self._inputs(missing, shape)
            values = predict(self._scorer.pipe.unet, x, timestep, conditioning)
            self._predictions.update(zip(missing, values, strict=True))
        return torch.stack([self._predictions[seed] for seed in seeds])
