"""A network at a point with its tangents, float64 truth and linearizations: what every candidate works on."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import configs
import torch
from baselines import central_difference, double_backward_jvp, oracle_vjp
from torch import Tensor

import sharpcore
from sharpcore.testing.tolerance import relative_error

MOST_TANGENTS = 32


class Problem:
    """One of `configs.NETWORKS` at its point.

    `truth` maps "value", "product" and "pulled" to float64 results: f(x), J times the first tangents, and J^T
    times the first cotangent. It is empty until `find_truth` or `load_truth`.
    """

    def __init__(self, network: str, **options: Any) -> None:
        self.network, self.options = network, options
        self.pair = configs.NETWORKS[network](**options)
        self.f, self.x = self.pair.f, self.pair.x
        generator = torch.Generator().manual_seed(1)
        self.tangents = torch.randn((MOST_TANGENTS, *self.x.shape), generator=generator)
        self.cotangents = self.tangents
        self.truth: dict[str, Tensor] = {}
        self.budget = configs.BUDGETS.get(network)
        self._linearizations: dict[tuple[str, bool], sharpcore.Linearization] = {}

    def linearization(self, precision: str = "float32", *, budgeted: bool = False) -> sharpcore.Linearization:
        """The linearization at x that the products share; float32 or with products in bfloat16, within the
        network's memory budget or not."""
        key = precision, budgeted
        if key not in self._linearizations:
            budget = self.budget if budgeted else None
            self._linearizations[key] = sharpcore.linearize(
                self.f, self.x, precision=precision, memory_budget=budget
            )
        return self._linearizations[key]

    def release(self) -> None:
        """Give the memory of the linearizations back."""
        self._linearizations.clear()

    @cached_property
    def low(self) -> configs.Pair:
        """The network itself in bfloat16: the plain way to low precision."""
        return self.pair.to(torch.bfloat16)

    def warm_up(self) -> None:
        """A pass over the smallest latent: what libraries load and keep for good is no candidate's peak."""
        with torch.no_grad():
            self.f(self.x[..., :8, :8].contiguous())

    def find_truth(self) -> None:
        """Float64 results: double-backward for small networks, central differences where a copy does not fit.

        In float64 a central difference is exact to about 1e-9, far below the errors that are compared with
        it. J^T is left out there, and so are the errors of transposed products.
        """
        large = sum(parameter.numel() for parameter in self.pair.unet.parameters()) > 2e8
        if large:
            high = self.pair.inputs(torch.float64)
            with torch.no_grad(), configs.float64_layers(high.unet):
                self.truth["value"] = high.f(high.x)
                self.truth["product"] = central_difference(high.f, high.x, self.tangents[:1].double())
            return
        high = self.pair.to(torch.float64)
        with torch.no_grad():
            self.truth["value"] = high.f(high.x)
        self.truth["product"] = double_backward_jvp(high.f, high.x, self.tangents[:2].double())
        self.truth["pulled"] = oracle_vjp(high.f, high.x, self.cotangents[:1].double())

    def save_truth(self, path: Path) -> None:
        """For another process."""
        torch.save(self.truth, path)

    def load_truth(self, path: Path) -> None:
        """As another process found it."""
        self.truth = torch.load(path)

    def error(self, kind: str, result: Tensor | sharpcore.Linearization) -> float | None:
        """Relative error of a result against float64; None where that was not computed."""
        truth = self.truth.get(kind)
        if truth is None:
            return None
        if not isinstance(result, Tensor):
            result = result.value
        if kind == "value":
            return relative_error(result, truth)
        count = min(len(result), len(truth))
        return relative_error(result[:count], truth[:count])
