"""Rules of normalizations and softmax: the tangent of what is divided by its own statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharpcore.rules import Call, LinearMap, aten, rule


class GroupNormSilu(LinearMap):
    """GroupNorm, followed by SiLU or not: one pass over K tangents, from the primal input and its
    statistics."""

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

    def _apply(self, kernel: Any, tangent: Tensor) -> Tensor:
        return kernel(tangent, self.x, self.mean, self.rstd, self.weight, self.bias, self.groups, self.silu)

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return (self._apply(kernels.group_norm_silu_tangent, tangents[0]),)

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        return (None if cotangent is None else self._apply(kernels.group_norm_silu_adjoint, cotangent),)


def group_norm_silu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, hw: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The primal of the fused operation: SiLU(GroupNorm(x)) with the mean and reciprocal deviation of each
    group."""
    out, mean, rstd = aten.native_group_norm(x, weight, bias, n, c, hw, groups, eps)
    return aten.silu(out), mean, rstd


def _group_norm(call: Call, silu: bool) -> LinearMap | None:
    if call.active != (0,):
        return None
    x, weight, bias, *_, groups, _eps = call.args
    _, mean, rstd = call.out
    return GroupNormSilu(
        x, mean.view(x.shape[0], groups), rstd.view(x.shape[0], groups), weight, bias, groups, silu
    )


@rule(aten.native_group_norm.default)
def group_norm(call: Call) -> LinearMap | None:
    return _group_norm(call, silu=False)


@rule(group_norm_silu)
def fused_group_norm_silu(call: Call) -> LinearMap | None:
    return _group_norm(call, silu=True)


class LayerNorm(LinearMap):
    """LayerNorm over trailing axes: one pass over K tangents, from the primal input and its statistics."""

    def __init__(self, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, axes: int) -> None:
        self.x, self.mean, self.rstd, self.weight = x, mean, rstd, weight
        self.axes = axes

    def _apply(self, kernel: Any, tangent: Tensor) -> Tensor:
        return kernel(tangent, self.x, self.mean, self.rstd, self.weight, self.axes)

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return (self._apply(kernels.layer_norm_tangent, tangents[0]),)

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        return (None if cotangent is None else self._apply(kernels.layer_norm_adjoint, cotangent),)


@rule(aten.native_layer_norm.default)
def layer_norm(call: Call) -> LinearMap | None:
    if call.active != (0,):
        return None
    x, shape, weight, _bias, _eps = call.args
    _, mean, rstd = call.out
    # Tokens that were an image a moment ago are transposed once here rather than in every product.
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
