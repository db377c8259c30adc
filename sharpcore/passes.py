"""Passes over a recorded program: fusion, removal of what nothing needs, and when each value can be freed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sharpcore.lowering import is_fixed
from sharpcore.program import Node, Program, Ref, TangentStep
from sharpcore.rules import Call, Identity, LinearMap, aten
from sharpcore.rules.norm import (
    GroupNormSilu,
    LayerNorm,
    group_norm_scale_shift,
    group_norm_silu,
    layer_norm_scale,
    pad_shape,
)
from sharpcore.rules.pointwise import geglu

# Operations that give side results (statistics) beside their value; their maps speak of the first output
# alone.
_FIRST_OUTPUT_ONLY = {
    "attention",
    group_norm_silu,
    group_norm_scale_shift,
    layer_norm_scale,
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
            return self._geglu(node, call) if len(node.active) == 2 else self._scale_shift(node, call)
        if node.op is aten.add.Tensor:
            return self._scale_shift(node, call)
        if node.op in (aten.split.Tensor, aten.split_with_sizes.default):
            self._note_halves(call)
        return None

    def _group_norm_silu(self, node: Node, call: Call) -> tuple[Node, Call] | None:
        before, norm = self._before(node, 0)
        if before is None or not isinstance(norm, GroupNormSilu) or norm.silu:
            return None
        primal = (norm.x, norm.weight, norm.bias, *before.args[3:8])
        if before.op is group_norm_scale_shift:
            # The weight and bias of the map hold the scale and the shift.
            args, primal = (*before.args[:-1], True), (*primal, None, None, True)
            fused = replace(node, op=group_norm_scale_shift, args=args, active=(0,))
        else:
            fused = replace(node, op=group_norm_silu, args=before.args, active=(0,))
        return fused, Call(fused.op, primal, {}, (call.out, norm.mean, norm.rstd), (0,))

    def _scale_shift(self, node: Node, call: Call) -> tuple[Node, Call] | None:
        """A norm times a scale, or plus a shift, that carries no tangent: a norm with parameters of each
        sample."""
        if len(node.active) != 1 or call.optional(2, "alpha", 1) != 1:
            return None
        (position,) = node.active
        before, norm = self._before(node, position)
        operand = call.args[1 - position]  # type: ignore[operator]
        if (
            before is None
            or not isinstance(norm, (GroupNormSilu, LayerNorm))
            or not isinstance(operand, Tensor)
            or not call.out.dtype == norm.x.dtype == operand.dtype
            or call.out.shape != norm.x.shape
            or not _holds_per_sample(pad_shape(operand, norm.x.dim()), norm)
        ):
            return None
        given = node.args[1 - position]  # type: ignore[operator]
        scales = node.op is aten.mul.Tensor
        if isinstance(norm, LayerNorm):
            # A shift does not change the derivative.
            if not scales or before.op is not aten.native_layer_norm.default:
                return None
            args = (*before.args, given)
            primal = (norm.x, before.args[1], norm.weight, None, before.args[4], operand)
            op: Any = layer_norm_scale
        else:
            scale, shift = before.args[8:10] if before.op is group_norm_scale_shift else (None, None)
            if norm.silu or shift is not None or (scales and scale is not None):
                return None
            parts = (given, None) if scales else (scale, given)
            args = (*before.args[:8], *parts, False)
            new = (operand, None) if scales else (None, operand)
            primal = (norm.x, norm.weight, norm.bias, *before.args[3:8], *new, False)
            op = group_norm_scale_shift
        fused = replace(node, op=op, args=args, kwargs={}, active=(0,))
        return fused, Call(op, primal, {}, (call.out, norm.mean, norm.rstd), (0,))

    def _before(self, node: Node, position: Any) -> tuple[Node | None, LinearMap | None]:
        """The node that made an argument, and its map."""
        argument = node.args[position]
        before = self._producer.get(argument.value) if isinstance(argument, Ref) else None
        return (None, None) if before is None else (self._nodes[before], self._maps[before])

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


def _holds_per_sample(shape: Sequence[int], norm: GroupNormSilu | LayerNorm) -> bool:
    """Whether an operand of this shape, padded to the axes of x, holds one number a sample and parameter of a
    norm."""
    x = norm.x.shape
    if isinstance(norm, GroupNormSilu):
        varying = {0, 1}
    else:
        varying = set(range(len(x) - norm.axes, len(x))) | ({0} if norm.axes < len(x) else set())
    return len(shape) == len(x) and all(n == 1 or (i in varying and n == x[i]) for i, n in enumerate(shape))


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
    _find_overwrites(program)
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


def _find_overwrites(program: Program) -> None:
    """Note where the factors of GEGLU may take the place of the projection: nothing else reads it, and no map
    keeps it."""
    readers = Counter(value for node in program.nodes for value in node.refs())
    projections = {node.outputs[0] for node in program.nodes if node.op is F.linear and node.fixed}
    for node in program.nodes:
        if node.op is geglu:
            value = node.args[0].value
            node.overwrites = value in projections and readers[value] == 1 and value != program.output
