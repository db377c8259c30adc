"""The buffer plan: where every tangent of a product lies in one workspace, so that a repeated product
allocates nothing but its result."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sharpcore.backends.launches import Launch
from sharpcore.rules import LinearMap, storage_of

_ALIGNMENT = 64
ADD = -1  # stands for an instruction: the sum of two cotangents of one value


@dataclass
class _Region:
    """Memory that one instruction fills, and the last instruction that needs its content."""

    nbytes: int
    dtype: torch.dtype
    origin: int  # where in its storage the first tensor began, in entries
    last: int
    offset: int = 0


@dataclass(frozen=True)
class _Place:
    """A tensor inside a region; the offset counts entries."""

    region: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Entry:
    node: int
    inputs: tuple[_Place | None, ...]
    outputs: tuple[_Place | None, ...]
    elementwise: bool


Named = tuple[int, Tensor]


class Log:
    """What the first product with K vectors did; `Plan` is made from it.

    Instructions are noted one after the other with their tensors, of which shapes and strides are kept. A
    result that shares the storage of an operand is a view of it and needs no instruction; any other is
    memory of its own.
    """

    def __init__(self, start: int, vectors: Tensor) -> None:
        self.regions: list[_Region] = []
        self.entries: list[_Entry] = []
        self.places: dict[int, _Place] = {}
        self.usable = True  # False where a result lies in memory in a way that a plan cannot give it
        self.seconds: dict[int, float] = {}  # that instructions took, by node
        self._since = time.perf_counter()
        self.start = self.places[start] = self._own(vectors)

    def note(
        self,
        node: int,
        inputs: Sequence[Named | None],
        outputs: Sequence[Named | None],
        *,
        elementwise: bool = False,
    ) -> None:
        """One instruction; operands and results are given with the numbers of their values.

        An elementwise one may write its result over an operand that nothing reads afterwards.
        """
        self.seconds[node] = time.perf_counter() - self._since
        position = len(self.entries)
        sources: dict[int, int] = {}
        read: list[_Place | None] = []
        for operand in inputs:
            if operand is None:
                read.append(None)
                continue
            place = self.places[operand[0]]
            read.append(place)
            sources[operand[1].untyped_storage()._cdata] = place.region
            self.regions[place.region].last = position
        written: list[_Place | None] = []
        for result in outputs:
            if result is None:
                written.append(None)
                continue
            value, tensor = result
            region = sources.get(tensor.untyped_storage()._cdata)
            if region is None:
                self.places[value] = self._own(tensor)
                written.append(self.places[value])
            else:
                self.places[value] = self._view(region, tensor)
                written.append(None)
        if any(place is not None for place in written):
            self.entries.append(_Entry(node, tuple(read), tuple(written), elementwise))
        self._since = time.perf_counter()

    def _own(self, tensor: Tensor) -> _Place:
        span, usable = _span(tensor)
        self.usable &= usable
        self.regions.append(
            _Region(
                span * tensor.element_size(), tensor.dtype, int(tensor.storage_offset()), len(self.entries)
            )
        )
        return _Place(len(self.regions) - 1, tensor.shape, tensor.stride(), 0)

    def _view(self, number: int, tensor: Tensor) -> _Place:
        region = self.regions[number]
        offset = int(tensor.storage_offset()) - region.origin
        end = (offset + _span(tensor)[0]) * tensor.element_size()
        self.usable &= tensor.dtype == region.dtype and offset >= 0 and end <= region.nbytes
        return _Place(number, tensor.shape, tensor.stride(), offset)


def _span(tensor: Tensor) -> tuple[int, bool]:
    """Entries from the first to the last in memory, and whether each has a place of its own as far as strides
    of zero tell."""
    pairs = list(zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() == 0:
        return 0, True
    return 1 + sum((n - 1) * step for n, step in pairs), all(step or n == 1 for n, step in pairs)


@dataclass
class Instruction:
    """A node's map (or ADD) with the tensors it reads, and those it writes: None for a view, or for what
    nobody wants.

    `calls` are what the map `of` did when it ran here, where that can be done again without the map, or else
    the map itself; empty as long as that is not known.
    """

    node: int
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor | None, ...]
    of: LinearMap | None = None
    calls: tuple[Callable[[], Any], ...] = ()
    touched: tuple[Tensor, ...] = ()  # what the calls point to: held, so that it stays

    def forget(self) -> None:
        """Run the map itself the next time."""
        self.of, self.calls, self.touched = None, (), ()

    def remember(self, made: Sequence[Launch], run: Callable[[], Any]) -> None:
        """Take over the launches of the map, if they touch its own memory and the workspace alone; if not,
        `run`, which runs the map here."""
        assert self.of is not None
        own = {id(t) for t in (*self.inputs, *self.outputs)}
        known = {storage_of(t)[0] for t in (*self.inputs, *self.outputs) if t is not None}
        known.update(storage_of(tensor)[0] for _, tensor in self.of.residuals())
        touched = [t for _, tensors in made for t in tensors if t is not None]
        if made and all(id(t) in own or storage_of(t)[0] in known for t in touched):
            self.calls = tuple(call for call, _ in made)
            # Tensors of their own: a parameter may be given other memory.
            self.touched = tuple(t.detach() for t in touched)
        else:
            self.calls = (run,)


class Plan:
    """The instructions of a product with every operand and result at its place in one workspace.

    Attributes
    ----------
    start, result
        Where the vectors go, and where the product is found.
    nbytes
        The size of the workspace.
    calls
        All that a product does, once every instruction has its calls; empty before that.
    """

    def __init__(self, log: Log, result: int) -> None:
        """`result` is the value that the product gives. The plan has no memory yet: see `place`."""
        log.regions[log.places[result].region].last = len(log.entries)
        self._log, self._result = log, result
        self._owner = _share_memory(log)
        self.nbytes = _assign_offsets(log, self._owner)

    def place(self, workspace: Tensor) -> None:
        """Lay everything into these bytes, at least `nbytes`."""
        log = self._log
        tensors: dict[_Place, Tensor] = {}

        def tensor(place: _Place) -> Tensor:
            if place not in tensors:
                region = log.regions[self._owner[place.region]]
                memory = workspace[region.offset : region.offset + region.nbytes].view(region.dtype)
                offset = int(memory.storage_offset()) + place.offset
                tensors[place] = memory.as_strided(place.size, place.stride, offset)
            return tensors[place]

        def optional(places: tuple[_Place | None, ...]) -> tuple[Tensor | None, ...]:
            return tuple(None if place is None else tensor(place) for place in places)

        self.instructions = [
            Instruction(entry.node, optional(entry.inputs), optional(entry.outputs)) for entry in log.entries
        ]
        for instruction in self.instructions:
            if instruction.node == ADD:
                instruction.calls = (partial(torch.add, *instruction.inputs, out=instruction.outputs[0]),)
        self.start, self.result = tensor(log.start), tensor(log.places[self._result])
        self.threads = torch.get_num_threads()
        self.calls: tuple[Callable[[], Any], ...] = ()

    def prepare(self) -> None:
        """Forget remembered calls where the number of threads has changed, which they hold."""
        if self.threads != torch.get_num_threads():
            self.threads = torch.get_num_threads()
            self.forget(())

    def forget(self, stay: Container[int]) -> None:
        """Run maps themselves the next time, but for those of the nodes that stay."""
        self.calls = ()
        for instruction in self.instructions:
            if instruction.node != ADD and instruction.node not in stay:
                instruction.forget()

    def collect(self) -> None:
        """Take over the calls of all instructions, if each has its own."""
        if all(instruction.calls for instruction in self.instructions):
            self.calls = tuple(call for instruction in self.instructions for call in instruction.calls)


def _share_memory(log: Log) -> list[int]:
    """For each region the one whose memory it uses: its own, or that of an operand that dies in the
    elementwise instruction which fills it."""
    owner = list(range(len(log.regions)))
    for position, entry in enumerate(log.entries):
        if not entry.elementwise:
            continue
        (out,) = entry.outputs
        assert out is not None
        mine = log.regions[out.region]
        operands = [place for place in entry.inputs if place is not None]
        for place in operands:
            region = log.regions[owner[place.region]]
            same_layout = (place.size, place.stride, place.offset) == (out.size, out.stride, out.offset)
            same_memory = (region.nbytes, region.dtype) == (mine.nbytes, mine.dtype)
            alone = sum(owner[other.region] == owner[place.region] for other in operands) == 1
            if region.last == position and same_layout and same_memory and alone:
                owner[out.region] = owner[place.region]
                region.last = mine.last
                break
    return owner


def _assign_offsets(log: Log, owner: list[int]) -> int:
    """Give every region that owns memory an offset: the smallest hole that fits when it is filled, free again
    after its last reader. Returns the size of the whole."""
    dying: dict[int, list[_Region]] = {}
    holes: list[tuple[int, int]] = []  # offset and size, in order, never adjacent
    size = 0

    def take(region: _Region) -> None:
        nonlocal size
        need = -(-region.nbytes // _ALIGNMENT) * _ALIGNMENT
        dying.setdefault(region.last, []).append(region)
        fitting = [hole for hole in holes if hole[1] >= need]
        if fitting:
            hole = min(fitting, key=lambda h: h[1])
            index = holes.index(hole)
            region.offset = hole[0]
            holes[index : index + 1] = [(hole[0] + need, hole[1] - need)] if hole[1] > need else []
            return
        if holes and sum(holes[-1]) == size:  # grow the last hole
            region.offset = holes.pop()[0]
        else:
            region.offset = size
        size = region.offset + need

    def free(region: _Region) -> None:
        need = -(-region.nbytes // _ALIGNMENT) * _ALIGNMENT
        if not need:
            return
        holes.append((region.offset, need))
        holes.sort()
        joined = [holes[0]]
        for offset, length in holes[1:]:
            if offset == sum(joined[-1]):
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((offset, length))
        holes[:] = joined

    take(log.regions[log.start.region])
    for position, entry in enumerate(log.entries):
        for place in entry.outputs:
            if place is not None and owner[place.region] == place.region:
                take(log.regions[place.region])
        for region in dying.pop(position, []):
            free(region)
    return size
