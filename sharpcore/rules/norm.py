"""Rules of normalizations and softmax: the tangent of what is divided by its own statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharpcore.rules import Call, LinearMap, aten, rule


class GroupNormSilu(LinearMap):
    """GroupNorm, followed by SiLU or not: one pass over K tangents, from the primal input and its
    statistics. Weight and bias are [C], or [B, C] where they come from a scale and a shift of each sample."""

    writes_jvp = writes_vjp = True

    def __init__(
        self,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int,
        silu: bool,
    ) -> None:
        self.x, self.mean, self.rstd, self.weight, self.bias = x, mean, rstd, weight, bias
        self.groups = groups
        self.silu = silu

    def _apply(self, kernel: Any, vectors: Tensor, out: Tensor | None) -> Tensor:
        return kernel(
            vectors,
            self.x,
            self.mean,
            self.rstd,
            self.weight,
            self.bias,
            self.groups,
            self.silu,
            out=out,
        )

    def jvp(self, kernels: Any, tangents: Sequence[Tensor], out: Tensor | None = None) -> Sequence[Tensor]:
        return (self._apply(kernels.group_norm_silu_tangent, tangents[0], out),)

    def vjp(
        self,
        kernels: Any,
        cotangents: Sequence[Tensor | None],
        out: Sequence[Tensor | None] | None = None,
    ) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        if cotangent is None:
            return (None,)
        return (self._apply(kernels.group_norm_silu_adjoint, cotangent, None if out is None else out[0]),)


def group_norm_silu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, hw: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The primal of the fused operation: SiLU(GroupNorm(x)) with the mean and reciprocal deviation of each
    group."""
    out, mean, rstd = aten.native_group_norm(x, weight, bias, n, c, hw, groups, eps)
    return aten.silu(out), mean, rstd


