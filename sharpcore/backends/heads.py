"""Attention's operands as [B, H, rows, width], whatever their leading axes, and what their shapes must be."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sharpcore.errors import InvalidInput


def is_viewable(tensor: Tensor, leading: int, *, adjacent: bool = True) -> bool:
    """Whether :func:`as_heads` gives a view."""
    shape, stride = tensor.shape[leading:-3], tensor.stride()[leading:-3]
    merges = all(
        size == 1 or outer == size * inner
        for size, inner, outer in zip(shape[1:], stride[1:], stride[:-1], strict=True)
    )
    return merges and (not adjacent or tensor.stride(-1) == 1 or tensor.shape[-1] == 1)


def as_heads(tensor: Tensor, leading: int, *, adjacent: bool = True) -> Tensor:
    """[*leading, ..., rows, width] as [*leading, B, H, rows, width]: a view if possible.

    With ``adjacent`` the entries of a row are adjacent in memory.
    """
    middle = tensor.ndim - leading - 2
    for _ in range(middle, 2):
        tensor = tensor.unsqueeze(leading)
    if middle > 2:
        tensor = tensor.flatten(leading, -4)
    return tensor if not adjacent or tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def empty_heads(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[K, ..., H, rows, width], uninitialized, of which [K, ..., rows, H, width] is contiguous."""
    if len(shape) < 4:
        return like.new_empty(shape)
    return like.new_empty((*shape[:-3], shape[-2], shape[-3], shape[-1])).transpose(-3, -2)


def results(out: Tensor | None, like: Tensor, shape: tuple[int, ...], leading: int = 0) -> Tensor:
    """What the kernel writes: `out` where it can."""
    if out is not None and is_viewable(out, leading):
        return out
    return empty_heads(like, shape)


def present(*tensors: Tensor | None) -> list[Tensor]:
    """Those that are not None."""
    return [t for t in tensors if t is not None]


def expanded_mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The mask as [B, H, L, S], without a copy. Raises InvalidInput where it does not broadcast."""
    scores = (*q.shape[:-1], k.shape[-2])
    try:
        mask = mask.expand(scores)
    except RuntimeError:
        raise InvalidInput(
            f"mask: expected a shape that broadcasts to {list(scores)}, got {list(mask.shape)}"
        ) from None
    return as_heads(mask, 0, adjacent=False)


def check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse shapes with which a kernel would read outside its tensors."""
    if q.ndim < 2:
        raise InvalidInput(f"q: expected shape [..., L, E], got {list(q.shape)}")
    leading, width = q.shape[:-2], q.shape[-1]
    if k.ndim < 2 or k.shape != (*leading, k.shape[-2], width):
        raise InvalidInput(f"k: expected shape {[*leading, 'S', width]}, got {list(k.shape)}")
    if v.ndim < 2 or v.shape != (*leading, k.shape[-2], v.shape[-1]):
        raise InvalidInput(f"v: expected shape {[*leading, k.shape[-2], 'Ev']}, got {list(v.shape)}")


def check_primal_results(q: Tensor, v: Tensor, o: Tensor, lse: Tensor) -> None:
    """Refuse other shapes than those of `attention_forward`'s results."""
    if o.shape != (*q.shape[:-1], v.shape[-1]):
        raise InvalidInput(f"o: expected shape {[*q.shape[:-1], v.shape[-1]]}, got {list(o.shape)}")
    if lse.shape != q.shape[:-1]:
        raise InvalidInput(f"lse: expected shape {list(q.shape[:-1])}, got {list(lse.shape)}")


def check_tangents(tangents: Sequence[Tensor | None], primals: Sequence[Tensor]) -> int:
    """K of the tangents of q, k, v. Raises InvalidInput for none at all, or another shape than [K, ...]."""
    given = present(*tangents)
    if not given:
        raise InvalidInput("dq, dk, dv: expected at least one tangent, got None for all")
    count = given[0].shape[0]
    for name, tangent, primal in zip(("dq", "dk", "dv"), tangents, primals, strict=True):
        if tangent is not None and tangent.shape != (count, *primal.shape):
            raise InvalidInput(f"{name}: expected shape {[count, *primal.shape]}, got {list(tangent.shape)}")
    return count


def check_cotangent(cotangent: Tensor, o: Tensor) -> int:
    """K of the cotangents of the output. Raises InvalidInput for another shape than [K, *o.shape]."""
    count = cotangent.shape[0] if cotangent.ndim else 0
    if cotangent.shape != (count, *o.shape):
        raise InvalidInput(
            f"cotangent: expected shape [K, *o.shape], o.shape = {list(o.shape)}, got {list(cotangent.shape)}"
        )
    return count
