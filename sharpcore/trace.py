"""Records the operations of a network while it runs, and builds the linear map of each on the way."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sharpcore import passes
from sharpcore.aliases import Aliases, InPlaceWrites, Kind, leaves, replace_tensors
from sharpcore.backends.reference.attention_tangent import additive_mask
from sharpcore.errors import InvalidInput, SharpcoreError, UnsupportedOperation
from sharpcore.lowering import is_fixed
from sharpcore.memory import give_back_freed
from sharpcore.program import GIVE_BACK_EVERY, Node, Program, Ref, build_map
from sharpcore.residuals import Dropped, residuals_of
from sharpcore.rules import (
    SHAPE_ONLY,
    ZERO_DERIVATIVE,
    Call,
    LinearMap,
    aten,
    autograd_enabled,
    load_rules,
    storage_of,
)
from sharpcore.rules.attention import causal_mask
from sharpcore.rules.shape import overlay

# How many of the last maps are kept while a trace is over its memory budget.
_RECENT = 8
_BATCH_NORMS = {aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default}


class Tracer:
    """One recording of f(x, *bound): the nodes of the program, and the linear map of each at this point."""

    def __init__(self, kernels: Any, budget: float | None) -> None:
        self.kernels = kernels
        self.budget = budget
        self._counted: dict[int, StorageWeakRef] = {}  # storages that maps keep
        self._kept_bytes = 0
        self._dropped = 0  # maps before this one have been let go of
        self._results: list[StorageWeakRef] = []  # of all nodes, so that no address is given twice
        self.rules = load_rules()
        self.nodes: list[Node] = []
        self.maps: list[LinearMap | None] = []
        self.kinds: list[Kind] = []
        self.producer: dict[int, int] = {}  # value -> index of the node that made it
        self.fusion = passes.Fusion(self.nodes, self.maps, self.producer)
        self.replayable = True
        # Every parameter that was read, also by operations that are constants of the derivative.
        self.parameters: dict[int, tuple[Tensor, int]] = {}
        self.failure: SharpcoreError | None = None
        self.paused = False
        self._running = False  # inside the caller's own operation, whose exceptions are the caller's
        self.aliases = Aliases(self)
        self.writes = InPlaceWrites(self, self.aliases)
        self._names: dict[int, str] = {}
        self._root: Any = None

    # -- values ------------------------------------------------------------------------------------

    def new_value(self, tensor: Tensor, kind: Kind) -> int:
        self.kinds.append(kind)
        value = len(self.kinds) - 1
        self.aliases.bind(tensor, value)
        return value

    def append_overlay(
        self, tensor: Tensor, base: int | None, update: int, size: torch.Size, source: Tensor
    ) -> int:
        current = tensor.clone()
        template = (current if base is None else Ref(base), Ref(update), source)
        call = Call(overlay, (current, current.new_zeros(()).expand(size), source), {}, current, ())
        kinds = [None if base is None else self.kinds[base], self.kinds[update], None]
        return self._append(overlay, template, {}, call, kinds, [0, 1, 2])[0]

    # -- recording ---------------------------------------------------------------------------------

    def record(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any]) -> Any:
        """Run one operation and, when it reads anything that depends on the inputs, add it to the program."""
        self.paused = True
        try:
            return self._record(op, args, kwargs, lambda *a, **k: self._call(run, a, k))
        except SharpcoreError as error:
            self.failure = error
            raise
        except Exception as error:
            if self._running:
                raise
            self.failure = UnsupportedOperation(f"{op} cannot be recorded {self.where()}: {error}")
            raise self.failure from error
        finally:
            self.paused = self._running = False

    def _call(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._running = True
        out = run(*args, **kwargs)
        self._running = False
        return out

    def _record(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any]) -> Any:
        values: dict[int | tuple[int, int], int] = {}
        for position, tensor in leaves(args):
            value = self.aliases.value_of(tensor)
            if value is not None:
                values[position] = value
            elif isinstance(tensor, torch.nn.Parameter) and not tensor.is_inference():
                self.parameters.setdefault(id(tensor), (tensor, tensor._version))
        mutates = isinstance(op, torch._ops.OpOverload) and op._schema.is_mutable
        for name, arg in kwargs.items():
            if isinstance(arg, Tensor) and self.aliases.value_of(arg) is not None:
                raise UnsupportedOperation(f"{op} takes a tensor that depends on x as {name}= {self.where()}")
        if not values:
            if not mutates:
                return run(*args, **kwargs)
            self.writes.protect([t for _, t in leaves((*args, *kwargs.values()))])
            out = run(*args, **kwargs)
            self.writes.record_constant(op, args, kwargs)
            return out
        if op in SHAPE_ONLY:
            return run(*args, **kwargs)
        tags = getattr(op, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            raise UnsupportedOperation(
                f"{op} draws random numbers that depend on x {self.where()}; use .eval()"
            )
        if op is aten.view.dtype and any(self.kinds[value] is Kind.ACTIVE for value in values.values()):
            raise UnsupportedOperation(
                f"the bits of a tensor that depends on x are read as another dtype {self.where()}"
            )
        if op in _BATCH_NORMS and args[5]:
            raise UnsupportedOperation(
                f"{op} in training mode writes its running statistics {self.where()}; use .eval()"
            )
        self._check_data_dependence(op, values, tags)
        if mutates:
            return self.writes.record(op, args, kwargs, values)
        out = run(*args, **kwargs)
        self.append_call(op, args, kwargs, out, values, bind=True)
        return out

    def _check_data_dependence(self, op: Any, values: dict[Any, int], tags: Any) -> None:
        """Values that leave the tensor world: fine for control flow, but not where a derivative would be
        lost."""
        if op in (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default):
            kinds = {self.kinds[value] for value in values.values()}
            if op is aten._local_scalar_dense.default and kinds != {Kind.PRIMAL}:
                raise UnsupportedOperation(
                    "a number is read out of a tensor that depends on x (.item() or float()) "
                    f"{self.where()}: its derivative would be lost"
                )
            self.replayable = False
        elif (torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags) and (
            # The shape that indexing gives depends on the indices, not on what is indexed.
            op is not aten.index.Tensor or any(isinstance(position, tuple) for position in values)
        ):
            self.replayable = False

    def append_call(
        self,
        op: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        values: dict[Any, int],
        bind: bool,
    ) -> list[Any]:
        """Add an operation that has run; `values` are those of its arguments. Returns those of its results,
        which `bind` makes their tensors hold."""
        template = self._template(args)
        kinds = [self.kinds[values[p]] if p in values else None for p, _ in leaves(args)]
        positions = [p for p, _ in leaves(args)]
        call = Call(op, args, kwargs, out, ())
        return self._append(op, template, kwargs, call, kinds, positions, bind=bind)

    def _template(self, args: Sequence[Any]) -> tuple[Any, ...]:
        def one(tensor: Tensor) -> Any:
            value = self.aliases.value_of(tensor)
            if value is not None:
                return Ref(value)
            self.aliases.capture(tensor)
            return tensor

        return replace_tensors(args, one)

    def _append(
        self,
        op: Any,
        template: tuple[Any, ...],
        kwargs: dict[str, Any],
        call: Call,
        kinds: list[Kind | None],
        positions: list[Any],
        bind: bool = True,
    ) -> list[Any]:
        if Kind.OPAQUE in kinds and op not in ZERO_DERIVATIVE:
            raise UnsupportedOperation(f"{op} reads a side result that has no derivative rule {self.where()}")
        active = tuple(p for p, kind in zip(positions, kinds, strict=True) if kind is Kind.ACTIVE)
        if op is aten.copy.default and active == (0,):
            active = ()  # the old entries are all overwritten
        outs = (
            [call.out]
            if isinstance(call.out, Tensor)
            else list(call.out)
            if isinstance(call.out, (list, tuple))
            else []
        )
        node = Node(
            op=op, args=template, kwargs=kwargs, active=active, outputs=(), module=self._module_name()
        )
        instruction: LinearMap | None = None
        differentiable = [isinstance(o, Tensor) and (o.is_floating_point() or o.is_complex()) for o in outs]
        if active and op not in ZERO_DERIVATIVE and any(differentiable):
            fused = self.fusion.rewrite(node, call)
            if fused is not None:
                node, call = fused[0], self._evaluate_fused(*fused)
            filled = Call(node.op, call.args, call.kwargs, call.out, node.active)
            with autograd_enabled():
                instruction = build_map(node, filled, self.rules, self.where())
        outputs: list[int | None] = []
        for i, out in enumerate(outs):
            if not isinstance(out, Tensor):
                outputs.append(None)
                continue
            kind = Kind.PRIMAL
            if instruction is not None and differentiable[i]:
                # Norms give their statistics beside the result; their maps speak of the result alone.
                kind = Kind.ACTIVE if i == 0 or not passes.only_first_output(node.op) else Kind.OPAQUE
            self.kinds.append(kind)
            value = len(self.kinds) - 1
            self.producer[value] = len(self.nodes)
            detaches = (active and op is aten.detach.default) or self.aliases.detached(node.refs())
            if detaches and kind is Kind.PRIMAL:
                self.aliases.detach(out, value)
            if bind:
                self.aliases.bind(out, value)
            outputs.append(value)
        node.outputs = tuple(outputs)
        node.shapes = tuple(tuple(o.shape) if isinstance(o, Tensor) else () for o in outs)
        node.nbytes = tuple(o.numel() * o.element_size() if isinstance(o, Tensor) else 0 for o in outs)
        node.memory = tuple(storage_of(o) if isinstance(o, Tensor) else (0, 0) for o in outs)
        self._results += [
            StorageWeakRef(o.untyped_storage())
            for o in outs
            if isinstance(o, Tensor) and o.layout is torch.strided
        ]
        self.nodes.append(node)
        self.maps.append(instruction)
        if instruction is not None and self.budget is not None:
            self._account(len(self.maps) - 1, self.budget)
        if instruction is not None:
            for _, tensor in instruction.residuals():
                self.aliases.capture(tensor)
        return outputs

    def _account(self, index: int, budget: float) -> None:
        """Count what a map keeps, and let go of older maps once all together pass the budget."""
        instruction = self.maps[index]
        assert instruction is not None
        for residual in residuals_of(self.nodes[index], instruction):
            if residual.memory.cdata not in self._counted:
                self._counted[residual.memory.cdata] = residual.memory
                self._kept_bytes += residual.nbytes
        if index % GIVE_BACK_EVERY == 0:
            give_back_freed()
        if self._kept_bytes <= budget:
            return
        # Fusion still looks at the maps of the nodes just before.
        for older in range(self._dropped, max(self._dropped, index - _RECENT)):
            map_ = self.maps[older]
            kept = [] if map_ is None or is_fixed(map_) else residuals_of(self.nodes[older], map_)
            if map_ is not None and kept:
                self.maps[older] = Dropped(map_, kept)
            self._dropped = older + 1

    def _evaluate_fused(self, node: Node, call: Call) -> Call:
        """The call with the bits that a replay gives it, where a kernel runs the fused operation."""
        if not node.has_kernel(call.args):
            return call
        result, *others = node.run(self.kernels, call.args)
        first = call.out if isinstance(call.out, Tensor) else call.out[0]
        first.copy_(result)  # what f goes on with
        return dataclasses.replace(call, out=(first, *others))

    # -- where an operation was called -------------------------------------------------------------

    def _module_name(self) -> str:
        """The dotted name of the innermost torch module that is running, found on the Python stack (no hook
        is needed)."""
        call_impl = torch.nn.Module._call_impl.__code__
        inner = outer = None
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code is call_impl:
                module = frame.f_locals.get("self")
                inner = module if inner is None else inner
                outer = module
            frame = frame.f_back  # type: ignore[assignment]
        if inner is None:
            return ""
        if outer is not self._root:
            self._root = outer
            self._names = {id(module): name for name, module in outer.named_modules()}
        name = self._names.get(id(inner), "?")
        return f"{type(outer).__name__}.{name}" if name else type(outer).__name__

    def where(self) -> str:
        """The place in the network, for an error message."""
        name = self._module_name()
        return f"(in module {name})" if name else "(outside of any torch module)"

    # -- composite operations ----------------------------------------------------------------------

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """scaled_dot_product_attention as one operation of the program."""
        if torch.is_autocast_enabled(query.device.type):
            # What autocast itself does to attention; the kernel then runs outside of it.
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = (t.to(dtype) for t in (query, key, value))
            if attn_mask is not None and attn_mask.dtype != torch.bool:
                attn_mask = attn_mask.to(dtype)
            with torch.autocast(query.device.type, enabled=False):
                return self.attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if dropout_p:
            raise UnsupportedOperation(f"attention with dropout {self.where()}; use .eval()")
        if enable_gqa and key.shape[-3] != query.shape[-3]:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if is_causal:
            key, value = key.flip(-2), value.flip(-2)
            attn_mask = causal_mask(query.shape[-2], key.shape[-2], query.dtype, query.device)
        mask = None if attn_mask is None else additive_mask(attn_mask, query.dtype)
        if mask is not None:
            number = self.aliases.value_of(mask)
            if number is not None and self.kinds[number] is not Kind.PRIMAL:
                # A mask that depends on x: the ordinary operations have all its derivatives.
                return torch.softmax(query @ key.mT * scale + mask, -1) @ value
        batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        query, key, value = (t.expand(*batch, *t.shape[-2:]) for t in (query, key, value))
        args = (query, key, value, mask, scale)
        run = lambda q, k, v, m, s: self.kernels.attention_forward(q, k, v, mask=m, scale=s)  # noqa: E731
        return self.record("attention", args, {}, run)[0]


class _Operations(TorchDispatchMode):
    """Sees every ATen operation of this thread."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.tracer.paused:
            return func(*args, **kwargs)
        return self.tracer.record(func, args, kwargs, func)


