"""Lowering: the layout and the precision in which a linear map keeps its residuals and takes its tangents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpcore.errors import InvalidInput
from sharpcore.rules import LinearMap, storage_of, with_tensors
from sharpcore.rules.attention import Attention
from sharpcore.rules.linear import Convolution, Linear, MatrixProduct, pack, packable
from sharpcore.rules.norm import GroupNormSilu, LayerNorm, Softmax
from sharpcore.rules.pointwise import Broadcast, Geglu, ScalarScale, Scale, Sum, SumOfScales
from sharpcore.rules.resampling import UpsampleNearest
from sharpcore.rules.shape import Cast, Concatenate, Expand, Flip, Permute, Pieces, Reshape

# What products are made in, and the dtype that tangents, weights and residuals are then rounded to. In "tf32"
# the operands of matrix products and convolutions are rounded on their way into a GPU's matrix units.
PRECISIONS: dict[str, torch.dtype | None] = {
    "float32": None,
    "tf32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_TF32_ROUNDING = 2.0**-10

# The same at every point, as long as their weights are: a new point keeps them.
_FIXED = (
    Convolution,
    Linear,
    Reshape,
    Permute,
    Flip,
    Expand,
    Pieces,
    Concatenate,
    Sum,
    Broadcast,
    ScalarScale,
    Cast,
    UpsampleNearest,
)
# Maps whose arithmetic stays right when what they keep of the point is rounded; the others take float32.
_ROUND_RESIDUALS = (
    Attention,
    GroupNormSilu,
    LayerNorm,
    Geglu,
    Scale,
    SumOfScales,
    MatrixProduct,
    Softmax,
)
_ROUND = (*_FIXED, *_ROUND_RESIDUALS)
# Statistics that kernels take in float32 beside tensors of 16 bits, and parameters too small to matter.
_KEEP = {"mean", "rstd", "lse", "mask", "bias"}


class Float32(LinearMap):
    """A map that computes in float32 between tangents of 16 bits."""

    def __init__(self, inner: LinearMap, low: torch.dtype) -> None:
        self.inner = inner
        self.low = low

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        given = [_exchange(tangent, self.low, torch.float32) for tangent in tangents]
        return [_exchange(out, torch.float32, self.low) for out in self.inner.jvp(kernels, given)]

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        given = [None if c is None else _exchange(c, self.low, torch.float32) for c in cotangents]
        pulled = self.inner.vjp(kernels, given)
        return [None if c is None else _exchange(c, torch.float32, self.low) for c in pulled]

    def residuals(self) -> list[tuple[str, Tensor]]:
        return self.inner.residuals()

    @property
    def kind(self) -> str:
        return f"{self.inner.kind} in float32"

    def flops(self, k: int) -> int:
        return self.inner.flops(k)


class Rounded(LinearMap):
    """A map that keeps residuals in bfloat16, and computes with them in float32 as if they were exact."""

    def __init__(self, inner: LinearMap) -> None:
        self.inner = inner
        self.writes_jvp, self.writes_vjp = inner.writes_jvp, inner.writes_vjp

    def jvp(self, kernels: Any, tangents: Sequence[Tensor], **where: Any) -> Sequence[Tensor]:
        return with_tensors(self.inner, restored).jvp(kernels, tangents, **where)

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None], **where: Any) -> Sequence[Tensor | None]:
        return with_tensors(self.inner, restored).vjp(kernels, cotangents, **where)

    def residuals(self) -> list[tuple[str, Tensor]]:
        return self.inner.residuals()

    @property
    def kind(self) -> str:
        return f"{self.inner.kind} from bfloat16"

    def flops(self, k: int) -> int:
        return self.inner.flops(k)


def restored(tensor: Tensor) -> Tensor:
    """A tensor that was stored in bfloat16, in float32 again; any other as it is."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _exchange(tensor: Tensor, old: torch.dtype, new: torch.dtype) -> Tensor:
    return tensor.to(new) if tensor.dtype == old else tensor


def is_fixed(instruction: LinearMap) -> bool:
    """Whether a map, of which no operand but the active ones changes, is the same at every point."""
    return isinstance(instruction, _FIXED)


