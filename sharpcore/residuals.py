"""What a linearization keeps for its products: the linear map of every node, or what it takes to make it
again."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sharpcore.lowering import Lowering
from sharpcore.memory import give_back_freed
from sharpcore.program import Node, Program
from sharpcore.rules import LinearMap, storage_of


def residual_storages(node: Node, instruction: LinearMap) -> list[tuple[StorageWeakRef, int]]:
    """The memory of what a map keeps, but for the constants of its node, with its size in bytes."""
    if isinstance(instruction, Dropped):
        return instruction.storages
    constants = {
        storage_of(part)[0]
        for arg in node.args
        for part in (arg if isinstance(arg, list) else (arg,))
        if isinstance(part, Tensor)
    }
    found = []
    for _, tensor in instruction.residuals():
        key, size = storage_of(tensor)
        if key not in constants and tensor.layout is torch.strided:
            found.append((StorageWeakRef(tensor.untyped_storage()), size))
    return found


class Dropped(LinearMap):
    """Stands for a map that was let go of in a trace, since it did not fit into memory."""

    def __init__(self, instruction: LinearMap, storages: list[tuple[StorageWeakRef, int]]) -> None:
        self._kind = instruction.kind
        self.storages = storages
        one = instruction.flops(1)
        self._flops = one, instruction.flops(2) - one

    @property
    def kind(self) -> str:
        return self._kind

    def flops(self, k: int) -> int:
        return self._flops[0] + (k - 1) * self._flops[1]


def kept_memory(
    program: Program, maps: Sequence[LinearMap | None], lowering: Lowering
) -> list[Mapping[Hashable, int]]:
    """The bytes that the map of each node will keep of the point, by what tells memory from another: a copy
    that lowering makes is shared with no other map."""
    result: list[Mapping[Hashable, int]] = []
    for index, (node, instruction) in enumerate(zip(program.nodes, maps, strict=True)):
        kept: dict[Hashable, int] = {}
        if instruction is not None and node.remade:
            copied = lowering.copies(instruction)
            for part, (storage, size) in enumerate(residual_storages(node, instruction)):
                kept[(index, part) if copied else storage.cdata] = lowering.rounded(size)
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
    product at a time may ask. Maps that do not depend on the point are always kept.
    """

    def __init__(
        self,
        maps: Sequence[LinearMap | None],
        segments: Sequence[Segment],
        program: Program,
        kernels: Any,
        lowering: Lowering,
    ) -> None:
        self._kept = list(maps)
        self.segments = tuple(segments)
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
        return self._program.remake(segment, self.checkpoints, self._kernels, self._lowering)

    def __setitem__(self, node: int, instruction: LinearMap | None) -> None:
        self._kept[node] = instruction

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
            self.checkpoints[value] = tensor

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
