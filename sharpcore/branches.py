"""The two branches of a guided network, with and without the prompt: predictions and linearizations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sharpcore.conditioning import Conditioning
from sharpcore.detect import Evidence
from sharpcore.errors import InvalidInput
from sharpcore.linearization import Linearization, linearize
from sharpcore.score import noise_level, prediction_type_of, score_from_prediction

#: A Jacobian, or a difference of two, times one vector for each sample: [B, ...] to [B, ...].
Product = Callable[[Tensor], Tensor]


class Branch:
    """A network as a function of the latent that is linearized once and then moved from point to point.

    The timestep and the conditioning are inputs of the recorded program, so that other prompts and steps of
    the same batch size cost a forward pass and no new trace.
    """

    def __init__(self, network: Callable[..., Any], backend: str, precision: str) -> None:
        self.network = network
        self.backend = backend
        self.precision = precision
        self._linearization: Linearization | None = None
        self._layout: Any = None

    def at(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Linearization:
        """The linearized prediction at x [B, ...], timestep [B], B conditionings, until the next call."""
        tensors = list(_tensors(conditioning))
        layout = (_keys(conditioning), [(t.shape, t.dtype, t.device) for t in (x, timestep, *tensors)])
        lin, self._linearization = self._linearization, None
        if lin is not None and self._layout == layout:
            self._linearization = lin.relinearize(x, timestep, *tensors)
            return self._linearization
        del lin  # its residuals are freed before those of the new batch size are made

        def prediction(x: Tensor, timestep: Tensor, *tensors: Tensor) -> Tensor:
            return predict(self.network, x, timestep, _rebuild(conditioning, iter(tensors)))

        self._linearization = linearize(
            prediction, x, timestep, *tensors, backend=self.backend, precision=self.precision
        )
        self._layout = layout
        return self._linearization


def predict(network: Callable[..., Any], x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """The network's own output (epsilon, v, sample or velocity) at x [B, ...], timestep [B]."""
    return network(x, timestep, return_dict=False, **conditioning)[0]


def prediction_factor(x: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str, units: str) -> Tensor:
    """What the prediction is multiplied with to give the score, broadcastable to x.

    In the difference of two scores at one x the term in x cancels, so this factor alone turns differences of
    predictions, and of their Jacobians, into those of scores.
    """
    one = torch.ones((x.shape[0], *(1,) * (x.dim() - 1)), dtype=x.dtype, device=x.device)
    return score_from_prediction(one, torch.zeros_like(one), alpha, sigma, prediction_type, units)


def pair_product(lin: Linearization) -> Product:
    """The product of (J with prompt) - (J without); both branches are one batch, those without first."""

    def product(vectors: Tensor) -> Tensor:
        without, with_prompt = lin.jvp(torch.cat([vectors, vectors]).unsqueeze(0)).squeeze(0).chunk(2)
        return with_prompt - without

    return product


def no_product(vectors: Tensor) -> Tensor:
    """In the place of a product where no metric declares that it needs one."""
    raise InvalidInput("this metric uses the Hessian's product but does not declare needs_product")


def make_evidence(
    difference: Tensor, product: Product, timestep: Tensor, scheduler: Any, units: str
) -> Evidence:
    """Evidence from a difference of predictions [B, ...] and the product with that of their Jacobians."""
    alpha, sigma = noise_level(scheduler, timestep)
    factor = prediction_factor(difference, alpha, sigma, prediction_type_of(scheduler), units)
    return Evidence(difference * factor, lambda vectors: product(vectors) * factor)


def scale_model_input(scheduler: Any, latents: Tensor, t: Tensor) -> Tensor:
    """The latent as the network sees it."""
    scale = getattr(scheduler, "scale_model_input", None)
    return latents if scale is None else scale(latents, t)


def advance(
    scheduler: Any, prediction: Tensor, t: Tensor, latents: Tensor, generators: list[torch.Generator]
) -> Tensor:
    """One step of the scheduler as pipelines take it: eta 0, and a generator for each sample."""
    accepted = inspect.signature(scheduler.step).parameters
    extra = {"generator": generators, "eta": 0.0}
    extra = {name: value for name, value in extra.items() if name in accepted}
    return scheduler.step(prediction, t, latents, return_dict=False, **extra)[0]


def _tensors(conditioning: Conditioning) -> Iterator[Tensor]:
    for value in conditioning.values():
        if isinstance(value, dict):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value


def _keys(conditioning: Conditioning) -> Any:
    return [
        (name, _keys(value) if isinstance(value, dict) else None if isinstance(value, Tensor) else value)
        for name, value in conditioning.items()
    ]


def _rebuild(conditioning: Conditioning, tensors: Iterator[Tensor]) -> Conditioning:
    return {
        name: _rebuild(value, tensors)
        if isinstance(value, dict)
        else next(tensors)
        if isinstance(value, Tensor)
        else value
        for name, value in conditioning.items()
    }