def roundable(instruction: LinearMap, constants: Container[int]) -> list[Tensor]:
    """The residuals of a float32 map that may be stored in bfloat16 and take less memory then.

    `constants` tells memory that stays whatever the map keeps. Statistics and parameters are left alone.
    """
    residuals = instruction.residuals() if isinstance(instruction, _ROUND_RESIDUALS) else []
    if any(tensor.dtype == torch.bfloat16 for _, tensor in residuals):
        return []
    kept = _kept_names(instruction)
    found = [tensor for name, tensor in residuals if name not in kept and tensor.dtype == torch.float32]
    taken: Counter[int] = Counter()  # views of one piece of memory become copies of their own
    for tensor in found:
        taken[storage_of(tensor)[0]] += torch.bfloat16.itemsize * tensor.numel()
    memory = [storage_of(tensor) for tensor in found]
    return [
        tensor
        for tensor, (key, nbytes) in zip(found, memory, strict=True)
        if key not in constants and taken[key] < nbytes
    ]


def _kept_names(instruction: LinearMap) -> set[str]:
    """The residuals that are not rounded."""
    return _KEEP | {"weight"} if isinstance(instruction, (GroupNormSilu, LayerNorm)) else _KEEP


# Converted or packed weights by the weight and what was done to it. Linearizations that are given the same
# dictionary share them; it may live as long as the weights do not change.
WeightCopies = dict[Any, tuple[Tensor, Tensor]]


def check_precision(precision: str, dtype: torch.dtype, device: torch.device) -> None:
    """Raise InvalidInput for a precision that there is not, or not for a network of this dtype and device."""
    if precision not in PRECISIONS:
        raise InvalidInput(f"precision: expected one of {', '.join(PRECISIONS)}; got {precision!r}")
    if precision != "float32" and dtype != torch.float32:
        raise InvalidInput(
            f'precision: "{precision}" rounds the products of a float32 network; this one computes in {dtype}'
        )
    if precision == "tf32" and device.type != "cuda":
        raise InvalidInput(f'precision: "tf32" is a mode of GPUs; the network is on {device.type}')


def rounding_of(precision: str, dtype: torch.dtype) -> float:
    """The relative rounding of the operands of products of this precision, with a network of this dtype."""
    return _TF32_ROUNDING if precision == "tf32" else torch.finfo(PRECISIONS[precision] or dtype).eps


