"""Diagonals of B operators from random probes, with a standard error of every entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharpcore.errors import InvalidInput
from sharpcore.krylov.estimation import Difference, Operator, Probed, student
from sharpcore.krylov.leave_one_out import directions, directions_beyond, exchangeable_error
from sharpcore.krylov.run import check_count
from sharpcore.krylov.solution import Estimate

METHODS = ("xdiag", "hutchinson")


def diagonal(
    operator: Operator,
    method: str = "xdiag",
    *,
    products: int = 32,
    shift: float | Sequence[float] | Tensor | None = None,
    minus: Operator | None = None,
    seed: int = 0,
    sample_ids: Sequence[int] | Tensor | None = None,
    block: int = 16,
    batched: bool | None = None,
) -> Estimate:
    """The diagonal of each of B square operators, symmetric or not, with a standard error for each entry.

    "hutchinson" is the mean of z * (A z) over `products` rademacher probes (Bekas, Kokiopoulou and Saad
    2007): the variance of entry i is the sum of the squares beside it in row i. "xdiag" (Epperly, Tropp and
    Webber 2024, section 2.4) takes the diagonal of a sketch's range exactly and probes the rest, all probes
    in both roles, each left out in turn; half its products are transposed ones. It gains where few
    eigenvalues are far from zero, and is exact (d unit vectors are multiplied instead) where `products` >=
    d.

    Args:
        products: vectors multiplied for each sample, at most; at least 2 ("hutchinson") or 4.
        shift: the multiple of the identity in A, a number or [B], as in `trace`: a sketch of the rest finds
            what stands out. Hutchinson's method needs none, as z * z = 1.
        minus: a second operator of the same shape: the diagonal of A - B, both multiplied with the same
            probes.
        operator, seed, sample_ids, block, batched: as in `trace`.

    Returns:
        `Estimate` of shape [B, *sample_shape].

    Raises:
        InvalidInput: arguments do not fit; xdiag of an operator without transposed product.
        NonFiniteError: a product is not finite.
    """
    if method not in METHODS:
        raise InvalidInput(f"method: expected one of {', '.join(METHODS)}; got {method!r}")
    options: dict[str, Any] = {
        "kind": "rademacher", "seed": seed, "sample_ids": sample_ids, "shift": shift, "block": block,
        "batched": batched,
    }  # fmt: skip
    target = Probed(operator, **options) if minus is None else Difference(operator, minus, **options)
    products = check_count("products", products, 1, None, "")
    if method == "xdiag" and products >= target.dimension:
        value, error = _exact(target)
        probes = target.dimension
    else:
        check_count("products", products, 2 if method == "hutchinson" else 4, None, f"for {method}")
        value, error, probes = (_hutchinson if method == "hutchinson" else _xdiag)(target, products)
    if target.shift is not None:
        value = value + target.shift[:, None]
    shape = (target.samples, *target.op.sample_shape)
    return Estimate(value.reshape(shape), error.reshape(shape), probes, target.products)


def _entries(target: Probed, image: Tensor) -> Tensor:
    """Sizes of the entries of A z, |R z| + |shift|, which their rounding is relative to."""
    return image.abs() if target.shift is None else image.abs() + target.shift.abs()[:, None]


def _exact(target: Probed) -> tuple[Tensor, Tensor]:
    d = target.dimension
    value = torch.zeros(target.samples, d, dtype=torch.float64, device=target.device)
    for first in range(0, d, target.block):
        count = min(target.block, d - first)
        image = target.multiply(target.units(first, count))
        value[:, first : first + count] = image[:, :, first : first + count].diagonal(dim1=0, dim2=2)
    return value, target.rounding * _entries(target, value)


def _hutchinson(target: Probed, products: int) -> tuple[Tensor, Tensor, int]:
    """Mean of z * (R z) and its standard error, of which only two sums are kept."""
    shape = (target.samples, target.dimension)
    mean = torch.zeros(shape, dtype=torch.float64, device=target.device)
    spread, size = torch.zeros_like(mean), torch.zeros_like(mean)
    for first in range(0, products, target.block):
        vectors = target.probes(first, min(target.block, products - first))
        image = target.multiply(vectors)
        size += _entries(target, image).sum(0)
        values = vectors * image
        # Sums of squares around the running mean (Chan, Golub and LeVeque 1983).
        count, part = len(values), values.mean(0)
        spread += (values - part).square().sum(0) + (part - mean).square() * (first * count / (first + count))
        mean += (part - mean) * (count / (first + count))
    error = (spread / (products * (products - 1))).sqrt() * student(products)
    return mean, torch.hypot(error, target.rounding * size / products), products


def _xdiag(target: Probed, products: int) -> tuple[Tensor, Tensor, int]:
    """The mean of k leave-one-out estimates.

    With P_i = Q (I - s_i s_i^T) Q^T, estimate i is diag(P_i A) + omega_i * (I - P_i) A omega_i, and (I - P_i)
    A omega_i = Q s_i (s_i^T R e_i).
    """
    count = products // 2
    omega = target.probes(0, count)
    basis, triangle, ranks = target.orthonormal(target.multiply(omega))
    q = basis.transpose(0, 1)
    aq = target.multiply_transposed(basis).transpose(0, 1)
    s = directions(triangle, ranks)
    beyond, pull = s.mT @ q, (s * triangle).sum(1)
    residual = beyond * pull[:, :, None]
    signs = omega.transpose(0, 1)
    values = (q * aq).sum(1, keepdim=True) - beyond * (s.mT @ aq) + signs * residual

    def change(t: Tensor, signs: Tensor, columns: Tensor) -> Tensor:
        """What the estimates with these signs and columns of R lose without the directions t."""
        along = t.mT @ q
        return along * (t.mT @ aq - signs * (t * columns).sum(1)[:, :, None])

    covariance = torch.zeros_like(values[:, 0])
    for i in range(count):
        of_i, of_others = directions_beyond(s, i)
        here = change(of_i, signs[:, i : i + 1], triangle[:, :, i : i + 1])
        covariance += (here * change(of_others, signs, triangle)).sum(1)
    covariance /= count * (count - 1)
    size = (basis.abs() * _entries(target, aq.transpose(0, 1))).sum(0) + residual.abs().mean(1)
    return (
        values.mean(1),
        exchangeable_error(values.transpose(0, 1), covariance, target.rounding * size),
        count,
    )
