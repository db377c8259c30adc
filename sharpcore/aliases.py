"""Which value of a program each live tensor holds, through views and in-place writes, and how writes are
recorded."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sharpcore.errors import UnsupportedOperation
from sharpcore.rules import aten, with_tensors

if TYPE_CHECKING:
    from sharpcore.trace import Tracer


class Kind(Enum):
    """What a recorded value is to the derivative."""

    PRIMAL = "depends on an input, but carries no tangent"
    ACTIVE = "carries a tangent"
    OPAQUE = "depends on x in a way that has no rule; an error if a tangent would need it"


@dataclass
class _Binding:
    """Which value of the program a live tensor holds, and after how many in-place writes to its storage."""

    tensor: weakref.ref[Tensor]
    value: int
    writes: int
    storage: int | None


@dataclass
class _WrittenStorage:
    """A storage that was written in place with recorded values: where, and with which value."""

    storage: Any  # held, so that its address is not reused during the trace
    # Each write: value, size, stride, offset, bytes of an entry.
    writes: list[tuple[int, torch.Size, tuple[int, ...], Any, int]] = field(default_factory=list)

    def add(self, value: int, target: Tensor) -> None:
        geometry = (target.size(), target.stride(), target.storage_offset(), target.element_size())
        self.writes.append((value, *geometry))


def leaves(args: Sequence[Any]) -> Iterator[tuple[int | tuple[int, int], Tensor]]:
    """The tensors among arguments, also those inside lists, with their positions."""
    for i, arg in enumerate(args):
        if isinstance(arg, Tensor):
            yield i, arg
        elif isinstance(arg, (list, tuple)):
            for j, part in enumerate(arg):
                if isinstance(part, Tensor):
                    yield (i, j), part


def replace_tensors(args: Sequence[Any], replacement: Callable[[Tensor], Any]) -> tuple[Any, ...]:
    """Arguments with every tensor exchanged, also those inside lists."""

    def one(arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return replacement(arg)
        if isinstance(arg, (list, tuple)) and any(isinstance(part, Tensor) for part in arg):
            return [replacement(part) if isinstance(part, Tensor) else part for part in arg]
        return arg

    return tuple(one(arg) for arg in args)


def storage_key(tensor: Tensor) -> int:
    """What tells the memory of an ordinary tensor from another\'s while both are alive."""
    return tensor.untyped_storage()._cdata


