"""Derivatives of a function of one tensor by PyTorch's own means, to compare linearizations with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

TensorFunction = Callable[[torch.Tensor], torch.Tensor]


def forward_mode_jvp(f: TensorFunction, x: torch.Tensor, tangents: torch.Tensor) -> torch.Tensor:
    """J v by torch.func.jvp through math attention; x [*X], tangents [K, *X] -> [K, *Y]."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.stack([torch.func.jvp(f, (x,), (tangent,))[1] for tangent in tangents]).detach()


def double_backward_jvp(f: TensorFunction, x: torch.Tensor, tangents: torch.Tensor) -> torch.Tensor:
    """J v as the derivative of u -> J^T u, which is linear; x [*X], tangents [K, *X] -> [K, *Y]."""
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        y = f(x)
        if not y.requires_grad:
            return torch.zeros(len(tangents), *y.shape, dtype=y.dtype, device=y.device)
        u = torch.zeros_like(y, requires_grad=True)
        (pulled,) = torch.autograd.grad(y, x, u, create_graph=True, materialize_grads=True)
        if not pulled.requires_grad:
            return torch.zeros(len(tangents), *y.shape, dtype=y.dtype, device=y.device)
        return torch.stack(
            [
                torch.autograd.grad(pulled, u, tangent, retain_graph=True, materialize_grads=True)[0]
                for tangent in tangents
            ]
        )


def oracle_jvp(f: TensorFunction, x: torch.Tensor, tangents: torch.Tensor) -> torch.Tensor:
    """J v by forward mode, or by the double-backward product where forward mode has no rule.

    torch.func.jvp raises on networks with attention over (B, C, H, W) tensors that it hands to `view`, and on
    writes into tensors made inside the function.
    """
    try:
        return forward_mode_jvp(f, x, tangents)
    except (RuntimeError, NotImplementedError):
        return double_backward_jvp(f, x, tangents)


def oracle_vjp(f: TensorFunction, x: torch.Tensor, cotangents: torch.Tensor) -> torch.Tensor:
    """J^T u by autograd; x [*X], cotangents [K, *Y] -> [K, *X]."""
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        y = f(x)
        if not y.requires_grad:
            return torch.zeros(len(cotangents), *x.shape, dtype=x.dtype, device=x.device)
        return torch.stack(
            [
                torch.autograd.grad(y, x, cotangent, retain_graph=True, materialize_grads=True)[0]
                for cotangent in cotangents
            ]
        )


@torch.no_grad()
def central_difference(
    f: TensorFunction, x: torch.Tensor, tangents: torch.Tensor, step: float | None = None
) -> torch.Tensor:
    """(f(x + h v) - f(x - h v)) / 2h; x [*X], tangents [K, *X] -> [K, *Y].

    The default h makes the rounding and the truncation error alike: eps^(1/3) of the dtype, relative to
    the root mean squares of x and v.
    """
    if step is None:
        step = torch.finfo(x.dtype).eps ** (1 / 3)
    differences = []
    for tangent in tangents:
        h = float(step * (1 + x.square().mean().sqrt()) / (tangent.square().mean().sqrt() + 1e-30))
        differences.append((f(x + h * tangent) - f(x - h * tangent)) / (2 * h))
    return torch.stack(differences)
