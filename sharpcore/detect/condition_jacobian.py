"""condition_jacobian: how strongly the score hangs on the prompt's embedding, ||d s / d c||_F."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sharpcore.detect.detector import Cost, Detector
from sharpcore.detect.evidence import Evidence
from sharpcore.detect.options import check_integer
from sharpcore.krylov.probes import probes

# Of the random vectors, apart from those of the other detectors.
_SEED = 1


class ConditionJacobian(Detector):
    """The Frobenius norm of the derivative of the score by the prompt's embedding, from `probes` vjps.

    E||J^T z||^2 = ||J||_F^2 for random signs z; the root of the mean. The embedding is that of the tokens
    (`encoder_hidden_states`). The network is linearized once more, in its embedding in place of its latent.
    """

    name = "condition_jacobian"
    source = "Shin 2026, OpenReview pY2P28M9Iv"
    needs_embedding = True

    def __init__(self, *, probes: int = 4) -> None:
        self.probes = check_integer("probes", probes, 1)

    def parts(self, dimension: int) -> Mapping[str, Cost]:
        return {f"{self.probes} gradients of the embedding": Cost(passes=1, products=self.probes)}

    def compute(self, evidence: Evidence) -> Tensor:
        x = evidence.state.x
        z = probes(
            "rademacher", _SEED, samples=evidence.state.seeds, count=self.probes, dimension=x[0].numel(),
            device=x.device, dtype=x.dtype,
        ).reshape(-1, *x.shape)  # fmt: skip
        gradients = evidence.embedding_gradients(z).double()
        return gradients.flatten(2).square().sum(2).mean(0).sqrt()
