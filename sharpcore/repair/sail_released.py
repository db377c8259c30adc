"""sail_released: the loss of the code that was published with SAIL, which is not the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpcore.repair.descent import Descent, gradient_of, squared_norms
from sharpcore.repair.method import Repair, check_count, check_not_negative, check_positive, check_threshold
from sharpcore.repair.sail import SOURCE
from sharpcore.repair.samples import Samples


@dataclass(frozen=True)
class SailReleased(Repair):
    """Descends on ||e_D(x + e_D / ||e_D||)|| + alpha ||x||.

    As github.com/Dongjae0324/sharpness_memorization_diffusion (local_model/pipe.py) does it; e_D is the
    difference of predicted noises. Against the paper's loss: eps units, norms without the square, a step of
    length one in the direction of e_D whatever its size, and the value there, not its difference to the one
    at x, so that it is the score difference at a neighbour and no curvature. The threshold is for the whole
    loss. The direction is that of the drawn noise in every round (its input is made once, before the loop),
    while its gradient is taken; `renew_direction` renews it. Numbers are those of the code for Stable
    Diffusion 1.4; for 2.0 it has alpha = 0.01 and thresholds of 4 to 6.

    Not taken over: it optimizes eight drawings and takes those that come below the threshold first; where too
    few do, it repeats, with the same drawings twice and then with others and a threshold 0.1 higher, without
    a bound, and the same latent may be taken more than once. Here a seed gives one latent, after `rounds`
    steps at most. For v prediction it takes (x - alpha v) / sigma for the noise; here that
    is alpha v + sigma x.
    """

    name = "sail_released"
    source = f"{SOURCE}, released code"
    changes = ("noise",)
    cost = "in each round two forward and two backward passes of both branches, and two forward at the end"

    threshold: float | None = 8.2
    rounds: int = 10
    lr: float = 0.05
    alpha: float = 0.05
    renew_direction: bool = False

    def __post_init__(self) -> None:
        check_threshold(threshold=self.threshold)
        check_count(rounds=self.rounds)
        check_positive(lr=self.lr)
        check_not_negative(alpha=self.alpha)

    def prepare(self, samples: Samples) -> None:
        """Replace the noise."""
        drawn = samples.noise

        def evaluate(
            noise: Tensor, rows: Sequence[int], wanted: bool
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            with torch.set_grad_enabled(wanted):
                noise = noise.detach().requires_grad_(wanted)
                x = samples.seen(noise)
                # The same values as of the drawn noise, the gradient as of the present one.
                first = x if self.renew_direction else x + (samples.seen(drawn[list(rows)]) - x).detach()
                along = samples.difference(first, rows, units="eps")
                norms = squared_norms(along).sqrt().to(x.dtype).clamp_min(torch.finfo(x.dtype).tiny)
                unit = along / norms.reshape(-1, *[1] * (x.dim() - 1))
                there = samples.difference(x + unit, rows, units="eps")
                loss = squared_norms(there).sqrt() + self.alpha * squared_norms(noise).sqrt()
            gradient = gradient_of(loss, noise, rows, samples, 4) if wanted else None
            return loss.detach(), loss.detach(), gradient

        samples.noise = Descent(self.lr, self.rounds, self.threshold).run(drawn, evaluate, samples)
