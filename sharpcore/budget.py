"""The choice of what a linearization keeps and what every product makes again, so that it fits into a given
memory."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from sharpcore.errors import OutOfMemory
from sharpcore.passes import only_first_output
from sharpcore.program import Node, Program
from sharpcore.residuals import Segment
from sharpcore.rules import LinearMap
from sharpcore.rules.pointwise import Sum

# Work is counted in FLOPs of matrix products; writing a byte of an elementwise result takes about as long as
# so many, and so does copying a byte of a weight.
_MOVED, _COPIED = 16, 32
# How long segments are, in operations, about: short ones take less memory while they are made again, and more
# checkpoints.
_LENGTHS = (3, 6, 12, 24, 48, 96)
# Inside a segment results of at least so many FLOPs a byte are kept rather than made again.
_THRESHOLDS = (0.0, 128.0, 512.0, 2048.0, 8192.0, math.inf)

Memory = Mapping[Hashable, int]  # bytes by what tells one piece of memory from another


@dataclass(frozen=True)
class Choice:
    """What is made again in every product, and what the rest takes, in bytes.

    `again` are the ids of the weights of which no copy is kept, `rounded` the nodes whose residuals are
    stored in bfloat16, and `low` the values that are, of those that segments start from. `kept` are residuals
    and checkpoints, `copies` the kept copies of weights, `transient` the most that is alive of a segment, a
    copy or a residual that are made again, and `workspace` the tangents of a product with one vector.
    """

    segments: tuple[Segment, ...] = ()
    again: frozenset[Hashable] = frozenset()
    rounded: frozenset[int] = frozenset()
    low: frozenset[int] = frozenset()
    work: float = 0.0
    kept: int = 0
    copies: int = 0
    transient: int = 0
    workspace: int = 0

    @property
    def needed(self) -> int:
        """All together."""
        return self.kept + self.copies + self.transient + self.workspace


def choose(
    program: Program,
    maps: Sequence[LinearMap | None],
    memory: Sequence[Memory],
    copies: Memory,
    workspace: int,
    budget: float,
    rounded: Sequence[Memory] | None = None,
) -> Choice:
    """What to make again in every product so that everything that is kept for it, and what it makes, take at
    most `budget` bytes; as little work as possible.

    `memory` is what each node's map keeps, `copies` the copies of weights by the id of the weight, and
    `workspace` what the tangents of a product with one vector take. What costs the least time for a byte goes
    first: a copy of a weight costs 32 FLOPs a byte, a result of a layer of width d some d/2 and more.
    `rounded` is what maps would keep in bfloat16, where that is allowed: a residual that is cast back costs
    as much as a weight that is copied. Checkpoints are rounded where nothing fits otherwise. Raises
    OutOfMemory where no choice fits.
    """
    exact = _Facts(program, maps, memory, copies)
    everything = _State(exact, workspace).choice()
    if everything.needed <= budget:
        return everything
    ways = [exact]
    if rounded is not None:
        ways += [_Facts(program, maps, memory, copies, rounded, low) for low in (False, True)]
    best: Choice | None = None
    least = everything.needed
    for facts in ways:
        if facts.low and best is not None:
            break
        for length in _LENGTHS:
            found, lowest = _greedy(facts, _cut(program, length), workspace, budget)
            least = min(least, lowest)
            if found is not None and (best is None or found.work < best.work):
                best, chosen = found, facts
    if best is None:
        raise OutOfMemory(
            f"memory_budget: at least {least} bytes are needed to multiply with this network at this "
            f"size, with nearly everything made again in each product; got {budget:.0f}"
        )
    held = frozenset(value for segment in best.segments for value in segment.needs)
    final = tuple(chosen.segment(s.start, s.stop, math.inf, held) for s in best.segments)
    low = frozenset(value for segment in final for value in segment.needs if value in chosen.low)
    return replace(best, segments=final, low=low)


def workspace_bytes(program: Program, maps: Sequence[LinearMap | None]) -> int:
    """What the tangents of one vector that are alive together take at most, about."""
    sizes = {v: n for node in program.nodes for v, n in zip(node.outputs, node.nbytes, strict=True)}
    places: dict[int | None, Hashable] = {
        v: m[0] for node in program.nodes for v, m in zip(node.outputs, node.memory, strict=True)
    }
    region: dict[int, int] = {program.x: program.x}  # by value: the value that its memory was made for
    users: Counter[int] = Counter([program.x])
    total = most = 0
    for step in program.steps:
        adds = isinstance(maps[step.node], Sum)
        for value in step.outputs:
            if value is None:
                continue
            shared = [v for v in step.inputs if v in region and places.get(v) == places[value]]
            if adds:  # the sum takes over the memory of an operand that ends here
                dying = (v for v in step.inputs if v in step.dead and users[region[v]] == 1)
                shared = [v for v in dying if sizes.get(v) == sizes[value]]
            region[value] = region[shared[0]] if shared else value
            users[region[value]] += 1
            total += 0 if shared else sizes[value]
        most = max(most, total)
        for value in step.dead:
            users[region[value]] -= 1
            if not users[region[value]]:
                total -= sizes.get(region[value], 0)
    return most


class _Facts:
    """What a choice weighs: the bytes of maps and values, and the work of every operation."""

    def __init__(
        self,
        program: Program,
        maps: Sequence[LinearMap | None],
        memory: Sequence[Memory],
        copies: Memory,
        rounded: Sequence[Memory] | None = None,
        low: bool = False,
    ) -> None:
        """`rounded`: maps may be kept in bfloat16; `low`: checkpoints and maps that are made again are."""
        self.program, self.memory, self.copies = program, memory, copies
        self.rounded: Sequence[Memory] = [{}] * len(memory) if rounded is None else rounded
        self.cast = [  # bytes of what a map casts back
            2 * sum(size for key, size in new.items() if key not in old)
            for old, new in zip(memory, self.rounded, strict=True)
        ]
        self.remade = [new if low and new else old for old, new in zip(memory, self.rounded, strict=True)]
        self.low: dict[int, int] = {}  # the values that are stored in bfloat16, and the bytes that they take
        weights = [id(getattr(instruction, "weight", None)) for instruction in maps]
        self.copied = [key if key in copies else None for key in weights]  # by node
        self.values: dict[int, tuple[Hashable, int]] = {}
        self.work: list[float] = []
        self._intense: list[float] = []
        for node, instruction in zip(program.nodes, maps, strict=True):
            before = {self.values[value][0] for value in node.refs() if value in self.values}
            made = 0
            for value, place in zip(node.outputs, node.memory, strict=True):
                if value is not None:
                    self.values[value] = place
                    made += place[1] if place[0] not in before else 0
            if low:
                self.low.update(_in_bfloat16(node))
            flops = 0 if instruction is None else instruction.flops(1)
            self.work.append(flops + _MOVED * made)
            self._intense.append(flops / made if made else 0.0)
        self.in_maps = {key for keys in memory for key in keys}

    def segment(self, start: int, stop: int, threshold: float, held: frozenset[int] = frozenset()) -> Segment:
        """Nodes [start, stop) with their maps made again, from results of earlier nodes, of those of at least
        so many FLOPs a byte, and of those that are held anyway."""
        needed: set[int] = set()
        needs: set[int] = set()
        runs: set[int] = set()
        for index in range(stop - 1, start - 1, -1):
            node = self.program.nodes[index]
            outputs = {value for value in node.outputs if value is not None}
            asked = needed & outputs
            if not (node.remade or asked):
                continue
            keeps = self._intense[index] >= threshold
            if node.remade and node.restores and (keeps or outputs <= held):
                needs |= outputs
                needed.update(node.refs())
            elif not node.remade and (keeps or asked <= held):
                needs |= asked
            else:
                runs.add(index)
                needed.update(node.refs())
            needed -= outputs
        return Segment(start, stop, tuple(sorted(needs | needed)), frozenset(runs))

    def held(self, values: Iterable[int]) -> dict[Hashable, int]:
        """The memory of values that are kept; that of the inputs is not counted."""
        return dict(
            (("rounded", value), self.low[value]) if value in self.low else self.values[value]
            for value in values
            if value in self.values
        )

    def roundable(self, start: int, stop: int) -> frozenset[int]:
        """The nodes of [start, stop) whose maps have residuals that may be stored in bfloat16."""
        return frozenset(index for index in range(start, stop) if self.rounded[index])

    def peak(self, segment: Segment) -> int:
        """The most that is alive while the maps of a segment are made, checkpoints not counted."""
        given = self.held(segment.needs)
        alive: dict[int, tuple[Hashable, int]] = {}
        made = dict(self.values[value] for value in segment.needs if value in self.low)  # cast back
        most = 0
        for index in range(segment.start, segment.stop):
            node = self.program.nodes[index]
            if index in segment.runs:
                alive.update((v, self.values[v]) for v in node.outputs if v is not None)
            if node.remade:
                made.update(self.remade[index])
            together = made | dict(alive.values())
            if node.overwrites and index in segment.runs and node.args[0].value in alive:
                together.pop(alive[node.args[0].value][0])  # the factors lie where the projection was
            total = sum(size for key, size in together.items() if key not in given)
            most = max(most, total + self.cast[index] * self._runs_rounded(index))
            for value in self.program.dead[index]:
                alive.pop(value, None)
        return most

    def _runs_rounded(self, index: int) -> bool:
        """Whether to round what a map that is made again keeps takes another run of the operation."""
        return bool(self.low) and bool(self.rounded[index]) and self.program.nodes[index].op == "attention"

    def work_of(self, segment: Segment) -> float:
        """The work of making a segment again, and of casting what is stored in bfloat16."""
        nodes = self.roundable(segment.start, segment.stop) if self.low else ()
        cast = sum(self.values[value][1] for value in segment.needs if value in self.low)
        cast += sum(self.cast[index] for index in nodes)
        runs = [*segment.runs, *(index for index in nodes if self._runs_rounded(index))]
        return sum(self.work[index] for index in runs) + _MOVED * cast


def _union(memories: Iterable[Memory]) -> dict[Hashable, int]:
    merged: dict[Hashable, int] = {}
    for memory in memories:
        merged.update(memory)
    return merged


def _in_bfloat16(node: Node) -> Iterator[tuple[int, int]]:
    """The results of an operation that may be stored in bfloat16, with the bytes that they take then; its
    statistics may not."""
    for position, value in enumerate(node.outputs):
        single = node.nbytes[position] == torch.float32.itemsize * math.prod(node.shapes[position])
        if value is not None and single and not (position and only_first_output(node.op)):
            yield value, node.nbytes[position] // 2


@dataclass(frozen=True)
class _Option:
    """One way of giving up the residuals of a stretch of operations: making them again as a segment, or
    keeping them. Those of the nodes `rounded` are stored in bfloat16."""

    segment: Segment | None
    rounded: frozenset[int]
    work: float
    saving: int  # about: what neighbours share is not known
    peak: int  # while its maps are made, and one of them is cast back
    made: int = 0  # of its maps
    copied: frozenset[Hashable] = frozenset()  # the weights of its layers

    def transient(self, again: Memory) -> int:
        """The most that it takes where the copies of these weights are made again."""
        return max(self.peak, self.made + max((again.get(key, 0) for key in self.copied), default=0))


class _State:
    """A choice under construction, with its memory."""

    def __init__(self, facts: _Facts, workspace: int) -> None:
        self._facts, self._workspace = facts, workspace
        self.chosen: dict[int, _Option] = {}  # by the start of the segment
        self.again: dict[Hashable, int] = {}
        self._users: Counter[Hashable] = Counter()
        self._sizes: dict[Hashable, int] = {}
        self._kept = 0
        for memory in facts.memory:
            self._count(memory, 1)

    def _count(self, memory: Memory, change: int) -> None:
        for key, size in memory.items():
            before = self._users[key]
            self._users[key] = before + change
            if before == 0:
                self._sizes[key] = size
                self._kept += size
            elif before + change == 0:
                self._kept -= self._sizes[key]

    def set(self, start: int, option: _Option | None) -> None:
        """Give up the maps from here on in this way; None: keep them."""
        old = self.chosen.pop(start, None)
        facts = self._facts
        for one, change in ((old, 1), (option, -1)):
            if one is None:
                continue
            if one.segment is None:
                for index in one.rounded:
                    self._count(facts.memory[index], change)
                    self._count(facts.rounded[index], -change)
                continue
            self._count(facts.held(one.segment.needs), -change)
            for index in range(one.segment.start, one.segment.stop):
                self._count(facts.memory[index], change)
        if option is not None:
            self.chosen[start] = option

    def choice(self) -> Choice:
        """What has been chosen so far."""
        options = [self.chosen[start] for start in sorted(self.chosen)]
        again = sum(self.again.values())
        return Choice(
            segments=tuple(option.segment for option in options if option.segment is not None),
            again=frozenset(self.again),
            rounded=frozenset(index for option in options for index in option.rounded),
            work=sum(option.work for option in options) + _COPIED * again,
            kept=self._kept,
            copies=sum(self._facts.copies.values()) - again,
            transient=max(
                (*self.again.values(), *(option.transient(self.again) for option in options)), default=0
            ),
            workspace=self._workspace,
        )


def _greedy(facts: _Facts, bounds: Sequence[int], workspace: int, budget: float) -> tuple[Choice | None, int]:
    """Give up what costs the least work a byte until the rest fits; with it the least that was seen to be
    needed."""
    options = {start: _options(facts, start, stop) for start, stop in itertools.pairwise(bounds)}
    state = _State(facts, workspace)
    # The smallest first: of those that are made again the largest counts.
    weights = sorted(facts.copies, key=lambda key: -facts.copies[key])
    queue: list[tuple[float, int, int]] = []  # work a byte, segment, option

    def propose(start: int) -> None:
        old = state.chosen.get(start)
        work, saving = (old.work, old.saving) if old is not None else (0.0, 0)
        further = [
            ((option.work - work) / (option.saving - saving), start, number)
            for number, option in enumerate(options[start])
            if option.saving > saving
        ]
        if further:
            heapq.heappush(queue, min(further))

    for start in options:
        propose(start)
    least = state.choice().needed
    while (weights or queue) and least > budget:
        if weights and (not queue or queue[0][0] >= _COPIED):
            weight = weights.pop()
            state.again[weight] = facts.copies[weight]
        else:
            _, start, number = heapq.heappop(queue)
            state.set(start, options[start][number])
            propose(start)
        least = min(least, state.choice().needed)
    if least > budget:
        return None, least
    for start in sorted(state.chosen, key=lambda s: -state.chosen[s].work):
        option = state.chosen[start]
        state.set(start, None)  # what was given up for more than its neighbours needed comes back
        if state.choice().needed > budget:
            state.set(start, option)
    return state.choice(), least


def _options(facts: _Facts, start: int, stop: int) -> list[_Option]:
    """The ways of giving up the maps of nodes [start, stop) that differ, where they save anything."""
    found: dict[Segment | None, _Option] = {}
    kept = _union(facts.memory[start:stop])
    rounded = facts.roundable(start, stop)
    cast = max((facts.cast[index] for index in rounded), default=0)
    if rounded:
        saving = sum(_union(facts.memory[index] for index in rounded).values())
        saving -= sum(_union(facts.rounded[index] for index in rounded).values())
        work = _MOVED * sum(facts.cast[index] for index in rounded)
        if saving > 0:
            found[None] = _Option(None, rounded, work, saving, cast)
    for threshold in _THRESHOLDS:
        segment = facts.segment(start, stop, threshold)
        if segment in found:
            continue
        held = facts.held(segment.needs)
        saving = sum(size for key, size in kept.items() if key not in held)
        saving -= sum(size for key, size in held.items() if key not in facts.in_maps)
        if saving > 0:
            made = sum(size for key, size in _union(facts.remade[start:stop]).items() if key not in held)
            peak = facts.peak(segment)
            low = rounded if facts.low else frozenset[int]()
            if low:
                peak = max(peak, made + cast)
            copied = frozenset(facts.copied[start:stop])
            found[segment] = _Option(segment, low, facts.work_of(segment), saving, peak, made, copied)
    return list(found.values())


def _cut(program: Program, length: int) -> list[int]:
    """Where segments begin, and the end: `length` to three times as many operations, cut where the fewest
    bytes cross."""
    crossing = _crossing_bytes(program)
    count = len(program.nodes)
    bounds = [0]
    while count - bounds[-1] > 3 * length:
        window = range(bounds[-1] + length, bounds[-1] + 3 * length + 1)
        bounds.append(min(window, key=lambda i: (crossing[i], -i)))
    return [*bounds, count]


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
                change[last[made] + 1] -= size
    crossing, total = [], 0
    for step in change[:-1]:
        total += step
        crossing.append(total)
    return crossing
