"""score_difference: how far the prompt moves the score, ||s_D||."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sharpcore.detect.detector import PREDICTIONS, Cost, Detector, sample_norms
from sharpcore.detect.evidence import Evidence


class ScoreDifference(Detector):
    """||s(x, prompt) - s(x, no prompt)||; large for memorized prompts (Wen et al., arXiv 2407.21720).

    The map is the length of the difference at each place of the latent, over its channels.
    """

    name = "score_difference"
    source = (
        "Wen et al., Detecting, Explaining, and Mitigating Memorization in Diffusion Models, ICLR 2024, "
        "arXiv 2407.21720"
    )
    has_map = True

    def parts(self, dimension: int) -> Mapping[str, Cost]:
        return PREDICTIONS

    def compute(self, evidence: Evidence) -> Tensor:
        return sample_norms(evidence.difference)

    def map(self, evidence: Evidence) -> Tensor:
        return evidence.difference.double().norm(dim=1)
