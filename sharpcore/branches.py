"""The two branches of a guided network, with and without the prompt: predictions and linearizations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sharpcore.conditioning import Conditioning
from sharpcore.linearization import Linearization
from sharpcore.lowering import WeightCopies


class Branch:
    """A network as a function of the latent, or of the prompt's embedding, that is linearized once and then
    moved from point to point.

    Timestep and conditioning (or latent) are inputs of the recorded program, so that other prompts and steps
    of the same batch size cost a forward pass and no new trace.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        backend: str,
        precision: str,
        copies: WeightCopies,
        *,
        of_embedding: bool = False,
    ) -> None:
        """`copies` are the weights as products want them, shared by the branches of a network; with
        `of_embedding` the variable is `encoder_hidden_states`, [B, L, D]."""
        self.network = network
        self._copies = copies
        self.backend = backend
        self.precision = precision
        self._of_embedding = of_embedding
        self._linearization: Linearization | None = None
        self._layout: Any = None

    def at(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Linearization:
        """The linearized prediction at x [B, ...], timestep [B], B conditionings, until the next call."""
        inputs = [x, timestep, *_tensors(conditioning)]
        place = 0
        if self._of_embedding:
            embedding = conditioning["encoder_hidden_states"]
            place = next(i for i, tensor in enumerate(inputs) if tensor is embedding)
        layout = (_keys(conditioning), [(t.shape, t.dtype, t.device) for t in inputs])
        variable, bound = inputs[place], (*inputs[:place], *inputs[place + 1 :])
        lin, self._linearization = self._linearization, None
        if lin is not None and self._layout == layout:
            self._linearization = lin.relinearize(variable, *bound)
            return self._linearization
        del lin  # its residuals are freed before those of the new batch size are made

        def prediction(variable: Tensor, *bound: Tensor) -> Tensor:
            inputs = [*bound[:place], variable, *bound[place:]]
            return predict(self.network, inputs[0], inputs[1], _rebuild(conditioning, iter(inputs[2:])))

        self._linearization = Linearization(
            prediction, variable, bound, self.backend, self.precision, None, self._copies
        )
        self._layout = layout
        return self._linearization


def predict(network: Callable[..., Any], x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """The network's own output (epsilon, v, sample or velocity) at x [B, ...], timestep [B]."""
    return network(x, timestep, return_dict=False, **conditioning)[0]


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
