"""The documented slow way for operations without a rule: PyTorch's own backward formula, differentiated once
more for jvp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharpcore.errors import UnsupportedOperation
from sharpcore.rules import Call, LinearMap


def _tensors(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [part for part in out if isinstance(part, Tensor)]


class AutogradFallback(LinearMap):
    """The derivative of one operation by autograd, one tangent at a time.

    The backward pass u -> J^T u is linear in u, so its own backward pass maps v to J v. Unlike forward mode
    this keeps no process-wide level, so several threads may use it at once.
    """

    def __init__(self, call: Call) -> None:
        self.op, self.args, self.kwargs, self.active = call.op, call.args, call.kwargs, call.active
        self.outputs = [
            i for i, out in enumerate(_tensors(call.out)) if out.is_floating_point() or out.is_complex()
        ]
        self.like = [out.new_zeros(()).expand(out.shape) for out in _tensors(call.out)]

    def residuals(self) -> list[tuple[str, Tensor]]:
        flat = [part for arg in self.args for part in (arg if isinstance(arg, (list, tuple)) else [arg])]
        return [(f"args[{i}]", part) for i, part in enumerate(flat) if isinstance(part, Tensor)]

    def _evaluate(self) -> tuple[list[Tensor], list[Tensor]]:
        """Leaves for the active operands and the differentiable outputs, with their graph."""
        args: list[Any] = [list(arg) if isinstance(arg, (list, tuple)) else arg for arg in self.args]
        leaves = []
        for position in self.active:
            if isinstance(position, int):
                leaf = args[position] = args[position].detach().clone().requires_grad_()
            else:
                leaf = args[position[0]][position[1]].detach().clone().requires_grad_()
                args[position[0]][position[1]] = leaf
            leaves.append(leaf)
        outputs = _tensors(self.op(*args, **self.kwargs))
        return leaves, [outputs[i] for i in self.outputs]

    def vjp(self, kernels: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        # Norms hand over the cotangent of their first output alone.
        given = dict(enumerate(cotangents))
        present = [(slot, given[i]) for slot, i in enumerate(self.outputs) if given.get(i) is not None]
        if not present:
            return (None,) * len(self.active)
        rows = []
        with torch.enable_grad():
            leaves, outputs = self._evaluate()
            for k in range(present[0][1].shape[0]):  # type: ignore[union-attr]
                rows.append(self._backward(leaves, outputs, present, k))
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    @staticmethod
    def _backward(leaves: list[Tensor], outputs: list[Tensor], present: list[Any], k: int) -> list[Tensor]:
        # An output without a graph does not depend on the operands here: it adds nothing.
        pairs = [(outputs[slot], cotangent[k]) for slot, cotangent in present if outputs[slot].requires_grad]
        if not pairs:
            return [torch.zeros_like(leaf) for leaf in leaves]
        grads = torch.autograd.grad(
            [output for output, _ in pairs],
            leaves,
            [cotangent for _, cotangent in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)]

    def jvp(self, kernels: Any, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        results: list[list[Tensor]] = [[] for _ in self.outputs]
        with torch.enable_grad():
            leaves, outputs = self._evaluate()
            for slot, output in enumerate(outputs):
                if not output.requires_grad:
                    results[slot] = [torch.zeros_like(output)] * tangents[0].shape[0]
                    continue
                probe = torch.zeros_like(output, requires_grad=True)
                pulled = torch.autograd.grad(output, leaves, probe, create_graph=True, allow_unused=True)
                pairs = [
                    (grad, tangent)
                    for grad, tangent in zip(pulled, tangents, strict=True)
                    if grad is not None and grad.requires_grad
                ]
                for k in range(tangents[0].shape[0]):
                    if pairs:
                        (pushed,) = torch.autograd.grad(
                            [grad for grad, _ in pairs],
                            probe,
                            [tangent[k] for _, tangent in pairs],
                            retain_graph=True,
                        )
                    else:
                        pushed = torch.zeros_like(output)
                    results[slot].append(pushed)
        pushed_outputs = {i: torch.stack(results[slot]) for slot, i in enumerate(self.outputs)}
        k = tangents[0].shape[0]
        return [
            pushed_outputs[i].detach() if i in pushed_outputs else like.expand(k, *like.shape)
            for i, like in enumerate(self.like)
        ]


def fallback(call: Call, where: str) -> LinearMap:
    """The autograd derivative of a call; raises UnsupportedOperation, naming it, when PyTorch has no formula
    for it either.

    Only PyTorch's own operations are taken: a custom operation without a registered derivative would silently
    give zero.
    """
    namespace = getattr(call.op, "namespace", None)
    if namespace not in ("aten", "prims") and not getattr(call.op, "__module__", "").startswith("sharpcore."):
        raise UnsupportedOperation(f"no derivative is known for {call.op} {where}")
    instruction = AutogradFallback(call)
    try:
        tangents = [torch.zeros_like(call.argument(position)).unsqueeze(0) for position in call.active]
        pushed = instruction.jvp(None, tangents)
        instruction.vjp(None, [torch.zeros_like(p) for p in pushed])
    except (RuntimeError, TypeError) as error:
        raise UnsupportedOperation(
            f"no derivative is known for {call.op} {where}; PyTorch's own formula failed too: {error}"
        ) from error
    return instruction
