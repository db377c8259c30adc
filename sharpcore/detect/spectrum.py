"""Features of the spectrum of H(x, prompt): the share of negative eigenvalues, its ends, its dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sharpcore.detect.detector import PROMPT_PREDICTION, Cost, Detector
from sharpcore.detect.evidence import Evidence
from sharpcore.detect.options import check_choice, check_float, check_integer
from sharpcore.eigenvalues import METHODS, Numbers

_JEON = "Jeon, Kim, No, ICML 2025, arXiv 2412.04140"


class SpectrumFeature(Detector):
    """A number from the spectrum of H(x, prompt), in score units; all of them share one.

    Options: `method` "lanczos", "dense" or "auto" as in `sharpcore.spectrum`; `probes` and `depth` of the
    estimates; `tolerance` of the ends of the spectrum, beside the largest eigenvalue; `max_products`, where
    block Lanczos stops with the best it has.
    """

    needs_product = True
    needs_score_units = True
    column = ""

    def __init__(
        self,
        *,
        method: str = "lanczos",
        probes: int = 4,
        depth: int = 16,
        tolerance: float = 1e-3,
        max_products: int = 64,
    ) -> None:
        self.method = check_choice("method", method, METHODS)
        self.probes, self.depth = check_integer("probes", probes, 2), check_integer("depth", depth, 1)
        self.tolerance = check_float("tolerance", tolerance, above=0.0)
        self.max_products = check_integer("max_products", max_products, 4)

    def _how(self) -> dict[str, Any]:
        return {
            "k": 1, "method": self.method, "condition": "prompt", "block": 4, "tolerance": self.tolerance,
            "max_products": self.max_products, "probes": self.probes, "depth": self.depth,
            "keep_eigenvalues": False,
        }  # fmt: skip

    def parts(self, dimension: int) -> Mapping[str, Cost]:
        """Of block Lanczos an upper bound: it stops where the ends have converged."""
        if Numbers(**self._how()).method_for(dimension) == "dense":
            cost = Cost(products=dimension)
        else:
            # Two for each vector, one transposed: ends, density, and the norms of the same probes.
            cost = Cost(products=2 * (self.max_products + self.probes * self.depth + self.probes))
        return PROMPT_PREDICTION | {f"spectrum {sorted(self._how().items())}": cost}

    def compute(self, evidence: Evidence) -> Tensor:
        rows = evidence.spectrum(**self._how())
        return self.of(torch.tensor([row[self.column] for row in rows], dtype=torch.float64), rows[0])

    def of(self, numbers: Tensor, row: Mapping[str, Any]) -> Tensor:
        """The feature, higher where memorized, from the column's numbers."""
        return -numbers


class NegativeFraction(SpectrumFeature):
    """The share of negative eigenvalues of H(x, prompt): nearly one at a peak."""

    name, source, column = "negative_fraction", _JEON, "nonnegative_fraction"

    def of(self, numbers: Tensor, row: Mapping[str, Any]) -> Tensor:
        return 1 - numbers


class LeastCurvature(SpectrumFeature):
    """Minus the largest eigenvalue of H(x, prompt): the curvature along the flattest direction."""

    name, source, column = "least_curvature", _JEON, "largest_eigenvalue"


class GreatestCurvature(SpectrumFeature):
    """Minus the smallest eigenvalue of H(x, prompt): the curvature along the sharpest direction."""

    name, source, column = "greatest_curvature", _JEON, "smallest_eigenvalue"


class FlipdCodimension(SpectrumFeature):
    """d minus the local intrinsic dimension by FLIPD: -s^2 (tr H + ||score||^2)."""

    name, column = "codimension_flipd", "flipd"
    source = "Kamkari et al., A Geometric View of Data Complexity: FLIPD, arXiv 2406.03537"

    def of(self, numbers: Tensor, row: Mapping[str, Any]) -> Tensor:
        return row["dimension"] - numbers


class LhsdCodimension(SpectrumFeature):
    """d minus the local intrinsic dimension by a smooth count of the spectrum of H (LHSD)."""

    name, source, column = "codimension_lhsd", "LHSD, arXiv 2605.01221", "lhsd"

    def of(self, numbers: Tensor, row: Mapping[str, Any]) -> Tensor:
        return row["dimension"] - numbers


FEATURES = (NegativeFraction, LeastCurvature, GreatestCurvature, FlipdCodimension, LhsdCodimension)
