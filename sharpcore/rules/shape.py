"""Rules of operations that move, copy or add up entries: linear, with no residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharpcore.backends.launches import launch
from sharpcore.rules import Call, Identity, LinearMap, aten, rule


class Reshape(LinearMap):
    """The same entries under another shape."""

    writes_jvp = writes_vjp = True

    def __init__(self, shape: torch.Size, out_shape: torch.Size) -> None:
        self.shape, self.out_shape = shape, out_shape

    def jvp(self, kernels: Any, tangents: Sequence[Tensor], out: Tensor | None = None) -> Sequence[Tensor]:
        return (_reshape(tangents[0], self.out_shape, out),)

    def vjp(
        self,
        kernels: Any,
        cotangents: Sequence[Tensor | None],
        out: Sequence[Tensor | None] = (None,),
    ) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        return (None if cotangent is None else _reshape(cotangent, self.shape, out[0]),)


def _reshape(vectors: Tensor, shape: torch.Size, out: Tensor | None) -> Tensor:
    """[K, ...] as [K, *shape]; a place is given for a copy, which is contiguous."""
    if out is None:
        return vectors.reshape(vectors.shape[0], *shape)
    target = out.view(vectors.shape)
    launch(target.copy_, (target, vectors), vectors)
    return out


@rule(
    aten.view.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
def reshape(call: Call) -> LinearMap:
    shape, out_shape = call.args[0].shape, call.out.shape
    return Identity() if shape == out_shape else Reshape(shape, out_shape)


@rule(
    aten.clone.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.contiguous.default,
    aten.positive.default,
)
def identity(call: Call) -> LinearMap:
    return Identity()


class Cast(LinearMap):
    """The same entries in another dtype."""

    writes_jvp = writes_vjp = True

    def __init__(self, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
        self.dtype, self.out_dtype = dtype, out_dtype

    def jvp(self, kernels: Any, tangents: Sequence[Tensor], out: Tensor | None = None) -> Sequence[Tensor]:
        return (tangents[0].to(self.out_dtype) if out is None else out.copy_(tangents[0]),)

    def vjp(
        self,
        kernels: Any,
        cotangents: Sequence[Tensor | None],
        out: Sequence[Tensor | None] = (None,),
    ) -> Sequence[Tensor | None]:
        (cotangent,), (place,) = cotangents, out
        if cotangent is None or place is None:
            return (None if cotangent is None else cotangent.to(self.dtype),)
        return (place.copy_(cotangent),)


@rule(aten._to_copy.default)
def to_copy(call: Call) -> LinearMap | None:
    x = call.args[0]
    if x.device != call.out.device or x.is_complex() != call.out.is_complex():
        return None
    return Identity() if x.dtype == call.out.dtype else Cast(x.dtype, call.out.dtype)


class Copied(LinearMap):
    """What `x.copy_(y)` leaves in x: y, broadcast and cast; the old entries do not matter."""

    def __init__(
        self, shape: torch.Size, source: Tensor, active: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.expand = Expand(source.shape, shape)
        self.active = active
        self.dtype, self.source_dtype = dtype, source.dtype

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return (self.expand.jvp(kernels, [tangents[self.active.index(1)]])[0].to(self.dtype),)

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        if cotangent is not None and cotangent.is_complex() and not self.source_dtype.is_complex:
            cotangent = cotangent.real
        back = None if cotangent is None else self.expand.vjp(kernels, [cotangent.to(self.source_dtype)])[0]
        return tuple(back if position == 1 else None for position in self.active)


@rule(aten.copy.default)
def copy(call: Call) -> LinearMap | None:
    target, source = call.args[:2]
    if 1 not in call.active or (source.is_complex() and not target.is_complex()):
        return None
    return Copied(target.shape, source, call.active, target.dtype)  # type: ignore[arg-type]


class Permute(LinearMap):
    """Axes in another order."""

    def __init__(self, order: Sequence[int]) -> None:
        self.order = (0, *(i + 1 for i in order))
        self.inverse = tuple(sorted(range(len(self.order)), key=self.order.__getitem__))

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return (tangents[0].permute(self.order),)

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        return (None if cotangent is None else cotangent.permute(self.inverse),)


@rule(aten.permute.default)
def permute(call: Call) -> LinearMap:
    x, order = call.args
    return Permute([i % x.dim() for i in order]) if x.dim() else Identity()


@rule(aten.transpose.int, aten.t.default)
def transpose(call: Call) -> LinearMap:
    x = call.args[0]
    first, second = call.args[1:] if call.op is aten.transpose.int else (0, 1)
    if x.dim() < 2:
        return Identity()
    order = list(range(x.dim()))
    order[first], order[second] = order[second], order[first]
    return Permute([i % x.dim() for i in order])


class Flip(LinearMap):
    """Entries in reverse order along axes; its own transpose."""

    def __init__(self, axes: Sequence[int]) -> None:
        self.axes = tuple(i + 1 for i in axes)

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return (tangents[0].flip(self.axes),)

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        return (None if cotangent is None else cotangent.flip(self.axes),)


@rule(aten.flip.default)
def flip(call: Call) -> LinearMap:
    x, axes = call.args
    return Flip([i % x.dim() for i in axes]) if x.dim() else Identity()


class Expand(LinearMap):
    """Axes of length one, or new leading axes, repeated."""

    def __init__(self, shape: torch.Size, out_shape: torch.Size) -> None:
        self.shape, self.out_shape = shape, out_shape

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        (tangent,) = tangents
        padded = tangent.reshape(
            tangent.shape[0], *(1,) * (len(self.out_shape) - len(self.shape)), *self.shape
        )
        return (padded.expand(-1, *self.out_shape),)

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        if cotangent is None:
            return (None,)
        new = len(self.out_shape) - len(self.shape)
        repeated = [i + 1 for i in range(new)]
        repeated += [i + new + 1 for i, n in enumerate(self.shape) if n == 1 and self.out_shape[i + new] != 1]
        total = cotangent.sum(repeated, keepdim=True) if repeated else cotangent
        return (total.reshape(cotangent.shape[0], *self.shape),)


@rule(aten.expand.default)
def expand(call: Call) -> LinearMap:
    shape, out_shape = call.args[0].shape, call.out.shape
    return Identity() if shape == out_shape else Expand(shape, out_shape)


class Pieces(LinearMap):
    """Slices of one tensor along one axis, each (start, stop, step), or with the axis dropped where step is
    0."""

    writes_vjp = True

    def __init__(self, shape: torch.Size, dim: int, pieces: Sequence[tuple[int, int, int]]) -> None:
        self.shape = shape
        self.dim = dim + 1
        self.pieces = tuple(pieces)

    def _piece(self, tensor: Tensor, start: int, stop: int, step: int) -> Tensor:
        if step == 0:
            return tensor.select(self.dim, start)
        if step == 1:
            return tensor.narrow(self.dim, start, stop - start)
        return tensor[(slice(None),) * self.dim + (slice(start, stop, step),)]

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return tuple(self._piece(tangents[0], *piece) for piece in self.pieces)

    def vjp(
        self,
        kernels: Any,
        cotangents: Sequence[Tensor | None],
        out: Sequence[Tensor | None] = (None,),
    ) -> Sequence[Tensor | None]:
        present = [c for c in cotangents if c is not None]
        if not present:
            return (None,)
        if len(present) == len(self.pieces) and len(present) > 1:
            # Several pieces of a split or an unbind: they tile the axis, in order.
            join = torch.stack if self.pieces[0][2] == 0 else torch.cat
            return (join(present, self.dim, out=out[0]),)
        total = out[0]
        if total is None:
            total = present[0].new_empty(present[0].shape[0], *self.shape)
        total.zero_()
        for piece, cotangent in zip(self.pieces, cotangents, strict=True):
            if cotangent is not None:
                self._piece(total, *piece).add_(cotangent)
        return (total,)


@rule(aten.slice.Tensor)
def slice_(call: Call) -> LinearMap:
    x = call.args[0]
    dim = call.optional(1, "dim", 0) % x.dim()
    start, stop = call.optional(2, "start", None), call.optional(3, "end", None)
    start, stop, step = slice(start, stop, call.optional(4, "step", 1)).indices(x.shape[dim])
    if (start, stop, step) == (0, x.shape[dim], 1):
        return Identity()
    return Pieces(x.shape, dim, [(start, max(start, stop), step)])


@rule(aten.select.int)
def select(call: Call) -> LinearMap:
    x, dim, index = call.args
    dim %= x.dim()
    index %= x.shape[dim]
    return Pieces(x.shape, dim, [(index, index + 1, 0)])


@rule(aten.split.Tensor, aten.split_with_sizes.default)
def split(call: Call) -> LinearMap:
    x = call.args[0]
    dim = call.optional(2, "dim", 0) % x.dim()
    stops, start = [], 0
    for part in call.out:
        stops.append((start, start + part.shape[dim], 1))
        start += part.shape[dim]
    return Pieces(x.shape, dim, stops)


@rule(aten.unbind.int)
def unbind(call: Call) -> LinearMap:
    x = call.args[0]
    dim = call.optional(1, "dim", 0) % x.dim()
    return Pieces(x.shape, dim, [(i, i + 1, 0) for i in range(x.shape[dim])])


class Concatenate(LinearMap):
    """Tensors joined along an axis, those without a tangent as zeros."""

    writes_jvp = writes_vjp = True

    def __init__(
        self, shapes: Sequence[torch.Size], active: Sequence[int], dim: int, dtype: torch.dtype
    ) -> None:
        self.shapes = tuple(shapes)
        self.active = tuple(active)
        self.dim = dim + 1
        self.dtype = dtype

    def jvp(self, kernels: Any, tangents: Sequence[Tensor], out: Tensor | None = None) -> Sequence[Tensor]:
        first = tangents[0]
        parts: list[Tensor | None] = [None] * len(self.shapes)
        for position, tangent in zip(self.active, tangents, strict=True):
            parts[position] = tangent.to(self.dtype)
        filled = [
            first.new_zeros((first.shape[0], *shape), dtype=self.dtype) if part is None else part
            for part, shape in zip(parts, self.shapes, strict=True)
        ]
        return (self._join(filled, out),)

    def _join(self, parts: Sequence[Tensor], out: Tensor | None) -> Tensor:
        if parts[0].dim() == 5 and self.dim == 2:
            # Images [K, B, C, H, W]: PyTorch knows channels-last for four axes only.
            k = parts[0].shape[0]
            folded = [part.flatten(0, 1) for part in parts]
            if out is None:
                return torch.cat(folded, 1).unflatten(0, (k, -1))
            target = out.flatten(0, 1)
            launch(torch.cat, (*folded, target), folded, 1, out=target)
            return out
        return torch.cat(list(parts), self.dim, out=out)

    def vjp(
        self,
        kernels: Any,
        cotangents: Sequence[Tensor | None],
        out: Sequence[Tensor | None] | None = None,
    ) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        if cotangent is None:
            return (None,) * len(self.active)
        pieces = cotangent.split([shape[self.dim - 1] for shape in self.shapes], self.dim)
        places = (None,) * len(self.active) if out is None else out
        return tuple(
            self._cut(pieces[position], place) for position, place in zip(self.active, places, strict=True)
        )

    def _cut(self, piece: Tensor, out: Tensor | None) -> Tensor:
        if out is not None:
            launch(out.copy_, (out, piece), piece)
            return out
        if piece.dim() == 5 and self.dim == 2:
            # Convolutions want them without gaps, and each of several would make a copy of its own.
            folded = piece.flatten(0, 1).contiguous(memory_format=torch.channels_last)
            return folded.unflatten(0, piece.shape[:2])
        return piece


@rule(aten.cat.default)
def cat(call: Call) -> LinearMap | None:
    tensors = call.args[0]
    if any(t.dim() != call.out.dim() or t.dtype != call.out.dtype for t in tensors):
        return None
    dim = call.optional(1, "dim", 0) % call.out.dim()
    return Concatenate([t.shape for t in tensors], [p[1] for p in call.active], dim, call.out.dtype)  # type: ignore[index]


class Stack(LinearMap):
    """Tensors joined along a new axis, those without a tangent as zeros."""

    def __init__(self, shape: torch.Size, count: int, active: Sequence[int], dim: int) -> None:
        self.shape, self.count, self.active = shape, count, tuple(active)
        self.dim = dim + 1

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        zeros = None
        given = dict(zip(self.active, tangents, strict=True))
        if len(given) < self.count:
            zeros = torch.zeros_like(tangents[0])
        return (torch.stack([given.get(i, zeros) for i in range(self.count)], self.dim),)  # type: ignore[misc]

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        return tuple(
            None if cotangent is None else cotangent.select(self.dim, position) for position in self.active
        )


@rule(aten.stack.default)
def stack(call: Call) -> LinearMap | None:
    tensors = call.args[0]
    if any(t.dtype != call.out.dtype for t in tensors):
        return None
    dim = call.optional(1, "dim", 0) % call.out.dim()
    return Stack(tensors[0].shape, len(tensors), [p[1] for p in call.active], dim)  # type: ignore[index]


class Reduce(LinearMap):
    """Sums or means over axes."""

    def __init__(self, call: Call, axes: Sequence[int], mean: bool) -> None:
        self.shape, self.out_shape = call.args[0].shape, call.out.shape
        self.dtype, self.out_dtype = call.args[0].dtype, call.out.dtype
        self.axes = tuple(i + 1 for i in axes)
        self.factor = 1 / max(1, torch.Size([self.shape[i] for i in axes]).numel()) if mean else 1

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        (tangent,) = tangents
        total = tangent.sum(self.axes, dtype=self.out_dtype) if self.axes else tangent.to(self.out_dtype)
        total = total.reshape(tangent.shape[0], *self.out_shape)
        return (total if self.factor == 1 else total * self.factor,)

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        if cotangent is None:
            return (None,)
        kept = [1 if i + 1 in self.axes else n for i, n in enumerate(self.shape)]
        spread = (cotangent * self.factor).to(self.dtype).reshape(cotangent.shape[0], *kept)
        return (spread.expand(-1, *self.shape),)


@rule(aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default)
def reduce(call: Call) -> LinearMap | None:
    x = call.args[0]
    if x.is_complex():
        return None
    whole = call.op in (aten.sum.default, aten.mean.default)
    axes = None if whole else call.optional(1, "dim", None)
    axes = range(x.dim()) if not axes else [i % max(1, x.dim()) for i in axes]
    return Reduce(call, list(axes) if x.dim() else [], mean=call.op in (aten.mean.default, aten.mean.dim))


class Repeat(LinearMap):
    """Tiles of a tensor."""

    def __init__(self, shape: torch.Size, repeats: Sequence[int]) -> None:
        self.repeats = tuple(repeats)
        self.shape = (*(1,) * (len(self.repeats) - len(shape)), *shape)
        self.in_shape = shape

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        (tangent,) = tangents
        return (tangent.reshape(tangent.shape[0], *self.shape).repeat(1, *self.repeats),)

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        if cotangent is None:
            return (None,)
        tiles = [size for pair in zip(self.repeats, self.shape, strict=True) for size in pair]
        tiled = cotangent.reshape(cotangent.shape[0], *tiles)
        total = tiled.sum(tuple(range(1, len(tiles), 2))) if tiles else tiled
        return (total.reshape(cotangent.shape[0], *self.in_shape),)


@rule(aten.repeat.default)
def repeat(call: Call) -> LinearMap:
    return Repeat(call.args[0].shape, call.args[1])


class Overlay(LinearMap):
    """A tensor some of whose entries were overwritten in place by those of another one.

    `source[i]` is the flat index in the written tensor that entry i now holds, or -1 where the old entry
    stays.
    """

    def __init__(
        self, source: Tensor, shape: torch.Size, update_shape: torch.Size, active: tuple[int, ...]
    ) -> None:
        self.source = source.flatten()
        self.written = self.source >= 0
        self.shape, self.update_shape = shape, update_shape
        self.active = active

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        given = dict(zip(self.active, tangents, strict=True))
        k = tangents[0].shape[0]
        base = given[0].reshape(k, -1) if 0 in given else tangents[0].new_zeros(k, self.source.numel())
        if 1 in given:
            moved = given[1].reshape(k, -1).index_select(1, self.source.clamp(min=0))
            result = torch.where(self.written, moved, base)
        else:
            result = base.masked_fill(self.written, 0)
        return (result.reshape(k, *self.shape),)

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        if cotangent is None:
            return (None,) * len(self.active)
        k = cotangent.shape[0]
        flat = cotangent.reshape(k, -1)
        results: list[Tensor | None] = []
        if 0 in self.active:
            results.append(flat.masked_fill(self.written, 0).reshape(k, *self.shape))
        if 1 in self.active:
            update = flat.new_zeros(k, self.update_shape.numel())
            positions = self.written.nonzero().squeeze(1)
            update.index_add_(1, self.source[positions], flat[:, positions])
            results.append(update.reshape(k, *self.update_shape))
        return results


def overlay(base: Tensor, update: Tensor, source: Tensor) -> Tensor:
    """The primal of `Overlay`: base with the entries that `source` names taken from update."""
    moved = update.reshape(-1)[source.clamp(min=0).flatten()].reshape(source.shape)
    return torch.where(source >= 0, moved, base)


@rule(overlay)
def overlay_rule(call: Call) -> LinearMap:
    base, update, source = call.args
    return Overlay(source, base.shape, update.shape, call.active)  # type: ignore[arg-type]
