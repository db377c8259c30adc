"""Traces of B operators from random probes: tr A, tr A^2, tr A^3, the Frobenius norm, and differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpcore.errors import InvalidInput
from sharpcore.krylov.estimation import (
    Difference,
    Operator,
    Probed,
    check_partner,
    dot,
    length,
    mean_and_error,
)
from sharpcore.krylov.leave_one_out import TINY, directions, directions_beyond, exchangeable_error
from sharpcore.krylov.run import check_count
from sharpcore.krylov.solution import Estimate
from sharpcore.operators import CurvatureOperator

METHODS = ("xtrace", "hutch++", "hutchinson")


def trace(
    operator: Operator,
    method: str = "xtrace",
    *,
    products: int = 32,
    kind: str | None = None,
    shift: float | Sequence[float] | Tensor | None = None,
    minus: Operator | None = None,
    seed: int = 0,
    sample_ids: Sequence[int] | Tensor | None = None,
    block: int = 16,
    batched: bool | None = None,
) -> Estimate:
    """tr A_i of each of B square operators, symmetric or not, with its standard error.

    "hutchinson" is the mean of z^T A z over `products` probes (Hutchinson 1989): unbiased, error ~ ||A||_F /
    sqrt(products). "hutch++" (Meyer, Musco, Musco and Woodruff 2021, Algorithm 1) takes the trace over the
    range of a sketch exactly and probes the rest; "xtrace" (Epperly, Tropp and Webber 2024) does so with all
    probes in both roles, each left out in turn. Both gain where few eigenvalues are far from
    zero, and are exact (d unit vectors are multiplied instead) where `products` >= d.

    A score's Hessian is -1 / sigma^2 times the identity and a little near t = T: give that as `shift`. Then
    probes see only R = A - shift I, and shift d is added exactly. Without it a sketch finds no direction that
    stands out, and in Hutchinson's method normal probes waste their accuracy on the length of z (rademacher
    and sphere probes have z^T z = d, and see no difference).

    Args:
        operator: a curvature operator (B: first dimension of x), a matrix [d, d] or [B, d, d], or a
            `BatchedOperator`.
        products: vectors multiplied for each sample, at most; at least 2 ("hutchinson") or 4.
        kind: "rademacher", "normal" or "sphere" probes. Default: rademacher for hutchinson, sphere for the
            others, in which normal and sphere probes are normalized to the mean of their length beyond the
            sketch.
        shift: the multiple of the identity in A, a number or [B].
        minus: a second operator of the same shape: the trace of A - B is estimated, both multiplied with the
            same probes, so that the error is that of the difference. A common shift cancels.
        seed, sample_ids: of the probes; a sample's numbers depend on its id (default: 0 .. B - 1), not on its
            batch.
        block: vectors multiplied at once.
        batched: see `as_batched`.

    Returns:
        `Estimate` of shape [B]. Standard errors come from the spread of the probes' values, widened as
        Student's distribution asks for few of them (+-2 hold 95.4 %), plus the rounding of the products.

    Raises:
        InvalidInput: arguments do not fit. NonFiniteError: a product is not finite.
    """
    if method not in METHODS:
        raise InvalidInput(f"method: expected one of {', '.join(METHODS)}; got {method!r}")
    kind = kind or ("rademacher" if method == "hutchinson" else "sphere")
    options: dict[str, Any] = {
        "kind": kind, "seed": seed, "sample_ids": sample_ids, "shift": shift, "block": block,
        "batched": batched,
    }  # fmt: skip
    target = Probed(operator, **options) if minus is None else Difference(operator, minus, **options)
    d = target.dimension
    products = check_count("products", products, 1, None, "")
    if method != "hutchinson" and products >= d:
        value, error = _exact(target, _first)
        probes = d
    else:
        check_count("products", products, 2 if method == "hutchinson" else 4, None, f"for {method}")
        estimate = {"hutchinson": _hutchinson, "hutch++": _hutch_plus_plus, "xtrace": _xtrace}[method]
        value, error, probes = estimate(target, products)
    if target.shift is not None:
        value = value + target.shift * d
    return Estimate(value, error, probes, target.products)


def trace_power(
    operator: Operator,
    power: int,
    *,
    products: int = 32,
    kind: str = "rademacher",
    shift: float | Sequence[float] | Tensor | None = None,
    minus: Operator | None = None,
    symmetric: bool | None = None,
    seed: int = 0,
    sample_ids: Sequence[int] | Tensor | None = None,
    block: int = 16,
    batched: bool | None = None,
) -> Estimate:
    """tr A_i^2 or tr A_i^3 of each of B operators, symmetric or not, with its standard error.

    Hutchinson's mean over probes z of ||A z||^2 and of <A z, A A z> for symmetric operators, (A^T z).(A z)
    and (A^T z).(A A z) for others (z.(A A z), ... where there is no transposed product): 1, 2, 2 or 3
    products a probe. Where `products` suffice for d of them the unit vectors are taken instead: exact.

    Args:
        power: 1, 2 or 3.
        symmetric: whether A^T = A. Default: True for `Hessian` and `HessianDifference` and for matrices that
            are, False for other operators.
        minus: a second operator B: tr A^p - tr B^p is estimated (not the trace of a power of the
            difference), from the same probes; `shift` is then that of both.
        products, kind, shift, seed, sample_ids, block, batched: as in `trace`; A^p is expanded around
        `shift`.

    Returns:
        `Estimate` of shape [B]; `products` counts those with both operators.

    Raises:
        InvalidInput: arguments do not fit. NonFiniteError: a product is not finite.
    """
    power = check_count("power", power, 1, 3, "")
    products = check_count("products", products, 1, None, "")
    targets = [
        Probed(each, kind=kind, seed=seed, sample_ids=sample_ids, shift=shift, block=block, batched=batched)
        for each in ([operator] if minus is None else [operator, minus])
    ]
    first = targets[0]
    flags = [
        _is_symmetric(each) if symmetric is None else symmetric
        for each in ([operator] if minus is None else [operator, minus])
    ]
    cost = max(power if power == 1 or not flag else power - 1 for flag in flags)
    forms = [_power(power, flag) for flag in flags]
    if minus is not None:
        check_partner(first, targets[1].op)

    def paired(_: Probed, vectors: Tensor, entries: int) -> tuple[Tensor, Tensor]:
        value, size = forms[0](first, vectors, entries)
        for form, target in zip(forms[1:], targets[1:], strict=True):
            other, scale = form(target, vectors, entries)
            value, size = value - other, torch.maximum(size, scale)
        return value, size

    d, count = first.dimension, products // cost
    if count >= d:
        value, error = _exact(first, paired)
        count = d
    else:
        check_count("products", products, 2 * cost, None, f"two probes of {cost} each")
        value, error = _mean(first, count, paired)
    return Estimate(value, error, count, sum(target.products for target in targets))


def frobenius(
    operator: Operator,
    *,
    products: int = 32,
    kind: str = "rademacher",
    shift: float | Sequence[float] | Tensor | None = None,
    seed: int = 0,
    sample_ids: Sequence[int] | Tensor | None = None,
    block: int = 16,
    batched: bool | None = None,
) -> Estimate:
    """||A_i||_F of each of B operators, symmetric or not: the root of the mean of ||A z||^2 over probes.

    Where `products` >= d the unit vectors are taken instead: exact. Arguments, errors: as `trace`.

    Returns:
        `Estimate` of shape [B]; the standard error of the root is that of the mean by the delta method.
    """
    products = check_count("products", products, 1, None, "")
    target = Probed(
        operator, kind=kind, seed=seed, sample_ids=sample_ids, shift=shift, block=block, batched=batched
    )
    if products >= target.dimension:
        square, error = _exact(target, _squared_length)
        products = target.dimension
    else:
        check_count("products", products, 2, None, "probes")
        square, error = _mean(target, products, _squared_length)
    root = square.clamp_min(0).sqrt()
    # Where the square is within its own error of zero, so is the root within that of the error.
    error = torch.minimum(error / (2 * root).clamp_min(torch.finfo(torch.float64).tiny), error.sqrt())
    return Estimate(root, error, products, target.products)


# What is averaged: of vectors [K, B, d], each standing for so many entries of the identity (d for a probe, 1
# for a unit vector), the values [K, B] and the sizes of their terms, which rounding is relative to.
Form = Callable[[Probed, Tensor, int], tuple[Tensor, Tensor]]


def _first(target: Probed, vectors: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """z^T R z."""
    image = target.multiply(vectors)
    return dot(vectors, image), length(vectors) * target.size(vectors, image)


def _squared_length(target: Probed, vectors: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """||A z||^2 = shift^2 z^T z + 2 shift z^T R z + ||R z||^2, the first term with its mean for z^T z."""
    image = target.multiply(vectors)
    value = dot(image, image)
    if target.shift is not None:
        value = target.shift.square() * entries + 2 * target.shift * dot(vectors, image) + value
    return value, target.size(vectors, image).square()


def _power(power: int, symmetric: bool) -> Form:
    """The form whose mean is tr A^power."""

    def form(target: Probed, vectors: Tensor, entries: int) -> tuple[Tensor, Tensor]:
        image = target.multiply(vectors)
        if symmetric or power == 1:
            left = image
        elif target.op.has_transpose:
            left = target.multiply_transposed(vectors)
        else:
            return chain(target, vectors, image, entries)
        size, size_left = target.size(vectors, image), target.size(vectors, left)
        moments, sizes = [dot(vectors, image), dot(left, image)], [length(vectors) * size, size_left * size]
        if power == 3:
            again = target.multiply(image)
            moments.append(dot(left, again))
            sizes.append(size_left * target.size(image, again))
        return around_shift(target, moments, entries), sizes[power - 1]

    def chain(target: Probed, vectors: Tensor, image: Tensor, entries: int) -> tuple[Tensor, Tensor]:
        moments = [dot(vectors, image)]
        size = target.size(vectors, image)
        for _ in range(power - 1):
            before, image = image, target.multiply(image)
            moments.append(dot(vectors, image))
            size = target.size(before, image)
        return around_shift(target, moments, entries), length(vectors) * size

    def around_shift(target: Probed, moments: list[Tensor], entries: int) -> Tensor:
        if target.shift is None:
            return moments[power - 1]
        # Binomial coefficients of (shift I + R)^power.
        value = target.shift**power * entries
        for k, moment in enumerate(moments[:power], start=1):
            value = value + math.comb(power, k) * target.shift ** (power - k) * moment
        return value

    return form


def _is_symmetric(operator: Operator) -> bool:
    if isinstance(operator, CurvatureOperator):
        return operator.T is operator
    return isinstance(operator, Tensor) and torch.equal(operator, operator.mT)


def _mean(target: Probed, count: int, form: Form) -> tuple[Tensor, Tensor]:
    """Mean of a form over `count` probes, in blocks, and its standard error."""
    values, sizes = [], []
    for first in range(0, count, target.block):
        vectors = target.probes(first, min(target.block, count - first))
        value, size = form(target, vectors, target.dimension)
        values.append(value)
        sizes.append(size)
    return mean_and_error(torch.cat(values), target.rounding * torch.cat(sizes).mean(0))


def _exact(target: Probed, form: Form) -> tuple[Tensor, Tensor]:
    """Sum of a form over all unit vectors, and its rounding."""
    d = target.dimension
    value = torch.zeros(target.samples, dtype=torch.float64, device=target.device)
    size = value.clone()
    for first in range(0, d, target.block):
        values, sizes = form(target, target.units(first, min(target.block, d - first)), 1)
        value, size = value + values.sum(0), size + sizes.sum(0)
    return value, target.rounding * size


def _hutchinson(target: Probed, products: int) -> tuple[Tensor, Tensor, int]:
    return *_mean(target, products, _first), products


def _normalized(target: Probed, form: Tensor, square: Tensor, dimension: Tensor) -> Tensor:
    """z^T A z of probes z in a subspace of this dimension, as if of the length sqrt(dimension) that they have
    in the mean: the direction of a normal or sphere probe is uniform and independent of its length."""
    return form if target.kind == "rademacher" else form * dimension / square.clamp_min(TINY)


def _hutch_plus_plus(target: Probed, products: int) -> tuple[Tensor, Tensor, int]:
    """A third of the products each for the sketch, the trace over its range, and probes of the rest."""
    sketched = max(products // 3, 1)
    count = products - 2 * sketched
    basis, _, ranks = target.orthonormal(target.multiply(target.probes(0, sketched)))
    image = target.multiply(basis)
    inside = dot(basis, image).sum(0)
    size = target.size(basis, image).sum(0)
    rows, outside = basis.transpose(0, 1), target.dimension - ranks.to(inside)
    values, sizes = [], []
    for first in range(0, count, target.block):
        vectors = target.probes(sketched + first, min(target.block, count - first)).transpose(0, 1)
        vectors = (vectors - (vectors @ rows.mT) @ rows).transpose(0, 1)
        value, each = _first(target, vectors, 0)
        values.append(_normalized(target, value, dot(vectors, vectors), outside))
        sizes.append(each)
    floor = target.rounding * (size + torch.cat(sizes).mean(0))
    rest, error = mean_and_error(torch.cat(values), floor)
    return inside + rest, error, sketched + count


def _xtrace(target: Probed, products: int) -> tuple[Tensor, Tensor, int]:
    """The mean of k leave-one-out estimates.

    P_i = Q (I - s_i s_i^T) Q^T projects on the range of all columns but i: tr_i = tr(Q^T A Q) - s_i^T (Q^T A
    Q) s_i + z_i^T A z_i, z_i = (I - P_i) omega_i. Given the others, the direction of a normal or sphere
    probe's z_i is uniform in the complement, so that its length may be set to the mean, sqrt(d - rank P_i).
    """
    count, d = products // 2, target.dimension
    omega = target.probes(0, count)
    image = target.multiply(omega)
    basis, triangle, ranks = target.orthonormal(image)
    image_of_basis = target.multiply(basis)
    size_inside = target.size(basis, image_of_basis).sum(0)
    size_outside = length(omega) * target.size(omega, image)
    q, aq = basis.transpose(0, 1), image_of_basis.transpose(0, 1)
    inner = q @ aq.mT
    s = directions(triangle, ranks)
    onto = q @ omega.permute(1, 2, 0)
    kept = (onto - s * (s * onto).sum(1, keepdim=True)).mT
    z, az = omega.transpose(0, 1) - kept @ q, image.transpose(0, 1) - kept @ aq
    form, square = dot(z, az), dot(z, z)
    outside = d - (ranks.to(s)[:, None] - s.square().sum(1))

    def trace_along(t: Tensor) -> Tensor:
        return (t * (inner @ t)).sum(1)

    inside = inner.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) - trace_along(s)
    values = inside + _normalized(target, form, square, outside)
    change = torch.zeros(*values.shape, count, dtype=values.dtype, device=values.device)
    both = z @ aq.mT + az @ q.mT
    for i in range(count):
        # Without probe j as well, z_i regains what it has along t.
        t, _ = directions_beyond(s, i)
        along, again = (t * onto[:, :, i : i + 1]).sum(1), trace_along(t)
        without = form[:, i, None] + along * (both[:, i, None] @ t)[:, 0] + along.square() * again
        less = _normalized(
            target, without, square[:, i, None] + along.square(), outside[:, i, None] + t.square().sum(1)
        )
        change[:, i] = values[:, i, None] - (inside[:, i, None] - again + less)
    covariance = (change * change.mT).sum((1, 2)) / (count * (count - 1))
    floor = target.rounding * (size_inside + size_outside.mean(0))
    return values.mean(1), exchangeable_error(values.mT, covariance, floor), count
