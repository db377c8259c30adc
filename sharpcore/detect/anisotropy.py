"""anisotropy: whether the prompt pulls along the score where there is hardly noise, and how far where there
is much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from sharpcore.detect.detector import PREDICTIONS, Cost, Detector, sample_norms
from sharpcore.detect.evidence import Evidence
from sharpcore.detect.options import check_float, check_integer


class Anisotropy(Detector):
    """cosine of s_D and the score without a prompt at t near 0, plus ||s_D|| at t near T.

    Both are taken at the pure noise that a trajectory starts from (Asthana and Belagiannis, arXiv
    2601.20642). The cosine is one over the channels of each place, averaged over places.

    Options: `timestep`, the one near 0; `cosine_weight` and `norm_weight` of the two terms, the second in the
    units that were asked for. It is computed at the first step, whatever steps are asked for. The map is the
    cosine at each place.
    """

    name = "anisotropy"
    source = "Asthana and Belagiannis, ICLR 2026, arXiv 2601.20642"
    has_map = True

    def __init__(self, *, timestep: int = 1, cosine_weight: float = 1.0, norm_weight: float = 1.0) -> None:
        self.timestep = check_integer("timestep", timestep, 0)
        self.cosine_weight = check_float("cosine_weight", cosine_weight)
        self.norm_weight = check_float("norm_weight", norm_weight)

    def steps(self, asked: Sequence[int], count: int) -> tuple[int, ...]:
        return (0,)

    def parts(self, dimension: int) -> Mapping[str, Cost]:
        return PREDICTIONS | {f"predictions at {self.timestep}": Cost(passes=2, shared_passes=1)}

    def compute(self, evidence: Evidence) -> Tensor:
        cosine = self.map(evidence).flatten(1).mean(1)
        return self.cosine_weight * cosine + self.norm_weight * sample_norms(evidence.difference)

    def map(self, evidence: Evidence) -> Tensor:
        return evidence.once(("cosine", self.timestep), lambda: self._cosine(evidence))

    def _cosine(self, evidence: Evidence) -> Tensor:
        with_prompt, without = (score.double() for score in evidence.scores_at(self.timestep))
        difference = with_prompt - without
        lengths = difference.norm(dim=1) * without.norm(dim=1)
        # Where a prompt changes nothing there is no direction: the cosine counts as zero.
        return (difference * without).sum(1) / lengths.clamp_min(1e-300)
