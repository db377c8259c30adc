"""The linear program: the recorded operations in order, how their values flow, and the three ways of running
it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sharpcore.backends.launches import recording
from sharpcore.explain import Cost, Timing, explain
from sharpcore.memory import give_back_freed
from sharpcore.plan import ADD, Log, Plan
from sharpcore.rules import Call, LinearMap, Rule, load_rules, storage_of
from sharpcore.rules.fallback import fallback
from sharpcore.rules.norm import group_norm_silu
from sharpcore.rules.pointwise import Sum, geglu

if TYPE_CHECKING:
    from sharpcore.lowering import Lowering
    from sharpcore.residuals import Residuals, Segment


# Under a memory budget: after how many recorded operations freed memory is given back.
GIVE_BACK_EVERY = 32


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
    nbytes: tuple[int, ...] = ()  # of the results
    # For each result what told its memory from another's in the trace, and the bytes of all that memory.
    memory: tuple[tuple[int, int], ...] = ()
    linear: bool = False  # whether a product runs its derivative, so that a replay builds its map
    fixed: bool = False  # whether that map is the same at every point
    overwrites: bool = False  # whether a replay may write over the first argument: nothing else reads it

    @property
    def remade(self) -> bool:
        """Whether the map is another one at another point."""
        return self.linear and not self.fixed

    @property
    def restores(self) -> bool:
        """Whether the values in `outputs` are all that the operation returns, in order, as tensors."""
        if None in self.outputs:
            return False
        if isinstance(self.op, torch._ops.OpOverload):
            return all(str(result.type) == "Tensor" for result in self.op._schema.returns)
        return self.op == "attention"

    def refs(self) -> list[int]:
        """The values that the operation reads."""
        found = []
        for arg in self.args:
            for part in arg if isinstance(arg, (list, tuple)) else (arg,):
                if isinstance(part, Ref):
                    found.append(part.value)
        return found

    def constants(self) -> set[int]:
        """The memory of the tensors among the arguments."""
        return {
            storage_of(part)[0]
            for arg in self.args
            for part in (arg if isinstance(arg, list) else (arg,))
            if isinstance(part, Tensor)
        }

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

    def run(self, kernels: Any, args: tuple[Any, ...], *, overwrite: bool = False) -> Any:
        """Execute the primal operation; with `overwrite` it may write into its first argument."""
        if self.op == "attention":
            q, k, v, mask, scale = args
            return kernels.attention_forward(q, k, v, mask=mask, scale=scale)
        if self.has_kernel(args):
            if self.op is geglu:
                return _geglu_over(kernels, *args) if overwrite else kernels.geglu_forward(*args)
            x, weight, bias, _, _, _, groups, eps = args
            return kernels.group_norm_silu_forward(x, weight, bias, groups, eps, True)
        return self.op(*args, **self.kwargs)

    def results(self, out: Any) -> Iterator[tuple[int, Tensor]]:
        """What the operation returned under the numbers of its values."""
        for value, tensor in zip(self.outputs, (out,) if isinstance(out, Tensor) else out, strict=False):
            if value is not None:
                yield value, tensor

    def has_kernel(self, args: tuple[Any, ...]) -> bool:
        """Whether a kernel runs this fused operation; in 16 bits PyTorch's own are as fast for norms."""
        return self.op is geglu or (self.op is group_norm_silu and args[0].element_size() > 2)

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
    costs: list[Cost] = field(default_factory=list)  # per step
    notes: list[str] = field(default_factory=list)  # what was chosen for the memory budget and the precision
    timing: Timing | None = None  # of the last product that was timed

    def explain(self, k: int | None = None) -> str:
        """A table of the instructions: operation, module, output shape, bytes kept, FLOPs of k tangents, and
        the times of the last product that was timed (if it had k): the first ones at a point are, and those
        of `Linearization.explain(k)`."""
        return explain(self, k)

    def replay(
        self,
        values: dict[int, Tensor],
        residuals: Residuals,
        kernels: Any,
        lowering: Lowering,
    ) -> None:
        """Run the primal operations on the values that they read, adding theirs; the linear maps that depend
        on the point and the checkpoints go to `residuals`."""
        rules = load_rules()
        for index, node in enumerate(self.nodes):
            if residuals.segments and index % GIVE_BACK_EVERY == 0:
                give_back_freed()
            args = node.fill(values)
            wanted = node.remade and not residuals.recomputes(index)
            if wanted:
                residuals[index] = None  # the old ones go before the new ones come
            overwrite = node.overwrites and not residuals.holds(node.args[0].value)
            out = node.run(kernels, args, overwrite=overwrite)
            if wanted:
                call = Call(node.op, args, node.kwargs, out, node.active)
                residuals[index] = lowering.lower(build_map(node, call, rules))
            for value, tensor in node.results(out):
                values[value] = tensor
                residuals.offer(value, tensor)
            for value in self.dead[index]:
                values.pop(value, None)

    def remake(
        self,
        segment: Segment,
        checkpoints: Mapping[int, Tensor],
        kernels: Any,
        lower: Callable[[int, LinearMap], LinearMap],
    ) -> dict[int, LinearMap]:
        """The maps of a segment that depend on the point, from the checkpoints, by running no more than that
        takes; `lower` makes of the map of a node what is kept."""
        rules = load_rules()
        values = dict(checkpoints)
        made: dict[int, LinearMap] = {}
        for index in range(segment.start, segment.stop):
            node = self.nodes[index]
            runs = index in segment.runs
            if runs or node.remade:
                args = node.fill(values)
                if runs:
                    overwrite = node.overwrites and node.args[0].value not in checkpoints
                    out = node.run(kernels, args, overwrite=overwrite)
                    values.update(node.results(out))
                else:
                    outs = tuple(checkpoints[value] for value in node.outputs if value is not None)
                    out = outs if node.op == "attention" or len(outs) > 1 else outs[0]
                if node.remade:
                    call = Call(node.op, args, node.kwargs, out, node.active)
                    made[index] = lower(index, build_map(node, call, rules))
                del args, out
            for value in self.dead[index]:
                values.pop(value, None)
        return made

    def push(
        self, maps: Sequence[LinearMap | None], kernels: Any, tangent: Tensor, log: Log | None = None
    ) -> Tensor:
        """Jacobian times K tangents [K, *x.shape]; what is done is noted in the log."""
        values = {self.x: tangent}
        for step in self.steps:
            instruction = maps[step.node]
            inputs = [values[value] for value in step.inputs]
            outs = instruction.jvp(kernels, inputs)  # type: ignore[union-attr]
            if log is not None:
                log.note(
                    step.node,
                    list(zip(step.inputs, inputs, strict=True)),
                    [None if v is None else (v, out) for v, out in zip(step.outputs, outs, strict=False)],
                    elementwise=isinstance(instruction, Sum),
                )
            for value, out in zip(step.outputs, outs, strict=False):
                if value is not None:
                    values[value] = out
            for value in step.dead:
                values.pop(value, None)
        assert self.tangent_output is not None
        return values[self.tangent_output]

    def pull(
        self, maps: Sequence[LinearMap | None], kernels: Any, cotangent: Tensor, log: Log | None = None
    ) -> Tensor | None:
        """Transposed Jacobian times K cotangents [K, *value.shape]; None where nothing reaches x. What is
        done is noted in the log."""
        assert self.tangent_output is not None
        values: dict[int, Tensor] = {self.tangent_output: cotangent}
        for step in reversed(self.steps):
            cotangents = [None if value is None else values.pop(value, None) for value in step.outputs]
            if all(c is None for c in cotangents):
                continue
            pulled = maps[step.node].vjp(kernels, cotangents)  # type: ignore[union-attr]
            # Names of the parts for the log: an instruction may give several to one value.
            parts = [-1 - i for i in range(len(pulled))]
            if log is not None:
                given = [
                    None if c is None or v is None else (v, c)
                    for v, c in zip(step.outputs, cotangents, strict=False)
                ]
                made = [None if part is None else (i, part) for i, part in zip(parts, pulled, strict=True)]
                log.note(step.node, given, made)
            for value, name, part in zip(step.inputs, parts, pulled, strict=True):
                if part is None:
                    continue
                if value not in values:
                    values[value] = part
                    if log is not None:
                        log.places[value] = log.places[name]
                    continue
                total = values[value] + part
                if log is not None:
                    log.note(ADD, [(value, values[value]), (name, part)], [(value, total)], elementwise=True)
                values[value] = total
        return values.get(self.x)

    def run(
        self,
        plan: Plan,
        maps: Residuals,
        kernels: Any,
        vectors: Tensor,
        *,
        transposed: bool,
        timed: bool = False,
    ) -> Tensor:
        """The product that the plan was made from, for other vectors and at another point; the result lies in
        the plan's workspace.

        Once all instructions have their calls those are all that runs, unless it is to be timed; on a GPU
        that waits for each.
        """
        plan.prepare()
        plan.start.copy_(vectors)
        if plan.calls and not timed:
            for call in plan.calls:
                call()
            return plan.result
        seconds: dict[int, float] = {}
        start = time.perf_counter()
        for step in plan.instructions:
            instruction = None if step.node == ADD else maps[step.node]
            if step.calls and step.of is instruction:
                for call in step.calls:
                    call()
            else:
                assert instruction is not None
                run = partial(_execute, step.inputs, step.outputs, instruction, kernels, transposed)
                if step.of is instruction:
                    with recording() as made:
                        run()
                    step.remember(made, run)
                else:  # at a new point
                    step.forget()
                    # One that is made and dropped again is nothing to remember.
                    step.of = None if maps.makes(step.node) else instruction
                    run()
            if timed and vectors.is_cuda:
                torch.cuda.synchronize()
            now = time.perf_counter()
            seconds[step.node] = now - start
            start = now
        if timed or not vectors.is_cuda:
            self.timing = Timing(vectors.shape[0], transposed, seconds)
        plan.collect()
        return plan.result


def _geglu_over(kernels: Any, projection: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """The value of GEGLU, and its factors where the projection was."""
    value = projection.new_empty((*projection.shape[:-1], projection.shape[-1] // 2))
    return kernels.geglu_forward(projection, approximate, out=(value, projection))


def _execute(
    inputs: Sequence[Tensor | None],
    outputs: Sequence[Tensor | None],
    instruction: LinearMap,
    kernels: Any,
    transposed: bool,
) -> None:
    """Run a map at its places in the workspace."""
    if transposed and instruction.writes_vjp:
        instruction.vjp(kernels, inputs, out=outputs)  # type: ignore[call-arg]
    elif not transposed and instruction.writes_jvp:
        instruction.jvp(kernels, inputs, out=outputs[0])  # type: ignore[call-arg,arg-type]
    else:
        product = instruction.vjp if transposed else instruction.jvp
        for place, result in zip(outputs, product(kernels, inputs), strict=False):  # type: ignore[arg-type]
            if place is not None:
                place.copy_(result)  # type: ignore[arg-type]


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
