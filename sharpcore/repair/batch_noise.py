"""batch_noise: moves of the initial noise without gradients, guidance late (Han et al., NeurIPS 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpcore.repair.descent import squared_norms
from sharpcore.repair.method import (
    Guide,
    Repair,
    check_count,
    check_not_negative,
    check_positive,
    check_threshold,
)
from sharpcore.repair.samples import Samples

SOURCE = (
    "Han et al., Adjusting Initial Noise to Mitigate Memorization in Text-to-Image Diffusion Models, NeurIPS "
    "2025, arXiv 2510.08625"
)
# Entries of a Stable Diffusion latent of 64x64, for which the paper gives rho.
_PAPER_ENTRIES = 4 * 64 * 64


@dataclass(frozen=True)
class BatchNoise(Repair):
    """x <- x - strength (e_D(x + rho e_D / ||e_D||) - e_D(x)), a few times; no guidance before `start`.

    "Batch-wise mitigation", algorithm 1 of arXiv 2510.08625: e_D is the difference of predicted noises at the
    first step, and the step is that of sharpness-aware minimization without second derivatives. All samples
    of a batch are moved at once, each with its own norm, so that a sample does not depend on the others.

    Parameters
    ----------
    strength, moves
        0.7 and 2 for Stable Diffusion 1.4 in the paper, 0.7 and 4 for 2.0.
    rho
        Length of the step to the neighbour. The paper has 50 and 30 for latents of norm 128; by default 50
        times what this latent's norm is of that.
    start
        Timesteps above this are not guided (scale 0); 900 in the paper (918 for 2.0).
    """

    name = "batch_noise"
    source = SOURCE
    changes = ("noise", "guidance")
    cost = "for each move two forward passes of both branches"

    strength: float = 0.7
    moves: int = 2
    rho: float | None = None
    start: float = 900.0

    def __post_init__(self) -> None:
        check_positive(strength=self.strength)
        check_count(moves=self.moves)
        check_threshold(rho=self.rho)
        check_not_negative(start=self.start)

    def prepare(self, samples: Samples) -> None:
        """Replace the noise; `path` has ||e_D|| before each move and after the last."""
        rows = range(len(samples))
        with samples.work.timed(rows):
            here = self._difference(samples)
            for _ in range(self.moves):
                norms = _note(samples, here)
                rho = self.rho
                if rho is None:
                    rho = 50 * math.sqrt(here[0].numel() / _PAPER_ENTRIES)
                x = samples.seen(samples.noise)
                there = samples.difference(x + rho * here / norms, rows, units="eps")
                samples.noise = samples.noise - self.strength * (there - here).to(samples.noise.dtype)
                here = self._difference(samples)
            _note(samples, here)
        samples.rounds = [self.moves] * len(samples)

    def guide(self, samples: Samples) -> Guide:
        """No guidance at timesteps above `start`."""
        return lambda step, _: samples.guidance_scale if samples.timesteps[step] <= self.start else 0.0

    @torch.no_grad()
    def _difference(self, samples: Samples) -> Tensor:
        return samples.difference(samples.seen(samples.noise), range(len(samples)), units="eps")


def _note(samples: Samples, difference: Tensor) -> Tensor:
    # Where the prompt moves nothing there is no direction: nothing is moved.
    norms = squared_norms(difference).sqrt().clamp_min(torch.finfo(difference.dtype).tiny)
    for path, value in zip(samples.path, norms.tolist(), strict=True):
        path.append(value)
    return norms.to(difference.dtype).reshape(-1, *[1] * (difference.dim() - 1))
