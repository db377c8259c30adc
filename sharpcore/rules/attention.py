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

    writes_jvp = writes_vjp = True

    def __init__(self, call: Call) -> None:
        self.q, self.k, self.v, self.mask, self.scale = call.args
        self.out, self.lse = call.out
        self.active = tuple(i in call.active for i in range(3))

    def _primal(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.out, self.lse

    def jvp(self, kernels: Any, tangents: Sequence[Tensor], out: Tensor | None = None) -> Sequence[Tensor]:
        given = iter(tangents)
        dq, dk, dv = (next(given) if active else None for active in self.active)
        settings = {"mask": self.mask, "scale": self.scale, "out": out}
        return (kernels.attention_tangent(*self._primal(), dq, dk, dv, **settings),)

    def vjp(
        self,
        kernels: Any,
        cotangents: Sequence[Tensor | None],
        out: Sequence[Tensor | None] | None = None,
    ) -> Sequence[Tensor | None]:
        cotangent = cotangents[0]
        if cotangent is None:
            return (None,) * sum(self.active)
        given = iter(out or ())
        places = tuple(next(given) if active else None for active in self.active) if out else None
        settings = {"mask": self.mask, "scale": self.scale, "needed": self.active, "out": places}
        grads = kernels.attention_adjoint(*self._primal(), cotangent, **settings)
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


def causal_mask(length: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to the scores [length, keys] of a query with the key j from the end: -inf where that lies
    behind it.

    Counted from the end, all entries of a diagonal are one number in memory.
    """
    hidden = torch.full((max(0, keys - 1),), float("-inf"), dtype=dtype, device=device)
    diagonals = torch.cat([hidden, hidden.new_zeros(length)])
    return diagonals.as_strided((length, keys), (1, 1))
