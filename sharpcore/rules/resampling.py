"""Rules of operations between grids of pixels: upsampling, pooling, padding; linear, with no residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharpcore.rules import Call, LinearMap, aten, rule


class Folded(LinearMap):
    """A linear operation over trailing axes, run with K folded into the batch axis; its transpose is
    PyTorch's own backward."""

    def __init__(self, call: Call) -> None:
        self.op, self.args, self.kwargs = call.op, call.args[1:], call.kwargs
        self.shape = call.args[0].shape
        self.dtype = call.args[0].dtype

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        (tangent,) = tangents
        out = self.op(tangent.flatten(0, 1), *self.args, **self.kwargs)
        return (out.unflatten(0, (tangent.shape[0], -1)),)

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        if cotangent is None:
            return (None,)
        k = cotangent.shape[0]
        with torch.enable_grad():
            point = cotangent.new_zeros(
                (k * self.shape[0], *self.shape[1:]), dtype=self.dtype
            ).requires_grad_()
            out = self.op(point, *self.args, **self.kwargs)
            (grad,) = torch.autograd.grad(out, point, cotangent.flatten(0, 1))
        return (grad.unflatten(0, (k, -1)),)


class UpsampleNearest(LinearMap):
    """Every pixel repeated over a block of `factors` pixels."""

    writes_jvp = writes_vjp = True

    def __init__(self, factors: tuple[int, int]) -> None:
        self.factors = factors

    def jvp(self, kernels: Any, tangents: Sequence[Tensor], out: Tensor | None = None) -> Sequence[Tensor]:
        return (kernels.upsample_nearest_tangent(tangents[0], self.factors, out=out),)

    def vjp(
        self,
        kernels: Any,
        cotangents: Sequence[Tensor | None],
        out: Sequence[Tensor | None] = (None,),
    ) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        if cotangent is None:
            return (None,)
        return (kernels.upsample_nearest_adjoint(cotangent, self.factors, out=out[0]),)


@rule(aten.upsample_nearest2d.default, aten.upsample_nearest2d.vec)
def upsample_nearest(call: Call) -> LinearMap | None:
    x = call.args[0]
    if x.dim() != 4 or 0 in x.shape:
        return folded(call)
    (height, width), (out_height, out_width) = x.shape[2:], call.out.shape[2:]
    factors = out_height // height, out_width // width
    # A scale that the caller gives, like 2.3, or rounding in it, can pick other pixels than the sizes say:
    # which ones, the operation itself tells on an image of its pixels' numbers.
    numbers = torch.arange(height * width, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    numbers = numbers.view(1, 1, height, width)
    blocks = numbers.repeat_interleave(factors[0], 2).repeat_interleave(factors[1], 3)
    picked = call.op(numbers, *call.args[1:], **call.kwargs)
    return UpsampleNearest(factors) if torch.equal(picked, blocks) else folded(call)


@rule(
    aten.upsample_bilinear2d.default,
    aten.upsample_bilinear2d.vec,
    aten.upsample_bicubic2d.default,
    aten.avg_pool2d.default,
    aten._adaptive_avg_pool2d.default,
    aten.reflection_pad2d.default,
    aten.replication_pad2d.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
)
def folded(call: Call) -> LinearMap | None:
    # Unbatched input ([C, H, W]) has no axis to fold K into.
    return Folded(call) if call.args[0].dim() == 4 else None


class Pad(LinearMap):
    """Constant padding: zeros around the tangent."""

    def __init__(self, pad: Sequence[int], shape: torch.Size) -> None:
        self.pad = tuple(pad)
        self.shape = shape

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return (aten.constant_pad_nd(tangents[0], self.pad, 0),)

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        return (None if cotangent is None else aten.constant_pad_nd(cotangent, [-p for p in self.pad], 0),)


@rule(aten.constant_pad_nd.default)
def pad(call: Call) -> LinearMap:
    return Pad(call.args[1], call.args[0].shape)
