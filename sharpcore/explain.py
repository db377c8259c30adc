"""A readable table of a linear program: what runs, where it came from, what it keeps, what it costs, how long
it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sharpcore.rules import storage_of

if TYPE_CHECKING:
    from sharpcore.program import Program
    from sharpcore.rules import LinearMap

_ROUNDS = 3


def explain(
    program: Program,
    maps: Sequence[LinearMap | None] | None,
    seconds: Sequence[float] | None = None,
    k: int = 1,
) -> str:
    """One line an instruction: operation, linear map, output shape, bytes kept, FLOPs of k tangents, module.

    `seconds` are the times of the instructions, from `time_instructions`; with them come a column of
    milliseconds and a summary by kind of map.
    """
    header = ["#", "operation", "linear map", "output", "kept MB", "MFLOP"]
    header += ["ms"] if seconds is not None else []
    rows = [[*header, "module"]]
    seen: set[int] = set()
    kinds: dict[str, list[float]] = {}
    total_bytes = total_flops = 0
    for number, step in enumerate(program.steps):
        node = program.nodes[step.node]
        instruction = None if maps is None else maps[step.node]
        kept = flops = 0
        kind = ""
        if instruction is not None:
            kind = type(instruction).__name__
            flops = instruction.flops(k)
            for _, tensor in instruction.residuals():
                key, size = storage_of(tensor)
                if key not in seen:
                    seen.add(key)
                    kept += size
        total_bytes += kept
        total_flops += flops
        shape = "x".join(map(str, node.shapes[0]))
        row = [str(number), node.name, kind, shape, f"{kept / 1e6:.2f}", f"{flops / 1e6:.2f}"]
        if seconds is not None:
            row.append(f"{seconds[number] * 1e3:.2f}")
            kinds.setdefault(kind, []).append(seconds[number])
        rows.append([*row, node.module])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]
    replay = "replayed" if program.replayable else "traced anew (control flow reads values)"
    lines.append(
        f"{len(program.steps)} instructions of {len(program.nodes)} recorded operations; "
        f"{total_bytes / 1e6:.1f} MB kept; {total_flops / 1e9:.3f} GFLOP of products for K = {k}; "
        f"at a new point the program is {replay}"
    )
    if seconds is not None:
        total = sum(seconds) or 1.0
        lines.append(f"{total * 1e3:.1f} ms for K = {k}:")
        for kind, times in sorted(kinds.items(), key=lambda item: -sum(item[1])):
            share = sum(times) / total
            lines.append(f"  {kind:<16}{len(times):>5} x {sum(times) * 1e3:>10.2f} ms {share:>7.1%}")
    return "\n".join(lines)


def time_instructions(
    program: Program, maps: Sequence[LinearMap | None], kernels: Any, tangent: Tensor
) -> list[float]:
    """Seconds of each instruction in a jvp with these tangents, the median of a few rounds."""
    synchronize = torch.cuda.synchronize if tangent.device.type == "cuda" else lambda: None
    rounds: list[list[float]] = []
    for _ in range(_ROUNDS):
        values: dict[int, Tensor] = {program.x: tangent}
        times = []
        for step in program.steps:
            synchronize()
            start = time.perf_counter()
            outs = maps[step.node].jvp(kernels, [values[v] for v in step.inputs])  # type: ignore[union-attr]
            synchronize()
            times.append(time.perf_counter() - start)
            values.update((v, out) for v, out in zip(step.outputs, outs, strict=False) if v is not None)
            for value in step.dead:
                values.pop(value, None)
        rounds.append(times)
    return [statistics.median(column) for column in zip(*rounds, strict=True)]
