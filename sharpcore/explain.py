"""A readable table of a linear program: what runs, where it came from, what it keeps, what it costs, how long
it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sharpcore.rules import LinearMap, storage_of

if TYPE_CHECKING:
    from sharpcore.program import Program


@dataclass(frozen=True)
class Cost:
    """What the map of one instruction keeps and computes."""

    kind: str
    kept: int  # bytes, what an earlier instruction keeps not counted again
    flops: tuple[int, int]  # for one tangent, and for each further one
    recomputed: bool = False

    def flops_of(self, k: int) -> int:
        """FLOPs of matrix products for k tangents."""
        return self.flops[0] + (k - 1) * self.flops[1]


def cost_of(instruction: LinearMap, seen: set[int] | None) -> Cost:
    """The cost of a map; `seen` is the memory that other maps keep, and grows by its own. None: the map is
    made again in every product."""
    kept = 0
    if seen is not None:
        found = dict(storage_of(tensor) for _, tensor in instruction.residuals())
        kept = sum(size for key, size in found.items() if key not in seen)
        seen.update(found)
    one = instruction.flops(1)
    return Cost(instruction.kind, kept, (one, instruction.flops(2) - one), recomputed=seen is None)


@dataclass(frozen=True)
class Timing:
    """Seconds of the instructions of one product, by node; views take no time and are left out."""

    k: int
    transposed: bool
    seconds: dict[int, float]


def explain(program: Program, k: int | None = None) -> str:
    """One line an instruction: operation, linear map, output shape, bytes kept, FLOPs and time of k tangents,
    module.

    The time is that of the last product that was timed; without k its number of tangents is taken, or 1
    where there was none yet.
    """
    timing = program.timing
    if timing is not None and k not in (None, timing.k):
        timing = None
    k = k or (timing.k if timing else 1)
    header = ["#", "operation", "linear map", "output", "kept MB", "MFLOP"]
    header += ["ms"] if timing is not None else []
    rows = [[*header, "module"]]
    for number, step in enumerate(program.steps):
        node, cost = program.nodes[step.node], program.costs[number]
        shape = "x".join(map(str, node.shapes[0]))
        kept = "recomputed" if cost.recomputed else f"{cost.kept / 1e6:.2f}"
        row = [str(number), node.name, cost.kind, shape, kept, f"{cost.flops_of(k) / 1e6:.2f}"]
        if timing is not None:
            row.append(f"{timing.seconds.get(step.node, 0.0) * 1e3:.2f}")
        rows.append([*row, node.module])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]
    lines += [_summary(program, k), *program.notes]
    if timing is not None:
        lines += _kinds(program, timing)
    return "\n".join(lines)


def _summary(program: Program, k: int) -> str:
    replay = "replayed" if program.replayable else "traced anew (control flow reads values)"
    return (
        f"{len(program.steps)} instructions of {len(program.nodes)} recorded operations; "
        f"{sum(cost.kept for cost in program.costs) / 1e6:.1f} MB kept; "
        f"{sum(cost.flops_of(k) for cost in program.costs) / 1e9:.3f} GFLOP of products for K = {k}; "
        f"at a new point the program is {replay}"
    )


def _kinds(program: Program, timing: Timing) -> list[str]:
    """The time by kind of map."""
    kinds: dict[str, list[float]] = {}
    for step, cost in zip(program.steps, program.costs, strict=True):
        kinds.setdefault(cost.kind, []).append(timing.seconds.get(step.node, 0.0))
    total = sum(map(sum, kinds.values())) or 1.0
    product = "transposed product" if timing.transposed else "product"
    lines = [f"{total * 1e3:.1f} ms for K = {timing.k}, in the last {product} that was timed:"]
    by_time: Sequence[tuple[str, list[float]]] = sorted(kinds.items(), key=lambda item: -sum(item[1]))
    for kind, times in by_time:
        share = sum(times) / total
        lines.append(f"  {kind:<16}{len(times):>5} x {sum(times) * 1e3:>10.2f} ms {share:>7.1%}")
    return lines
