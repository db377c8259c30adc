"""Passes over a recorded program: fusion, removal of what nothing needs, and when each value can be freed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from sharpcore.lowering import is_fixed
from sharpcore.program import Node, Program, Ref, TangentStep
from sharpcore.rules import Call, Identity, LinearMap, aten
from sharpcore.rules.norm import GroupNormSilu, group_norm_silu
from sharpcore.rules.pointwise import geglu

# Operations that give side results (statistics) beside their value; their maps speak of the first output
# alone.
_FIRST_OUTPUT_ONLY = {
    "attention",
    group_norm_silu,
    aten.native_group_norm.default,
    aten.native_layer_norm.default,
}


def only_first_output(op: Any) -> bool:
    """Whether the derivative of an operation is known for its first output only."""
    return op in _FIRST_OUTPUT_ONLY


class Fusion:
    """Rewrites nodes that, with those before them, are a fused operation, so that they read the earlier ones'
    inputs instead.

    The earlier nodes stay; if nothing else reads their results, `optimize` removes them.
    """

    def __init__(self, nodes: list[Node], maps: list[LinearMap | None], producer: dict[int, int]) -> None:
        self._nodes, self._maps, self._producer = nodes, maps, producer
        # The last split of a last axis into two halves: its node, what was split, and how often that had been
        # written in place.
        self._halved: tuple[int, Tensor, int] | None = None

    def rewrite(self, node: Node, call: Call) -> tuple[Node, Call] | None:
        """The fused node and its call where the node that is about to be appended ends a fused operation."""
        if node.op is aten.silu.default:
            return self._group_norm_silu(node, call)
        if node.op is aten.mul.Tensor:
            return self._geglu(node, call)
        if node.op in (aten.split.Tensor, aten.split_with_sizes.default):
            self._note_halves(call)
        return None

    def _group_norm_silu(self, node: Node, call: Call) -> tuple[Node, Call] | None:
        before = self._producer.get(node.args[0].value) if isinstance(node.args[0], Ref) else None
        norm = None if before is None else self._maps[before]
        if before is None or not isinstance(norm, GroupNormSilu) or norm.silu:
            return None
        args = self._nodes[before].args
        primal = (norm.x, norm.weight, norm.bias, *args[3:])
        fused = replace(node, op=group_norm_silu, args=args, active=(0,))
        return fused, Call(group_norm_silu, primal, {}, (call.out, norm.mean, norm.rstd), (0,))

    def _note_halves(self, call: Call) -> None:
        whole = call.args[0]
        last_axis = call.optional(2, "dim", 0) % whole.dim() == whole.dim() - 1
        if last_axis and len(call.out) == 2 and call.out[0].shape == call.out[1].shape:
            self._halved = len(self._nodes), whole, whole._version

    def _geglu(self, node: Node, call: Call) -> tuple[Node, Call] | None:
        if self._halved is None or node.active != (0, 1):
            return None
        split, projection, version = self._halved
        hidden, gate = self._nodes[split].outputs
        for i, j in ((0, 1), (1, 0)):
            before = self._producer.get(node.args[j].value)
            gelu = None if before is None else self._nodes[before]
            if (
                gelu is not None
                and gelu.op is aten.gelu.default
                and gelu.args[0].value == gate
                and node.args[i].value == hidden
                # The projection still holds what was split, and will: a product that is written into it is
                # computed from a copy of its half.
                and projection._version == version
                and call.args[i].data_ptr() == projection.data_ptr()
            ):
                approximate = gelu.kwargs.get("approximate", "none")
                args = (self._nodes[split].args[0], approximate)
                fused = replace(node, op=geglu, args=args, active=(0,))
                return fused, Call(geglu, (projection, approximate), {}, call.out, (0,))
        return None


def replace_residuals(instruction: LinearMap, replacement: Callable[[Tensor], Tensor]) -> None:
    """Exchange tensors that a linear map keeps, wherever it keeps them."""

    def exchange(value: Any) -> Any:
        if isinstance(value, Tensor):
            return replacement(value)
        if isinstance(value, LinearMap):
            replace_residuals(value, replacement)
        elif isinstance(value, (list, tuple)):
            return type(value)(exchange(part) for part in value)
        return value

    for name, value in list(vars(instruction).items()):
        setattr(instruction, name, exchange(value))


def optimize(program: Program, maps: list[LinearMap | None]) -> list[LinearMap | None]:
    """Drop nodes that neither the value nor a tangent needs, skip identities, and plan when values die;
    returns the maps left."""
    linear, primal = _needed(program, maps)
    kept = [i for i in range(len(program.nodes)) if i in primal]
    program.nodes = [program.nodes[i] for i in kept]
    maps = [maps[i] if i in linear else None for i in kept]
    for node, instruction in zip(program.nodes, maps, strict=True):
        node.linear = instruction is not None
        node.fixed = (
            instruction is not None
            and is_fixed(instruction)
            and set(node.refs()) == set(node.active_inputs())
        )
    _plan_tangents(program, maps)
    _plan_primal(program)
    return maps


def _needed(program: Program, maps: list[LinearMap | None]) -> tuple[set[int], set[int]]:
    """The nodes whose linear maps the derivative runs, and those whose primal operation a replay runs."""
    tangent_needed = {program.output} if program.active else set()
    primal_needed = {program.output}
    linear: set[int] = set()
    primal: set[int] = set()
    for i in range(len(program.nodes) - 1, -1, -1):
        node = program.nodes[i]
        outputs = {v for v in node.outputs if v is not None}
        if maps[i] is not None and outputs & tangent_needed:
            linear.add(i)
            tangent_needed.update(node.active_inputs())
        if i in linear or outputs & primal_needed:
            primal.add(i)
            primal_needed.update(node.refs())
    return linear, primal


def _plan_tangents(program: Program, maps: list[LinearMap | None]) -> None:
    """List the instructions, with identities replaced by a renaming, and mark each value's last reader."""
    renamed: dict[int, int] = {}

    def resolve(value: int) -> int:
        return renamed.get(value, value)

    steps = []
    for i, (node, instruction) in enumerate(zip(program.nodes, maps, strict=True)):
        if instruction is None:
            continue
        inputs = tuple(resolve(value) for value in node.active_inputs())
        if isinstance(instruction, Identity):
            assert node.outputs[0] is not None
            renamed[node.outputs[0]] = inputs[0]
            continue
        outputs = node.outputs[:1] if only_first_output(node.op) else node.outputs
        steps.append(TangentStep(i, inputs, outputs))
    program.tangent_output = None if program.output is None or not program.active else resolve(program.output)
    last: dict[int, int] = {}
    for position, step in enumerate(steps):
        for value in (*step.inputs, *step.outputs):
            if value is not None:
                last[value] = position
    for position, step in enumerate(steps):
        mine = {v for v in (*step.inputs, *step.outputs) if v is not None}
        step.dead = tuple(v for v in mine if last[v] == position and v != program.tangent_output)
    program.steps = steps


def _plan_primal(program: Program) -> None:
    last: dict[int, int] = {}
    for i, node in enumerate(program.nodes):
        for value in (*node.refs(), *(v for v in node.outputs if v is not None)):
            last[value] = i
    dead: list[list[int]] = [[] for _ in program.nodes]
    for value, i in last.items():
        if value != program.output:
            dead[i].append(value)
    program.dead = [tuple(values) for values in dead]
