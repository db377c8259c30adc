"""The posterior of clean data given a noisy state: covariance by Tweedie's formula, and its main modes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharpcore.autoencoder import decode_latents
from sharpcore.curvature import Curvature
from sharpcore.errors import InvalidInput
from sharpcore.krylov.block_lanczos import block_lanczos
from sharpcore.krylov.solution import Result
from sharpcore.operators import CurvatureOperator

Level = float | Tensor


class PosteriorCovariance(CurvatureOperator):
    """Cov[x_0 | x_t] = (sigma^2 / alpha^2) (I + sigma^2 H), the covariance of clean data given a noisy state.

    `hessian` is that of log p_t in score units at B states x_t = alpha x_0 + sigma e; `alpha` and `sigma` are
    positive numbers or tensors [B]. Products and shapes are those of the Hessian. Of a learned score the
    covariance may have small negative eigenvalues. Second-order Tweedie formula: Efron (2011), Meng et al.
    (arXiv 2111.04726). Raises InvalidInput for levels that are not positive.
    """

    def __init__(self, hessian: CurvatureOperator, alpha: Level, sigma: Level) -> None:
        if not isinstance(hessian, CurvatureOperator):
            raise InvalidInput(f"hessian: expected a curvature operator; got {type(hessian).__name__}")
        self.hessian = hessian
        x = hessian._template
        for name, level in (("alpha", alpha), ("sigma", sigma)):
            value = torch.as_tensor(level, dtype=torch.float64)
            if value.dim() > 1 or (value.dim() == 1 and value.shape != x.shape[:1]):
                raise InvalidInput(
                    f"{name}: expected a number, or one for each of the {x.shape[0]} samples; "
                    f"got shape {list(value.shape)}"
                )
            if not bool((torch.isfinite(value) & (value > 0)).all()):
                raise InvalidInput(f"{name}: expected positive finite numbers; got {value.tolist()}")
            value = value.to(x.device)
            setattr(self, name, value.reshape(-1, *[1] * (x.dim() - 1)) if value.dim() else value)
        self._on_identity = (self.sigma / self.alpha) ** 2
        self._on_hessian = self._on_identity * self.sigma**2

    alpha: Tensor
    sigma: Tensor

    @property
    def _template(self) -> Tensor:  # type: ignore[override]
        return self.hessian._template

    @property
    def T(self) -> CurvatureOperator:
        return self

    @property
    def rounding(self) -> float:
        return self.hessian.rounding

    def _multiply(self, vectors: Tensor) -> Tensor:
        product = self.hessian._multiply(vectors)
        return vectors * self._on_identity.to(vectors.dtype) + product * self._on_hessian.to(vectors.dtype)

    def _multiply_transposed(self, vectors: Tensor) -> Tensor:
        return self._multiply(vectors)


@dataclass(frozen=True)
class PosteriorModes:
    """The directions in which clean data are least certain, given B noisy states.

    `variances` [B, k] float64, descending, are the largest eigenvalues of Cov[x_0 | x_t] (in squared units of
    the latent), `modes` [B, k, *sample_shape] float64 their eigenvectors of norm 1, `residuals` [B, k] =
    ||C v - variance v||; `mean` [B, *sample_shape] is E[x_0 | x_t], where it is known; `result` says how the
    solver ended.
    """

    variances: Tensor
    modes: Tensor
    residuals: Tensor
    mean: Tensor | None
    result: Result

    @property
    def standard_deviations(self) -> Tensor:
        """Square roots of the variances, [B, k]; 0 for the negative ones that a learned score may have."""
        return self.variances.clamp_min(0).sqrt()

    def latents(self, scales: Sequence[float] = (-2, -1, 0, 1, 2)) -> Tensor:
        """mean + c * standard deviation * mode for each c of `scales`: [B, k, len(scales), *sample_shape].

        float64. Raises InvalidInput where the mean is not known or a scale is not finite.
        """
        if self.mean is None:
            raise InvalidInput("mean: expected the posterior mean; give it to posterior_modes")
        if not scales or not all(
            isinstance(c, (int, float)) and not isinstance(c, bool) and math.isfinite(c) for c in scales
        ):
            raise InvalidInput(f"scales: expected finite numbers; got {scales!r}")
        steps = torch.tensor(scales, dtype=torch.float64, device=self.modes.device)
        trailing = (1,) * (self.modes.dim() - 2)
        moved = self.modes * self.standard_deviations.reshape(*self.variances.shape, *trailing)
        along = moved.unsqueeze(2) * steps.reshape(-1, *trailing)
        return self.mean.to(moved).unsqueeze(1).unsqueeze(1) + along

    def images(
        self, pipe: Any, scales: Sequence[float] = (-2, -1, 0, 1, 2), *, output_type: str = "pil"
    ) -> Any:
        """`latents` through the pipeline's VAE: images from `scales[0]` to the last along each mode.

        output_type "pil" gives lists [B][k][len(scales)] of PIL images, "pt" a tensor [B, k, len(scales), 3,
        height, width] in [0, 1]. Raises InvalidInput for another output type or a pipeline without a VAE.
        """
        if output_type not in ("pil", "pt"):
            raise InvalidInput(f"output_type: expected 'pil' or 'pt'; got {output_type!r}")
        latents = self.latents(scales)
        decoded = decode(pipe, latents.flatten(0, 2))
        if output_type == "pt":
            return decoded.unflatten(0, latents.shape[:3])
        pictures = pipe.image_processor.numpy_to_pil(decoded.permute(0, 2, 3, 1).float().cpu().numpy())
        samples, modes, count = latents.shape[:3]
        return [
            [pictures[(b * modes + m) * count : (b * modes + m + 1) * count] for m in range(modes)]
            for b in range(samples)
        ]


def posterior_modes(
    source: Curvature | PosteriorCovariance,
    k: int = 4,
    *,
    mean: Tensor | None = None,
    block: int = 2,
    tolerance: float | None = None,
    max_products: int | None = None,
    seed: int = 0,
) -> PosteriorModes:
    """The k main modes of Cov[x_0 | x_t] at each of B states, by block Lanczos.

    Args:
        source: what `curvature_at` gives, which knows its mean, or a `PosteriorCovariance`.
        mean: E[x_0 | x_t], shape of x, for a covariance that is given itself.
        block, tolerance, max_products, seed: as in `sharpcore.krylov.block_lanczos`.

    Raises InvalidInput for bad arguments, NonFiniteError where a product is not finite.
    """
    if isinstance(source, Curvature):
        covariance, mean = source.posterior_covariance, source.posterior_mean if mean is None else mean
    elif isinstance(source, PosteriorCovariance):
        covariance = source
    else:
        raise InvalidInput(
            f"source: expected a Curvature or a PosteriorCovariance; got {type(source).__name__}"
        )
    x = covariance._template
    if mean is not None and mean.shape != x.shape:
        raise InvalidInput(f"mean: expected shape {list(x.shape)}; got {list(mean.shape)}")
    # The covariance has the Hessian's eigenvectors; its own products nearly cancel where noise is all.
    found = block_lanczos(
        covariance.hessian,
        k,
        "largest",
        block=block,
        tolerance=tolerance,
        max_products=max_products,
        seed=seed,
        batched=True,
    )
    assert found.vectors is not None
    on_identity, on_hessian = (
        factor.double().reshape(-1, 1) for factor in (covariance._on_identity, covariance._on_hessian)
    )
    variances, residuals = on_identity + on_hessian * found.values, on_hessian * found.residuals
    return PosteriorModes(variances.flip(1), found.vectors.flip(1), residuals.flip(1), mean, found.result)


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Latents [N, C, H, W] through the pipeline's VAE: images [N, 3, height, width] in [0, 1], on
    the CPU."""
    if getattr(pipe, "vae", None) is None:
        raise InvalidInput(f"pipe: expected a pipeline with a VAE; {type(pipe).__name__} has none")
    return torch.cat([decode_latents(pipe, part) for part in latents.split(16)])
