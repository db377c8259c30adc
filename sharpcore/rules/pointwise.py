"""Rules of elementwise operations: activations, sums, products, and any operation that PyTorch marks as
pointwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharpcore.backends.launches import launch
from sharpcore.backends.output import deliver
from sharpcore.backends.reference.geglu_tangent import geglu_forward
from sharpcore.rules import Call, Identity, LinearMap, aten, lift, rule, unbroadcast


class Scale(LinearMap):
    """y' = d * x' with an elementwise residual d that broadcasts against the input."""

    writes_jvp = writes_vjp = True

    def __init__(self, factor: Tensor, shape: torch.Size) -> None:
        self.factor = factor
        self.shape = shape

    def jvp(self, kernels: Any, tangents: Sequence[Tensor], out: Tensor | None = None) -> Sequence[Tensor]:
        return (_times(lift(tangents[0], self.factor.dim()), self.factor, out),)

    def vjp(
        self,
        kernels: Any,
        cotangents: Sequence[Tensor | None],
        out: Sequence[Tensor | None] = (None,),
    ) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        if cotangent is None:
            return (None,)
        if cotangent.shape[1:] == self.shape:
            return (_times(cotangent, self.factor.conj(), out[0]),)
        return (deliver(unbroadcast(cotangent * self.factor.conj(), self.shape), out[0]),)


class ScalarScale(LinearMap):
    """y' = c * x' with a number c."""

    writes_jvp = writes_vjp = True

    def __init__(self, factor: complex | float) -> None:
        self.factor = factor

    def jvp(self, kernels: Any, tangents: Sequence[Tensor], out: Tensor | None = None) -> Sequence[Tensor]:
        return (_times(tangents[0], self.factor, out),)

    def vjp(
        self,
        kernels: Any,
        cotangents: Sequence[Tensor | None],
        out: Sequence[Tensor | None] = (None,),
    ) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        return (None if cotangent is None else _times(cotangent, self.factor.conjugate(), out[0]),)


def _times(vectors: Tensor, factor: Tensor | complex, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.mul(vectors, factor)
    launch(
        torch.mul, (vectors, factor if isinstance(factor, Tensor) else None, out), vectors, factor, out=out
    )
    return out


class Broadcast(LinearMap):
    """y' = x' broadcast to the output's shape (the other operand of a sum carries no tangent)."""

    def __init__(self, shape: torch.Size, out_shape: torch.Size, factor: float) -> None:
        self.shape = shape
        self.out_shape = out_shape
        self.factor = factor

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        tangent = lift(tangents[0], len(self.out_shape)).expand(-1, *self.out_shape)
        return (tangent if self.factor == 1 else tangent * self.factor,)

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        if cotangent is None:
            return (None,)
        cotangent = unbroadcast(cotangent, self.shape)
        return (cotangent if self.factor == 1 else cotangent * self.factor.conjugate(),)


class Sum(LinearMap):
    """y' = x1' + c * x2', each broadcast as its primal was."""

    writes_jvp = writes_vjp = True

    def __init__(self, shapes: tuple[torch.Size, torch.Size], ndim: int, factor: float) -> None:
        self.shapes = shapes
        self.ndim = ndim
        self.factor = factor

    def jvp(self, kernels: Any, tangents: Sequence[Tensor], out: Tensor | None = None) -> Sequence[Tensor]:
        first, second = (lift(tangent, self.ndim) for tangent in tangents)
        if first.shape == second.shape and first.dtype == second.dtype and not first.is_complex():
            return (kernels.residual_add(first, second, self.factor, out=out),)
        return (torch.add(first, second, alpha=self.factor, out=out),)

    def vjp(
        self,
        kernels: Any,
        cotangents: Sequence[Tensor | None],
        out: Sequence[Tensor | None] = (None, None),
    ) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        if cotangent is None:
            return (None, None)
        first, second = (unbroadcast(cotangent, shape) for shape in self.shapes)
        if self.factor != 1:
            second = _times(second, self.factor.conjugate(), out[1])
        return deliver(first, out[0]), deliver(second, out[1])


