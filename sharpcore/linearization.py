"""linearize(f, x): run a network once, keep what its derivative needs, and apply the Jacobian to many
tangents."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from sharpcore.backends import get_backend
from sharpcore.budget import Choice, choose, workspace_bytes
from sharpcore.errors import InvalidInput, NonFiniteError
from sharpcore.explain import Cost, cost_of
from sharpcore.lowering import Lowering, Rounded, WeightCopies
from sharpcore.program import Program
from sharpcore.residuals import Dropped, Residuals, kept_memory
from sharpcore.rules import LinearMap, storage_of
from sharpcore.trace import trace
from sharpcore.workspace import Workspace

_looks: ContextVar[bool] = ContextVar("looks", default=True)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Products of this thread do not look for NaN and infinity meanwhile.

    A look waits for a device that works on its own; the caller looks, before a number gets out.
    """
    token = _looks.set(False)
    try:
        yield
    finally:
        _looks.reset(token)


def checking() -> bool:
    """Whether products look for NaN and infinity themselves."""
    return _looks.get()


def linearize(
    f: Callable[..., Tensor],
    x: Tensor,
    *bound: Tensor,
    backend: str = "auto",
    precision: str = "float32",
    memory_budget: int | None = None,
    round_residuals: bool = False,
) -> Linearization:
    """Evaluate f(x, *bound) once and return its value with its exact Jacobian in x, as a linear operator.

    Parameters
    ----------
    f
        Any callable that runs torch operations on x and returns one tensor: a network call with everything
        else bound, or a `ScoreFunction`. It is called once, without gradients; nothing of it is changed.
    x
        The point, any shape, a floating-point dtype on any device. For a batch of B samples the first axis is
        B.
    bound
        Further tensors that f takes and that may differ when re-linearizing (timesteps, prompt embeddings);
        they carry no tangent.
    backend
        "auto", "reference", "cpu" or "cuda": who executes the linear program (see `sharpcore.backends`).
    precision
        Of the products with a float32 network. "float32"; "bfloat16" or "float16": tangents, weights and
        residuals are rounded and sums are formed in float32; the value stays as it is. A relative error of
        about 1e-2 or 1e-3 for less time and memory. "tf32", on a GPU: operands of convolutions and matrix
        products are rounded to 11 bits on their way in, whatever the process has set; in "float32" those of
        convolutions and attention never are. Networks in another dtype are multiplied with in their own.
    memory_budget
        How many bytes a product with one vector may take beside the network itself and the pass that
        linearizes: residuals, copies of weights, and the workspace. Where that is not enough, copies of
        weights are made anew in every product and parts of the network run again; `explain` says which. None:
        everything is kept. The bits of a jvp are the same with a budget as without.
    round_residuals
        Residuals of a float32 network may be stored in bfloat16 to fit the budget, where that is the least
        work, or nothing else fits. They are cast back in every product, which stays in float32: a relative
        error of 1e-3 to 3e-3 in place of 1e-6. `explain` says how many are rounded.

    Raises
    ------
    InvalidInput
        x is not a finite floating-point tensor, f does not return a tensor, the precision is unknown or not
        one for x's dtype, the budget is no positive number, or residuals are to be rounded without a budget
        or of another than a float32 network multiplied with in float32.
    OutOfMemory
        The budget does not even hold one part at a time; the message says how much would do.
    UnsupportedOperation
        f runs an operation whose derivative is not known; the message names it and the module that called it.
    NonFiniteError
        f(x) holds a NaN or an infinity; the message names the operation in which it appeared first.
    """
    return Linearization(f, x, bound, backend, precision, memory_budget, round_residuals=round_residuals)


