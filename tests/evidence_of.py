"""Evidence of given differences and products, without a network."""

from __future__ import annotations

import diffusers
import torch

from sharpcore.detect import Evidence, State
from sharpcore.states import Side


class Given(Side):
    """A side with a given prediction and product."""

    def __init__(self, value, product):
        self.value, self._product = value, product

    def jvp(self, vectors, common=None):
        return self._product(vectors)


def evidence_of(difference, product):
    """Evidence with s_D = `difference` [B, ...] and H_D given by `product` of [K, B, ...]; and its calls."""
    calls = []

    def counted(vectors):
        calls.append(vectors)
        return product(vectors)

    zero = torch.zeros_like(difference)
    state = State(
        network=None,
        scheduler=diffusers.DDIMScheduler(),
        step=0,
        x=zero,
        timestep=torch.full((len(difference),), 981),
        seeds=range(len(difference)),
        conditional={},
        unconditional={},
        with_prompt=lambda: Given(difference, counted),
        without=lambda: Given(zero, torch.zeros_like),
        units="eps",  # of an epsilon network: the predictions themselves
    )
    return Evidence(state), calls
