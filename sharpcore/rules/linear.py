"""Rules of convolutions and matrix products: the same product on the batch of K tangents, without bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sharpcore.backends.launches import launch
from sharpcore.backends.output import deliver
from sharpcore.rules import Call, LinearMap, aten, rule
from sharpcore.rules.pointwise import Broadcast

mkldnn = torch.ops.mkldnn


class Convolution(LinearMap):
    """y' = conv(x', w) with K folded into the batch.

    On a GPU float32 tangents go to cuDNN with the backend's precision, not with what the process allows.
    Where oneDNN has the convolution, `packed` holds the weight in the layout that it wants for channels-last
    tangents (every product would reorder it otherwise), and, once a transposed product was asked for,
    `packed_adjoint` that of the transpose, which for stride 1 is a convolution as well. Where there is no
    memory for that, `packs` makes `packed` in every product.
    """

    writes_jvp = writes_vjp = True

    def __init__(self, call: Call) -> None:
        x, self.weight = call.args[0], call.args[1]
        self.x_shape, self.out_shape = x.shape, call.out.shape
        # stride, padding, dilation, transposed, output_padding, groups
        self.geometry = tuple(call.args[3:9])
        self.packed: Tensor | None = None
        self.packed_adjoint: Tensor | None = None
        self.packs: Callable[[], Tensor] | None = None
        # Gives the copy of a weight that all linearizations of the network share; None: no second copy.
        self.copy: Callable[[Tensor, str, Callable[[], Tensor]], Tensor] | None = None

    @property
    def is_packed(self) -> bool:
        """Whether tangents go through oneDNN's packed convolution, with channels last."""
        return self.packed is not None or self.packs is not None

    def jvp(self, kernels: Any, tangents: Sequence[Tensor], out: Tensor | None = None) -> Sequence[Tensor]:
        (tangent,) = tangents
        packed = self.packs() if self.packs is not None else self.packed
        if packed is not None:
            return (_packed_convolution(tangent, packed, _onednn_geometry(self.geometry), out),)
        weight, folded = self.weight.to(tangent.dtype), tangent.flatten(0, 1)
        if _is_for_cudnn(folded):
            made = _cudnn_convolution(folded, weight, self.geometry, kernels.tf32)
        else:
            made = aten.convolution(folded, weight, None, *self.geometry)
        made = made.unflatten(0, (tangent.shape[0], -1))
        return (deliver(made, out),)

    def vjp(
        self,
        kernels: Any,
        cotangents: Sequence[Tensor | None],
        out: Sequence[Tensor | None] = (None,),
    ) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        if cotangent is None:
            return (None,)
        geometry = self._adjoint_geometry()
        if self.packed is not None and self.copy is not None and geometry is not None:
            if self.packed_adjoint is None:
                self.packed_adjoint = self.copy(
                    self.weight, f"adjoint {self.packed.dtype} {geometry}", self._pack_adjoint
                )
            return (_packed_convolution(cotangent, self.packed_adjoint, geometry, out[0]),)
        k = cotangent.shape[0]
        folded = cotangent.flatten(0, 1)
        if _is_for_cudnn(folded):
            weight = self.weight.to(folded.dtype)
            grad = _cudnn_convolution(folded, weight, self._transpose_geometry(), kernels.tf32)
            return (deliver(grad.unflatten(0, (k, -1)), out[0]),)
        # The backward operation reads only the shape of its input argument.
        like = folded.new_empty(()).expand(k * self.x_shape[0], *self.x_shape[1:])
        weight = self.weight.to(folded.dtype)
        grad = aten.convolution_backward(folded, like, weight, None, *self.geometry, [True, False, False])[0]
        return (deliver(grad.unflatten(0, (k, -1)), out[0]),)

    def _transpose_geometry(self) -> tuple[Any, ...]:
        """The geometry, as in `geometry`, of the (transposed) convolution that pulls cotangents back."""
        stride, padding, dilation, transposed, _, groups = self.geometry
        reached = [
            (n - 1) * s - 2 * p + d * (k - 1) + 1
            for n, s, p, d, k in zip(
                self.out_shape[2:], stride, padding, dilation, self.weight.shape[2:], strict=True
            )
        ]
        # What the convolution left over at the far end of x.
        left = [0 if transposed else n - m for n, m in zip(self.x_shape[2:], reached, strict=True)]
        return stride, padding, dilation, not transposed, left, groups

    def _pack_adjoint(self) -> Tensor:
        assert self.packed is not None
        weight = self.weight.detach().transpose(0, 1).flip(2, 3).to(self.packed.dtype)
        geometry = self._adjoint_geometry()
        assert geometry is not None
        return _pack(weight, geometry, self.out_shape)

    def _adjoint_geometry(self) -> _Geometry | None:
        """The convolution that the transpose is; None where it is none."""
        stride, padding, dilation, _, _, groups = self.geometry
        kernel = self.weight.shape[2:]
        outer = [n - 1 - p for n, p in zip(kernel, padding, strict=True)]
        if groups != 1 or set(stride) != {1} or set(dilation) != {1} or min(outer) < 0:
            return None
        return outer, stride, dilation, 1

    def flops(self, k: int) -> int:
        transposed = self.geometry[3]
        positions = self.x_shape if transposed else self.out_shape
        return 2 * k * positions[0] * positions[2:].numel() * self.weight.numel()


