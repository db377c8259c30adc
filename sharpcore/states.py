"""The two branches of a guided network at one state of B samples: predictions and products."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpcore.errors import InvalidInput
from sharpcore.linearization import Linearization
from sharpcore.lowering import rounding_of

_NOT_LINEARIZED = "this detector multiplies with a Jacobian but does not declare needs_product"


class Side:
    """One branch at a state: its prediction [B, ...], and products of its Jacobian with vectors [K, B, ...].

    `common` names vectors that depend on the seed of a sample alone: a branch that does not depend on the
    prompt multiplies them once.
    """

    value: Tensor

    @property
    def rounding(self) -> float:
        """The relative rounding of a product."""
        raise InvalidInput(_NOT_LINEARIZED)

    def jvp(self, vectors: Tensor, common: Hashable = None) -> Tensor:
        """The Jacobian times K vectors of each sample, [K, B, ...] in and out."""
        raise InvalidInput(_NOT_LINEARIZED)

    def vjp(self, cotangents: Tensor) -> Tensor:
        """The transposed Jacobian times K vectors of each sample, [K, B, ...] in and out."""
        raise InvalidInput(_NOT_LINEARIZED)


class Predicted(Side):
    """A branch of which only the prediction is known."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Linearized(Side):
    """A branch that is linearized at the B states."""

    def __init__(self, linearization: Linearization) -> None:
        self.value = linearization.value
        self._linearization = linearization

    @property
    def rounding(self) -> float:
        return rounding_of(self._linearization.precision, self._linearization.x.dtype)

    def jvp(self, vectors: Tensor, common: Hashable = None) -> Tensor:
        return self._linearization.jvp(vectors)

    def vjp(self, cotangents: Tensor) -> Tensor:
        return self._linearization.vjp(cotangents)


class SharedSide(Side):
    """The branch without a prompt at the S states that P prompts share, sample p * S + s being in state s.

    Every prompt is a tangent of the same linearizations, `parts`, which together cover the S states. Products
    with common vectors are kept in `known`.
    """

    def __init__(self, parts: Sequence[Linearization], prompts: int, known: dict[Hashable, Tensor]) -> None:
        self.value = torch.cat([part.value for part in parts]).repeat(prompts, 1, 1, 1)
        self._parts, self._prompts, self._known = parts, prompts, known

    @property
    def rounding(self) -> float:
        return rounding_of(self._parts[0].precision, self._parts[0].x.dtype)

    def jvp(self, vectors: Tensor, common: Hashable = None) -> Tensor:
        if common is None:
            return self._multiply(vectors, lambda part: part.jvp)
        if common not in self._known:
            states = vectors.shape[1] // self._prompts
            self._known[common] = self._of_states(vectors[:, :states], lambda part: part.jvp)
        return self._known[common].repeat(1, self._prompts, 1, 1, 1)

    def vjp(self, cotangents: Tensor) -> Tensor:
        return self._multiply(cotangents, lambda part: part.vjp)

    def _multiply(self, vectors: Tensor, product: Callable[[Linearization], Any]) -> Tensor:
        by_state = vectors.unflatten(1, (self._prompts, -1)).flatten(0, 1)
        return self._of_states(by_state, product).unflatten(0, (-1, self._prompts)).flatten(1, 2)

    def _of_states(self, vectors: Tensor, product: Callable[[Linearization], Any]) -> Tensor:
        """[K, S, ...] in and out."""
        sizes = [part.x.shape[0] for part in self._parts]
        pieces = [
            product(part)(piece.contiguous())
            for part, piece in zip(self._parts, vectors.split(sizes, 1), strict=True)
        ]
        return torch.cat(pieces, 1)
