"""curvature_difference: where the prompt makes the landscape sharper, diag(-H(x, prompt)) - diag(-H(x))."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sharpcore.detect.detector import PREDICTIONS, Cost, Detector
from sharpcore.detect.evidence import Evidence
from sharpcore.detect.options import check_choice, check_integer
from sharpcore.krylov.diagonal import METHODS, diagonal
from sharpcore.krylov.estimation import mean_and_error
from sharpcore.krylov.solution import Estimate

_SOURCE = "Kim and Lee, ICML 2026, arXiv 2605.26756"


class CurvatureDifference(Detector):
    """The mean over the latent of diag(-H(x, prompt)) - diag(-H(x, no prompt)), or a map of it.

    In score units, estimated with random vectors, both Hessians with the same ones, so that what they have in
    common cancels. `method` "hutchinson" (Bekas, Kokiopoulou and Saad 2007) takes `probes` of them, whose
    products without a prompt are shared by all prompts of a seed; "xdiag" (Epperly, Tropp and Webber 2024)
    spends as many products, half of them transposed, on a sketch and what is beyond it. The map is summed
    over channels; `error_map` is its standard error.
    """

    name = "curvature_difference"
    source = _SOURCE
    needs_product = True
    has_map = True

    def __init__(self, *, probes: int = 16, method: str = "hutchinson") -> None:
        self.method = check_choice("method", method, METHODS)
        self.probes = check_integer("probes", probes, 2 if method == "hutchinson" else 4)

    def parts(self, dimension: int) -> Mapping[str, Cost]:
        if self.method == "hutchinson":
            name, cost = f"{self.probes} probes", Cost(products=2 * self.probes, shared_products=self.probes)
        else:
            count = dimension if self.probes >= dimension else 2 * (self.probes // 2)
            name, cost = f"xdiag of {self.probes}", Cost(products=2 * count)
        return PREDICTIONS | {name: cost}

    def estimate(self, evidence: Evidence) -> Estimate:
        """The diagonal of -H_D, [B, C, H, W], with a standard error for each entry, float64."""
        return self._estimates(evidence)[0]

    def compute(self, evidence: Evidence) -> Tensor:
        return self.estimate(evidence).value.flatten(1).mean(1)

    def map(self, evidence: Evidence) -> Tensor:
        return self._estimates(evidence)[1][0]

    def error_map(self, evidence: Evidence) -> Tensor:
        """The standard error of the map, [B, H, W]; that of "xdiag" takes the errors of a place's channels as
        independent."""
        return self._estimates(evidence)[1][1]

    def _estimates(self, evidence: Evidence) -> tuple[Estimate, tuple[Tensor, Tensor]]:
        """Of the entries, and of their sums over channels with standard errors."""
        key = ("curvature difference", self.method, self.probes)
        if self.method == "hutchinson":
            return evidence.once(key, lambda: self._hutchinson(evidence))
        return evidence.once(key, lambda: self._xdiag(evidence))

    def _hutchinson(self, evidence: Evidence) -> tuple[Estimate, tuple[Tensor, Tensor]]:
        z, conditional, unconditional = evidence.common_probes(self.probes)
        values = -(z.double() * (conditional - unconditional).double())
        entries, places = (
            mean_and_error(part, torch.zeros_like(part[0])) for part in (values, values.sum(2))
        )
        return Estimate(*entries, self.probes, 2 * self.probes), places

    def _xdiag(self, evidence: Evidence) -> tuple[Estimate, tuple[Tensor, Tensor]]:
        found = diagonal(
            evidence.jacobian(difference=True),
            "xdiag",
            products=self.probes,
            sample_ids=evidence.state.seeds,
            batched=True,
        )
        error = found.standard_error.square().sum(1).sqrt()
        estimate = Estimate(-found.value, found.standard_error, found.probes, found.products)
        return estimate, (estimate.value.sum(1), error)


class CurvatureProxy(Detector):
    """The mean over the latent of (s(x, prompt) - s(x, no prompt))^2, without a product.

    What the curvature difference is where integration by parts holds place by place; the map is summed over
    channels.
    """

    name = "curvature_proxy"
    source = _SOURCE
    has_map = True

    def parts(self, dimension: int) -> Mapping[str, Cost]:
        return PREDICTIONS

    def compute(self, evidence: Evidence) -> Tensor:
        return evidence.difference.double().square().flatten(1).mean(1)

    def map(self, evidence: Evidence) -> Tensor:
        return evidence.difference.double().square().sum(1)
