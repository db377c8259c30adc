"""sail_exact: as sail, with the exact product ||H_D s_D||^2 in the place of its finite difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpcore.repair.descent import Objective, squared_norms
from sharpcore.repair.sail import Sail
from sharpcore.repair.samples import Samples

# Of the square root of the rounding error: where the errors of truncation and of rounding of a forward
# difference are about equal, the network's own rounding being a few times that of its numbers.
_STEP = 4.0


@dataclass(frozen=True)
class SailExact(Sail):
    """Descends on ||H_D s_D||^2 + alpha ||x||^2 with H_D s_D by the exact Jacobians of `linearize`.

    With w = J_D s_D (J_D the plain Jacobians' difference, as in the score), the gradient of ||J_D s_D||^2 is
    2 (d/de J_D(x + e s_D)^T w + J_D^T J_D^T w): second derivatives commute, so the first term, which is that
    of ||J_D(x) v||^2 with v fixed, is how the transposed product with w changes along s_D. It is formed from
    a forward difference of two exact transposed products; everything else is exact. This needs no backward
    pass of a backward pass, and works with any attention that `linearize` knows. `delta` is not used.

    A round costs two linearizations, one product and three transposed ones (two without
    `through_direction`), against two forward and two backward passes of `sail`.
    """

    name = "sail_exact"
    cost = "in each round two forward passes, one product and three transposed ones of both branches"

    def objective(self, samples: Samples) -> Objective:
        """The loss as a function of the noise; what is watched is ||H_D s_D||^2."""

        def evaluate(
            noise: Tensor, rows: Sequence[int], wanted: bool
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            with torch.enable_grad():
                variable = noise.detach().requires_grad_()
                seen = samples.seen(variable)
            x = seen.detach()
            here = samples.linearized(x, rows)
            direction = here.value.clone()
            product = here.jvp(direction)
            curvature = squared_norms(product)
            loss = curvature + self.alpha * squared_norms(noise)
            if not wanted:
                return loss, curvature, None
            pulled = here.vjp(product)
            gradient = here.vjp(pulled) if self.through_direction else torch.zeros_like(x)
            step = _step_along(direction, x)
            # The linearization moves on: nothing of `here` is used from here on.
            gradient = (
                gradient + (samples.linearized(x + step * direction, rows).vjp(product) - pulled) / step
            )
            # What the network sees is linear in the noise.
            (total,) = torch.autograd.grad(seen, variable, 2 * gradient)
            return loss, curvature, total + 2 * self.alpha * noise

        return evaluate


def _step_along(direction: Tensor, x: Tensor) -> Tensor:
    """How far to go along each sample's direction [b, ...] for a difference of derivatives, [b, 1, ...]."""
    norms = [tensor.flatten(1).norm(dim=1) for tensor in (x, direction)]
    step = _STEP * torch.finfo(x.dtype).eps ** 0.5 * norms[0] / norms[1].clamp_min(torch.finfo(x.dtype).tiny)
    return step.reshape(-1, *[1] * (x.dim() - 1))