# Ways out of the tensor world that bypass ATen; on a value that depends on x they would lose its derivative
# silently.
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_ESCAPES = {
    Tensor.numpy,
    Tensor.tolist,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.__reduce_ex__,
    Tensor.data_ptr,
    Tensor.storage,
    Tensor.untyped_storage,
}


class _Functions(TorchFunctionMode):
    """Sees the torch functions that are better kept whole than seen through their ATen parts."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tracer = self.tracer
        if tracer.paused:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return tracer.attention(*args, **kwargs)
        if func is Tensor.__deepcopy__:
            return args[0].clone()
        if func is F.linear and not torch.is_autocast_enabled(_device_type(args, kwargs)):
            operands = _linear_arguments(*args, **kwargs)
            if tracer.aliases.value_of(operands[0]) is not None and operands[1].dim() == 2:
                return tracer.record(F.linear, operands, {}, F.linear)
        elif func == _DATA:
            return args[0].detach()
        elif (
            func in _ESCAPES and isinstance(args[0], Tensor) and tracer.aliases.value_of(args[0]) is not None
        ):
            raise UnsupportedOperation(
                f"{getattr(func, '__name__', func)} takes a tensor that depends on x out of torch "
                f"{tracer.where()}"
            )
        return func(*args, **kwargs)


def _device_type(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return (args[0] if args else kwargs["input"]).device.type


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def trace(
    f: Callable[..., Any],
    x: Tensor,
    bound: Sequence[Tensor],
    kernels: Any,
    budget: float | None,
) -> tuple[Program, list[LinearMap | None], Tensor, list[tuple[Tensor, int]]]:
    """Run f(x, *bound) once and return its program, the linear map of each node at this point, the value, and
    the parameters that were read with their in-place versions.

    x and the bound tensors are program inputs: a replay may give others of the same shape. Only x carries
    tangents. Once the maps take more than `budget` bytes, all but the last are replaced by `Dropped`.
    Raises UnsupportedOperation for an operation without an exact derivative.
    """
    tracer = Tracer(kernels, budget)
    # Copies: f may write into its arguments, and the residuals must not change with the caller's tensors.
    with torch.inference_mode(False), torch.no_grad():
        inputs = [t.detach().clone() for t in itertools.chain([x], bound)]
        values = [tracer.new_value(t, Kind.ACTIVE if i == 0 else Kind.PRIMAL) for i, t in enumerate(inputs)]
        try:
            with _Functions(tracer), _Operations(tracer):
                out = f(*inputs)
        except Exception as error:
            # TorchScript hides the exception of an operation behind one of its own.
            if tracer.failure is not None and not isinstance(error, SharpcoreError):
                raise tracer.failure from error
            if isinstance(error, NotImplementedError) and "HigherOrderOperator" in str(error):
                raise UnsupportedOperation(f"a higher-order operation cannot be recorded: {error}") from error
            raise
    if not isinstance(out, Tensor):
        raise InvalidInput(f"f: expected it to return one tensor; got {type(out).__name__}")
    if not out.is_floating_point():
        raise InvalidInput(f"f: expected it to return a floating-point tensor; got {out.dtype}")
    tracer.paused = True
    output = tracer.aliases.value_of(out)
    active = output is not None and tracer.kinds[output] is Kind.ACTIVE
    if output is not None and tracer.kinds[output] is Kind.OPAQUE:
        raise UnsupportedOperation("f returns a side result that has no derivative rule")
    parameters = list(tracer.parameters.values())
    program = Program(tracer.nodes, values[0], tuple(values[1:]), output, active, tracer.replayable)
    maps = passes.optimize(program, tracer.maps)
    value = out.detach().clone(memory_format=torch.contiguous_format)
    return program, maps, value, parameters
