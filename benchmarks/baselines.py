"""The rivals: how PyTorch, and two curvature packages, give products with the Jacobian of a score network.

Each takes f and x and returns a function from tangents [K, *X] to products [K, *Y] (or from cotangents to
transposed ones); what it does before it returns is its set-up. Those that the tests use as oracles are
imported from there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from oracles import central_difference, double_backward_jvp, forward_mode_jvp, oracle_vjp

TensorFunction = Callable[[Tensor], Tensor]
Products = Callable[[Tensor], Tensor]

__all__ = [
    "authors_procedure",
    "autograd_vjp",
    "central_difference",
    "compiled_central_difference",
    "compiled_double_backward",
    "compiled_forward",
    "compiled_forward_mode",
    "compiled_torch_linearize",
    "compiled_vjp",
    "compiled_vmap_jvp",
    "curvlinops_adjoint",
    "curvlinops_jacobian",
    "difference",
    "double_backward",
    "double_backward_jvp",
    "flash_forward_mode",
    "forward",
    "forward_mode",
    "hessian_eigenthings",
    "oracle_vjp",
    "torch_linearize",
    "traced_double_backward",
    "traced_forward_mode",
    "traced_vmap_jvp",
    "vmap_jvp",
]


def forward(f: TensorFunction, x: Tensor) -> Callable[[], Tensor]:
    """The unit of all ratios: one evaluation without gradients through fused attention."""
    return lambda: torch.no_grad()(f)(x)


def difference(f: TensorFunction, x: Tensor) -> Products:
    """Central difference through fused attention: two forward passes a product."""
    return lambda tangents: central_difference(f, x, tangents)


def forward_mode(f: TensorFunction, x: Tensor) -> Products:
    """torch.func.jvp, one tangent after the other, through math attention: the fused one has no such rule."""
    return lambda tangents: torch.no_grad()(forward_mode_jvp)(f, x, tangents)


def double_backward(f: TensorFunction, x: Tensor) -> Products:
    """The derivative of u -> J^T u."""
    return lambda tangents: double_backward_jvp(f, x, tangents)


def autograd_vjp(f: TensorFunction, x: Tensor) -> Products:
    """J^T u by torch.autograd.grad through fused attention, with the forward pass that it needs each time."""

    def pull(cotangents: Tensor) -> Tensor:
        point = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            value = f(point)
        return torch.stack([torch.autograd.grad(value, point, u, retain_graph=True)[0] for u in cotangents])

    return pull


def vmap_jvp(f: TensorFunction, x: Tensor) -> Products:
    """All tangents in one pass that shares the primal: vmap over torch.func.jvp, math attention."""
    return _math(torch.func.vmap(lambda tangent: torch.func.jvp(f, (x,), (tangent,))[1]))


def torch_linearize(f: TensorFunction, x: Tensor) -> Products:
    """torch.func.linearize once, then its product one tangent after the other."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, product = torch.func.linearize(f, x)
    return _math(lambda tangents: torch.stack([product(tangent) for tangent in tangents]))


def _math(products: Products) -> Products:
    def run(tangents: Tensor) -> Tensor:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return products(tangents)

    return run


# -- the same under torch.compile: the first call compiles ---------------------------------------------------


def compiled_forward(f: TensorFunction, x: Tensor) -> Callable[[], Tensor]:
    """The forward pass through inductor."""
    return forward(torch.compile(f), x)


def compiled_central_difference(f: TensorFunction, x: Tensor) -> Products:
    """Central difference of the compiled network."""
    return difference(torch.compile(f), x)


def compiled_forward_mode(f: TensorFunction, x: Tensor) -> Products:
    """torch.func.jvp inside of the compiled function."""
    product = torch.compile(lambda point, tangent: torch.func.jvp(f, (point,), (tangent,))[1])
    return _math(lambda tangents: torch.stack([product(x, tangent) for tangent in tangents]))


def compiled_vmap_jvp(f: TensorFunction, x: Tensor) -> Products:
    """vmap(jvp) inside of the compiled function."""
    return _math(torch.compile(vmap_jvp(f, x)))


def traced_forward_mode(f: TensorFunction, x: Tensor) -> Products:
    """torch.func.jvp recorded by make_fx, which Dynamo need not understand then, and compiled."""
    product = _traced(lambda point, tangent: torch.func.jvp(f, (point,), (tangent,))[1])
    return _math(lambda tangents: torch.stack([product(x, tangent) for tangent in tangents]))


def traced_vmap_jvp(f: TensorFunction, x: Tensor) -> Products:
    """vmap(jvp) recorded by make_fx and compiled."""
    products = _traced(
        lambda point, tangents: torch.func.vmap(lambda v: torch.func.jvp(f, (point,), (v,))[1])(tangents)
    )
    return _math(lambda tangents: products(x, tangents))


def traced_double_backward(f: TensorFunction, x: Tensor) -> Products:
    """The derivative of u -> J^T u recorded by make_fx, both backward passes in one graph, and compiled."""

    def product(point: Tensor, tangent: Tensor) -> Tensor:
        _, pull = torch.func.vjp(f, point)
        _, push = torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(tangent))
        return push(tangent)[0]

    traced = _traced(product)
    return _math(lambda tangents: torch.stack([traced(x, tangent) for tangent in tangents]))