class Linearization:
    """The value of f at a point, and its Jacobian there as an exact linear operator; made by `linearize`.

    Attributes
    ----------
    value
        f(x), with f's own shape and dtype.
    x
        The point.
    program
        The recorded linear program; it does not depend on the point.
    """

    def __init__(
        self,
        f: Callable[..., Tensor],
        x: Tensor,
        bound: Sequence[Tensor],
        backend: str,
        precision: str,
        memory_budget: int | None,
        copies: WeightCopies | None = None,
        *,
        round_residuals: bool = False,
    ) -> None:
        if not callable(f):
            raise InvalidInput(f"f: expected a callable of one tensor; got {type(f).__name__}")
        _check_point(x, None)
        for i, tensor in enumerate(bound):
            if not isinstance(tensor, Tensor):
                raise InvalidInput(f"bound[{i}]: expected a tensor; got {type(tensor).__name__}")
        self.backend = get_backend(
            backend, device=x.device, dtype=x.dtype, tf32=precision == "tf32" and x.is_cuda
        )
        if memory_budget is not None and not (_is_count(memory_budget) and memory_budget > 0):
            raise InvalidInput(f"memory_budget: expected a positive number of bytes; got {memory_budget!r}")
        self.precision = precision
        self.memory_budget = memory_budget
        self._lowering = Lowering(precision, x, self.backend, {} if copies is None else copies)
        self._lowering.packs_adjoints = memory_budget is None
        if round_residuals and (memory_budget is None or self._lowering.rounds or x.dtype != torch.float32):
            raise InvalidInput(
                "round_residuals: expected a memory_budget with it, and products in float32; "
                f"got memory_budget={memory_budget}, {x.dtype}, precision={precision!r}"
            )
        self.round_residuals = round_residuals
        self._f = f
        self._trace(x, bound)

    def _trace(self, x: Tensor, bound: Sequence[Tensor]) -> None:
        self._ready = False
        self._workspace = Workspace(x.device)
        with _plain_precision(x):
            # The rest is for the pass itself, which goes on while its maps pile up.
            third = None if self.memory_budget is None else max(1, self.memory_budget // 3)
            budget = self._lowering.unrounded(third)
            self.program, maps, self.value, parameters = trace(self._f, x, bound, self.backend, budget)
        with torch.inference_mode(False):
            self.x = x.detach().clone()
            self._bound = tuple(t.detach().clone() for t in bound)
        # Parameters count from when they were read.
        self._constants = [(t, (version, *_state(t)[1:])) for t, version in parameters]
        self._constants += [(t, _state(t)) for t in _constants(self.program)]
        with torch.inference_mode(False), torch.no_grad(), _plain_precision(x):
            self._keep(maps)
        self._arrive()

    def _keep(self, maps: list[LinearMap | None]) -> None:
        """Lower what the trace left, and choose what to make again where that is more than the budget."""
        program, lowering = self.program, self._lowering
        choice = Choice()
        lowering.again = frozenset()
        if self.memory_budget is not None:
            choice = choose(
                program,
                maps,
                kept_memory(program, maps, lowering),
                lowering.weight_copies(maps),
                lowering.rounded(workspace_bytes(program, maps)),
                self.memory_budget,
                kept_memory(program, maps, lowering, rounded=True) if self.round_residuals else None,
            )
            lowering.again = choice.again
        self._residuals = Residuals(
            maps, choice.segments, program, self.backend, lowering, choice.rounded, choice.low
        )
        missing = bool(choice.segments)
        recomputed: dict[int, Cost] = {}
        for index, instruction in enumerate(maps):
            maps[index] = None
            again = self._residuals.recomputes(index) and program.nodes[index].remade
            missing |= isinstance(instruction, Dropped)
            if instruction is not None and again:
                kept = Rounded(instruction) if index in choice.rounded else instruction
                recomputed[index] = cost_of(kept, None)
            if instruction is None or again or isinstance(instruction, Dropped):
                self._residuals[index] = None
            else:
                self._residuals[index] = lowering.lower(instruction, fixed=program.nodes[index].fixed)
        if missing:
            self._replay((self.x, *self._bound))
        self._describe(choice, recomputed)

    def _describe(self, choice: Choice, recomputed: dict[int, Cost]) -> None:
        """Note for `explain` what each instruction keeps and costs, and what was chosen."""
        program, seen = self.program, set[int]()
        program.costs = [
            recomputed.get(step.node) or cost_of(self._residuals[step.node], seen)  # type: ignore[arg-type]
            for step in program.steps
        ]
        if self._lowering.rounds:
            name = self.precision
            program.notes.append(f"products in {name}, summed in float32; residuals stored in {name}")
        if self.memory_budget is None:
            return
        chosen = "every residual is kept"
        if choice.segments:
            chosen = f"{len(choice.segments)} segments are run again in every product"
        checkpoints = dict(storage_of(tensor) for tensor in self._residuals.checkpoints.values())
        program.notes.append(
            f"memory budget {self.memory_budget / 1e6:.1f} MB: {chosen}; "
            f"checkpoints take {sum(checkpoints.values()) / 1e6:.1f} MB; "
            f"{len(choice.again)} copies of weights are made again, {choice.copies / 1e6:.1f} MB of them kept"
        )
        if self.round_residuals:
            program.notes.append(
                f"stored in bfloat16, and cast back in every product: the residuals of {len(choice.rounded)} "
                f"instructions, and {len(choice.low)} checkpoints"
            )
        program.notes.append(
            f"a product with one vector takes {choice.needed / 1e6:.1f} MB, about: "
            f"{choice.kept / 1e6:.1f} kept of the point, {choice.copies / 1e6:.1f} of weights, "
            f"{choice.transient / 1e6:.1f} for what is made again, {choice.workspace / 1e6:.1f} of tangents; "
            f"making it again, casts included, takes {choice.work / 1e9:.3f} GFLOP"
        )

    def _replay(self, inputs: Sequence[Tensor]) -> Tensor | None:
        """Move to the point of these inputs; returns the value, None for a constant."""
        self._residuals.release()
        return self._workspace.move(
            self.program, inputs, self._run_recorded, segments=bool(self._residuals.segments)
        )

    def _run_recorded(self, *inputs: Tensor) -> Tensor | None:
        """Run the recorded operations and make the maps that depend on the point."""
        values = dict(zip((self.program.x, *self.program.bound), inputs, strict=True))
        for value, tensor in values.items():
            self._residuals.offer(value, tensor)
        self.program.replay(values, self._residuals, self.backend, self._lowering)
        return None if self.program.output is None else values[self.program.output]

    def _arrive(self) -> None:
        """Allow products at the new point, if the value there is one."""
        if not bool(torch.isfinite(self.value).all()):
            self._name_non_finite()
        self._ready = True

    @property
    def nbytes(self) -> int:
        """Bytes of everything that products refer to: residuals, weights and the workspace."""
        seen = dict(storage_of(tensor) for _, tensor in self._residuals.tensors())
        return sum(seen.values()) + self._workspace.nbytes

    @property
    def residual_bytes(self) -> int:
        """Bytes that are kept of the point, weights and the workspace not counted."""
        fixed = self._weights()
        seen = dict(storage_of(tensor) for _, tensor in self._residuals.tensors())
        return sum(size for key, size in seen.items() if key not in fixed)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the copies of weights that were made for the products, shared by all linearizations of a
        network."""
        return self._lowering.weight_bytes(list(self._residuals.kept()))

    def _weights(self) -> set[int]:
        """The memory of constants and of copies of them."""
        found = set[int]()
        for node, instruction in zip(self.program.nodes, self._residuals.kept(), strict=True):
            found |= node.constants()
            if node.fixed and instruction is not None:
                found.update(storage_of(tensor)[0] for _, tensor in instruction.residuals())
        return found

    def jvp(self, tangents: Tensor) -> Tensor:
        """The Jacobian times K tangents.

        `tangents` is [K, *x.shape] with x's dtype and device, K >= 1; returns [K, *value.shape]. Units: those
        of f. Raises InvalidInput for another shape, dtype or device, and NonFiniteError for NaN or infinite
        tangents.
        """
        self._check_tangents("tangents", tangents, self.x)
        self._check_ready()
        return self._product(tangents, transposed=False)

    def vjp(self, cotangents: Tensor) -> Tensor:
        """The transposed Jacobian times K cotangents.

        `cotangents` is [K, *value.shape] with the value's dtype and device, K >= 1; returns [K, *x.shape].
        Raises InvalidInput for another shape, dtype or device, and NonFiniteError for NaN or infinite
        cotangents.
        """
        self._check_tangents("cotangents", cotangents, self.value)
        self._check_ready()
        return self._product(cotangents, transposed=True)

    def _product(self, vectors: Tensor, *, transposed: bool, timed: bool = False) -> Tensor:
        like = self.x if transposed else self.value
        with torch.inference_mode(False), torch.no_grad(), _plain_precision(vectors):
            result = torch.empty((vectors.shape[0], *like.shape), dtype=like.dtype, device=like.device)
            if self.program.tangent_output is None:
                return result.zero_()
            vectors = vectors.detach().to(self._lowering.dtype or vectors.dtype)
            self._workspace.product(
                self.program,
                self._residuals,
                self.backend,
                vectors,
                result,
                transposed=transposed,
                timed=timed,
            )
            if checking() and not bool(torch.isfinite(result).all()):
                raise NonFiniteError(
                    f"{'vjp' if transposed else 'jvp'}: the product is not finite although the vectors and "
                    "f(x) are: a derivative is infinite at this point, or the product overflows"
                )
            return result

    def relinearize(self, x: Tensor, *bound: Tensor) -> Linearization:
        """Move this linearization to another point of the same shape, for the price of a forward pass;
        returns itself.

        x has the shape, dtype and device of the first point; `bound` as in `linearize`, or nothing to keep
        the tensors in use. The recorded operations are replayed, f is not called again, except where its
        control flow read tensor values. Raises as `linearize`. After an error inside the replay there is no
        point to multiply at until a relinearize succeeds.
        """
        _check_point(x, self.x)
        bound = bound or self._bound
        self._check_bound(bound)
        self._check_constants()
        self._ready = False
        if not self.program.replayable:
            self._trace(x, bound)
            return self
        with torch.inference_mode(False), torch.no_grad(), _plain_precision(x):
            # The recorded operations were chosen for the memory layout of the first point.
            inputs = [
                torch.empty_strided(old.size(), old.stride(), dtype=old.dtype, device=old.device).copy_(
                    new.detach()
                )
                for old, new in zip((self.x, *self._bound), (x, *bound), strict=True)
            ]
            value = self._replay(inputs)
            if value is not None:
                self.value = value
        self.x, self._bound = inputs[0], tuple(inputs[1:])
        self._arrive()
        return self

    def explain(self, k: int | None = None) -> str:
        """A table of the instructions: operation, module, output shape, bytes kept, FLOPs, what was chosen
        for the memory budget, and the time of each.

        With a number k the times are those of a jvp with k tangents that is made for this; without, those of
        the last product that was timed, as the first ones at a point are. Raises InvalidInput when k is not a
        positive integer.
        """
        if k is not None:
            if not _is_count(k) or k < 1:
                raise InvalidInput(f"k: expected a positive integer; got {k!r}")
            tangents = torch.ones((k, *self.x.shape), dtype=self.x.dtype, device=self.x.device)
            self._check_ready()
            for _ in range(3):  # the first makes the plan, the second finds caches cold
                self._product(tangents, transposed=False, timed=True)
        return self.program.explain(k)

    def _check_bound(self, bound: Sequence[Tensor]) -> None:
        if len(bound) != len(self._bound):
            raise InvalidInput(
                f"bound: expected {len(self._bound)} tensors as in linearize; got {len(bound)}"
            )
        for i, (new, old) in enumerate(zip(bound, self._bound, strict=True)):
            if not isinstance(new, Tensor):
                raise InvalidInput(f"bound[{i}]: expected a tensor; got {type(new).__name__}")
            if (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
                raise InvalidInput(
                    f"bound[{i}]: expected {tuple(old.shape)} {old.dtype} on {old.device} as in linearize; "
                    f"got {tuple(new.shape)} {new.dtype} on {new.device}"
                )

    def _check_tangents(self, name: str, tangents: Tensor, like: Tensor) -> None:
        if not isinstance(tangents, Tensor):
            raise InvalidInput(f"{name}: expected a tensor; got {type(tangents).__name__}")
        if tangents.layout is not torch.strided:
            raise InvalidInput(f"{name}: expected an ordinary (strided) tensor; got layout {tangents.layout}")
        if tangents.device != like.device:
            raise InvalidInput(f"{name}: expected a tensor on {like.device}; got one on {tangents.device}")
        if tangents.dim() != like.dim() + 1 or tangents.shape[1:] != like.shape:
            raise InvalidInput(
                f"{name}: expected shape (K, {', '.join(map(str, like.shape))}); got {tuple(tangents.shape)}"
            )
        if tangents.shape[0] == 0:
            raise InvalidInput(f"{name}: expected at least one (K >= 1); got K = 0")
        if tangents.dtype != like.dtype:
            raise InvalidInput(f"{name}: expected dtype {like.dtype}; got {tangents.dtype}")
        if checking() and not bool(torch.isfinite(tangents).all()):
            raise NonFiniteError(f"{name}: expected finite numbers; got NaN or infinity")

    def _check_ready(self) -> None:
        if not self._ready:
            raise InvalidInput(
                "the last relinearize failed, so there is no point to multiply at; relinearize first"
            )
        self._check_constants()

    def _check_constants(self) -> None:
        """Products need the weights of the linearization; relinearize keeps constants that were computed from
        them."""
        for tensor, state in self._constants:
            if _state(tensor) != state:
                raise InvalidInput(
                    f"a weight or buffer of shape {tuple(tensor.shape)} was changed in place, or given other "
                    "memory, since the network was linearized; linearize it again"
                )

    def _name_non_finite(self) -> None:
        """Find the first operation whose result is not finite, and raise NonFiniteError naming it."""
        values = dict(zip((self.program.x, *self.program.bound), (self.x, *self._bound), strict=True))
        with torch.inference_mode(False), torch.no_grad(), _plain_precision(self.x):
            for node in self.program.nodes:
                out = node.run(self.backend, node.fill(values))
                outs = (out,) if isinstance(out, Tensor) else tuple(out)
                if isinstance(outs[0], Tensor) and not bool(torch.isfinite(outs[0]).all()):
                    where = f"in module {node.module}" if node.module else "outside of any torch module"
                    raise NonFiniteError(
                        f"f(x) is not finite: NaN or infinity appears first in the result of {node.name} "
                        f"({where}); its inputs are finite, so its weights or their magnitude are to blame"
                    )
                values.update((v, t) for v, t in zip(node.outputs, outs, strict=False) if v is not None)
        raise NonFiniteError("f(x) is not finite: the NaN or infinity does not depend on x")


def _check_point(x: Tensor, like: Tensor | None) -> None:
    if not isinstance(x, Tensor):
        raise InvalidInput(f"x: expected a tensor; got {type(x).__name__}")
    if x.device.type == "meta":
        raise InvalidInput("x: expected a tensor with data; got one on the meta device")
    if x.layout is not torch.strided:
        raise InvalidInput(f"x: expected an ordinary (strided) tensor; got layout {x.layout}")
    if not x.is_floating_point():
        raise InvalidInput(f"x: expected a floating-point tensor; got {x.dtype}")
    if x.numel() == 0:
        raise InvalidInput(f"x: expected at least one entry; got shape {tuple(x.shape)}")
    if like is not None and (x.shape, x.dtype, x.device) != (like.shape, like.dtype, like.device):
        raise InvalidInput(
            f"x: expected {tuple(like.shape)} {like.dtype} on {like.device} as in linearize; "
            f"got {tuple(x.shape)} {x.dtype} on {x.device}"
        )
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError("x: expected finite numbers; got NaN or infinity")


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _plain_precision(x: Tensor) -> Any:
    """No autocast: the precision of the linear program is that of the recorded operations."""
    return torch.autocast(x.device.type, enabled=False)


def _constants(program: Program) -> list[Tensor]:
    """The parameters and other constants that the program refers to and whose changes are counted."""
    found: dict[int, Tensor] = {}
    for node in program.nodes:
        for arg in node.args:
            for part in arg if isinstance(arg, list) else (arg,):
                if isinstance(part, Tensor) and not part.is_inference():
                    found[id(part)] = part
    return list(found.values())


def _state(constant: Tensor) -> tuple[int, int, torch.dtype]:
    """What tells whether a constant is still the same: its in-place version, address and dtype."""
    address = constant.data_ptr() if constant.layout is torch.strided else 0
    return constant._version, address, constant.dtype
