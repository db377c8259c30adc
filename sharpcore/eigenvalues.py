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
from sharpcore.krylov.operator import BatchedOperator, as_batched
from sharpcore.krylov.probes import probes
from sharpcore.operators import CurvatureOperator

METHODS = ("auto", "dense", "lanczos")
# The most entries of a state whose matrix is made: float64 matrices of it take 128 MiB a sample.
MOST_DENSE = 4096
# Up to here the whole matrix takes fewer products than block Lanczos and the probes together.
AUTO_DENSE = 1024
# Vectors multiplied at once for all samples together where the whole matrix is made.
DENSE_VECTORS = 32
# Of the random probes; latents have seeds of their own, which number the streams.
_SEED = 0
# Points of the density's grid, and the standard deviation of its smoothing in widths of the spectrum.
GRID = 256
_SMOOTHING = 1 / 100
_MARGIN = 4 * _SMOOTHING


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
    keep_eigenvalues: bool

    def method_for(self, dimension: int) -> str:
        """ "dense" or "lanczos" for states of so many entries. Raises InvalidInput for too many."""
        if self.method == "dense" and dimension > MOST_DENSE:
            raise InvalidInput(
                f"method: expected 'auto' or 'lanczos' for {dimension} entries: 'dense' is for at most "
                f"{MOST_DENSE}"
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
        row |= {"method": method, "dimension": dimension, "score_norm": norm}
        if how.condition != "difference":
            # Of a difference of scores neither is a dimension.
            variance = curvature.sigma**2
            row["flipd"] = dimension + variance * (row["trace"] + norm**2)
            row["flipd_se"] = variance * row["trace_se"]
    return rows


def _dense(
    operator: Any, curvature: Curvature, how: Numbers, check_time: Callable[[], None]
) -> list[dict[str, Any]]:
    batched = as_batched(operator.jacobian, batched=True)
    jacobians = matrices(batched, check_time)
    branches = 2 if how.condition == "difference" else 1
    rows = []
    for jacobian in jacobians:
        symmetric = (jacobian + jacobian.mT) / 2
        values, vectors = torch.linalg.eigh(symmetric)
        residuals = (symmetric @ vectors - vectors * values).norm(dim=0)
        frobenius, skew = float(jacobian.norm()), float((jacobian - jacobian.mT).norm())
        positive = values[values >= 0]
        grid = _grid(float(values[0]), float(values[-1]))
        row = {
            "result": "exact",
            "products": batched.products * branches,
            **_extremes(values[: how.k], values[-how.k :], residuals[: how.k], residuals[-how.k :]),
            "nonnegative": float(len(positive)),
            "nonnegative_fraction": len(positive) / len(values),
            "nonnegative_mass": float(positive.sum()),
            "trace": float(jacobian.diagonal().sum()),
            "frobenius": frobenius,
            "asymmetry": skew / frobenius if frobenius > 0 else 0.0,
            "density_grid": grid.tolist(),
            "density": _smoothed(values, grid).tolist(),
            "density_se": [0.0] * len(grid),
        }
        exact = ("nonnegative", "nonnegative_fraction", "nonnegative_mass", "trace", "frobenius", "asymmetry")
        row |= {f"{name}_se": 0.0 for name in exact}
        if how.keep_eigenvalues:
            row["eigenvalues"] = values.tolist()
        rows.append(row)
    return rows


def _lanczos(
    operator: Any, curvature: Curvature, how: Numbers, check_time: Callable[[], None]
) -> list[dict[str, Any]]:
    samples = len(curvature.prompts)
    # A state's probes depend on its seed alone, so that its numbers do not depend on the batch, and states of
    # different prompts at one seed have common ones.
    ids = curvature.seeds or tuple(range(samples))
    ends = block_lanczos(
        operator,
        how.k,
        "both",
        block=how.block,
        tolerance=how.tolerance,
        max_products=how.max_products,
        vectors=False,
        seed=_SEED,
        sample_ids=ids,
        batched=True,
        progress=lambda _: check_time(),
    )
    norms, products = _norms(operator.jacobian, how, ids, check_time)
    branches = 2 if how.condition == "difference" else 1
    products = branches * (products + 2 * ends.stats.products)
    rows = []
    for i in range(samples):
        found = torch.isfinite(ends.values[i])
        values, residuals = ends.values[i][found], ends.residuals[i][found]
        k = min(how.k, len(values))
        rows.append(
            {
                "result": ends.results[i].name,
                "products": products,
                **{name: float(value[i]) for name, value in norms.items()},
                **_extremes(values[:k], values[-k:], residuals[:k], residuals[-k:]),
            }
        )
    return rows


def _norms(
    operator: CurvatureOperator, how: Numbers, ids: Sequence[int], check_time: Callable[[], None]
) -> tuple[dict[str, Tensor], int]:
    """Trace, Frobenius norm and asymmetry of B Jacobians from the same random signs z, with standard errors
    [B], and how many products that took for each sample.

    E z^T J z = tr J, E ||J z||^2 = ||J||^2 and E ||(J - J^T) z||^2 = ||J - J^T||^2.
    """
    jacobian = as_batched(operator, batched=True)
    parts = []
    for first in range(0, how.probes, how.block):
        check_time()
        count = min(how.block, how.probes - first)
        z = probes(
            "rademacher",
            _SEED,
            samples=ids,
            first=first,
            count=count,
            dimension=jacobian.dimension,
            device=jacobian.device,
        )
        forward, backward = jacobian.multiply(z).double(), jacobian.multiply_transposed(z).double()
        squares = (forward.square().sum(2), (forward - backward).square().sum(2))
        parts.append(torch.stack([(z * forward).sum(2), *squares]))
    trace, square, skew = torch.cat(parts, 1).cpu()  # each [probes, B]
    n = how.probes
    frobenius = square.mean(0).sqrt()
    ratio = (skew.mean(0) / square.mean(0).clamp_min(1e-300)).sqrt()
    # Delta method for the square root of a mean, and for that of a ratio of means.
    spread = (skew - ratio.square() * square).std(0) / square.mean(0).clamp_min(1e-300)
    return {
        "trace": trace.mean(0),
        "trace_se": trace.std(0) / n**0.5,
        "frobenius": frobenius,
        "frobenius_se": square.std(0) / n**0.5 / (2 * frobenius).clamp_min(1e-300),
        "asymmetry": ratio,
        "asymmetry_se": spread / n**0.5 / (2 * ratio).clamp_min(1e-300),
    }, jacobian.products


def matrices(operator: BatchedOperator, check_time: Callable[[], None] = lambda: None) -> Tensor:
    """The whole matrices of B operators, [B, d, d] float64, by products with the d unit vectors.

    Column j of matrix i is operator i times unit vector j.
    """
    samples, dimension = operator.samples, operator.dimension
    found = torch.empty(samples, dimension, dimension, dtype=torch.float64, device=operator.device)
    count = max(1, DENSE_VECTORS // samples)
    for first in range(0, dimension, count):
        check_time()
        rows = torch.arange(first, min(first + count, dimension), device=operator.device)
        block = torch.zeros(len(rows), samples, dimension, dtype=operator.dtype, device=operator.device)
        block[torch.arange(len(rows)), :, rows] = 1
        found[:, :, rows] = operator.multiply(block).double().permute(1, 2, 0)
    return found


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


def _grid(low: float, high: float) -> Tensor:
    """Where the density is given: the spectrum and a margin in which its smoothing fades."""
    width = (high - low) or abs(high) or 1.0
    return torch.linspace(low - _MARGIN * width, high + _MARGIN * width, GRID, dtype=torch.float64)


def _smoothed(values: Tensor, grid: Tensor) -> Tensor:
    """The eigenvalues' density on the grid, smoothed with a Gaussian; it integrates to one."""
    sigma = _SMOOTHING * float(grid[-1] - grid[0]) / (1 + 2 * _MARGIN)
    exponent = -0.5 * ((grid[:, None] - values[None, :].to(grid.device)) / sigma).square()
    return exponent.exp().mean(1) / (sigma * math.sqrt(2 * math.pi))