def _is_for_cudnn(vectors: Tensor) -> bool:
    return vectors.is_cuda and vectors.dtype == torch.float32 and vectors.dim() in (4, 5) and _cudnn()


def _cudnn() -> bool:
    return torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled


def _cudnn_convolution(vectors: Tensor, weight: Tensor, geometry: tuple[Any, ...], tf32: bool) -> Tensor:
    """A convolution whose precision is said, as aten.convolution takes it from a switch of the process."""
    stride, padding, dilation, transposed, output_padding, groups = geometry
    last = {"benchmark": False, "deterministic": True, "allow_tf32": tf32}
    if transposed:
        return aten.cudnn_convolution_transpose(
            vectors, weight, padding, output_padding, stride, dilation, groups, **last
        )
    return aten.cudnn_convolution(vectors, weight, padding, stride, dilation, groups, **last)


@rule(aten.convolution.default)
def convolution(call: Call) -> LinearMap | None:
    # An unbatched convolution reaches ATen with a batch axis already added, and an active weight or bias is
    # no score network's.
    return Convolution(call) if call.active == (0,) and not call.args[1].is_complex() else None


_Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]  # padding, stride, dilation, groups


def packable(weight: Tensor, geometry: tuple[Any, ...], dtype: torch.dtype) -> bool:
    """Whether oneDNN has the convolution with this weight, geometry as in `Convolution`, for CPU tensors of
    this dtype (float32 or bfloat16)."""
    return (
        weight.dim() == 4
        and not geometry[3]
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and hasattr(mkldnn, "_reorder_convolution_weight")
        and torch.backends.mkldnn.is_available()
        and (dtype == torch.float32 or mkldnn._is_mkldnn_bf16_supported())
    )


def pack(weight: Tensor, geometry: tuple[Any, ...], shape: torch.Size) -> Tensor:
    """The weight of a convolution of x with this shape as oneDNN wants it."""
    return _pack(weight, _onednn_geometry(geometry), shape)


def _onednn_geometry(geometry: tuple[Any, ...]) -> _Geometry:
    stride, padding, dilation, _, _, groups = geometry
    return padding, stride, dilation, groups


def _pack(weight: Tensor, geometry: _Geometry, shape: torch.Size) -> Tensor:
    return mkldnn._reorder_convolution_weight(weight, *geometry, list(shape))


def _add_convolution(*arguments: Any) -> None:
    mkldnn._convolution_pointwise_.binary(*arguments)


def _packed_convolution(vectors: Tensor, packed: Tensor, geometry: _Geometry, out: Tensor | None) -> Tensor:
    """The convolution of [K, B, C, H, W], with channels last."""
    folded = vectors.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    if out is None:
        made = mkldnn._convolution_pointwise(folded, packed, None, *geometry, "none", [], "")
        return made.unflatten(0, (vectors.shape[0], -1))
    # oneDNN writes into memory that is given where it may add to what is there.
    target = out.flatten(0, 1)
    launch(target.zero_, (target,))
    keywords: tuple[Any, ...] = ("add", None, None, [], None)
    launch(_add_convolution, (target, folded, packed), target, folded, packed, None, *geometry, *keywords)
    return out


class Linear(LinearMap):
    """y' = x' W^T over the last axis."""

    writes_jvp = writes_vjp = True

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.rows = 0

    def jvp(self, kernels: Any, tangents: Sequence[Tensor], out: Tensor | None = None) -> Sequence[Tensor]:
        weight = self.weight.to(tangents[0].dtype)  # a copy where no rounded one is kept
        return (_rows_times(tangents[0], weight.mT, out, kernels.tf32),)

    def vjp(
        self,
        kernels: Any,
        cotangents: Sequence[Tensor | None],
        out: Sequence[Tensor | None] = (None,),
    ) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        if cotangent is None:
            return (None,)
        return (_rows_times(cotangent, self.weight.conj().to(cotangent.dtype), out[0], kernels.tf32),)

    def flops(self, k: int) -> int:
        return 2 * k * self.rows * self.weight.numel()


