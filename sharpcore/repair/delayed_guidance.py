"""delayed_guidance: no guidance until the trajectory leaves the attraction basin (Jain et al., CVPR 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpcore.arguments import is_number
from sharpcore.errors import InvalidInput
from sharpcore.repair.descent import squared_norms
from sharpcore.repair.method import Guide, Repair, check_threshold
from sharpcore.repair.samples import Samples


@dataclass(frozen=True)
class DelayedGuidance(Repair):
    """Guides with the scale `before` until a transition point, and with the generation's own from it on.

    arXiv 2411.16738 and its released code: inside the basin the magnitude of the difference of predicted
    noises is large, and it falls where the trajectory leaves. The dynamic point is the step after its first
    local minimum, found for each sample while it is generated; the static one is a timestep.

    Parameters
    ----------
    transition
        The timestep at and below which the generation is guided (static; 500 to 650 in the paper's commands,
        more in comparisons); None: dynamic.
    before
        The scale before: 0 is the prediction without the prompt, 1 that with it (the released dynamic code),
        a negative number is the paper's opposite guidance.
    latest
        The timestep at and below which a dynamic generation is guided even if no minimum was found. None:
        never, as in the paper.
    """

    name = "delayed_guidance"
    source = (
        "Jain et al., Classifier-Free Guidance inside the Attraction Basin May Cause Memorization, CVPR "
        "2025, arXiv 2411.16738"
    )
    changes = ("guidance",)
    cost = "none"

    transition: float | None = None
    before: float = 0.0
    latest: float | None = None

    def __post_init__(self) -> None:
        check_threshold(transition=self.transition, latest=self.latest)
        if not is_number(self.before) or not math.isfinite(self.before):
            raise InvalidInput(f"before: expected a number; got {self.before!r}")

    def guide(self, samples: Samples) -> Guide:
        """The scale of each sample."""
        scale, before = samples.guidance_scale, self.before
        if self.transition is not None:
            given = self.transition
            return lambda step, _: scale if samples.timesteps[step] <= given else before
        begun = [False] * len(samples)

        def dynamic(step: int, difference: Tensor) -> Tensor:
            late = self.latest is not None and samples.timesteps[step] <= self.latest
            norms = squared_norms(difference).sqrt().tolist()
            for row, (path, norm) in enumerate(zip(samples.path, norms, strict=True)):
                minimum = len(path) > 1 and path[-2] > path[-1] < norm
                begun[row] = begun[row] or minimum or late
                path.append(norm)
                if not begun[row]:
                    samples.rounds[row] = step + 1
            samples.stopped = list(begun)
            scales = [scale if now else before for now in begun]
            return torch.tensor(scales, dtype=difference.dtype, device=difference.device)

        return dynamic
