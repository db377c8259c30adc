"""Derivatives of single operations: each rule turns one recorded call into the linear map that its tangents
go through."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """One executed operation as a rule sees it.

    `args` and `kwargs` hold the primal tensors, `out` what the operation returned, and `active` the positions
    in `args` whose tensors carry a tangent: an index, or a pair (index, element) for a tensor inside a list
    argument.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    active: tuple[int | tuple[int, int], ...]

    def argument(self, position: int | tuple[int, int]) -> Any:
        """The argument at a position as it is written in `active`."""
        return self.args[position] if isinstance(position, int) else self.args[position[0]][position[1]]

    def optional(self, index: int, name: str, default: Any) -> Any:
        """An argument that the caller may have given by position, by name, or not at all."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)


class LinearMap:
    """The derivative of one operation at one point, applied to K tangents at once.

    Tensors that the derivative needs from the primal pass (the residuals) are attributes. Tangents and
    cotangents have a leading axis K in front of the shape of their primal tensor.
    """

    # Whether jvp takes `out=`, a tensor for its only result, and vjp `out=`, a sequence of tensors for its
    # results (None: not wanted). What a map that does not has made is copied to its place.
    writes_jvp = False
    writes_vjp = False

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """Push the tangents of the active inputs, each [K, *input shape], to those of the outputs, each [K,
        *output shape]."""
        raise TypeError(f"{type(self).__name__} defines no jvp")

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Pull cotangents of the outputs (None where an output does not matter) back to the active inputs."""
        raise TypeError(f"{type(self).__name__} defines no vjp")

    @property
    def kind(self) -> str:
        """What `explain` calls it."""
        return type(self).__name__

    def residuals(self) -> list[tuple[str, Tensor]]:
        """The tensors that are kept for the derivative, with their attribute names."""
        return [(name, value) for name, value in vars(self).items() if isinstance(value, Tensor)]

    def flops(self, k: int) -> int:
        """Multiplications and additions of the matrix products of a jvp with k tangents (elementwise work is
        not counted)."""
        return 0


class Identity(LinearMap):
    """y' = x' (clones, evaluation-mode dropout, division by one); removed before products run."""

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return tangents

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        return cotangents


# A rule gives the linear map of a call, or None when it cannot express it (the autograd fallback is asked
# then).
Rule = Callable[[Call], "LinearMap | None"]
RULES: dict[Any, Rule] = {}

# Operations whose result has no derivative with respect to their input, by definition or almost everywhere.
ZERO_DERIVATIVE: set[Any] = {
    aten.detach.default,
    aten.floor.default,
    aten.ceil.default,
    aten.round.default,
    aten.trunc.default,
    aten.sign.default,
    aten.sgn.default,
}

# Operations that read only the shape, dtype or device of their tensor argument.
SHAPE_ONLY: set[Any] = {
    getattr(packet, overload)
    for packet in (
        aten.empty_like,
        aten.zeros_like,
        aten.ones_like,
        aten.full_like,
        aten.rand_like,
        aten.randn_like,
        aten.randint_like,
        aten.new_empty,
        aten.new_zeros,
        aten.new_ones,
        aten.new_full,
        aten.new_empty_strided,
    )
    for overload in packet.overloads()
    if overload != "out" and not overload.endswith("_out")
}


def rule(*ops: Any) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the given operations."""

    def register(function: Rule) -> Rule:
        for op in ops:
            if op in RULES:
                raise ValueError(f"{op} has two rules")
            RULES[op] = function
        return function

    return register


@contextlib.contextmanager
def autograd_enabled() -> Iterator[None]:
    """PyTorch's own derivatives, also inside a dispatch mode, where they are switched off for the caller's
    operation."""
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        exclude = exclude.remove(key)
    with torch._C._ForceDispatchKeyGuard(include, exclude):
        yield


def lift(tangent: Tensor, ndim: int) -> Tensor:
    """Insert axes of length one behind K, so that a [K, *shape] tangent broadcasts like its primal does
    against `ndim` axes."""
    missing = ndim - (tangent.dim() - 1)
    if missing <= 0:
        return tangent
    return tangent.reshape(tangent.shape[0], *(1,) * missing, *tangent.shape[1:])


def unbroadcast(cotangent: Tensor, shape: torch.Size) -> Tensor:
    """Sum a [K, *broadcast shape] cotangent over what was broadcast from `shape`; the transpose of `lift` and
    expansion."""
    extra = cotangent.dim() - 1 - len(shape)
    if extra:
        cotangent = cotangent.sum(dim=tuple(range(1, 1 + extra)))
    axes = tuple(i + 1 for i, n in enumerate(shape) if n == 1 and cotangent.shape[i + 1] != 1)
    return cotangent.sum(dim=axes, keepdim=True) if axes else cotangent


def with_tensors(instruction: LinearMap, exchange: Callable[[Tensor], Tensor]) -> LinearMap:
    """A copy of a linear map with other tensors, wherever it keeps them."""

    def exchanged(value: Any) -> Any:
        if isinstance(value, Tensor):
            return exchange(value)
        if isinstance(value, LinearMap):
            return with_tensors(value, exchange)
        if isinstance(value, (list, tuple)):
            return type(value)(exchanged(part) for part in value)
        return value

    other = copy.copy(instruction)
    vars(other).update({name: exchanged(value) for name, value in vars(instruction).items()})
    return other


def storage_of(tensor: Tensor) -> tuple[int, int]:
    """What tells a tensor's memory from another's, and its size in bytes."""
    if tensor.layout is torch.strided:
        storage = tensor.untyped_storage()
        return storage._cdata, storage.nbytes()
    return id(tensor), tensor.numel() * tensor.element_size()  # a weight that oneDNN has packed


def load_rules() -> dict[Any, Rule]:
    """Import every family of rules once and return the registry."""
    from sharpcore.rules import attention, linear, norm, pointwise, resampling, shape  # noqa: F401  (imported for their registrations)

    return RULES
