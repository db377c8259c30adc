"""The cpu backend: checks tensors and hands their pointers, sizes and strides to the C++ kernels."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sharpcore.backends import reference
from sharpcore.errors import InvalidInput

DTYPES = (torch.float32, torch.float64)

_extension: ModuleType | None = None
_import_error: str | None = None


def extension() -> ModuleType | None:
    """The compiled module ``sharpcore._C``, imported at the first call, or None where it cannot be.

    Raises:
        InvalidInput: the environment variable SHARPCORE_CPU_ISA asks for an instruction set that does not
            exist, or that this CPU lacks.
    """
    global _extension, _import_error
    if _extension is None and _import_error is None:
        try:
            module = importlib.import_module("sharpcore._C")
        except ImportError as error:
            _import_error = str(error)
            return None
        try:
            module.isa()
        except (ValueError, RuntimeError) as error:
            raise InvalidInput(str(error)) from error
        _extension = module
    return _extension


def why_missing() -> str:
    """A sentence that says why :func:`extension` is None and how to get it."""
    return (
        "the cpu backend needs the compiled module sharpcore._C, which cannot be imported "
        f"({_import_error}); install a C++17 compiler and then sharpcore again, with "
        "SHARPCORE_REQUIRE_EXTENSION=1 to see why a build fails"
    )


def group_norm_silu_tangent(
    tangent: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    silu: bool,
) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result is laid out as the tangent."""
    return _group_norm_silu("group_norm_silu_tangent", tangent, x, mean, rstd, weight, bias, groups, silu)


def group_norm_silu_adjoint(
    cotangent: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    silu: bool,
) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result is laid out as the cotangent."""
    return _group_norm_silu("group_norm_silu_adjoint", cotangent, x, mean, rstd, weight, bias, groups, silu)


def layer_norm_tangent(
    tangent: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, axes: int
) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result is contiguous."""
    return _layer_norm("layer_norm_tangent", tangent, x, mean, rstd, weight, axes)


def layer_norm_adjoint(
    cotangent: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, axes: int
) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result is contiguous."""
    return _layer_norm("layer_norm_adjoint", cotangent, x, mean, rstd, weight, axes)


def geglu_tangent(tangent: Tensor, projection: Tensor, approximate: str) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result is contiguous."""
    return _geglu("geglu_tangent", tangent, projection, approximate)


def geglu_adjoint(cotangent: Tensor, projection: Tensor, approximate: str) -> Tensor:
    """As its namesake in sharpcore.backends.reference; the result is contiguous."""
    return _geglu("geglu_adjoint", cotangent, projection, approximate)


def attention_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    *,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """As its namesake in sharpcore.backends.reference; [K, B, L, H, Ev] of the result is contiguous."""
    tangents = (dq, dk, dv)
    given = [t for t in tangents if t is not None]
    native = extension()
    if native is None or not _computable([q, k, v, out, lse, *given, *([] if mask is None else [mask])]):
        return reference.KERNELS["attention_tangent"](q, k, v, out, lse, dq, dk, dv, mask=mask, scale=scale)
    _check_attention(q, k, v, out, lse)
    if not given:
        raise InvalidInput("dq, dk, dv: expected at least one tangent, got None for all")
    count = given[0].shape[0]
    for name, tangent, primal in zip(("dq", "dk", "dv"), tangents, (q, k, v), strict=True):
        if tangent is not None and tangent.shape != (count, *primal.shape):
            raise InvalidInput(f"{name}: expected shape {[count, *primal.shape]}, got {list(tangent.shape)}")

    leading = q.shape[:-2]
    kept = _AttentionPrimal(q, k, v, out, lse, mask, scale)
    result = _empty_heads(q, (count, *leading, q.shape[-2], v.shape[-1]))
    if result.numel() == 0:
        return result
    operands = [None if t is None else _as_heads(t, 1) for t in (result, dq, dk, dv)]
    native.attention_tangent(
        **kept.arguments,
        **dict(zip(("result", "dq", "dk", "dv"), map(_operand, operands), strict=True)),
        count=count,
        threads=torch.get_num_threads(),
    )
    return result


