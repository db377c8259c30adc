"""The linear program: the recorded operations in order, how their values flow, and the three ways of running
it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sharpcore.rules import Call, LinearMap, Rule
from sharpcore.rules.fallback import fallback


@dataclass(frozen=True)
class Ref:
    """A place in a node's arguments that is filled with a value of the program."""

    value: int


@dataclass
class Node:
    """One recorded operation.

    `args` is the template of its arguments (constants, and Refs to values), `active` the argument positions
    that carry a tangent, `outputs` the values it makes (None for one that nobody can read).
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    active: tuple[int | tuple[int, int], ...]
    outputs: tuple[int | None, ...]
    module: str
    shapes: tuple[tuple[int, ...], ...] = ()
    linear: bool = False  # whether a product runs its derivative, so that a replay builds its map

    def refs(self) -> list[int]:
        """The values that the operation reads."""
        found = []
        for arg in self.args:
            for part in arg if isinstance(arg, (list, tuple)) else (arg,):
                if isinstance(part, Ref):
                    found.append(part.value)
        return found

    def active_inputs(self) -> list[int]:
        """The values whose tangents the linear map takes, in its order."""
        places = [self.args[p] if isinstance(p, int) else self.args[p[0]][p[1]] for p in self.active]
        return [place.value for place in places]

    def fill(self, values: dict[int, Tensor]) -> tuple[Any, ...]:
        """The arguments with every Ref replaced by its tensor."""
        return tuple(
            values[arg.value]
            if isinstance(arg, Ref)
            else [values[part.value] if isinstance(part, Ref) else part for part in arg]
            if isinstance(arg, list)
            else arg
            for arg in self.args
        )

    def run(self, kernels: Any, args: tuple[Any, ...]) -> Any:
        """Execute the primal operation."""
        if self.op == "attention":
            q, k, v, mask, scale = args
            return kernels.attention_forward(q, k, v, mask=mask, scale=scale)
        return self.op(*args, **self.kwargs)

    @property
    def name(self) -> str:
        """A short name of the operation."""
        if isinstance(self.op, torch._ops.OpOverload):
            return self.op._schema.name.split("::")[1]
        return self.op if isinstance(self.op, str) else self.op.__name__


@dataclass
class TangentStep:
    """One instruction of the linear program: which map runs on which values, and which values are dead
    afterwards."""

    node: int
    inputs: tuple[int, ...]
    outputs: tuple[int | None, ...]
    dead: tuple[int, ...] = ()


@dataclass
class Program:
    """What a trace recorded, independent of the point: shared by every linearization at inputs of the same
    shapes."""

    nodes: list[Node]
    x: int
    bound: tuple[int, ...]
    output: int | None
    active: bool  # whether the output carries a tangent; if not, the derivative is zero
    replayable: bool  # False where Python control flow read values: a new point needs a new trace
    steps: list[TangentStep] = field(default_factory=list)
    tangent_output: int | None = None
    dead: list[tuple[int, ...]] = field(default_factory=list)  # per node: primal values not read any more

    def explain(self, maps: Sequence[LinearMap | None] | None = None) -> str:
        """A table of the instructions; with the maps of a linearization also what each keeps and costs."""
        from sharpcore.explain import explain

        return explain(self, maps)

    def replay(
        self, inputs: Sequence[Tensor], maps: list[LinearMap | None], rules: dict[Any, Rule], kernels: Any
    ) -> Tensor | None:
        """Run the primal operations at new inputs, replacing each linear map in `maps`; returns the value
        (None: a constant)."""
        values = dict(zip((self.x, *self.bound), inputs, strict=True))
        for index, node in enumerate(self.nodes):
            args = node.fill(values)
            maps[index] = None  # the old residuals go before the new ones come
            out = node.run(kernels, args)
            if node.linear:
                maps[index] = build_map(node, Call(node.op, args, node.kwargs, out, node.active), rules)
            for value, tensor in zip(node.outputs, (out,) if isinstance(out, Tensor) else out, strict=False):
                if value is not None:
                    values[value] = tensor
            for value in self.dead[index]:
                values.pop(value, None)
        return None if self.output is None else values[self.output]

    def push(self, maps: Sequence[LinearMap | None], kernels: Any, tangent: Tensor) -> Tensor:
        """Jacobian times K tangents [K, *x.shape]."""
        values = {self.x: tangent}
        for step in self.steps:
            outs = maps[step.node].jvp(kernels, [values[value] for value in step.inputs])  # type: ignore[union-attr]
            for value, out in zip(step.outputs, outs, strict=False):
                if value is not None:
                    values[value] = out
            for value in step.dead:
                values.pop(value, None)
        assert self.tangent_output is not None
        return values[self.tangent_output]

    def pull(self, maps: Sequence[LinearMap | None], kernels: Any, cotangent: Tensor) -> Tensor | None:
        """Transposed Jacobian times K cotangents [K, *value.shape]; None where nothing reaches x."""
        assert self.tangent_output is not None
        values: dict[int, Tensor] = {self.tangent_output: cotangent}
        for step in reversed(self.steps):
            cotangents = [None if value is None else values.pop(value, None) for value in step.outputs]
            if all(c is None for c in cotangents):
                continue
            pulled = maps[step.node].vjp(kernels, cotangents)  # type: ignore[union-attr]
            for value, part in zip(step.inputs, pulled, strict=True):
                if part is not None:
                    values[value] = values[value] + part if value in values else part
        return values.get(self.x)


def build_map(node: Node, call: Call, rules: dict[Any, Rule], where: str | None = None) -> LinearMap:
    """The linear map of a call: by its rule, by PyTorch's derivative of a pointwise operation, or by the
    autograd fallback."""
    found = rules.get(node.op)
    if found is None and isinstance(node.op, torch._ops.OpOverload) and torch.Tag.pointwise in node.op.tags:
        found = rules["pointwise"]
    instruction = None if found is None else found(call)
    if instruction is None:
        instruction = fallback(call, f"(in module {node.module})" if where is None else where)
    return instruction
