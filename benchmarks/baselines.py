"""The rivals: every way in which PyTorch itself gives products with the Jacobian of a score network."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from oracles import central_difference, double_backward_jvp, forward_mode_jvp, oracle_vjp

TensorFunction = Callable[[Tensor], Tensor]

__all__ = [
    "authors_procedure",
    "central_difference",
    "double_backward_jvp",
    "forward_mode_jvp",
    "no_grad_forward",
    "oracle_vjp",
    "torch_linearize",
    "vmap_jvp",
]


@torch.no_grad()
def no_grad_forward(f: TensorFunction, x: Tensor) -> Tensor:
    """The unit of all ratios: one evaluation through fused attention."""
    return f(x)


def vmap_jvp(f: TensorFunction, x: Tensor, tangents: Tensor) -> Tensor:
    """All tangents [K, *X] in one pass that shares the primal: vmap over torch.func.jvp, math attention."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return torch.func.vmap(lambda tangent: torch.func.jvp(f, (x,), (tangent,))[1])(tangents)


def torch_linearize(f: TensorFunction, x: Tensor) -> Callable[[Tensor], Tensor]:
    """torch.func.linearize: the returned function maps tangents [K, *X] to [K, *Y], one after the other."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, product = torch.func.linearize(f, x)

    def products(tangents: Tensor) -> Tensor:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return torch.stack([product(tangent) for tangent in tangents])

    return products


def authors_procedure(
    unet: nn.Module, latent: Tensor, timestep: Tensor | int, prompt: Tensor, empty: Tensor, sigma: float
) -> tuple[Tensor, Tensor]:
    """Both scores of one prompt and one seed the way the released code of arXiv 2412.04140 goes about it.

    One guidance pair forward for s_D, one torch.func.jvp of the pair through math attention for H_D s_D, and
    one more pair forward whose result is not needed. latent [1, C, H, W], prompt and empty [1, L, D];
    returns ||s_D|| and ||H_D s_D|| in score units.
    """
    context = torch.cat([empty, prompt])

    def difference(x: Tensor) -> Tensor:
        without, conditional = unet(x.repeat(2, 1, 1, 1), timestep, context, return_dict=False)[0].chunk(2)
        return (without - conditional) / sigma

    with torch.no_grad():
        s_difference = difference(latent)
        with sdpa_kernel(SDPBackend.MATH):
            product = torch.func.jvp(difference, (latent,), (s_difference,))[1]
        difference(latent)
    return s_difference.norm(), product.norm()