class SumOfScales(LinearMap):
    """y' = sum_i d_i * x_i', the derivative of an elementwise operation with several active operands."""

    writes_jvp = writes_vjp = True

    def __init__(self, scales: Sequence[Scale], ndim: int) -> None:
        self.scales = tuple(scales)
        self.ndim = ndim

    def jvp(self, kernels: Any, tangents: Sequence[Tensor], out: Tensor | None = None) -> Sequence[Tensor]:
        total = _times(lift(tangents[0], self.ndim), self.scales[0].factor, out)
        for scale, tangent in zip(self.scales[1:], tangents[1:], strict=True):
            further = lift(tangent, self.ndim)
            tensors = total, further, scale.factor
            launch(torch.addcmul, tensors, *tensors, out=total)
        return (total,)

    def vjp(
        self,
        kernels: Any,
        cotangents: Sequence[Tensor | None],
        out: Sequence[Tensor | None] | None = None,
    ) -> Sequence[Tensor | None]:
        places = (None,) * len(self.scales) if out is None else out
        return tuple(
            scale.vjp(kernels, cotangents, (place,))[0]
            for scale, place in zip(self.scales, places, strict=True)
        )

    def residuals(self) -> list[tuple[str, Tensor]]:
        return [(f"scales[{i}].factor", scale.factor) for i, scale in enumerate(self.scales)]


def _same_dtype(call: Call) -> bool:
    """Whether every active operand has the result's dtype; promotions go the general way, which casts."""
    return all(call.argument(position).dtype == call.out.dtype for position in call.active)


def _matching_scale(call: Call, position: Any, factor: Any) -> LinearMap:
    """The map of one active operand times a factor that is a number or a tensor."""
    shape = call.argument(position).shape
    if not isinstance(factor, Tensor):
        if shape == call.out.shape:
            return Identity() if factor == 1 else ScalarScale(factor)
        return Broadcast(shape, call.out.shape, factor)
    if shape != call.out.shape:
        factor = factor.expand(call.out.shape)
    return Scale(factor, shape)


