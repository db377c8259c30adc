"""What a linearization keeps for its products: the linear map of every node, or what it takes to make it
again."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sharpcore.lowering import Lowering, restored, roundable
from sharpcore.memory import give_back_freed
from sharpcore.program import Node, Program
from sharpcore.rules import LinearMap, storage_of


@dataclass(frozen=True)
class Residual:
    """A tensor that a map keeps: its memory, the bytes of all that memory, and what a copy in bfloat16 takes
    instead; None where there is to be none."""

    memory: StorageWeakRef
    nbytes: int
    rounded: int | None


def residuals_of(node: Node, instruction: LinearMap) -> list[Residual]:
    """What a map keeps beside the constants of its node."""
    if isinstance(instruction, Dropped):
        return instruction.kept
    constants = node.constants()
    rounds = {id(tensor) for tensor in roundable(instruction, constants)}
    return [
        Residual(
            StorageWeakRef(tensor.untyped_storage()),
            storage_of(tensor)[1],
            torch.bfloat16.itemsize * tensor.numel() if id(tensor) in rounds else None,
        )
        for _, tensor in instruction.residuals()
        if tensor.layout is torch.strided and storage_of(tensor)[0] not in constants
    ]


class Dropped(LinearMap):
    """Stands for a map that was let go of in a trace, since it did not fit into memory."""

    def __init__(self, instruction: LinearMap, kept: list[Residual]) -> None:
        self._kind = instruction.kind
        self.kept = kept
        one = instruction.flops(1)
        self._flops = one, instruction.flops(2) - one

    @property
    def kind(self) -> str:
        return self._kind

    def flops(self, k: int) -> int:
        return self._flops[0] + (k - 1) * self._flops[1]


def kept_memory(
    program: Program, maps: Sequence[LinearMap | None], lowering: Lowering, *, rounded: bool = False
) -> list[Mapping[Hashable, int]]:
    """The bytes that the map of each node will keep of the point, by what tells memory from another: a copy
    that lowering makes is shared with no other map. `rounded`: with residuals in bfloat16, and only of maps
    that have such."""
    result: list[Mapping[Hashable, int]] = []
    for index, (node, instruction) in enumerate(zip(program.nodes, maps, strict=True)):
        kept: dict[Hashable, int] = {}
        if instruction is not None and node.remade:
            copied = lowering.copies(instruction)
            residuals = residuals_of(node, instruction)
            for part, residual in enumerate(residuals):
                if rounded and residual.rounded is not None:
                    kept["rounded", index, part] = residual.rounded
                else:
                    key = (index, part) if copied else residual.memory.cdata
                    kept[key] = lowering.rounded(residual.nbytes)
            if rounded and all(residual.rounded is None for residual in residuals):
                kept = {}
        result.append(kept)
    return result


@dataclass(frozen=True)
class Segment:
    """Nodes [start, stop) whose maps are made again in every product, from the values in `needs`, by running
    the operations `runs` of them."""

    start: int
    stop: int
    needs: tuple[int, ...]
    runs: frozenset[int]


class Residuals(Sequence["LinearMap | None"]):
    """The maps of a linearization by node; those of a recomputed segment are made when one is asked for.

    One segment at a time is held beside what is kept, until a node outside of it is asked for, so that one
    product at a time may ask. Maps that do not depend on the point are always kept. The maps of the nodes
    `rounded`, and the values `low` that segments start from, are stored in bfloat16.
    """

    def __init__(
        self,
        maps: Sequence[LinearMap | None],
        segments: Sequence[Segment],
        program: Program,
        kernels: Any,
        lowering: Lowering,
        rounded: Container[int] = (),
        low: Container[int] = (),
    ) -> None:
        self._kept = list(maps)
        self.segments = tuple(segments)
        self._rounded, self._low = rounded, low
        self.checkpoints: dict[int, Tensor] = {}
        self._program, self._kernels, self._lowering = program, kernels, lowering
        self._needed = {value for segment in segments for value in segment.needs}
        self._of = {node: segment for segment in segments for node in range(segment.start, segment.stop)}
        self._made: tuple[Segment | None, dict[int, LinearMap]] = (None, {})

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, node: int) -> LinearMap | None: ...

    @overload
    def __getitem__(self, node: slice) -> Sequence[LinearMap | None]: ...

    def __getitem__(self, node: int | slice) -> LinearMap | Sequence[LinearMap | None] | None:
        if not self.segments:
            return self._kept[node]
        if isinstance(node, slice):
            return [self[i] for i in range(*node.indices(len(self)))]
        kept = self._kept[node]
        segment = self._of.get(node)
        if self._made[0] is not segment:
            self.release()
        if kept is not None or segment is None:
            return kept
        if self._made[0] is None:
            self._made = (segment, self.make(segment))
        return self._made[1].get(node)

    def make(self, segment: Segment) -> dict[int, LinearMap]:
        """The maps of a segment, from the checkpoints."""
        values = {value: self.checkpoints[value] for value in segment.needs}
        values.update((value, restored(values[value])) for value in segment.needs if value in self._low)
        lower = self._lowering.lower
        return self._program.remake(
            segment, values, self._kernels, lambda node, instruction: self._stored(node, lower(instruction))
        )

    def _stored(self, node: int, instruction: LinearMap) -> LinearMap:
        """A lowered map as it is kept."""
        if node not in self._rounded:
            return instruction
        return self._lowering.round_residuals(instruction, self._program.nodes[node].constants())

    def __setitem__(self, node: int, instruction: LinearMap | None) -> None:
        self._kept[node] = None if instruction is None else self._stored(node, instruction)

    def kept(self) -> Iterator[LinearMap | None]:
        """The maps by node, None for one that is recomputed."""
        return iter(self._kept)

    def recomputes(self, node: int) -> bool:
        """Whether the node's map, if it depends on the point, is made again in every product."""
        return node in self._of

    def makes(self, node: int) -> bool:
        """Whether the node's map was made from checkpoints and will be dropped again."""
        return node in self._of and self._kept[node] is None

    def holds(self, value: int) -> bool:
        """Whether a recomputed segment starts from this value."""
        return value in self._needed

    def offer(self, value: int, tensor: Tensor) -> None:
        """Keep a value of the primal pass if a recomputed segment starts from it."""
        if value in self._needed:
            rounds = value in self._low and tensor.dtype == torch.float32
            self.checkpoints[value] = tensor.bfloat16() if rounds else tensor

    def release(self) -> None:
        """Drop the segment that was made last."""
        if self._made[0] is not None:
            self._made = (None, {})
            give_back_freed()

    def tensors(self) -> Iterator[tuple[int | None, Tensor]]:
        """Every tensor that is kept, with the node of its map; None for a checkpoint."""
        for node, instruction in enumerate(self._kept):
            if instruction is not None:
                for _, tensor in instruction.residuals():
                    yield node, tensor
        for tensor in self.checkpoints.values():
            yield None, tensor