class Aliases:
    """What the live tensors of a trace hold, and the memory that they share."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = weakref.proxy(tracer)  # a cycle would keep the maps of the trace alive for a while
        self._bindings: dict[int, _Binding] = {}
        self._written: dict[int, _WrittenStorage] = {}
        # Storages that hold recorded values. A weak reference keeps the address from being reused, not the
        # memory alive.
        self._dependent: dict[int, StorageWeakRef] = {}
        self._active: set[int] = set()  # storages that hold values with a tangent
        self._detached: set[int] = set()  # values without a tangent that share the memory of one with it
        self._captured: set[int] = set()  # storages that nodes or maps refer to

    def capture(self, tensor: Tensor) -> None:
        """Note that a node or a map refers to the memory of a tensor."""
        if tensor.layout is torch.strided:
            self._captured.add(storage_key(tensor))

    def captured(self, tensors: Sequence[Tensor]) -> set[int]:
        """The memory of these tensors to which nodes or maps refer."""
        return {storage_key(t) for t in tensors if t.layout is torch.strided} & self._captured

    def detach(self, tensor: Tensor, value: int) -> None:
        """Note that a value without a tangent lies in the memory of one with it, if that is so."""
        if storage_key(tensor) in self._active:
            self._detached.add(value)

    def detached(self, values: Sequence[int | None]) -> bool:
        """Whether one of the values is such a one."""
        return not self._detached.isdisjoint(values)

    def write(self, target: Tensor, value: int) -> None:
        """Note that a tensor was written in place, and holds a value from now on."""
        written = self._written.setdefault(storage_key(target), _WrittenStorage(target.untyped_storage()))
        written.add(value, target)
        self.bind(target, value)

    def is_written(self, tensor: Tensor) -> bool:
        """Whether the memory of a tensor was written with recorded values."""
        return tensor.layout is torch.strided and storage_key(tensor) in self._written

    def bind(self, tensor: Tensor, value: int) -> None:
        """Note that a tensor holds a value from now on."""
        storage = None
        if tensor.layout is torch.strided:
            storage = storage_key(tensor)
            if storage not in self._dependent:
                self._dependent[storage] = StorageWeakRef(tensor.untyped_storage())
            if self._tracer.kinds[value] is Kind.ACTIVE:
                self._active.add(storage)
        written = self._written.get(storage) if storage is not None else None
        key = id(tensor)
        bindings = self._bindings
        reference = weakref.ref(tensor, lambda _: bindings.pop(key, None))
        bindings[key] = _Binding(reference, value, len(written.writes) if written else 0, storage)

    def value_of(self, tensor: Tensor) -> int | None:
        """The program value that a tensor holds now; None for a constant.

        Raises UnsupportedOperation for a tensor that shares memory with a recorded value but was not made
        from it by a recorded operation (`.data =`, `nn.Parameter(...)`, `as_subclass`, `set_`): taking it for
        a constant would lose its derivative.
        """
        binding = self._bindings.get(id(tensor))
        if binding is not None and binding.tensor() is not tensor:
            binding = None
        if tensor.layout is not torch.strided:
            return None if binding is None else binding.value
        storage = storage_key(tensor)
        if binding is not None and binding.storage != storage:
            raise UnsupportedOperation(
                f"a tensor that depends on x was given another storage {self._tracer.where()}"
            )
        written = self._written.get(storage)
        if written is not None and len(written.writes) > (binding.writes if binding else 0):
            return self._catch_up(tensor, binding, written)
        if binding is None and storage in self._dependent:
            raise UnsupportedOperation(
                f"a tensor shares memory with one that depends on x, but came from no recorded operation "
                f"{self._tracer.where()}: its derivative would be lost"
            )
        return None if binding is None else binding.value

    def _catch_up(self, tensor: Tensor, binding: _Binding | None, written: _WrittenStorage) -> int | None:
        """Apply in-place writes that were made through other tensors of the same storage."""
        value = binding.value if binding else None
        start = binding.writes if binding else 0
        geometry = (tensor.size(), tensor.stride(), tensor.storage_offset())
        for update, size, stride, offset, itemsize in written.writes[start:]:
            if itemsize != tensor.element_size():
                raise UnsupportedOperation(
                    f"memory that depends on x is read as entries of another size {self._tracer.where()}"
                )
            if (size, stride, offset) == geometry:
                value = update
                continue
            length = written.storage.nbytes() // tensor.element_size()
            where = torch.full((length,), -1, dtype=torch.int64, device=tensor.device)
            where.as_strided(size, stride, offset).copy_(
                torch.arange(size.numel(), device=tensor.device).reshape(size)
            )
            source = where.as_strided(*geometry).clone()
            if not bool((source >= 0).any()):
                continue
            value = self._tracer.append_overlay(tensor, value, update, size, source)
        if value is not None:
            self.bind(tensor, value)
        return value


class InPlaceWrites:
    """Records writes into tensors that a program knows as operations without side effects."""

    def __init__(self, tracer: Tracer, aliases: Aliases) -> None:
        self._tracer, self._aliases = weakref.proxy(tracer), aliases

    def record(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], values: dict[Any, int]) -> Any:
        """Record `x.op_(...)` as its functional twin followed by a change of what x holds."""
        name = op._schema.name.split("::")[1]
        written = [
            i
            for i, a in enumerate(op._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]
        twin = getattr(getattr(aten, name[:-1], None), op._overloadname, None) if name.endswith("_") else None
        if twin is None or written != [0] or op.namespace != "aten":
            raise UnsupportedOperation(f"{op} writes into a tensor that depends on x {self._tracer.where()}")
        target = args[0]
        if self._aliases.detached([values.get(0)]):
            raise UnsupportedOperation(
                f"{op} writes through .detach() or .data into a tensor that depends on x "
                f"{self._tracer.where()}: the derivative of what it overwrites would be lost"
            )
        out = twin(*args, **kwargs)
        self.protect([target])
        # The maps refer to the operands before the write: copies of those that share the written storage are
        # recorded.
        key = storage_key(target)
        saved = replace_tensors(args, lambda t: t.clone() if storage_key(t) == key else t)
        originals = dict(leaves(args))
        for position, tensor in leaves(saved):
            if tensor is not originals[position] and position in values:
                self._aliases.bind(tensor, values[position])
        (value,) = self._tracer.append_call(twin, saved, kwargs, out, values, bind=False)
        if out.dtype != target.dtype:
            cast = out.to(target.dtype)
            self._aliases.bind(out, value)
            (value,) = self._tracer.append_call(
                aten._to_copy.default, (out,), {"dtype": target.dtype}, cast, {0: value}, bind=False
            )
            out = cast
        target.copy_(out)
        self._aliases.write(target, value)
        return target

    def record_constant(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A constant was written into a storage that also holds recorded values: their readers must see
        it."""
        for i, argument in enumerate(op._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            target = args[i] if i < len(args) else kwargs.get(argument.name)
            for _, tensor in leaves([target]):
                if self._aliases.is_written(tensor):
                    kept = tensor.clone()
                    (value,) = self._tracer.append_call(aten.clone.default, (kept,), {}, kept, {}, bind=False)
                    self._aliases.write(tensor, value)

    def protect(self, targets: list[Tensor]) -> None:
        """Before a storage is overwritten, give nodes and maps that refer to it a copy of what it holds."""
        keys = self._aliases.captured(targets)
        if not keys:
            return

        def copy(tensor: Tensor) -> Tensor:
            return (
                tensor.clone() if tensor.layout is torch.strided and storage_key(tensor) in keys else tensor
            )

        maps = self._tracer.maps
        for index, (node, instruction) in enumerate(zip(self._tracer.nodes, maps, strict=True)):
            node.args = replace_tensors(node.args, copy)
            if instruction is not None:
                maps[index] = with_tensors(instruction, copy)
