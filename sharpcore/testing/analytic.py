"""Score networks of Gaussian and Gaussian-mixture data: p_t, its score and its Hessian in closed form.

The data x_0 come from a mixture sum_k w_k N(mu_k, Sigma_k), and x_t = alpha x_0 + sigma e. Then p_t is the
mixture of N(alpha mu_k, C_k) with C_k = alpha^2 Sigma_k + sigma^2 I. `forward` is what a perfectly trained
network would return, written with ordinary tensor operations on an eigenbasis of Sigma_k; the closed forms
beside it use Cholesky factors of C_k and share no arithmetic with it, so that each checks the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InvalidInput
from ..score import PREDICTION_TYPES

Numbers = float | Sequence[float] | Tensor


class _Components(NamedTuple):
    """Per sample and component: log weight + log density, precision, gradient of the log density."""

    log_joint: Tensor  # [B, K]
    precision: Tensor  # [B, K, d, d]
    gradient: Tensor  # [B, K, d]


class GaussianMixtureScoreNetwork(nn.Module):
    """The exact network for data from a Gaussian mixture, in any of the four parameterizations.

    ``weights`` [K] (normalized here), ``means`` [K, d], ``covariances`` [K, d, d] (positive semi-definite: a
    zero matrix is a memorized point); their common floating dtype is the module's. ``alpha`` and
    ``sigma`` are numbers or [B], fixed for the batch; with ``by_timestep=True`` they are tables [T], and
    row ``timestep`` is used. ``prediction_type`` is one of ``sharpcore.score.PREDICTION_TYPES``.

    All methods take x [B, ...] with d entries a sample, ``timestep`` (an integer, or [] or [B]; ignored
    without ``by_timestep``) and ``condition``: None for the whole mixture (the unconditional branch), an
    integer tensor [B] that picks one component a sample, or a tensor [B, K] of non-negative factors on
    the weights (a mask restricts the mixture). Scores are in score units, grad_x log p_t(x | condition).

    Raises InvalidInput for shapes, dtypes or parameters that do not fit.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    alpha: Tensor
    sigma: Tensor
    _variances: Tensor
    _axes: Tensor

    def __init__(
        self,
        weights: Tensor,
        means: Tensor,
        covariances: Tensor,
        *,
        alpha: Numbers,
        sigma: Numbers,
        prediction_type: str = "epsilon",
        by_timestep: bool = False,
    ) -> None:
        super().__init__()
        if prediction_type not in PREDICTION_TYPES:
            raise InvalidInput(
                f"prediction_type: expected one of {PREDICTION_TYPES}, got {prediction_type!r}"
            )
        if means.ndim != 2 or weights.shape != means.shape[:1] or not means.is_floating_point():
            raise InvalidInput(
                "weights, means: expected floating shapes [K] and [K, d], got "
                f"{tuple(weights.shape)} and {tuple(means.shape)} {means.dtype}"
            )
        if covariances.shape != (*means.shape, means.shape[1]):
            raise InvalidInput(
                f"covariances: expected shape {(*means.shape, means.shape[1])}, "
                f"got {tuple(covariances.shape)}"
            )
        dtype = means.dtype
        weights, covariances = weights.to(dtype), covariances.to(dtype)
        if not bool((weights > 0).all()):
            raise InvalidInput(f"weights: expected positive numbers, got {weights.tolist()}")
        variances, axes = torch.linalg.eigh(covariances)
        scale = variances.abs().amax().clamp_min(torch.finfo(dtype).tiny)
        rounding = 64 * torch.finfo(dtype).eps * means.shape[1] * scale
        if bool((variances < -rounding).any()) or bool(
            (covariances - covariances.mT).abs().amax() > rounding
        ):
            raise InvalidInput("covariances: expected symmetric positive semi-definite matrices")
        alpha, sigma = torch.as_tensor(alpha, dtype=dtype), torch.as_tensor(sigma, dtype=dtype)
        if alpha.ndim > 1 or alpha.shape != sigma.shape or (by_timestep and alpha.ndim != 1):
            raise InvalidInput(
                f"alpha, sigma: expected equal shapes, {'[T]' if by_timestep else '[] or [B]'}, got "
                f"{tuple(alpha.shape)} and {tuple(sigma.shape)}"
            )
        if not bool((sigma > 0).all()):
            raise InvalidInput(f"sigma: expected positive numbers, got {sigma.tolist()}")
        self.prediction_type = prediction_type
        self.by_timestep = by_timestep
        for name, value in (
            ("weights", weights / weights.sum()),
            ("means", means),
            ("covariances", covariances),
            ("alpha", alpha),
            ("sigma", sigma),
            ("_variances", variances.clamp_min(0)),
            ("_axes", axes),
        ):
            self.register_buffer(name, value)

    def forward(
        self, x: Tensor, timestep: Tensor | int | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """The prediction at x: [B, ...] to [B, ...], in this network's parameterization."""
        flat, alpha, sigma = self._inputs(x, timestep)
        offset = flat[:, None, :] - alpha[..., None, None] * self.means
        along = torch.matmul(offset.transpose(0, 1), self._axes)
        level = alpha[..., None, None] ** 2 * self._variances + sigma[..., None, None] ** 2
        level = level.expand(len(flat), *self.means.shape).transpose(0, 1)
        log_joint = self._log_weights(condition) - 0.5 * (along**2 / level + level.log()).sum(-1).mT
        responsibility = log_joint.softmax(-1).unsqueeze(-1)

        def average(component: Tensor) -> Tensor:
            back = torch.matmul(component, self._axes.mT).transpose(0, 1)
            return (responsibility * back).sum(1)

        alpha, sigma = alpha[..., None], sigma[..., None]
        if self.prediction_type != "sample":
            prediction = noise = sigma * average(along / level)
        if self.prediction_type != "epsilon":
            shrinkage = along * self._variances[:, None, :] / level
            prediction = clean = alpha * average(shrinkage) + (responsibility * self.means).sum(1)
        if self.prediction_type == "v_prediction":
            prediction = alpha * noise - sigma * clean
        elif self.prediction_type == "flow":
            prediction = noise - clean
        return prediction.reshape(x.shape)

    def log_density(
        self, x: Tensor, timestep: Tensor | int | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """log p_t(x | condition), shape [B]."""
        return self._components(x, timestep, condition).log_joint.logsumexp(-1)

    def score(
        self, x: Tensor, timestep: Tensor | int | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """grad_x log p_t(x | condition), shape of x."""
        parts = self._components(x, timestep, condition)
        return torch.einsum("bk,bkd->bd", parts.log_joint.softmax(-1), parts.gradient).reshape(x.shape)

    def hessian(
        self, x: Tensor, timestep: Tensor | int | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """The Hessian of log p_t(x | condition), shape [B, d, d]: sum_k r_k (g_k g_k^T - C_k^-1) - s s^T."""
        parts = self._components(x, timestep, condition)
        share = parts.log_joint.softmax(-1)
        score = torch.einsum("bk,bkd->bd", share, parts.gradient)
        outer = torch.einsum("bk,bki,bkj->bij", share, parts.gradient, parts.gradient)
        precision = torch.einsum("bk,bkij->bij", share, parts.precision)
        return outer - precision - score[:, :, None] * score[:, None, :]

    def eigenvalues(
        self, x: Tensor, timestep: Tensor | int | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """The eigenvalues of `hessian`, ascending, shape [B, d]."""
        return torch.linalg.eigvalsh(self.hessian(x, timestep, condition))

    def posterior_mean(
        self, x: Tensor, timestep: Tensor | int | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """E[x_0 | x_t = x], shape of x, by conditioning each component (not by Tweedie's formula)."""
        parts = self._components(x, timestep, condition)
        means = self._posterior_means(x, timestep, parts)
        return torch.einsum("bk,bkd->bd", parts.log_joint.softmax(-1), means).reshape(x.shape)

    def posterior_covariance(
        self, x: Tensor, timestep: Tensor | int | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """Cov[x_0 | x_t = x], shape [B, d, d], by the law of total covariance (not by Tweedie's formula)."""
        parts = self._components(x, timestep, condition)
        share, means = parts.log_joint.softmax(-1), self._posterior_means(x, timestep, parts)
        _, alpha, _ = self._inputs(x, timestep)
        gain = alpha[..., None, None, None] * self.covariances @ parts.precision
        within = self.covariances - alpha[..., None, None, None] * gain @ self.covariances
        centred = means - torch.einsum("bk,bkd->bd", share, means)[:, None, :]
        return torch.einsum("bk,bkij->bij", share, within) + torch.einsum(
            "bk,bki,bkj->bij", share, centred, centred
        )

    def _posterior_means(self, x: Tensor, timestep: Tensor | int | None, parts: _Components) -> Tensor:
        _, alpha, _ = self._inputs(x, timestep)
        pull = torch.einsum("kij,bkj->bki", self.covariances, parts.gradient)
        return self.means - alpha[..., None, None] * pull

    def _components(self, x: Tensor, timestep: Tensor | int | None, condition: Tensor | None) -> _Components:
        flat, alpha, sigma = self._inputs(x, timestep)
        count, dimension = self.means.shape
        identity = torch.eye(dimension, dtype=x.dtype, device=x.device)
        noise = sigma[..., None, None, None] ** 2 * identity
        covariance = alpha[..., None, None, None] ** 2 * self.covariances + noise
        factor = torch.linalg.cholesky(covariance.expand(len(flat), count, dimension, dimension))
        offset = flat[:, None, :] - alpha[..., None, None] * self.means
        whitened = torch.linalg.solve_triangular(factor, offset[..., None], upper=False)
        gradient = -torch.linalg.solve_triangular(factor.mT, whitened, upper=True)[..., 0]
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_density = -0.5 * (whitened[..., 0].square().sum(-1) + log_det + dimension * math.log(2 * math.pi))
        log_joint = self._log_weights(condition) + log_density
        return _Components(log_joint, torch.cholesky_inverse(factor), gradient)

    def _log_weights(self, condition: Tensor | None) -> Tensor:
        """Log weights of the components, [K] or, under a condition, [B, K]; they sum to one."""
        if condition is None:
            return self.weights.log()
        if condition.ndim == 1 and not condition.is_floating_point() and condition.dtype != torch.bool:
            components = torch.arange(len(self.weights), device=condition.device)
            condition = condition[:, None] == components
        if condition.ndim != 2 or condition.shape[1] != len(self.weights):
            raise InvalidInput(
                f"condition: expected integers [B] or factors [B, {len(self.weights)}], "
                f"got {condition.dtype} {tuple(condition.shape)}"
            )
        weights = self.weights * condition.to(self.weights.dtype)
        return (weights / weights.sum(-1, keepdim=True)).log()

    def _inputs(self, x: Tensor, timestep: Tensor | int | None) -> tuple[Tensor, Tensor, Tensor]:
        """x as [B, d], and alpha and sigma as [] or [B]."""
        dimension = self.means.shape[1]
        if x.ndim < 2 or math.prod(x.shape[1:]) != dimension or x.dtype != self.means.dtype:
            raise InvalidInput(
                f"x: expected {self.means.dtype} [B, ...] with {dimension} entries a sample, "
                f"got {x.dtype} {tuple(x.shape)}"
            )
        alpha, sigma = self.alpha, self.sigma
        if self.by_timestep:
            if timestep is None:
                raise InvalidInput(
                    "timestep: expected an integer or [B] of them (by_timestep=True), got None"
                )
            row = torch.as_tensor(timestep, dtype=torch.long, device=x.device)
            alpha, sigma = alpha[row], sigma[row]
        if alpha.ndim and len(alpha) != len(x):
            raise InvalidInput(f"x: expected {len(alpha)} samples, one for each alpha, got {len(x)}")
        return x.reshape(len(x), dimension), alpha, sigma


class GaussianScoreNetwork(GaussianMixtureScoreNetwork):
    """The exact network for data from one Gaussian N(``mean`` [d], ``covariance`` [d, d]).

    A mixture of one component: p_t = N(alpha mean, C), s = -C^-1 (x - alpha mean), H = -C^-1 everywhere, with
    C = alpha^2 covariance + sigma^2 I. Arguments, shapes and errors otherwise as
    `GaussianMixtureScoreNetwork`.
    """

    def __init__(
        self,
        mean: Tensor,
        covariance: Tensor,
        *,
        alpha: Numbers,
        sigma: Numbers,
        prediction_type: str = "epsilon",
        by_timestep: bool = False,
    ) -> None:
        super().__init__(
            torch.ones(1, dtype=mean.dtype),
            mean[None],
            covariance[None],
            alpha=alpha,
            sigma=sigma,
            prediction_type=prediction_type,
            by_timestep=by_timestep,
        )
