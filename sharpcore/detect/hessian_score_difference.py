"""hessian_score_difference: the sharpness that the prompt adds along its own direction, ||H_D s_D||^2."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sharpcore.detect.detector import PREDICTIONS, Cost, Detector, sample_norms
from sharpcore.detect.evidence import Evidence
from sharpcore.detect.options import check_flag


class HessianScoreDifference(Detector):
    """||(H(x, prompt) - H(x, no prompt)) s_D||^2, or its root with squared=False (arXiv 2412.04140).

    The paper squares, its released code does not: the same ranking for one seed, not for means over several.
    """

    name = "hessian_score_difference"
    source = (
        "Jeon, Kim, No, Understanding and Mitigating Memorization ... via Sharpness ..., ICML 2025, "
        "arXiv 2412.04140"
    )
    needs_product = True

    def __init__(self, *, squared: bool = True) -> None:
        self.squared = check_flag("squared", squared)

    def parts(self, dimension: int) -> Mapping[str, Cost]:
        return PREDICTIONS | {"product of the difference": Cost(products=2)}

    def compute(self, evidence: Evidence) -> Tensor:
        norms = sample_norms(evidence.hessian_difference_product)
        return norms.square() if self.squared else norms
