"""score_difference: how far the prompt moves the score, ||s_D||."""

from __future__ import annotations

from torch import Tensor

from sharpcore.detect.evidence import Evidence, Metric, sample_norms


class ScoreDifference(Metric):
    """||s(x, prompt) - s(x, no prompt)||; large for memorized prompts (Wen et al., arXiv 2407.21720)."""

    name = "score_difference"
    source = (
        "Wen et al., Detecting, Explaining, and Mitigating Memorization in Diffusion Models, ICLR 2024, "
        "arXiv 2407.21720"
    )

    def compute(self, evidence: Evidence) -> Tensor:
        return sample_norms(evidence.difference)
