"""Passes over a recorded program: fusion, removal of what nothing needs, and when each value can be freed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from sharpcore.program import Node, Program, Ref, TangentStep
from sharpcore.rules import Call, Identity, LinearMap, aten
from sharpcore.rules.norm import GroupNormSilu, group_norm_silu

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


def fuse(
    node: Node, call: Call, nodes: list[Node], maps: list[LinearMap | None], producer: dict[int, int]
) -> tuple[Node, Call] | None:
    """Rewrite a node that, with the one before it, is a fused operation, so that it reads that one's inputs
    instead.

    The earlier node stays; if nothing else reads its result, `optimize` removes it.
    """
    if node.op is aten.silu.default and isinstance(node.args[0], Ref):
        before = producer.get(node.args[0].value)
        norm = None if before is None else maps[before]
        if before is not None and isinstance(norm, GroupNormSilu) and not norm.silu:
            args = nodes[before].args
            primal = (norm.x, norm.weight, norm.bias, *args[3:])
            fused = replace(node, op=group_norm_silu, args=args, active=(0,))
            return fused, Call(group_norm_silu, primal, {}, (call.out, norm.mean, norm.rstd), (0,))
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
