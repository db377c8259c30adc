"""p_laplace: minus the p-Laplacian of log p_t, from its flux through a small sphere; needs no prompt."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sharpcore.detect.detector import Cost, Detector
from sharpcore.detect.evidence import Evidence
from sharpcore.detect.options import check_float, check_integer
from sharpcore.errors import InvalidInput
from sharpcore.krylov.probes import probes

_SEED = 2


class PLaplace(Detector):
    """-div(|s|^(p-2) s) of the score without a prompt, by its flux through a sphere around the latent.

    d / r times the mean of |s|^(p-2) s . u over unit vectors u at x + r u (Brokman et al., arXiv 2505.08246):
    large at a peak of log p_t. p = 2 is the Laplacian, minus the trace of the Hessian; p = 1 looks at the
    direction of the score alone. Vectors come in pairs u, -u, which takes the constant part of s out of the
    noise.

    Options: `p`; `probes`, how many points on the sphere (even); `radius`, a multiple of the square root of
    d, the length of unit noise.
    """

    name = "p_laplace"
    source = (
        "Brokman et al., Identifying Memorization of Diffusion Models through p-Laplace Analysis, SSVM 2025, "
        "arXiv 2505.08246"
    )

    def __init__(self, *, p: float = 1.0, probes: int = 16, radius: float = 0.02) -> None:
        self.p = check_float("p", p)
        self.probes = check_integer("probes", probes, 2)
        if self.probes % 2:
            raise InvalidInput(f"probes: expected an even number; got {probes}")
        self.radius = check_float("radius", radius, above=0.0)

    def parts(self, dimension: int) -> Mapping[str, Cost]:
        return {self._key: Cost(passes=self.probes, shared_passes=self.probes)}

    @property
    def _key(self) -> str:
        return f"{self.probes} points on a sphere of {self.radius:g}"

    def compute(self, evidence: Evidence) -> Tensor:
        x = evidence.state.x
        d = x[0].numel()
        u = probes(
            "sphere", _SEED, samples=evidence.state.seeds, count=self.probes // 2, dimension=d,
            device=x.device,
        ).reshape(-1, *x.shape) / d**0.5  # fmt: skip
        u, r = torch.cat([u, -u]), self.radius * d**0.5
        field = evidence.unconditional_scores((r * u).to(x.dtype), self._key).double()
        if self.p != 2:
            field = field * field.flatten(2).norm(dim=2).pow(self.p - 2).reshape(*field.shape[:2], 1, 1, 1)
        return -(d / r) * (field * u).flatten(2).sum(2).mean(0)
