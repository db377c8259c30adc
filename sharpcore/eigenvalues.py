"""The numbers of a spectrum, of B states at once: from the whole matrix, or by Krylov methods and probes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sharpcore.errors import InvalidInput
from sharpcore.krylov.block_lanczos import block_lanczos
from sharpcore.krylov.dense import MOST, dense
from sharpcore.krylov.density import Density, spectral_density
from sharpcore.krylov.dimension import flipd, lhsd
from sharpcore.krylov.estimation import mean_and_error
from sharpcore.krylov.operator import BatchedOperator, Multiply, as_batched
from sharpcore.krylov.probes import probes
from sharpcore.krylov.solution import Estimate
from sharpcore.operators import CurvatureOperator

METHODS = ("auto", "dense", "lanczos")
# Up to here the whole matrix takes about as many products as block Lanczos and the probes together.
AUTO_DENSE = 1024
# Vectors multiplied at once for all samples together where the whole matrix is made.
DENSE_VECTORS = 32
# Of the random probes; latents have seeds of their own, which number the samples.
_SEED = 0
# Points of the density's grid, and the standard deviation of its smoothing in widths of the spectrum.
GRID = 256
_SMOOTHING = 1 / 100


class States(Protocol):
    """What is taken of a `sharpcore.Curvature`: B states, their scores and Hessians."""

    @property
    def x(self) -> Tensor: ...

    @property
    def seeds(self) -> tuple[int, ...] | None: ...

    @property
    def sigma(self) -> float: ...

    @property
    def score(self) -> Tensor: ...

    @property
    def unconditional_score(self) -> Tensor: ...

    def operator(self, condition: str = ...) -> Symmetrized: ...


class Symmetrized(Protocol):
    """A Hessian, and the Jacobian whose symmetric part it is."""

    @property
    def jacobian(self) -> CurvatureOperator: ...


@dataclass(frozen=True)
class Numbers:
    """What is computed of each state, and how; see `sharpcore.spectrum`."""

    k: int
    method: str
    condition: str
    block: int
    tolerance: float | None
    max_products: int | None
    probes: int
    depth: int
    keep_eigenvalues: bool

    def method_for(self, dimension: int) -> str:
        """ "dense" or "lanczos" for states of so many entries. Raises InvalidInput for too many."""
        if self.method == "dense" and dimension > MOST:
            raise InvalidInput(
                f"method: expected 'auto' or 'lanczos' for {dimension} entries: 'dense' is for at most {MOST}"
            )
        if self.k > dimension:
            raise InvalidInput(f"k: expected at most the {dimension} entries of a state; got {self.k}")
        if self.method == "auto":
            return "dense" if dimension <= AUTO_DENSE else "lanczos"
        return self.method


def compute(curvature: States, how: Numbers, check_time: Callable[[], None]) -> list[dict[str, Any]]:
    """The columns of `SpectrumTable` that are numbers, one dictionary a sample.

    `check_time` is called between products and may raise. Raises NonFiniteError where a product is not
    finite.
    """
    operator = curvature.operator(how.condition)
    dimension = curvature.x[0].numel()
    method = how.method_for(dimension)
    density, estimates, rows = (_dense if method == "dense" else _lanczos)(
        operator, curvature, how, check_time
    )
    score = curvature.unconditional_score if how.condition == "none" else curvature.score
    if how.condition == "difference":
        score = score - curvature.unconditional_score
    norms = torch.linalg.vector_norm(score.double().flatten(1), dim=1)
    count = density.count_above(0.0)
    estimates |= {
        "nonnegative": count,
        "nonnegative_fraction": replace(
            count, value=count.value / dimension, standard_error=count.standard_error / dimension
        ),
        "nonnegative_mass": density.mass_above(0.0),
    }
    if how.condition != "difference":
        # Of a difference of scores neither is a dimension.
        estimates["flipd"] = flipd(estimates["trace"], norms.square(), curvature.sigma, dimension)
        estimates["lhsd"] = lhsd(density, curvature.sigma)
    for i, row in enumerate(rows):
        row |= {"method": method, "dimension": dimension, "score_norm": float(norms[i])}
        for name, estimate in estimates.items():
            row |= {name: float(estimate.value[i]), f"{name}_se": float(estimate.standard_error[i])}
    return rows


# The density of B states, estimates of sums that it does not give, and the other columns.
_Found = tuple[Density, dict[str, Estimate], list[dict[str, Any]]]


def _dense(operator: Any, curvature: States, how: Numbers, check_time: Callable[[], None]) -> _Found:
    jacobian = as_batched(operator.jacobian, batched=True)
    block = max(1, DENSE_VECTORS // jacobian.samples)
    pairs, norms = [], []
    for matrix in dense(jacobian, block=block, progress=lambda _: check_time()):
        symmetric = (matrix + matrix.mT) / 2
        values, vectors = torch.linalg.eigh(symmetric)
        pairs.append(torch.stack([values, (symmetric @ vectors - vectors * values).norm(dim=0)]))
        norms.append(torch.stack([matrix.diagonal().sum(), matrix.norm(), (matrix - matrix.mT).norm()]))
    values, residuals = torch.stack(pairs, 1)
    trace, frobenius, skew = torch.stack(norms, 1)
    density, zero = Density.of(values), torch.zeros_like(trace)
    asymmetry = skew / frobenius.clamp_min(torch.finfo(skew.dtype).tiny)
    exact = {
        name: Estimate(value, zero, 0, 0)
        for name, value in (("trace", trace), ("frobenius", frobenius), ("asymmetry", asymmetry))
    }
    rows = _rows(density, values, residuals, how, _SMOOTHING)
    for row, every in zip(rows, values, strict=True):
        row |= {"result": "exact", "products": jacobian.dimension * _branches(how)}
        if how.keep_eigenvalues:
            row["eigenvalues"] = every.tolist()
    return density, exact, rows


def _lanczos(operator: Any, curvature: States, how: Numbers, check_time: Callable[[], None]) -> _Found:
    hessian, jacobian = (
        _watched(as_batched(each, batched=True), check_time) for each in (operator, operator.jacobian)
    )
    # A state's probes depend on its seed alone, so that its numbers do not depend on the batch, and states of
    # different prompts at one seed have common ones.
    ids = curvature.seeds or tuple(range(hessian.samples))
    ends = block_lanczos(
        hessian,
        how.k,
        "both",
        block=how.block,
        tolerance=how.tolerance,
        max_products=how.max_products,
        seed=_SEED,
        sample_ids=ids,
    )
    # What block Lanczos has found is taken out of the probes and counted exactly.
    density = spectral_density(
        hessian,
        probes=how.probes,
        steps=how.depth,
        deflate=ends,
        seed=_SEED,
        sample_ids=ids,
        block=how.block,
    )
    norms = _norms(jacobian, how, ids)
    # A product with the Hessian is one with the Jacobian and one with its transpose.
    products = _branches(how) * (2 * (ends.stats.products + density.products) + 2 * how.probes)
    rows = _rows(density, ends.values, ends.residuals, how, max(_SMOOTHING, 1 / how.depth))
    for row, result in zip(rows, ends.results, strict=True):
        row |= {"result": result.name, "products": products}
    return density, norms, rows


def _branches(how: Numbers) -> int:
    return 2 if how.condition == "difference" else 1


def _watched(operator: BatchedOperator, check_time: Callable[[], None]) -> BatchedOperator:
    """The operator, with a look at the time before each product."""

    def looking(multiply: Multiply) -> Multiply:
        def product(block: Tensor) -> Tensor:
            check_time()
            return multiply(block)

        return product

    # The products as they are: they are searched for NaN once, by the operator that is returned.
    transposed = operator._multiply_transposed
    return BatchedOperator(
        looking(operator._multiply),
        None if transposed is None else looking(transposed),
        samples=operator.samples,
        dimension=operator.dimension,
        dtype=operator.dtype,
        device=operator.device,
        sample_shape=operator.sample_shape,
        rounding=operator.rounding,
        name=operator.name,
    )


def _norms(jacobian: BatchedOperator, how: Numbers, ids: Sequence[int]) -> dict[str, Estimate]:
    """Trace, Frobenius norm and asymmetry of B Jacobians, all from the same random signs z.

    E z^T J z = tr J, E ||J z||^2 = ||J||^2 and E ||(J - J^T) z||^2 = ||J - J^T||^2. The spectrum of a score
    network is flat but for its ends: on the shipped model XTrace with as many products has about twice the
    standard error of this mean, with the analytic -1 / sigma^2 taken off first or not.
    """
    parts = []
    for first in range(0, how.probes, how.block):
        z = probes(
            "rademacher",
            _SEED,
            samples=ids,
            first=first,
            count=min(how.block, how.probes - first),
            dimension=jacobian.dimension,
            device=jacobian.device,
        )
        forward, backward = jacobian.multiply(z).double(), jacobian.multiply_transposed(z).double()
        squares = (forward.square().sum(2), (forward - backward).square().sum(2))
        parts.append(torch.stack([(z * forward).sum(2), *squares]))
    trace, square, skew = torch.cat(parts, 1)  # each [probes, B]
    tiny = torch.finfo(torch.float64).tiny
    size = square.mean(0).clamp_min(tiny)
    frobenius, ratio = square.mean(0).sqrt(), (skew.mean(0) / size).sqrt()
    zero = torch.zeros_like(frobenius)
    # The delta method for the square root of a mean, and for that of a ratio of means.
    found = {
        "trace": mean_and_error(trace, zero),
        "frobenius": (frobenius, mean_and_error(square, zero)[1] / (2 * frobenius).clamp_min(tiny)),
        "asymmetry": (
            ratio,
            mean_and_error(skew - ratio.square() * square, zero)[1] / size / (2 * ratio).clamp_min(tiny),
        ),
    }
    return {name: Estimate(*pair, how.probes, jacobian.products) for name, pair in found.items()}


def _rows(
    density: Density, values: Tensor, residuals: Tensor, how: Numbers, smoothing: float
) -> list[dict[str, Any]]:
    """Columns of the two ends, the outermost first, from ascending eigenvalues [B, n] (NaN: not found) with
    their residuals, and of the density, smoothed by a share of the spectrum's length."""
    grids, widths, rows = [], [], []
    for found, off in zip(values, residuals, strict=True):
        there = torch.isfinite(found)
        found, off = found[there], off[there]
        # None is of both ends.
        low, high = min(how.k, (len(found) + 1) // 2), max(len(found) - how.k, (len(found) + 1) // 2)
        rows.append(
            {
                "smallest_eigenvalue": float(found[0]),
                "largest_eigenvalue": float(found[-1]),
                "smallest": found[:low].tolist(),
                "smallest_residuals": off[:low].tolist(),
                "largest": found[high:].flip(0).tolist(),
                "largest_residuals": off[high:].flip(0).tolist(),
            }
        )
        grid, width = _grid(float(found[0]), float(found[-1]), smoothing)
        grids.append(grid)
        widths.append(width)
    curve = density.curve(torch.stack(grids), torch.tensor(widths, dtype=torch.float64))
    for i, row in enumerate(rows):
        row["density_grid"] = grids[i].tolist()
        row["density"], row["density_se"] = curve.density[i].tolist(), curve.standard_error[i].tolist()
    return rows


def _grid(low: float, high: float, smoothing: float) -> tuple[Tensor, float]:
    """Where the density is given, the spectrum and a margin in which it fades, and its smoothing's width."""
    length = (high - low) or abs(high) or 1.0
    width = smoothing * length
    return torch.linspace(low - 4 * width, high + 4 * width, GRID, dtype=torch.float64), width
