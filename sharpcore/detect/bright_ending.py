"""bright_ending: how much the prompt's end token is attended to at the last step, and where."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sharpcore.detect.detector import Cost, Detector
from sharpcore.detect.evidence import Evidence
from sharpcore.errors import InvalidInput


class BrightEnding(Detector):
    """The attention that the end token gets at the last step: a mean over the latent, or a map.

    Memorized places look at the end token when the picture is nearly done, others do not (Chen, Liu, Shah and
    Xu, arXiv 2410.21665). The map is the mean over heads and over the cross-attention layers with the most
    places, at the latent's size. It is computed at the last step of the trajectory, whatever steps are asked
    for, and so costs a whole generation.
    """

    name = "bright_ending"
    source = (
        "Chen, Liu, Shah, Xu, Exploring Local Memorization ... Bright Ending ..., ICLR 2025, arXiv 2410.21665"
    )
    needs_attention = True
    needs_tokens = True
    has_map = True

    def steps(self, asked: Sequence[int], count: int) -> tuple[int, ...]:
        return (count - 1,)

    def parts(self, dimension: int) -> Mapping[str, Cost]:
        return {"attention": Cost(passes=1)}

    def compute(self, evidence: Evidence) -> Tensor:
        return self.map(evidence).flatten(1).mean(1)

    def map(self, evidence: Evidence) -> Tensor:
        height, width = evidence.state.x.shape[-2:]
        maps = [layer.end for layer in evidence.attention]
        if any(part is None for part in maps):
            raise InvalidInput("bright_ending: it needs the prompts themselves, to know their end tokens")
        places = max(part.shape[1] for part in maps if part is not None)
        found = torch.stack([part for part in maps if part is not None and part.shape[1] == places]).mean(0)
        # Strided layers round a side up, so that the two sides of a map follow from their product.
        scale = max(1, round(math.sqrt(height * width / places)))
        rows, columns = -(-height // scale), -(-width // scale)
        if rows * columns != places:
            raise InvalidInput(
                f"bright_ending: {places} places are no whole fraction of a latent of {height} x {width}"
            )
        picture = found.reshape(-1, 1, rows, columns)
        return F.interpolate(picture, (height, width), mode="bilinear", align_corners=False).squeeze(1)