def _traced(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Records in its first call, and compiles what it recorded."""
    from torch.fx.experimental.proxy_tensor import make_fx

    found: list[Callable[..., Tensor]] = []

    def run(*arguments: Tensor) -> Tensor:
        if not found:
            found.append(torch.compile(make_fx(function)(*arguments)))
        return found[0](*arguments)

    return run


def compiled_torch_linearize(f: TensorFunction, x: Tensor) -> Products:
    """The product of torch.func.linearize, compiled."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, product = torch.func.linearize(f, x)
    product = torch.compile(product)
    return _math(lambda tangents: torch.stack([product(tangent) for tangent in tangents]))


def compiled_vjp(f: TensorFunction, x: Tensor) -> Products:
    """J^T u through the compiled network and its compiled backward pass."""
    return autograd_vjp(torch.compile(f), x)


def compiled_double_backward(f: TensorFunction, x: Tensor) -> Products:
    """The derivative of u -> J^T u of the compiled network."""
    return double_backward(torch.compile(f), x)


# -- packages ------------------------------------------------------------------------------------------------


def flash_forward_mode(f: TensorFunction, x: Tensor) -> Products:
    """torch.func.jvp, one tangent after the other, with jvp-flash-attention (0.14) in the place of attention.

    Its kernel takes equal numbers of queries and keys, even and at least 32, and heads of 16, 32, ..., 256:
    others are filled up with zeros, which changes nothing but the work. What it does not take, above all
    cross-attention, is math attention as in `forward_mode`.
    """
    from jvp_flash_attention.jvp_attention import JVPAttn

    usual = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        width = q.shape[-1]
        plain = not any(rest) and not any(options.values())
        if (
            not plain
            or not q.shape == k.shape == v.shape
            or q.shape[-2] < 32
            or q.shape[-2] % 2
            or width > 256
        ):
            return usual(q, k, v, *rest, **options)
        filled = max(16, 1 << (width - 1).bit_length())
        q, k, v = (F.pad(t, (0, filled - width)) for t in (q, k, v))
        # Not `attention` of the package, which torch.func.jvp takes no tangents through.
        return JVPAttn.fwd_dual(q, k, v, sm_scale=width**-0.5)[..., :width]

    def products(tangents: Tensor) -> Tensor:
        with torch.no_grad(), mock.patch.object(F, "scaled_dot_product_attention", attention):
            return forward_mode_jvp(f, x, tangents)

    return products


class Latent(nn.Module):
    """A network whose only parameter is its latent, for packages that differentiate in parameters alone."""

    def __init__(self, f: TensorFunction, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x.clone())
        self._f = f

    def forward(self, _: Tensor) -> Tensor:
        """The "data" is a placeholder with one row a sample."""
        return self._f(self.x)


def curvlinops_jacobian(f: TensorFunction, x: Tensor) -> Products:
    """curvlinops' JacobianLinearOperator in the latent: J itself, by vmap(torch.func.jvp)."""
    return _curvlinops("JacobianLinearOperator", f, x)


def curvlinops_adjoint(f: TensorFunction, x: Tensor) -> Products:
    """curvlinops' TransposedJacobianLinearOperator in the latent: J^T itself, by vmap(torch.func.vjp)."""
    return _curvlinops("TransposedJacobianLinearOperator", f, x)


def _curvlinops(name: str, f: TensorFunction, x: Tensor) -> Products:
    import curvlinops

    model, placeholder = Latent(f, x), torch.zeros(len(x), 1)
    operator = getattr(curvlinops, name)(
        model, [model.x], [(placeholder, placeholder)], check_deterministic=False, num_data=len(x)
    )

    def products(vectors: Tensor) -> Tensor:
        # Its matrices have a vector a column. Score networks map latents to latents of the same shape.
        with sdpa_kernel(SDPBackend.MATH):
            columns = operator @ vectors.flatten(1).T.contiguous()
        return columns.T.reshape(vectors.shape).detach()

    return products


class Pairing(Latent):
    """<w, f(x)> with parameters w and x; its Hessian at w = 0, in their blocks, is [[0, J], [J^T, 0]]."""

    def __init__(self, f: TensorFunction, x: Tensor) -> None:
        super().__init__(f, x)
        with torch.no_grad():
            self.w = nn.Parameter(torch.zeros_like(f(x)))

    def forward(self, _: Tensor) -> Tensor:
        return (self.w * self._f(self.x)).sum()


def hessian_eigenthings(f: TensorFunction, x: Tensor) -> Products:
    """hessian-eigenthings' HessianOperator of `Pairing`: (0, v) -> (J v, 0), by double-backward.

    The package multiplies with Hessians of scalar functions. log p is not available from a score network, but
    the Hessian of <w, f(x)> in both arguments holds J as a block, so J v is expressed exactly. The operator
    works through the other blocks beside it: it cannot be told that they give zero.
    """
    from hessian_eigenthings import HessianOperator

    model = Pairing(f, x)
    names = [name for name, _ in model.named_parameters()]
    sizes = [parameter.numel() for parameter in model.parameters()]
    operator = HessianOperator(model, [torch.zeros(len(x), 1)], lambda module, batch: module(batch))

    def product(tangent: Tensor) -> Tensor:
        blocks = {"x": tangent.flatten(), "w": torch.zeros(model.w.numel())}
        with sdpa_kernel(SDPBackend.MATH):
            result = operator.matvec(torch.cat([blocks[name] for name in names]))
        return dict(zip(names, result.split(sizes), strict=True))["w"].reshape(model.w.shape).detach()

    return lambda tangents: torch.stack([product(tangent) for tangent in tangents])


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
