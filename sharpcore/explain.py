"""A readable table of a linear program: what runs, where it came from, what it keeps and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sharpcore.program import Program
    from sharpcore.rules import LinearMap


def explain(program: Program, maps: Sequence[LinearMap | None] | None) -> str:
    """One line an instruction: operation, kind of linear map, output shape, bytes kept, FLOPs per tangent,
    module."""
    rows = [("#", "operation", "linear map", "output", "kept MB", "MFLOP", "module")]
    seen: set[int] = set()
    total_bytes = total_flops = 0
    for number, step in enumerate(program.steps):
        node = program.nodes[step.node]
        instruction = None if maps is None else maps[step.node]
        kept = flops = 0
        if instruction is not None:
            flops = instruction.flops(1)
            for _, tensor in instruction.residuals():
                storage = tensor.untyped_storage()
                if storage._cdata not in seen:
                    seen.add(storage._cdata)
                    kept += storage.nbytes()
        total_bytes += kept
        total_flops += flops
        rows.append(
            (
                str(number),
                node.name,
                "" if instruction is None else type(instruction).__name__,
                "x".join(map(str, node.shapes[0])),
                f"{kept / 1e6:.2f}",
                f"{flops / 1e6:.2f}",
                node.module,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]
    replay = "replayed" if program.replayable else "traced anew (control flow reads values)"
    lines.append(
        f"{len(program.steps)} instructions of {len(program.nodes)} recorded operations; "
        f"{total_bytes / 1e6:.1f} MB kept; "
        f"{total_flops / 1e9:.3f} GFLOP of products per tangent; at a new point the program is {replay}"
    )
    return "\n".join(lines)
