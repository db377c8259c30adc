"""The rule of scaled dot-product attention, recorded as one operation before PyTorch decomposes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharpcore.rules import Call, LinearMap, rule


class Attention(LinearMap):
    """O' = P V' + P (S' - rowsum(P S')) V with S' = scale (Q' K^T + Q K'^T), for the operands that carry
    tangents."""

    def __init__(self, call: Call) -> None:
        self.q, self.k, self.v, self.mask, self.scale = call.args
        self.out, self.lse = call.out
        self.active = tuple(i in call.active for i in range(3))

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        given = iter(tangents)
        dq, dk, dv = (next(given) if active else None for active in self.active)
        return (
            kernels.attention_tangent(
                self.q, self.k, self.v, self.out, self.lse, dq, dk, dv, mask=self.mask, scale=self.scale
            ),
        )

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        cotangent = cotangents[0]
        if cotangent is None:
            return (None,) * sum(self.active)
        grads = kernels.attention_adjoint(
            self.q,
            self.k,
            self.v,
            self.out,
            self.lse,
            cotangent,
            mask=self.mask,
            scale=self.scale,
            needed=self.active,
        )
        return tuple(grad for grad in grads if grad is not None)

    def flops(self, k: int) -> int:
        rows = self.q.shape[:-1].numel()
        s_products = 2 * rows * self.k.shape[-2] * self.q.shape[-1]
        o_products = 2 * rows * self.k.shape[-2] * self.v.shape[-1]
        dq, dk, dv = self.active
        moving = dq or dk
        return s_products * (1 + k * (dq + dk)) + o_products * k * (dv + moving)


@rule("attention")
def attention(call: Call) -> LinearMap | None:
    return Attention(call) if all(position in (0, 1, 2) for position in call.active) else None


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean attention mask (True: take part) as what is added to the scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
