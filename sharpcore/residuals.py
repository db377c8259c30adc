"""What a linearization keeps for its products: the linear map of every node, or what it takes to make it
again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sharpcore.lowering import Lowering, is_fixed
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

    def __init__(self, storages: list[tuple[StorageWeakRef, int]]) -> None:
        self.storages = storages


def kept_bytes(program: Program, maps: Sequence[LinearMap | None], lowering: Lowering) -> list[int]:
    """What the map of each node will keep, but for what the map of an earlier node keeps as well: a copy that
    lowering makes is shared with no other map."""
    seen: dict[int, StorageWeakRef] = {}
    result = []
    for node, instruction in zip(program.nodes, maps, strict=True):
        total = 0
        if instruction is not None and not is_fixed(instruction):
            for storage, size in residual_storages(node, instruction):
                if storage.cdata not in seen or lowering.copies(instruction):
                    seen[storage.cdata] = storage
                    total += lowering.rounded(size)
        result.append(total)
    return result


@dataclass(frozen=True)
class Segment:
    """Nodes [start, stop) whose maps are made again in every product, from the values in `needs`."""

    start: int
    stop: int
    needs: tuple[int, ...]


class Residuals(Sequence["LinearMap | None"]):
    """The maps of a linearization by node; those of a recomputed segment are made when one is asked for.

    One segment at a time is held beside what is kept. Maps that do not depend on the point are always kept.
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
        if kept is not None or segment is None:
            return kept
        made_for, made = self._made
        if made_for is not segment:
            del made
            self._made = (None, {})  # the other segment goes first
            made = self.make(segment)
            self._made = (segment, made)
        return made.get(node)

    def make(self, segment: Segment) -> dict[int, LinearMap]:
        """The maps of a segment, from the checkpoints."""
        values = dict(self.checkpoints)
        return self._program.replay(values, self, self._kernels, self._lowering, segment)

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

    def offer(self, value: int, tensor: Tensor) -> None:
        """Keep a value of the primal pass if a recomputed segment starts from it."""
        if value in self._needed:
            self.checkpoints[value] = tensor

    def release(self) -> None:
        """Drop the segment that was made last."""
        self._made = (None, {})

    def tensors(self) -> Iterator[tuple[int | None, Tensor]]:
        """Every tensor that is kept, with the node of its map; None for a checkpoint."""
        for node, instruction in enumerate(self._kept):
            if instruction is not None:
                for _, tensor in instruction.residuals():
                    yield node, tensor
        for tensor in self.checkpoints.values():
            yield None, tensor