class Lowering:
    """How the maps of one linearization are lowered.

    Weights are converted and packed once; the maps that hold them are kept when the point moves.
    """

    def __init__(self, precision: str, x: Tensor, kernels: Any, copies: WeightCopies) -> None:
        check_precision(precision, x.dtype, x.device)
        self._kernels = kernels
        self._copies = copies
        self.packs_adjoints = True
        self.again: frozenset[Hashable] = frozenset()  # ids of weights that every product copies anew
        self.dtype = PRECISIONS[precision]  # of tangents inside a product; None: that of the network
        self.packs = x.device.type == "cpu" and x.dtype == torch.float32 and precision != "float16"
        # A GPU's matrix units take the channels of a pixel side by side.
        self.channels_last = x.device.type == "cuda" and precision != "float32"

    @property
    def rounds(self) -> bool:
        """Whether products work on rounded copies of residuals and weights."""
        return self.dtype is not None

    def rounded(self, nbytes: int) -> int:
        """What float32 residuals take once they are lowered."""
        return nbytes // 2 if self.rounds else nbytes

    def unrounded(self, nbytes: int | None) -> int | None:
        """What float32 residuals may take so that they fit into so many bytes once they are lowered."""
        return 2 * nbytes if nbytes is not None and self.rounds else nbytes

    def weight_copies(self, maps: Sequence[LinearMap | None]) -> dict[Hashable, int]:
        """The bytes of the copies of weights that products with these maps need, by the id of the weight."""
        copied: dict[Hashable, int] = {}
        for instruction in maps:
            if isinstance(instruction, Convolution):
                if self.rounds or self._packs(instruction):
                    copied[id(instruction.weight)] = self.rounded(4 * instruction.weight.numel())
            elif (
                isinstance(instruction, Linear)
                and self.rounds
                and instruction.weight.dtype
                in (
                    torch.float32,
                    self.dtype,
                )
            ):
                copied[id(instruction.weight)] = 2 * instruction.weight.numel()
        return copied

    def weight_bytes(self, maps: Sequence[LinearMap | None]) -> int:
        """What the kept ones of these copies take."""
        return sum(size for key, size in self.weight_copies(maps).items() if key not in self.again)

    def copies(self, instruction: LinearMap) -> bool:
        """Whether `lower` makes copies of what a map keeps of the point."""
        return self.rounds or self._turns(instruction)

    def lower(self, instruction: LinearMap, *, fixed: bool = False) -> LinearMap:
        """The map as products run it; the given one is changed and may be what is returned. `fixed`: it stays
        when the point moves, so that its weight is worth packing."""
        if isinstance(instruction, Convolution) and fixed and self._packs(instruction):
            arguments = instruction.geometry, instruction.x_shape
            if id(instruction.weight) in self.again:
                weight, dtype = instruction.weight, self._dtype
                instruction.packs = lambda: pack(weight.detach().to(dtype), *arguments)
                return instruction
            instruction.packed = self._packed(instruction.weight, *arguments)
            instruction.copy = self._copy if self.packs_adjoints else None
            return instruction
        if isinstance(instruction, (Convolution, Linear)) and id(instruction.weight) in self.again:
            return instruction
        if isinstance(instruction, Convolution) and fixed and self._reorders(instruction):
            weight, dtype, order = instruction.weight, self._dtype, torch.channels_last
            instruction.weight = self._copy(
                weight, f"{dtype} {order}", lambda: weight.detach().to(dtype, memory_format=order)
            )
            return instruction
        if self._turns(instruction):
            # Tangents come out of packed convolutions with the channels last; the residual lies beside them.
            instruction.x = instruction.x.contiguous(memory_format=torch.channels_last)  # type: ignore[attr-defined]
        low = self.dtype
        if low is None:
            return instruction
        if not isinstance(instruction, _ROUND):
            return Float32(instruction, low)
        if isinstance(instruction, Linear):
            weight = instruction.weight
            if weight.dtype != torch.float32:
                return instruction
            instruction.weight = self._copy(weight, f"rounded {low}", lambda: weight.detach().to(low))
            return instruction
        self._round(instruction, low)
        if isinstance(instruction, Attention) and instruction.q.dtype == low:
            # The statistics of the rounded scores, as in round_residuals.
            instruction.out, instruction.lse = self._kernels.attention_forward(
                instruction.q, instruction.k, instruction.v, mask=instruction.mask, scale=instruction.scale
            )
        return instruction

    def round_residuals(self, instruction: LinearMap, constants: Container[int]) -> LinearMap:
        """The map with what is `roundable` in bfloat16."""
        chosen = {id(tensor) for tensor in roundable(instruction, constants)}
        if not chosen:
            return instruction
        low = with_tensors(instruction, lambda t: t.detach().bfloat16() if id(t) in chosen else t)
        if isinstance(low, Attention):
            # The statistics of the rounded scores: with those of the exact ones no row would sum to one.
            q, k, v = map(restored, (low.q, low.k, low.v))
            out, low.lse = self._kernels.attention_forward(q, k, v, mask=low.mask, scale=low.scale)
            low.out = out.bfloat16()
        return Rounded(low)

    def _turns(self, instruction: LinearMap) -> bool:
        turns = self.packs or self.channels_last
        return isinstance(instruction, GroupNormSilu) and turns and instruction.x.dim() == 4

    def _reorders(self, convolution: Convolution) -> bool:
        weight = convolution.weight
        return self.channels_last and weight.dim() == 4 and weight.dtype == torch.float32

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype of packed and reordered weights."""
        return self.dtype or torch.float32

    def _packs(self, convolution: Convolution) -> bool:
        return self.packs and packable(convolution.weight, convolution.geometry, self._dtype)

    def _packed(self, weight: Tensor, geometry: tuple[Any, ...], shape: torch.Size) -> Tensor:
        kind = f"packed {self._dtype} {geometry}"
        return self._copy(weight, kind, lambda: pack(weight.detach().to(self._dtype), geometry, shape))

    def _copy(self, weight: Tensor, kind: str, make: Callable[[], Tensor]) -> Tensor:
        if not isinstance(weight, torch.nn.Parameter) or weight.is_inference():
            return make()  # computed, or one whose changes are not counted: a copy for this map alone
        key = (weight.data_ptr(), weight._version, weight.shape, weight.stride(), kind)
        if key not in self._copies:
            # While its memory is held, no other weight comes to lie at its address.
            self._copies[key] = (weight.detach(), make())
        return self._copies[key][1]

    def _round(self, instruction: LinearMap, low: torch.dtype) -> None:
        keep = _kept_names(instruction)
        for name, value in list(vars(instruction).items()):
            if name in keep:
                continue
            if isinstance(value, Tensor) and value.dtype == torch.float32:
                setattr(instruction, name, value.detach().to(low))
            elif value is torch.float32:
                setattr(instruction, name, low)
            elif isinstance(value, LinearMap):
                self._round(value, low)
            elif isinstance(value, tuple) and value and isinstance(value[0], LinearMap):
                for part in value:
                    self._round(part, low)