def group_norm_scale_shift(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    c: int,
    hw: int,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The primal of the fused operation: GroupNorm(x) * scale + shift, followed by SiLU or not, with the
    statistics; scale and shift broadcast from [B, C, 1, ..., 1]."""
    out, mean, rstd = aten.native_group_norm(x, weight, bias, n, c, hw, groups, eps)
    if scale is not None:
        out = out * scale
    if shift is not None:
        out = out + shift
    return aten.silu(out) if silu else out, mean, rstd


def _group_norm(
    call: Call, weight: Tensor | None, bias: Tensor | None, groups: int, silu: bool
) -> LinearMap | None:
    if call.active != (0,):
        return None
    x, (_, mean, rstd) = call.args[0], call.out
    return GroupNormSilu(
        x, mean.view(x.shape[0], groups), rstd.view(x.shape[0], groups), weight, bias, groups, silu
    )


@rule(aten.native_group_norm.default)
def group_norm(call: Call) -> LinearMap | None:
    _, weight, bias, *_, groups, _eps = call.args
    return _group_norm(call, weight, bias, groups, silu=False)


@rule(group_norm_silu)
def fused_group_norm_silu(call: Call) -> LinearMap | None:
    _, weight, bias, *_, groups, _eps = call.args
    return _group_norm(call, weight, bias, groups, silu=True)


@rule(group_norm_scale_shift)
def fused_group_norm_scale_shift(call: Call) -> LinearMap | None:
    """One GroupNorm whose weight and bias are those of each sample: [B, C], or [C] where samples share
    them."""
    x, weight, bias, *_, groups, _eps, scale, shift, silu = call.args

    def per_channel(operand: Tensor) -> Tensor:
        rows = pad_shape(operand, x.dim())[:2]
        spread = operand.reshape(rows).expand(-1, x.shape[1])
        return spread[0] if rows[0] == 1 else spread

    if scale is not None:
        scale = per_channel(scale)
        weight = scale if weight is None else weight * scale
        bias = None if bias is None else bias * scale
    if shift is not None:
        shift = per_channel(shift)
        bias = shift if bias is None else bias + shift
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    return _group_norm(call, weight, bias, groups, silu)


def pad_shape(operand: Tensor, ndim: int) -> torch.Size:
    """The shape with which a tensor broadcasts against one of `ndim` axes."""
    return torch.Size((*(1,) * (ndim - operand.dim()), *operand.shape))


class LayerNorm(LinearMap):
    """LayerNorm over trailing axes: one pass over K tangents, from the primal input and its statistics. The
    weight has the normalized shape, or [B, 1, ..., 1, *normalized] where each sample has its own."""

    writes_jvp = writes_vjp = True

    def __init__(self, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, axes: int) -> None:
        self.x, self.mean, self.rstd, self.weight = x, mean, rstd, weight
        self.axes = axes

    def _apply(self, kernel: Any, vectors: Tensor, out: Tensor | None) -> Tensor:
        return kernel(vectors, self.x, self.mean, self.rstd, self.weight, self.axes, out=out)

    def jvp(self, kernels: Any, tangents: Sequence[Tensor], out: Tensor | None = None) -> Sequence[Tensor]:
        return (self._apply(kernels.layer_norm_tangent, tangents[0], out),)

    def vjp(
        self,
        kernels: Any,
        cotangents: Sequence[Tensor | None],
        out: Sequence[Tensor | None] | None = None,
    ) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        if cotangent is None:
            return (None,)
        return (self._apply(kernels.layer_norm_adjoint, cotangent, None if out is None else out[0]),)


@rule(aten.native_layer_norm.default)
def layer_norm(call: Call) -> LinearMap | None:
    if call.active != (0,):
        return None
    x, shape, weight, _bias, _eps = call.args
    _, mean, rstd = call.out
    # Tokens that were an image a moment ago are transposed once here rather than in every product.
    return LayerNorm(x.contiguous(), mean, rstd, weight, len(shape))


def layer_norm_scale(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The primal of the fused operation: LayerNorm(x) * scale with the statistics; scale broadcasts from
    [B, 1, ..., 1, *shape]."""
    out, mean, rstd = aten.native_layer_norm(x, shape, weight, bias, eps)
    return out * scale, mean, rstd


@rule(layer_norm_scale)
def fused_layer_norm_scale(call: Call) -> LinearMap | None:
    """One LayerNorm with a weight of each sample, or of all where they share it."""
    if call.active != (0,):
        return None
    x, shape, weight, _bias, _eps, scale = call.args
    _, mean, rstd = call.out
    padded = pad_shape(scale, x.dim())
    scale = scale.reshape(padded).expand(*padded[: -len(shape)], *shape)
    if padded[: -len(shape)].numel() == 1:
        scale = scale.reshape(shape)
    weight = (scale if weight is None else weight * scale).contiguous()
    return LayerNorm(x.contiguous(), mean, rstd, weight, len(shape))


class Softmax(LinearMap):
    """y' = P (x' - sum P x') along one axis; the map is its own transpose."""

    def __init__(self, probabilities: Tensor, dim: int) -> None:
        self.probabilities = probabilities
        self.dim = dim if dim < 0 else dim - probabilities.dim()

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        weighted = tangents[0] * self.probabilities
        return (weighted.addcmul_(self.probabilities, weighted.sum(self.dim, keepdim=True), value=-1),)

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        return (None,) if cotangent is None else self.jvp(kernels, [cotangent])


@rule(aten._softmax.default)
def softmax(call: Call) -> LinearMap | None:
    x, dim, half_to_float = call.args
    return None if half_to_float or x.dim() == 0 else Softmax(call.out, dim)


class LogSoftmax(LinearMap):
    """y' = x' - sum P x' along one axis."""

    def __init__(self, probabilities: Tensor, dim: int) -> None:
        self.probabilities = probabilities
        self.dim = dim if dim < 0 else dim - probabilities.dim()

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        (tangent,) = tangents
        return (tangent - (tangent * self.probabilities).sum(self.dim, keepdim=True),)

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        if cotangent is None:
            return (None,)
        return (cotangent - self.probabilities * cotangent.sum(self.dim, keepdim=True),)


@rule(aten._log_softmax.default)
def log_softmax(call: Call) -> LinearMap | None:
    x, dim, half_to_float = call.args
    return None if half_to_float or x.dim() == 0 else LogSoftmax(torch.exp(call.out), dim)