@rule(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
def add(call: Call) -> LinearMap | None:
    if not _same_dtype(call):
        return pointwise(call)
    alpha = call.optional(2, "alpha", 1)
    factor = -alpha if call.op in (aten.sub.Tensor, aten.sub.Scalar) else alpha
    if call.active == (0, 1):
        first, second = call.args[0], call.args[1]
        return Sum((first.shape, second.shape), call.out.dim(), factor)
    (position,) = call.active
    return _matching_scale(call, position, 1 if position == 0 else factor)


@rule(aten.rsub.Scalar, aten.rsub.Tensor)
def rsub(call: Call) -> LinearMap | None:
    if call.active != (0,) or not _same_dtype(call):
        return pointwise(call)
    return _matching_scale(call, 0, -call.optional(2, "alpha", 1))


@rule(aten.neg.default)
def neg(call: Call) -> LinearMap:
    return ScalarScale(-1)


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(call: Call) -> LinearMap | None:
    if not _same_dtype(call):
        return pointwise(call)
    first, second = call.args[0], call.args[1]
    if call.active == (0, 1):
        scales = (
            Scale(second.expand(call.out.shape), first.shape),
            Scale(first.expand(call.out.shape), second.shape),
        )
        return SumOfScales(scales, call.out.dim())
    (position,) = call.active
    other = second if position == 0 else first
    return _matching_scale(call, position, other.to(call.out.dtype) if isinstance(other, Tensor) else other)


@rule(aten.div.Tensor, aten.div.Scalar)
def div(call: Call) -> LinearMap | None:
    if call.active != (0,) or not _same_dtype(call):
        return pointwise(call)
    divisor = call.args[1]
    inverse = divisor.to(call.out.dtype).reciprocal() if isinstance(divisor, Tensor) else 1 / divisor
    return _matching_scale(call, 0, inverse)


@rule(aten.silu.default)
def silu(call: Call) -> LinearMap:
    x = call.args[0]
    return Scale(aten.silu_backward(x.new_ones(()).expand(x.shape), x), x.shape)


@rule(aten.gelu.default)
def gelu(call: Call) -> LinearMap:
    x = call.args[0]
    approximate = call.kwargs.get("approximate", "none")
    return Scale(aten.gelu_backward(x.new_ones(()).expand(x.shape), x, approximate=approximate), x.shape)


class Geglu(LinearMap):
    """y = h * gelu(g) of the halves [h | g] of the last axis: one pass over K tangents, with the derivatives
    [dy/dh | dy/dg] as residual."""

    writes_jvp = writes_vjp = True

    def __init__(self, factors: Tensor) -> None:
        self.factors = factors

    def jvp(self, kernels: Any, tangents: Sequence[Tensor], out: Tensor | None = None) -> Sequence[Tensor]:
        return (kernels.geglu_tangent(tangents[0], self.factors, out=out),)

    def vjp(
        self,
        kernels: Any,
        cotangents: Sequence[Tensor | None],
        out: Sequence[Tensor | None] = (None,),
    ) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        return (None if cotangent is None else kernels.geglu_adjoint(cotangent, self.factors, out=out[0]),)


def geglu(projection: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """The primal of the fused operation: h * gelu(g), and the factors of its derivative."""
    return geglu_forward(projection, approximate)


@rule(geglu)
def fused_geglu(call: Call) -> LinearMap:
    # While a network is traced its own operations made the value, and nothing has made the factors yet.
    _, factors = geglu(*call.args) if isinstance(call.out, Tensor) else call.out
    return Geglu(factors)


@rule(aten.sigmoid.default)
def sigmoid(call: Call) -> LinearMap:
    return Scale(call.out * (1 - call.out), call.out.shape)


@rule(aten.tanh.default)
def tanh(call: Call) -> LinearMap:
    return Scale(1 - call.out * call.out, call.out.shape)


@rule(aten.exp.default)
def exp(call: Call) -> LinearMap:
    return Scale(call.out, call.out.shape)


@rule("pointwise")
def pointwise(call: Call) -> LinearMap | None:
    """The map of any elementwise operation: PyTorch's own derivative with respect to each active operand,
    taken once as a factor."""
    out = call.out
    if not isinstance(out, Tensor) or out.is_complex():
        return None
    leaves: dict[Any, Tensor] = {}
    args = list(call.args)
    for position in call.active:
        operand = call.argument(position)
        if isinstance(position, tuple) or operand.is_complex():
            return None
        # Every element gets a leaf of its own, so that the gradient of the sum is the elementwise derivative.
        leaves[position] = args[position] = operand.detach().expand(out.shape).clone().requires_grad_()
    with torch.enable_grad():
        value = call.op(*args, **call.kwargs)
        if not value.requires_grad:
            return None
        factors = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True)
    scales = [
        Scale(torch.zeros_like(leaf) if factor is None else factor, call.argument(position).shape)
        for (position, leaf), factor in zip(leaves.items(), factors, strict=True)
    ]
    if all(scale.factor.dtype == out.dtype for scale in scales):
        return scales[0] if len(scales) == 1 else SumOfScales(scales, out.dim())
    return PromotedSum(scales, out.dim(), out.dtype)


class PromotedSum(LinearMap):
    """y' = sum_i cast(d_i * x_i') where the operands' dtypes differ from the result's."""

    def __init__(self, scales: Sequence[Scale], ndim: int, dtype: torch.dtype) -> None:
        self.scales = tuple(scales)
        self.ndim = ndim
        self.dtype = dtype

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        terms = [
            lift(tangent, self.ndim).to(self.dtype) * scale.factor.to(self.dtype)
            for scale, tangent in zip(self.scales, tangents, strict=True)
        ]
        return (sum(terms[1:], terms[0]),)

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        if cotangent is None:
            return (None,) * len(self.scales)
        return tuple(
            unbroadcast(cotangent * scale.factor.to(self.dtype), scale.shape).to(scale.factor.dtype)
            for scale in self.scales
        )

    def residuals(self) -> list[tuple[str, Tensor]]:
        return [(f"scales[{i}].factor", scale.factor) for i, scale in enumerate(self.scales)]
