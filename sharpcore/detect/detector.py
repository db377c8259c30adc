"""What a detector is: a number for each sample, higher for memorized prompts, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sharpcore.errors import InvalidInput

if TYPE_CHECKING:
    from sharpcore.detect.evidence import Evidence


@dataclass(frozen=True)
class Cost:
    """Work for one sample (a prompt with one seed): passes of the network, and products with a Jacobian.

    A pass is of one branch. Products are with the Jacobian of one branch or its transpose, one vector each.
    `shared_passes` and `shared_products` are those among them that do not depend on the prompt: at the first
    step they are done once for each seed, whatever the number of prompts.
    """

    passes: int = 0
    products: int = 0
    shared_passes: int = 0
    shared_products: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.passes + other.passes,
            self.products + other.products,
            self.shared_passes + other.shared_passes,
            self.shared_products + other.shared_products,
        )


#: The pieces of evidence that most detectors share, with their costs.
PROMPT_PREDICTION = {"prediction with the prompt": Cost(passes=1)}
EMPTY_PREDICTION = {"prediction without": Cost(passes=1, shared_passes=1)}
PREDICTIONS = PROMPT_PREDICTION | EMPTY_PREDICTION


class Detector:
    """One number for each sample, higher where the prompt is memorized.

    Subclasses define `name` (that of the column), `source` (the publication), `compute`, and `parts`: the
    pieces of `Evidence` that they use, with the cost of each. Detectors that name the same piece share it.
    Options are keyword arguments of the constructor. Packages register theirs as entry points of the group
    `sharpcore.detectors`, under the detector's name.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    #: Whether it multiplies with the Jacobian of a branch in the latent, so that the branch is linearized.
    needs_product: ClassVar[bool] = False
    #: Whether it is defined in score units alone.
    needs_score_units: ClassVar[bool] = False
    #: Whether it differentiates in the prompt's embedding.
    needs_embedding: ClassVar[bool] = False
    #: Whether it reads cross-attention.
    needs_attention: ClassVar[bool] = False
    #: Whether it looks at the text of the prompt (which token is the last), and not only at its embedding.
    needs_tokens: ClassVar[bool] = False
    #: Whether it has a map of where in the latent the prompt is memorized.
    has_map: ClassVar[bool] = False

    def steps(self, asked: Sequence[int], count: int) -> tuple[int, ...]:
        """The steps at which it is computed, where `asked` are asked for, out of `count`."""
        return tuple(asked)

    def parts(self, dimension: int) -> Mapping[str, Cost]:
        """The pieces of evidence that it uses in one state of so many entries, with their costs."""
        raise TypeError(f"{type(self).__name__} defines no parts")

    def compute(self, evidence: Evidence) -> Tensor:
        """The number of each sample, [B], float64."""
        raise TypeError(f"{type(self).__name__} defines no compute")

    def map(self, evidence: Evidence) -> Tensor:
        """Where in the latent: [B, H, W], float64, higher where it is memorized; if `has_map`."""
        raise TypeError(f"{type(self).__name__} has no map")

    def error_map(self, evidence: Evidence) -> Tensor | None:
        """The standard error of the map, [B, H, W], where it is estimated with one."""
        return None

    def options(self) -> dict[str, object]:
        """The options it was made with: its attributes that are numbers, text or flags."""
        plain = (bool, int, float, str, type(None))
        return {name: value for name, value in vars(self).items() if isinstance(value, plain)}


def cost_of(
    detectors: Iterable[Detector], *, dimension: int, steps: Sequence[int] = (0,), count: int = 50
) -> Cost:
    """What it costs to compute these detectors together for one sample, trajectory included.

    `dimension` is the number of entries of a latent, `steps` are those asked for, out of `count`. Every piece
    of evidence is counted once a step; a step that is only passed through costs a pass of each branch.
    """
    detectors = list(detectors)
    at = {step: [d for d in detectors if step in d.steps(steps, count)] for step in range(count)}
    last = max((step for step, here in at.items() if here), default=-1)
    total = Cost()
    for step in range(last + 1):
        parts: dict[str, Cost] = {} if step == last else dict(PREDICTIONS)
        for detector in at[step]:
            parts |= detector.parts(dimension)
        if any(d.needs_attention for d in at[step]) and not any(d.needs_product for d in at[step]):
            # Read in the pass of the prediction itself, where that is a pass of the network's own.
            parts.pop("attention", None)
            parts |= PROMPT_PREDICTION
        here = sum(parts.values(), Cost())
        total += here if step == 0 else Cost(here.passes, here.products)
    return total


def check_units(detectors: Iterable[Detector], units: str) -> None:
    """Raise InvalidInput where a detector is not defined in these units."""
    for detector in detectors:
        if detector.needs_score_units and units != "score":
            raise InvalidInput(f'units: {detector.name} is defined in "score" units; got {units!r}')


def sample_norms(x: Tensor) -> Tensor:
    """The Euclidean norm of each sample, [B, ...] to [B], accumulated in float64."""
    return torch.linalg.vector_norm(x.double().flatten(1), dim=1)