def _rows_times(vectors: Tensor, matrix: Tensor, out: Tensor | None, tf32: bool) -> Tensor:
    """[K, ..., n] @ [n, m], as one product of all rows."""
    shape = (*vectors.shape[:-1], matrix.shape[1])
    rows = vectors.reshape(vectors.shape[:-1].numel(), vectors.shape[-1])
    if tf32 and rows.is_cuda and rows.dtype == torch.float32 and _cudnn():
        # A convolution of single pixels is a matrix product whose precision can be said.
        pixels, filters = rows[..., None, None], matrix.mT[..., None, None]
        made = aten.cudnn_convolution(pixels, filters, (0, 0), (1, 1), (1, 1), 1, False, True, True)
        return deliver(made.reshape(shape), out)
    if out is None:
        return torch.mm(rows, matrix).view(shape)
    if not out.is_contiguous():
        return out.copy_(torch.mm(rows, matrix).view(shape))
    target = out.view(rows.shape[0], shape[-1])
    launch(torch.mm, (rows, matrix, target), rows, matrix, out=target)
    return out


@rule(F.linear)
def linear(call: Call) -> LinearMap | None:
    if call.active != (0,) or call.args[1].dim() != 2:
        return None
    instruction = Linear(call.args[1])
    instruction.rows = call.args[0].shape[:-1].numel()
    return instruction


def _left_product(tangent: Tensor, right: Tensor) -> Tensor:
    """[K, ..., n, m] @ [..., m, p] where K shares the right factor."""
    if right.dim() == 2 or tangent.shape[0] == 1:
        return tangent @ right
    k, *batch, n, m = tangent.shape
    # K goes into the rows, so that the shared factor is read once.
    folded = tangent.movedim(0, -3).reshape(*batch, k * n, m) @ right
    return folded.unflatten(-2, (k, n)).movedim(-3, 0)


def _right_product(left: Tensor, tangent: Tensor) -> Tensor:
    """[..., n, m] @ [K, ..., m, p] where K shares the left factor."""
    return _left_product(tangent.mT, left.mT).mT


class MatrixProduct(LinearMap):
    """The derivative of alpha * A @ B (+ beta * C), for batched or plain matrices, in whichever operands
    carry tangents."""

    def __init__(
        self,
        a: Tensor | None,
        b: Tensor | None,
        bias: Broadcast | None,
        alpha: float,
        sizes: tuple[int, int, int, int],
    ) -> None:
        self.a = a  # the left factor, kept when the right one is active
        self.b = b  # the right factor, kept when the left one is active
        self.bias = bias
        self.alpha = alpha
        self.sizes = sizes

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        pending = list(tangents)
        shift = self.bias.jvp(kernels, [pending.pop(0)])[0] if self.bias is not None else None
        total: Tensor | None = None
        if self.b is not None:
            total = _left_product(pending.pop(0), self.b)
        if self.a is not None:
            other = _right_product(self.a, pending.pop(0))
            total = other if total is None else total + other
        if total is None:
            return (shift,)  # type: ignore[return-value]
        if self.alpha != 1:
            total = total * self.alpha
        return (total if shift is None else total + shift,)

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        count = sum(part is not None for part in (self.a, self.b, self.bias))
        if cotangent is None:
            return (None,) * count
        results: list[Tensor | None] = []
        if self.bias is not None:
            results.append(self.bias.vjp(kernels, [cotangent])[0])
        scaled = cotangent if self.alpha == 1 else cotangent * self.alpha.conjugate()
        if self.b is not None:
            results.append(_left_product(scaled, self.b.mH))
        if self.a is not None:
            results.append(_right_product(self.a.mH, scaled))
        return results

    def flops(self, k: int) -> int:
        batch, n, m, p = self.sizes
        return 2 * k * batch * n * m * p * ((self.a is not None) + (self.b is not None))


def _matrix_product(call: Call, first: int, bias: bool) -> LinearMap:
    a, b = call.args[first], call.args[first + 1]
    beta, alpha = call.kwargs.get("beta", 1), call.kwargs.get("alpha", 1)
    shift = Broadcast(call.args[0].shape, call.out.shape, beta) if bias and 0 in call.active else None
    batch = a.shape[0] if a.dim() == 3 else 1
    sizes = (batch, a.shape[-2], a.shape[-1], b.shape[-1])
    return MatrixProduct(
        a if first + 1 in call.active else None, b if first in call.active else None, shift, alpha, sizes
    )


@rule(aten.mm.default, aten.bmm.default)
def matmul(call: Call) -> LinearMap:
    return _matrix_product(call, 0, bias=False)


@rule(aten.addmm.default, aten.baddbmm.default)
def matmul_with_bias(call: Call) -> LinearMap:
    return _matrix_product(call, 1, bias=True)


class Embedding(LinearMap):
    """y' = T'[index], rows of an active table picked by constant indices along one axis."""

    def __init__(self, index: Tensor, dim: int, shape: torch.Size) -> None:
        self.index = index
        self.dim = dim % max(1, len(shape)) + 1
        self.shape = shape

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return (tangents[0].index_select(self.dim, self.index),)

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        if cotangent is None:
            return (None,)
        grad = cotangent.new_zeros(cotangent.shape[0], *self.shape)
        return (grad.index_add(self.dim, self.index, cotangent),)


@rule(aten.index_select.default)
def index_select(call: Call) -> LinearMap | None:
    x, dim, index = call.args
    return Embedding(index, dim, x.shape) if x.dim() else None
