"""The numbers of a spectrum, of B states at once: from the whole matrix, or by Krylov methods and probes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharpcore.curvature import Curvature
from sharpcore.errors import InvalidInput
from sharpcore.krylov.block_lanczos import block_lanczos
from sharpcore.krylov.dense import MOST, dense
from sharpcore.krylov.density import Density, spectral_density
from sharpcore.krylov.dimension import lhsd
from sharpcore.krylov.estimation import mean_and_error
from sharpcore.krylov.operator import BatchedOperator, as_batched
from sharpcore.krylov.probes import probes
from sharpcore.krylov.solution import Estimate
from sharpcore.operators import Hessian, HessianDifference

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
# The filter of LHSD, as in `sharpcore.krylov.lhsd`: its edge is this much of the curvature of pure noise.
LHSD_CUTOFF, LHSD_ORDER = 0.7, 4.0


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


def compute(curvature: Curvature, how: Numbers, check_time: Callable[[], None]) -> list[dict[str, Any]]:
    """The columns of `SpectrumTable` that are numbers, one dictionary a sample.

    `check_time` is called between products and may raise. Raises NonFiniteError where a product is not
    finite.
    """
    operator = curvature.operator(how.condition)
    dimension = curvature.x[0].numel()
    method = how.method_for(dimension)
    rows = (_dense if method == "dense" else _lanczos)(operator, curvature, how, check_time)
    score = curvature.unconditional_score if how.condition == "none" else curvature.score
    if how.condition == "difference":
        score = score - curvature.unconditional_score
    norms = score.double().flatten(1).norm(dim=1).tolist()
    for row, norm in zip(rows, norms, strict=True):
        for end in ("", "_se"):
            row[f"nonnegative_fraction{end}"] = row[f"nonnegative{end}"] / dimension
        row |= {"method": method, "dimension": dimension, "score_norm": norm}
        if how.condition != "difference":
            # Of a difference of scores neither is a dimension.
            variance = curvature.sigma**2
            row["flipd"] = dimension + variance * (row["trace"] + norm**2)
            row["flipd_se"] = variance * row["trace_se"]
    return rows


def _dense(
    operator: Hessian | HessianDifference, curvature: Curvature, how: Numbers, check_time: Callable[[], None]
) -> list[dict[str, Any]]:
    jacobian = as_batched(operator.jacobian, batched=True)
    block = max(1, DENSE_VECTORS // jacobian.samples)
    matrices = dense(jacobian, block=block, progress=lambda _: check_time())
    rows = []
    for matrix in matrices:
        symmetric = (matrix + matrix.mT) / 2
        values, vectors = torch.linalg.eigh(symmetric)
        residuals = (symmetric @ vectors - vectors * values).norm(dim=0)
        frobenius, skew = float(matrix.norm()), float((matrix - matrix.mT).norm())
        low, high = float(values[0]), float(values[-1])
        grid, width = _grid(low, high, _SMOOTHING)
        numbers = {
            "nonnegative": float((values >= 0).sum()),
            "nonnegative_mass": float(values.clamp_min(0).sum()),
            "trace": float(matrix.diagonal().sum()),
            "frobenius": frobenius,
            "asymmetry": skew / frobenius if frobenius > 0 else 0.0,
        }
        if how.condition != "difference":
            numbers["lhsd"] = float(hill_filter(values, LHSD_CUTOFF / curvature.sigma**2).sum())
        row = {
            "result": "exact",
            "products": jacobian.dimension * _branches(how),
            **_extremes(values[: how.k], values[-how.k :], residuals[: how.k], residuals[-how.k :]),
            **numbers,
            **{f"{name}_se": 0.0 for name in numbers},
            "density_grid": grid.tolist(),
            "density": _smoothed(values.to(grid), grid, width).tolist(),
            "density_se": [0.0] * len(grid),
        }
        if how.keep_eigenvalues:
            row["eigenvalues"] = values.tolist()
        rows.append(row)
    return rows


def _lanczos(
    operator: Hessian | HessianDifference, curvature: Curvature, how: Numbers, check_time: Callable[[], None]
) -> list[dict[str, Any]]:
    hessian, jacobian = (
        _watched(as_batched(each, batched=True), check_time) for each in (operator, operator.jacobian)
    )
    samples = hessian.samples
    # A state's probes depend on its seed alone, so that its numbers do not depend on the batch, and states of
    # different prompts at one seed have common ones.
    ids = curvature.seeds or tuple(range(samples))
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
    rest = spectral_density(
        hessian,
        probes=how.probes,
        steps=how.depth,
        deflate=ends,
        seed=_SEED,
        sample_ids=ids,
        block=how.block,
    )
    estimates = {"nonnegative": rest.count_above(0.0), "nonnegative_mass": rest.mass_above(0.0)}
    if how.condition != "difference":
        estimates["lhsd"] = lhsd(rest, curvature.sigma, cutoff=LHSD_CUTOFF, order=LHSD_ORDER)
    norms = _norms(jacobian, how, ids)
    lows, highs = ends.values.nan_to_num(nan=math.inf).amin(1), ends.values.nan_to_num(nan=-math.inf).amax(1)
    grids, widths = zip(
        *(
            _grid(low, high, max(_SMOOTHING, 1 / how.depth))
            for low, high in zip(lows.tolist(), highs.tolist(), strict=True)
        ),
        strict=True,
    )
    curves = _curves(rest, torch.stack(grids), torch.tensor(widths))
    # A product with the Hessian is one with the Jacobian and one with its transpose.
    products = _branches(how) * (2 * (ends.stats.products + rest.products) + 2 * how.probes)
    rows = []
    for i in range(samples):
        found = torch.isfinite(ends.values[i])
        values, residuals = ends.values[i][found], ends.residuals[i][found]
        k = min(how.k, len(values))
        row = {
            "result": ends.results[i].name,
            "products": products,
            **_extremes(values[:k], values[-k:], residuals[:k], residuals[-k:]),
            "density_grid": grids[i].tolist(),
            "density": curves[0][i].tolist(),
            "density_se": curves[1][i].tolist(),
        }
        for name, estimate in {**estimates, **norms}.items():
            row |= {name: float(estimate.value[i]), f"{name}_se": float(estimate.standard_error[i])}
        rows.append(row)
    return rows


def hill_filter(values: Tensor, threshold: float) -> Tensor:
    """1 / (1 + (|l| / threshold)^LHSD_ORDER): near one for eigenvalues that are small beside it."""
    return 1 / (1 + (values.abs() / threshold) ** LHSD_ORDER)


def _branches(how: Numbers) -> int:
    return 2 if how.condition == "difference" else 1


def _watched(operator: BatchedOperator, check_time: Callable[[], None]) -> BatchedOperator:
    """The operator, with a look at the time before each product."""

    def looking(multiply: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def product(block: Tensor) -> Tensor:
            check_time()
            return multiply(block)

        return product

    return BatchedOperator(
        looking(operator.multiply),
        looking(operator.multiply_transposed),
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


def _extremes(
    smallest: Tensor, largest: Tensor, smallest_residuals: Tensor, largest_residuals: Tensor
) -> dict[str, Any]:
    """Columns of the two ends, the outermost first, given ascending."""
    return {
        "smallest_eigenvalue": float(smallest[0]),
        "largest_eigenvalue": float(largest[-1]),
        "smallest": smallest.tolist(),
        "smallest_residuals": smallest_residuals.tolist(),
        "largest": largest.flip(0).tolist(),
        "largest_residuals": largest_residuals.flip(0).tolist(),
    }


def _grid(low: float, high: float, smoothing: float) -> tuple[Tensor, float]:
    """Where the density is given, the spectrum and a margin in which it fades, and its smoothing's width."""
    length = (high - low) or abs(high) or 1.0
    width = smoothing * length
    return torch.linspace(low - 4 * width, high + 4 * width, GRID, dtype=torch.float64), width


def _smoothed(values: Tensor, grid: Tensor, width: float) -> Tensor:
    """The eigenvalues' density on the grid, smoothed with a Gaussian; it integrates to one."""
    return _gaussian(grid[:, None] - values[None, :], width).mean(1)


def _curves(density: Density, grids: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """Densities [B, G] and their standard errors on a grid [B, G] for each sample, smoothed by its width."""
    device = density.nodes.device
    grids, widths = grids.to(device), widths.to(device, torch.float64)

    def near(point: Tensor) -> Callable[[Tensor], Tensor]:
        def kernel(values: Tensor) -> Tensor:
            shape = (-1, *[1] * (values.dim() - 1))
            return _gaussian(values - point.reshape(shape), widths.reshape(shape))

        return kernel

    estimates = [density.apply(near(point)) for point in grids.mT]
    values = torch.stack([estimate.value for estimate in estimates], 1)
    errors = torch.stack([estimate.standard_error for estimate in estimates], 1)
    return values / density.dimension, errors / density.dimension


def _gaussian(distances: Tensor, width: Tensor | float) -> Tensor:
    return (-0.5 * (distances / width).square()).exp() / (width * math.sqrt(2 * math.pi))
