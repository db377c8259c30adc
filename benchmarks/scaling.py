"""The price of a product along one axis: tangents, latent size, channels or batch."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import baselines
from measure import Table
from problems import Problem

# Beyond, one call of torch.func.jvp takes minutes or many GiB.
FORWARD_MODE_UP_TO = {"tangents": 8, "size": 48, "width": 2, "batch": 4}


def curve(table: Table, network: str, axis: str, points: Sequence[float]) -> None:
    """Rows for each point of one axis; "tangents" is K, the others are options of the network."""
    problem = None
    for point in points:
        if problem is None or axis != "tangents":
            # The former network goes before the next one comes.
            problem = None
            gc.collect()
            problem = Problem(network, **({} if axis == "tangents" else {axis: point}))
        measure_point(table, problem, axis, point)


def measure_point(table: Table, problem: Problem, axis: str, point: float) -> None:
    """Per tangent: our product, a central difference, and torch.func.jvp while it is not too slow."""
    count = int(point) if axis == "tangents" else 1
    tangents = problem.tangents[:count]
    labels: dict[str, Any] = {"axis": axis, "point": point}

    def prepare() -> Any:
        linearization = problem.linearization()
        linearization.jvp(tangents)  # the first product with so many tangents plans its buffers
        return lambda: linearization.jvp(tangents)

    difference = baselines.difference(problem.f, problem.x)
    table.unit("forward", baselines.forward(problem.f, problem.x), **labels)
    table.add("product", prepare=prepare, per=count, **labels)
    table.add("central difference", lambda: difference(tangents), per=count, **labels)
    if point <= FORWARD_MODE_UP_TO[axis]:
        name, make = ("torch.func.jvp", baselines.forward_mode)
        if count > 1:
            name, make = ("vmap(jvp)", baselines.vmap_jvp)
        jvp = make(problem.f, problem.x)
        table.add(name, lambda: jvp(tangents), per=count, turns=1, **labels)
    table.measure()
