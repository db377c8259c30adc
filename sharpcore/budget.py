"""The choice of what a linearization keeps and what it recomputes, so that it fits into a given memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from sharpcore.errors import OutOfMemory
from sharpcore.program import Program
from sharpcore.residuals import Segment

# How finely a program is cut: fine segments take less memory while one is made again, and more checkpoints.
_CUTS = (8, 16, 32, 64, 128)


def choose_segments(
    program: Program, kept: Sequence[int], input_bytes: int, weights: int, budget: float
) -> list[Segment]:
    """The segments to recompute in every product so that what is kept, the checkpoints and the largest
    recomputed segment together take at most `budget` bytes; as little work as possible.

    `kept` are the bytes that each node's map takes, `weights` those of copied weights. Raises OutOfMemory
    where no choice fits.
    """
    if sum(kept) + weights <= budget:
        return []
    sizes = _value_bytes(program, input_bytes)
    best: tuple[int, list[Segment]] | None = None
    least = float(weights + sum(kept))
    for cuts in _CUTS:
        segments = _cut(program, kept, cuts)
        weight = {segment: sum(kept[segment.start : segment.stop]) for segment in segments}
        gain = {segment: weight[segment] - sum(sizes[v] for v in segment.needs) for segment in segments}
        chosen: list[Segment] = []
        for segment in sorted(segments, key=lambda s: -gain[s]):
            chosen.append(segment)
            checkpoints = sum(sizes[value] for value in {v for s in chosen for v in s.needs})
            redone = sum(weight[s] for s in chosen)
            needed = weights + sum(kept) - redone + checkpoints + max(weight[s] for s in chosen)
            least = min(least, needed)
            if needed <= budget:
                if best is None or redone < best[0]:
                    best = (redone, sorted(chosen, key=lambda s: s.start))
                break
    if best is None:
        raise OutOfMemory(
            f"memory_budget: at least {least:.0f} bytes are needed to multiply with this network at this "
            f"size, with nearly everything recomputed in each product; got {budget:.0f}"
        )
    return best[1]


def _value_bytes(program: Program, input_bytes: int) -> dict[int, int]:
    sizes = dict.fromkeys((program.x, *program.bound), input_bytes)
    for node in program.nodes:
        for value, size in zip(node.outputs, node.nbytes, strict=True):
            if value is not None:
                sizes[value] = size
    return sizes


def _cut(program: Program, kept: Sequence[int], cuts: int) -> list[Segment]:
    """Stretches of about equal bytes, cut where few values cross."""
    crossing = _crossing_bytes(program)
    target, total, start = sum(kept) / cuts, 0, 0
    bounds = [0]
    for index, size in enumerate(kept):
        total += size
        if total - start >= target:
            window = range(max(bounds[-1] + 1, index - len(kept) // (4 * cuts)), index + 2)
            cut = min(window, key=lambda i: crossing[i] if i < len(crossing) else 0)
            bounds.append(cut)
            start = total
    if bounds[-1] < len(kept):
        bounds.append(len(kept))
    return [_segment(program, first, last) for first, last in itertools.pairwise(bounds)]


def _crossing_bytes(program: Program) -> list[int]:
    """For each node the bytes of earlier nodes' values that it or a later node reads."""
    last: dict[int, int] = {}
    for index, node in enumerate(program.nodes):
        for value in node.refs():
            last[value] = index
    change = [0] * (len(program.nodes) + 1)
    for index, node in enumerate(program.nodes):
        for made, size in zip(node.outputs, node.nbytes, strict=True):
            if made is not None and made in last:
                change[index + 1] += size
                change[min(last[made] + 1, len(program.nodes))] -= size
    crossing, total = [], 0
    for step in change[:-1]:
        total += step
        crossing.append(total)
    return crossing


def _segment(program: Program, start: int, stop: int) -> Segment:
    made: set[int] = set()
    needs: dict[int, None] = {}
    for node in program.nodes[start:stop]:
        needs.update(dict.fromkeys(value for value in node.refs() if value not in made))
        made.update(value for value in node.outputs if value is not None)
    return Segment(start, stop, tuple(needs))
