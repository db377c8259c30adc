"""Lowering: the layout and the precision in which a linear map keeps its residuals and takes its tangents."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpcore.errors import InvalidInput
from sharpcore.rules import LinearMap
from sharpcore.rules.attention import Attention
from sharpcore.rules.linear import Convolution, Linear, MatrixProduct, pack, packable
from sharpcore.rules.norm import GroupNormSilu, LayerNorm, Softmax
from sharpcore.rules.pointwise import Broadcast, Geglu, ScalarScale, Scale, Sum, SumOfScales
from sharpcore.rules.shape import Cast, Concatenate, Expand, Permute, Pieces, Reshape, UpsampleNearest

PRECISIONS = ("float32", "bfloat16")

# The same at every point, as long as their weights are: a new point keeps them.
_FIXED = (
    Convolution,
    Linear,
    Reshape,
    Permute,
    Expand,
    Pieces,
    Concatenate,
    Sum,
    Broadcast,
    ScalarScale,
    Cast,
    UpsampleNearest,
)
# Maps whose arithmetic stays right when what they keep is rounded; the others take float32.
_ROUND = (
    *_FIXED,
    Attention,
    GroupNormSilu,
    LayerNorm,
    Geglu,
    Scale,
    SumOfScales,
    MatrixProduct,
    Softmax,
)
# Statistics that kernels take in float32 beside bfloat16 tensors, and parameters too small to matter.
_KEEP = {"mean", "rstd", "lse", "mask", "bias"}


class Float32(LinearMap):
    """A map that computes in float32 between bfloat16 tangents."""

    def __init__(self, inner: LinearMap) -> None:
        self.inner = inner

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        given = [_exchange(tangent, _FORTH) for tangent in tangents]
        return [_exchange(out, _BACK) for out in self.inner.jvp(kernels, given)]

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        given = [None if c is None else _exchange(c, _FORTH) for c in cotangents]
        return [None if c is None else _exchange(c, _BACK) for c in self.inner.vjp(kernels, given)]

    def residuals(self) -> list[tuple[str, Tensor]]:
        return self.inner.residuals()

    @property
    def kind(self) -> str:
        return f"{self.inner.kind} in float32"

    def flops(self, k: int) -> int:
        return self.inner.flops(k)


_EITHER = (torch.float32, torch.bfloat16)
_FORTH = {torch.bfloat16: torch.float32}
_BACK = {torch.float32: torch.bfloat16}


def _exchange(tensor: Tensor, dtypes: dict[torch.dtype, torch.dtype]) -> Tensor:
    return tensor.to(dtypes.get(tensor.dtype, tensor.dtype))


def is_fixed(instruction: LinearMap) -> bool:
    """Whether a map, of which no operand but the active ones changes, is the same at every point."""
    return isinstance(instruction, _FIXED)


# Converted or packed weights by the weight and what was done to it. Linearizations that are given the same
# dictionary share them; it may live as long as the weights do not change.
WeightCopies = dict[Any, tuple[Tensor, Tensor]]


def check_precision(precision: str, dtype: torch.dtype) -> None:
    """Raise InvalidInput for a precision that there is not, or not for a network of this dtype."""
    if precision not in PRECISIONS:
        raise InvalidInput(f"precision: expected one of {', '.join(PRECISIONS)}; got {precision!r}")
    if precision == "bfloat16" and dtype != torch.float32:
        raise InvalidInput(
            f'precision: "bfloat16" rounds the products of a float32 network; this one computes in {dtype}'
        )


class Lowering:
    """How the maps of one linearization are lowered.

    Weights are converted and packed once; the maps that hold them are kept when the point moves.
    """

    def __init__(self, precision: str, x: Tensor, kernels: Any, copies: WeightCopies) -> None:
        check_precision(precision, x.dtype)
        self._kernels = kernels
        self._copies = copies
        self.packs_adjoints = True
        self.again: frozenset[Hashable] = frozenset()  # ids of weights that every product copies anew
        self.rounds = precision == "bfloat16"
        self.packs = x.device.type == "cpu" and x.dtype == torch.float32

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of tangents inside a product; None: that of the network."""
        return torch.bfloat16 if self.rounds else None

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
            elif isinstance(instruction, Linear) and self.rounds and instruction.weight.dtype in _EITHER:
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
        if self._turns(instruction):
            # Tangents come out of packed convolutions with the channels last; the residual lies beside them.
            instruction.x = instruction.x.contiguous(memory_format=torch.channels_last)  # type: ignore[attr-defined]
        if not self.rounds:
            return instruction
        if not isinstance(instruction, _ROUND):
            return Float32(instruction)
        if isinstance(instruction, Linear):
            weight = instruction.weight
            if weight.dtype != torch.float32:
                return instruction
            instruction.weight = self._copy(weight, "rounded", lambda: weight.detach().to(torch.bfloat16))
            return instruction
        self._round(instruction)
        if isinstance(instruction, Attention) and instruction.q.dtype == torch.bfloat16:
            # The statistics of the rounded scores: with those of the exact ones no row would sum to one.
            instruction.out, instruction.lse = self._kernels.attention_forward(
                instruction.q, instruction.k, instruction.v, mask=instruction.mask, scale=instruction.scale
            )
        return instruction

    def _turns(self, instruction: LinearMap) -> bool:
        return isinstance(instruction, GroupNormSilu) and self.packs and instruction.x.dim() == 4

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype of packed weights."""
        return torch.bfloat16 if self.rounds else torch.float32

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

    def _round(self, instruction: LinearMap) -> None:
        keep = _KEEP | {"weight"} if isinstance(instruction, (GroupNormSilu, LayerNorm)) else _KEEP
        for name, value in list(vars(instruction).items()):
            if name in keep:
                continue
            if isinstance(value, Tensor) and value.dtype in _BACK:
                setattr(instruction, name, value.detach().to(torch.bfloat16))
            elif isinstance(value, torch.dtype):
                setattr(instruction, name, _BACK.get(value, value))
            elif isinstance(value, LinearMap):
                self._round(value)
            elif isinstance(value, tuple) and value and isinstance(value[0], LinearMap):
                for part in value:
                    self._round(part)
