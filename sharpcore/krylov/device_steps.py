"""Steps of block Lanczos that a device takes on its own: what they change, in places that stay, and their
CUDA graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sharpcore.backends.reference.lanczos_step import LanczosState
from sharpcore.graphs import Recordings, graph_maker
from sharpcore.krylov.operator import BatchedOperator, closing_share
from sharpcore.linearization import unchecked

# The counters [B] that a step changes, but for the norm.
COUNTERS = ("sizes", "processed", "multiplied", "deflated", "breakdowns")


class DeviceSteps:
    """The state of a decomposition on its device, for the kernel `lanczos_step`.

    Steps with as many vectors are one CUDA graph from the second on (see `Recordings`): everything that they
    touch stays where it is.
    """

    def __init__(self, basis: Tensor, projected: Tensor, lost: Tensor, kernels: Any) -> None:
        samples, device = len(basis), basis.device
        # One piece of memory, so that what decides comes and goes in one copy.
        self._numbers = torch.zeros(len(COUNTERS) + 2, samples, dtype=torch.int64, device=device)
        *counters, faults, norm = self._numbers
        self._state = LanczosState(
            basis=basis,
            projected=projected,
            lost=lost,
            norm=norm.view(torch.float64),
            frozen=torch.zeros(samples, dtype=torch.bool, device=device),
            faults=faults,
            **dict(zip(COUNTERS, counters, strict=True)),
        )
        self._kernels = kernels
        make = graph_maker(device)
        self._recordings = None if make is None else Recordings(make)

    @property
    def refused(self) -> str:
        """Why steps were not recorded as a CUDA graph; empty where they were, or are not meant to be."""
        refused = {} if self._recordings is None else self._recordings.refused
        return next(iter(refused.values()), "")

    def take(
        self,
        operator: BatchedOperator,
        block: Tensor,
        counters: Mapping[str, Tensor],
        frozen: Tensor,
        *,
        tolerance: float,
        limit: int,
        steps: int,
    ) -> dict[str, Tensor]:
        """Multiply `block` [K, B, d] and what follows it, so many times, without waiting for the device.

        `counters` [B] on the CPU, "norm" among them, say where the samples stand. Returns where they stand
        then, and "faults". Where there are any, or a product raises, the projections are as they were.
        """
        state = self._state
        given = [counters[name] for name in COUNTERS]
        norm = counters["norm"].view(torch.int64)
        self._numbers.copy_(torch.stack([*given, torch.zeros_like(norm), norm]))
        state.frozen.copy_(frozen)
        kept = state.projected.clone(), state.lost.clone()
        share = closing_share(operator.rounding)

        def step(products: Tensor) -> Tensor:
            out = torch.empty(products.shape, dtype=operator.dtype, device=products.device)
            return self._kernels.lanczos_step(
                state, products, share=share, tolerance=tolerance, limit=limit, out=out
            )

        try:
            with unchecked():
                for _ in range(steps):
                    products = operator.multiply(block)
                    name = (len(products), products.dtype)
                    run = self._recordings
                    block = step(products) if run is None else run.run(name, (products,), step)
        except BaseException:
            self._restore(*kept)
            raise
        *found, faults, norm = self._numbers.to("cpu", copy=True)
        if bool(faults.any()):
            self._restore(*kept)
        # Memory of its own, as torch.save takes no storage of two dtypes.
        norm = norm.clone().view(torch.float64)
        return dict(zip(COUNTERS, found, strict=True)) | {"faults": faults, "norm": norm}

    def _restore(self, projected: Tensor, lost: Tensor) -> None:
        self._state.projected.copy_(projected)
        self._state.lost.copy_(lost)
