"""Lowering: the layout and the precision in which a linear map keeps its residuals and takes its tangents."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpcore.errors import InvalidInput
from sharpcore.rules import LinearMap
from sharpcore.rules.attention import Attention
from sharpcore.rules.linear import Convolution, Linear, MatrixProduct
from sharpcore.rules.norm import GroupNormSilu, LayerNorm, Softmax
from sharpcore.rules.pointwise import Broadcast, Geglu, ScalarScale, Scale, Sum, SumOfScales
from sharpcore.rules.shape import Cast, Concatenate, Expand, Permute, Pieces, Reshape

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

    def flops(self, k: int) -> int:
        return self.inner.flops(k)


_FORTH = {torch.bfloat16: torch.float32}
_BACK = {torch.float32: torch.bfloat16}


def _exchange(tensor: Tensor, dtypes: dict[torch.dtype, torch.dtype]) -> Tensor:
    return tensor.to(dtypes.get(tensor.dtype, tensor.dtype))


def is_fixed(instruction: LinearMap) -> bool:
    """Whether a map, of which no operand but the active ones changes, is the same at every point."""
    return isinstance(instruction, _FIXED)


# Copies of weights, for as long as a map refers to one: all linearizations of a network share them. Such a
# map refers to the weight as well, so that no other tensor can come to lie at its address.
_COPIES: weakref.WeakValueDictionary[Any, Tensor] = weakref.WeakValueDictionary()


def _shared_copy(weight: Tensor, kind: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
    """The copy of a weight that there is of this kind, or a new one."""
    if weight.is_inference():  # does not count its in-place changes
        return make()
    key = (weight.data_ptr(), weight._version, weight.shape, weight.stride(), weight.dtype, str(kind))
    copy = _COPIES.get(key)
    if copy is None:
        copy = _COPIES[key] = make()
    return copy


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

    def __init__(self, precision: str, x: Tensor) -> None:
        check_precision(precision, x.dtype)
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

    def weight_bytes(self, maps: Sequence[LinearMap | None]) -> int:
        """What the copies of weights take that `lower` makes of these maps, or has made."""
        copied: dict[int, int] = {}
        for instruction in maps:
            if isinstance(instruction, Convolution):
                if self.rounds or (self.packs and instruction.packable()):
                    copied[id(instruction.weight)] = self.rounded(4 * instruction.weight.numel())
            elif isinstance(instruction, Linear) and self.rounds:
                copied[id(instruction.weight)] = 2 * instruction.weight.numel()
        return sum(copied.values())

    def lower(self, instruction: LinearMap) -> LinearMap:
        """The map as products run it; the given one is changed and may be what is returned."""
        if isinstance(instruction, Convolution) and self.packs and instruction.packable():
            dtype = torch.bfloat16 if self.rounds else torch.float32
            weight = instruction.weight
            instruction.packed = _shared_copy(
                weight,
                ("packed", dtype, instruction.geometry),
                lambda: instruction.pack(weight.detach().to(dtype)),
            )
            return instruction
        if isinstance(instruction, GroupNormSilu) and self.packs and instruction.x.dim() == 4:
            # Tangents come out of packed convolutions with the channels last; the residual lies beside them.
            instruction.x = instruction.x.contiguous(memory_format=torch.channels_last)
        if not self.rounds:
            return instruction
        if not isinstance(instruction, _ROUND):
            return Float32(instruction)
        if isinstance(instruction, Linear):
            weight = instruction.weight
            instruction.source = weight
            instruction.weight = _shared_copy(
                weight, ("rounded",), lambda: weight.detach().to(torch.bfloat16)
            )
            return instruction
        self._round(instruction)
        return instruction

    def _round(self, instruction: LinearMap) -> None:
        for name, value in list(vars(instruction).items()):
            if name in _KEEP:
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
