"""per_sample_noise: initial noise at which the prompt hardly moves the score (Han et al., NeurIPS 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpcore.repair.batch_noise import SOURCE
from sharpcore.repair.descent import Descent, gradient_of, squared_norms
from sharpcore.repair.method import Repair, check_count, check_not_negative, check_positive, check_threshold
from sharpcore.repair.samples import Samples


@dataclass(frozen=True)
class PerSampleNoise(Repair):
    """AdamW on ||e_D(x)||, the difference of predicted noises at the first step, until below a target.

    "Per-sample mitigation" of arXiv 2510.08625, appendix A; its numbers for Stable Diffusion 1.4 are the
    defaults (lr 0.01, targets 0.7 to 1.5, weight decay 0.01, which is what keeps the noise likely). Their
    loop has no bound; here `rounds` is one.
    """

    name = "per_sample_noise"
    source = SOURCE
    changes = ("noise",)
    cost = "in each round one forward and one backward pass of both branches, and one forward at the end"

    target: float | None = 0.9
    rounds: int = 40
    lr: float = 0.01
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        check_threshold(target=self.target)
        check_count(rounds=self.rounds)
        check_positive(lr=self.lr)
        check_not_negative(weight_decay=self.weight_decay)

    def prepare(self, samples: Samples) -> None:
        """Replace the noise."""

        def evaluate(
            noise: Tensor, rows: Sequence[int], wanted: bool
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            with torch.set_grad_enabled(wanted):
                noise = noise.detach().requires_grad_(wanted)
                loss = squared_norms(samples.difference(samples.seen(noise), rows, units="eps")).sqrt()
            gradient = gradient_of(loss, noise, rows, samples, 2) if wanted else None
            return loss.detach(), loss.detach(), gradient

        descent = Descent(self.lr, self.rounds, self.target, self.weight_decay)
        samples.noise = descent.run(samples.noise, evaluate, samples)
