"""Adam on many samples at once, each of which stops on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpcore.errors import NonFiniteError
from sharpcore.repair.samples import Samples

#: Called with the variable of b samples, their indices, and whether the gradient is wanted; returns the loss
#: [b], the number that is compared with the threshold [b], and the gradient (None where it is not wanted).
Objective = Callable[[Tensor, Sequence[int], bool], tuple[Tensor, Tensor, "Tensor | None"]]

_BETAS, _EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Descent:
    """How far to go: Adam's step size, the most steps, where to stop, and decoupled weight decay (AdamW)."""

    lr: float
    rounds: int
    threshold: float | None = None
    weight_decay: float = 0.0

    def run(
        self,
        start: Tensor,
        objective: Objective,
        samples: Samples,
        project: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Minimize the loss of each sample from `start` [B, ...]; returns the points it ended at.

        A sample stops as soon as what is watched is at most the threshold, and is not computed any more; one
        that is there from the start keeps `start` bit for bit. The others end after `rounds` steps. The loss
        at each point is noted in `samples.path`, the steps in `samples.rounds`, and in `samples.stopped`
        whether the threshold was reached. `project(point, start)` is applied after each step. Samples do not
        influence each other. Raises NonFiniteError where a loss or a gradient is NaN or infinite.
        """
        point = start.detach().clone()
        mean, square = torch.zeros_like(point), torch.zeros_like(point)
        active = list(range(len(samples)))
        if self.threshold is not None:
            samples.stopped = [False] * len(samples)
        for number in range(self.rounds + 1):
            with samples.work.timed(active):
                last = number == self.rounds
                loss, watched, gradient = objective(point[active], active, not last)
                for row, value in zip(active, loss.tolist(), strict=True):
                    samples.path[row].append(value)
                _check_finite(loss, gradient)
                if self.threshold is not None:
                    below = (watched <= self.threshold).tolist()
                    for row, reached in zip(active, below, strict=True):
                        samples.stopped[row] = reached
                    kept = [i for i, reached in enumerate(below) if not reached]
                    active = [active[i] for i in kept]
                else:
                    kept = list(range(len(active)))
                if last or not active or gradient is None:
                    break
                gradient = gradient[kept].to(point.dtype)
                mean[active] = torch.lerp(mean[active], gradient, 1 - _BETAS[0])
                square[active] = torch.lerp(square[active], gradient.square(), 1 - _BETAS[1])
                corrected = mean[active] / (1 - _BETAS[0] ** (number + 1))
                scale = (square[active] / (1 - _BETAS[1] ** (number + 1))).sqrt() + _EPSILON
                moved = point[active] * (1 - self.lr * self.weight_decay) - self.lr * corrected / scale
                point[active] = moved if project is None else project(moved, start[active])
                for row in active:
                    samples.rounds[row] += 1
        return point


def squared_norms(x: Tensor) -> Tensor:
    """The squared Euclidean norm of each sample, [b, ...] to [b], in float32 at least."""
    x = x.flatten(1)
    return (x if x.dtype == torch.float64 else x.float()).square().sum(1)


def gradient_of(
    losses: Tensor, variable: Tensor, rows: Sequence[int], samples: Samples, passes: int
) -> Tensor:
    """The gradient of each sample's loss [b], by autograd; `passes` of the network run backwards for each."""
    samples.work.add(rows, backwards=passes)
    return torch.autograd.grad(losses, variable, torch.ones_like(losses))[0]


def _check_finite(loss: Tensor, gradient: Tensor | None) -> None:
    if not bool(torch.isfinite(loss).all()):
        raise NonFiniteError("the loss of the repair is NaN or infinite; the network is not finite here")
    if gradient is not None and not bool(torch.isfinite(gradient).all()):
        raise NonFiniteError("the gradient of the repair's loss is NaN or infinite")