def attention_adjoint(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cotangent: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As its namesake in sharpcore.backends.reference; the results lie in memory as attention_tangent's."""
    native = extension()
    if native is None or not _computable([q, k, v, out, lse, cotangent, *([] if mask is None else [mask])]):
        kernel = reference.KERNELS["attention_adjoint"]
        return kernel(q, k, v, out, lse, cotangent, mask=mask, scale=scale, needed=needed)
    _check_attention(q, k, v, out, lse)
    count = cotangent.shape[0] if cotangent.ndim else 0
    if cotangent.shape != (count, *out.shape):
        raise InvalidInput(
            f"cotangent: expected shape [K, *out.shape], out.shape = {list(out.shape)}, "
            f"got {list(cotangent.shape)}"
        )
    grads = [
        _empty_heads(q, (count, *primal.shape)) if wanted else None
        for primal, wanted in zip((q, k, v), needed, strict=True)
    ]
    if 0 in (*cotangent.shape, k.shape[-2], q.shape[-1]):
        grads = [None if grad is None else grad.zero_() for grad in grads]
    elif any(needed):
        kept = _AttentionPrimal(q, k, v, out, lse, mask, scale)
        operands = [None if t is None else _as_heads(t, 1) for t in (cotangent, *grads)]
        native.attention_adjoint(
            **kept.arguments,
            **dict(zip(("cotangent", "grad_q", "grad_k", "grad_v"), map(_operand, operands), strict=True)),
            count=count,
            threads=torch.get_num_threads(),
        )
    return grads[0], grads[1], grads[2]


KERNELS: Mapping[str, Callable[..., Any]] = {
    kernel.__name__: kernel
    for kernel in (
        attention_tangent,
        attention_adjoint,
        group_norm_silu_tangent,
        group_norm_silu_adjoint,
        layer_norm_tangent,
        layer_norm_adjoint,
        geglu_tangent,
        geglu_adjoint,
    )
}


class _AttentionPrimal:
    """The primal operands as [B, H, rows, width], kept alive, and as arguments of the kernels."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float
    ) -> None:
        if mask is not None:
            scores = (*q.shape[:-1], k.shape[-2])
            try:
                mask = mask.expand(scores)
            except RuntimeError:
                raise InvalidInput(
                    f"mask: expected a shape that broadcasts to {list(scores)}, got {list(mask.shape)}"
                ) from None
            mask = _as_heads(mask, 0, adjacent=False)
        q, k, v, out = (_as_heads(t, 0) for t in (q, k, v, out))
        lse = _as_heads(lse.unsqueeze(-1), 0, adjacent=False)
        self._alive = (q, k, v, out, lse, mask)
        self.arguments: dict[str, Any] = {
            **{name: _operand(t) for name, t in (("q", q), ("k", k), ("v", v), ("out", out))},
            "lse": lse.data_ptr(),
            "lse_strides": lse.stride()[:3],
            "mask": 0 if mask is None else mask.data_ptr(),
            "mask_strides": (0, 0, 0, 0) if mask is None else mask.stride(),
            "scale": scale,
            "float64": q.dtype == torch.float64,
            "sizes": (*q.shape[:3], k.shape[2], q.shape[3], v.shape[3]),
        }


def _as_heads(tensor: Tensor, leading: int, *, adjacent: bool = True) -> Tensor:
    """[*leading, ..., rows, width] as [*leading, B, H, rows, width]: a view if possible.

    With ``adjacent`` the entries of a row are adjacent in memory.
    """
    middle = tensor.ndim - leading - 2
    for _ in range(middle, 2):
        tensor = tensor.unsqueeze(leading)
    if middle > 2:
        tensor = tensor.flatten(leading, -4)
    return tensor if not adjacent or tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _empty_heads(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[K, ..., H, rows, width], uninitialized, of which [K, ..., rows, H, width] is contiguous."""
    if len(shape) < 4:
        return like.new_empty(shape)
    return like.new_empty((*shape[:-3], shape[-2], shape[-3], shape[-1])).transpose(-3, -2)


def _operand(tensor: Tensor | None) -> tuple[int, tuple[int, ...]]:
    """Address and strides of [B, H, rows, width] or [K, B, H, rows, width], without that of the width."""
    if tensor is None:
        return 0, (0, 0, 0, 0)
    return tensor.data_ptr(), (*((0,) if tensor.ndim == 4 else ()), *tensor.stride()[:-1])


def _check_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """Refuse shapes with which the kernels would read or write outside their tensors."""
    if q.ndim < 2:
        raise InvalidInput(f"q: expected shape [..., L, E], got {list(q.shape)}")
    leading, rows, width = q.shape[:-2], q.shape[-2], q.shape[-1]
    if k.ndim < 2 or k.shape != (*leading, k.shape[-2], width):
        raise InvalidInput(f"k: expected shape {[*leading, 'S', width]}, got {list(k.shape)}")
    if v.ndim < 2 or v.shape != (*leading, k.shape[-2], v.shape[-1]):
        raise InvalidInput(f"v: expected shape {[*leading, k.shape[-2], 'Ev']}, got {list(v.shape)}")
    if out.shape != (*leading, rows, v.shape[-1]):
        raise InvalidInput(f"out: expected shape {[*leading, rows, v.shape[-1]]}, got {list(out.shape)}")
    if lse.shape != (*leading, rows):
        raise InvalidInput(f"lse: expected shape {[*leading, rows]}, got {list(lse.shape)}")


def _group_norm_silu(
    kernel: str,
    vectors: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    silu: bool,
) -> Tensor:
    tensors = [t for t in (vectors, x, mean, rstd, weight, bias) if t is not None]
    native = extension()
    if native is None or not _computable(tensors):
        return reference.KERNELS[kernel](vectors, x, mean, rstd, weight, bias, groups, silu)
    _check_group_norm(vectors, x, mean, rstd, weight, bias, groups)

    channels_last = _is_channels_last(vectors)
    if not (channels_last or _is_channels_first(vectors)):
        vectors = vectors.contiguous()
    count, batch, channels = vectors.shape[:3]
    if channels_last:
        out = vectors.new_empty((count, batch, *vectors.shape[3:], channels)).movedim(-1, 2)
        x = x if _is_channels_last(x[None]) else x.movedim(1, -1).contiguous().movedim(-1, 1)
    else:
        out = vectors.new_empty(vectors.shape)
        x = x if _is_channels_first(x[None]) else x.contiguous()
    if out.numel() == 0:
        return out
    mean, rstd = mean.contiguous(), rstd.contiguous()
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    getattr(native, kernel)(
        out=out.data_ptr(),
        vectors=vectors.data_ptr(),
        x=x.data_ptr(),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        weight=0 if weight is None else weight.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        float64=vectors.dtype == torch.float64,
        count=count,
        batch=batch,
        channels=channels,
        positions=vectors.shape[3:].numel(),
        groups=groups,
        out_strides=out.stride()[:2],
        vector_strides=vectors.stride()[:2],
        x_stride=x.stride(0),
        channels_last=channels_last,
        silu=silu,
        threads=torch.get_num_threads(),
    )
    return out


def _layer_norm(
    kernel: str, vectors: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, axes: int
) -> Tensor:
    tensors = [t for t in (vectors, x, mean, rstd, weight) if t is not None]
    native = extension()
    if native is None or not _computable(tensors):
        return reference.KERNELS[kernel](vectors, x, mean, rstd, weight, axes)
    if not 1 <= axes <= x.ndim:
        raise InvalidInput(f"axes: expected 1 to the {x.ndim} axes of x, got {axes}")
    if vectors.shape[1:] != x.shape:
        raise InvalidInput(f"tangent: expected shape [K, *{list(x.shape)}], got {list(vectors.shape)}")
    statistics = (*x.shape[:-axes], *(1,) * axes)
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        if statistic.shape != statistics:
            raise InvalidInput(f"{name}: expected shape {list(statistics)}, got {list(statistic.shape)}")
    if weight is not None and weight.shape != x.shape[-axes:]:
        raise InvalidInput(f"weight: expected shape {list(x.shape[-axes:])}, got {list(weight.shape)}")

    out = vectors.new_empty(vectors.shape)
    if out.numel() == 0:
        return out
    # [K, B, rows, C] whose memory is [K, B, C, rows]: tokens that were an image a moment ago.
    columns = vectors.ndim == 4 and axes == 1 and not _is_dense(vectors.shape[2:], vectors.stride()[2:])
    columns = columns and _is_dense(vectors.mT.shape[2:], vectors.mT.stride()[2:])
    if not columns:
        vectors = _dense_each(vectors)
    batch = vectors.shape[1] if columns else 1
    x, mean, rstd = x.contiguous(), mean.contiguous(), rstd.contiguous()
    weight = None if weight is None else weight.contiguous()
    getattr(native, kernel)(
        out=out.data_ptr(),
        vectors=vectors.data_ptr(),
        x=x.data_ptr(),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        weight=0 if weight is None else weight.data_ptr(),
        float64=vectors.dtype == torch.float64,
        columns=columns,
        count=vectors.shape[0],
        batch=batch,
        rows=mean.numel() // batch,
        size=x.shape[-axes:].numel(),
        vector_strides=vectors.stride()[:2] if columns else (vectors.stride(0), 0),
        threads=torch.get_num_threads(),
    )
    return out


def _geglu(kernel: str, vectors: Tensor, projection: Tensor, approximate: str) -> Tensor:
    native = extension()
    if native is None or not _computable([vectors, projection]):
        return reference.KERNELS[kernel](vectors, projection, approximate)
    if approximate not in ("none", "tanh"):
        raise InvalidInput(f"approximate: expected none or tanh, got {approximate!r}")
    if projection.ndim < 1 or projection.shape[-1] % 2:
        raise InvalidInput(f"projection: expected shape [..., 2 C], got {list(projection.shape)}")
    narrow = torch.Size((*projection.shape[:-1], projection.shape[-1] // 2))
    adjoint = kernel == "geglu_adjoint"
    given, returned = (narrow, projection.shape) if adjoint else (projection.shape, narrow)
    if vectors.ndim < 1 or vectors.shape[1:] != given:
        name = "cotangent" if adjoint else "tangent"
        raise InvalidInput(f"{name}: expected shape [K, *{list(given)}], got {list(vectors.shape)}")

    out = vectors.new_empty((vectors.shape[0], *returned))
    if out.numel() == 0:
        return out
    vectors, projection = _dense_each(vectors), projection.contiguous()
    getattr(native, kernel)(
        out=out.data_ptr(),
        vectors=vectors.data_ptr(),
        projection=projection.data_ptr(),
        float64=vectors.dtype == torch.float64,
        tanh=approximate == "tanh",
        count=vectors.shape[0],
        rows=narrow[:-1].numel(),
        columns=narrow[-1],
        out_stride=out.stride(0),
        vector_stride=vectors.stride(0),
        threads=torch.get_num_threads(),
    )
    return out


def _dense_each(vectors: Tensor) -> Tensor:
    """[K, ...] of which each of the K lies in memory in this order without gaps: itself if it does."""
    return vectors if _is_dense(vectors.shape[1:], vectors.stride()[1:]) else vectors.contiguous()


def _computable(tensors: list[Tensor]) -> bool:
    """Whether the C++ kernels take these: one supported dtype, CPU memory, nothing for autograd to record."""
    dtype = tensors[0].dtype
    return (
        dtype in DTYPES
        and all(t.dtype == dtype and t.device.type == "cpu" for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def _check_group_norm(
    vectors: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
) -> None:
    """Refuse shapes with which the kernel would read or write outside its tensors."""
    if x.ndim < 2 or vectors.shape[1:] != x.shape:
        raise InvalidInput(
            f"tangent: expected shape [K, *x.shape] = [K, *{list(x.shape)}], got {list(vectors.shape)}"
        )
    batch, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        raise InvalidInput(f"groups: expected a divisor of the {channels} channels, got {groups}")
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        if statistic.shape != (batch, groups):
            raise InvalidInput(f"{name}: expected shape {[batch, groups]}, got {list(statistic.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (channels,):
            raise InvalidInput(f"{name}: expected shape {[channels]} or None, got {list(parameter.shape)}")


def _is_channels_first(vectors: Tensor) -> bool:
    """Whether each [C, *spatial] of [K, B, C, *spatial] lies in memory in this order without gaps."""
    return _is_dense(vectors.shape[2:], vectors.stride()[2:])


def _is_channels_last(vectors: Tensor) -> bool:
    """Whether each [C, *spatial] of [K, B, C, *spatial] lies in memory as [*spatial, C] without gaps."""
    shape, stride = vectors.shape, vectors.stride()
    return _is_dense((*shape[3:], shape[2]), (*stride[3:], stride[2]))


def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True
