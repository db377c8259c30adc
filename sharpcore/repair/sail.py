"""sail: initial noise at which the prompt adds little curvature (Jeon, Kim, No, ICML 2025)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpcore.errors import InvalidInput
from sharpcore.repair.descent import Descent, Objective, gradient_of, squared_norms
from sharpcore.repair.method import (
    Repair,
    check_count,
    check_not_negative,
    check_positive,
    check_threshold,
)
from sharpcore.repair.samples import Samples

SOURCE = (
    "Jeon, Kim, No, Understanding and Mitigating Memorization ... via Sharpness ..., ICML 2025, "
    "arXiv 2412.04140"
)


def with_norm_of(noise: Tensor, drawn: Tensor) -> Tensor:
    """Each sample of `noise` scaled to the norm of that of `drawn`, [b, ...]."""
    norms = [tensor.flatten(1).norm(dim=1) for tensor in (drawn, noise)]
    return noise * (norms[0] / norms[1]).reshape(-1, *[1] * (noise.dim() - 1))


def with_spectrum_of(noise: Tensor, drawn: Tensor) -> Tensor:
    """The noise with the amplitude of `drawn` at each spatial frequency of each channel, [b, C, H, W].

    Only phases stay as they are; an amplitude of zero, which has none, takes the phase of `drawn`.
    """
    found, wanted = torch.fft.rfft2(noise), torch.fft.rfft2(drawn)
    size = found.abs()
    phases = torch.where(size > 0, found / size.clamp_min(torch.finfo(size.dtype).tiny), torch.sgn(wanted))
    return torch.fft.irfft2(wanted.abs() * phases, s=noise.shape[-2:])


#: What of the drawn noise each step gives back.
KEEPS: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "nothing": None,
    "norm": with_norm_of,
    "spectrum": with_spectrum_of,
}


@dataclass(frozen=True)
class Sail(Repair):
    """Sharpness-aware initialization: descends on ||s_D(x + delta s_D) - s_D(x)||^2 + alpha ||x||^2.

    s_D = s(x, prompt) - s(x, no prompt) at the first step, score units (arXiv 2412.04140, section 5.1); the
    first term over delta^2 is ||H_D s_D||^2 to first order. The direction s_D is renewed at each step.

    Parameters
    ----------
    threshold
        A sample stops once its curvature term, over delta^2, is at most this. The paper thresholds the whole
        loss; the curvature alone is what `hessian_score_difference` measures, so a value for it can be read
        off prompts that are not memorized. It depends on the model: there is no default.
    rounds
        Most steps. Each costs two forward and two backward passes of both branches, about six steps of the
        generation: with 8 rounds, one of 50 steps takes twice as long at most.
    lr
        Adam's step size, 0.05 in the paper: what one entry of the noise moves in a round.
    alpha
        Weight of ||x||^2. The paper has 0.05 and 0.01 for losses whose terms are not squared in its released
        code, where it pulls with a force of alpha; squared it is 2 alpha ||x|| and would outweigh the
        curvature, so the default is smaller.
    delta
        Step of the difference in units of s_D.
    through_direction
        Whether the gradient takes into account that the direction s_D(x) changes with x, too. It costs
        nothing. Where s_D is affine in x the other part is zero: without it the loss has no gradient although
        ||H_D s_D|| has one.
    keep
        What of the drawn noise is given back after each step, an addition of ours: a pull towards 0 is not
        what keeps standard normal noise of 1,000 dimensions likely. "spectrum": the amplitude of every
        spatial frequency of every channel, so that only phases are optimized; "norm": the norm alone, with
        which low frequencies can leave what noise has, and images with them; "nothing": as in the paper.
    """

    name = "sail"
    source = SOURCE
    changes = ("noise",)
    cost = "in each round two forward and two backward passes of both branches, and two forward at the end"

    threshold: float | None = None
    rounds: int = 8
    lr: float = 0.05
    alpha: float = 1e-4
    delta: float = 1.0
    through_direction: bool = True
    keep: str = "spectrum"

    def __post_init__(self) -> None:
        check_threshold(threshold=self.threshold)
        check_count(rounds=self.rounds)
        check_positive(lr=self.lr, delta=self.delta)
        check_not_negative(alpha=self.alpha)
        if self.keep not in KEEPS:
            raise InvalidInput(f"keep: expected one of {', '.join(KEEPS)}; got {self.keep!r}")

    def prepare(self, samples: Samples) -> None:
        """Replace the noise."""
        descent = Descent(self.lr, self.rounds, self.threshold)
        project = KEEPS[self.keep]
        samples.noise = descent.run(samples.noise, self.objective(samples), samples, project)

    def objective(self, samples: Samples) -> Objective:
        """The loss as a function of the noise; what is watched is the curvature term."""

        def evaluate(
            noise: Tensor, rows: Sequence[int], wanted: bool
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            with torch.set_grad_enabled(wanted):
                noise = noise.detach().requires_grad_(wanted)
                x = samples.seen(noise)
                here = samples.difference(x, rows)
                direction = here if self.through_direction else here.detach()
                there = samples.difference(x + self.delta * direction, rows)
                change = squared_norms(there - here)
                loss = change + self.alpha * squared_norms(noise)
            gradient = gradient_of(loss, noise, rows, samples, 4) if wanted else None
            return loss.detach(), change.detach() / self.delta**2, gradient

        return evaluate
