"""Whole matrices of B operators by products with all unit vectors: the ground truth of the other solvers."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from sharpcore.errors import InvalidInput
from sharpcore.krylov.operator import BatchedOperator, as_batched, precision_defaults
from sharpcore.krylov.run import check_count
from sharpcore.krylov.solution import Result, Solution, Stats
from sharpcore.operators import CurvatureOperator

#: The most entries of a sample whose matrix is made: in float64 it takes 128 MiB.
MOST = 4096
# Vectors multiplied at once for all samples together: enough to fill a processor, few enough to fit its
# memory.
_VECTORS = 32


def dense(
    operator: CurvatureOperator | BatchedOperator | Tensor,
    *,
    block: int | None = None,
    most: int = MOST,
    batched: bool | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """The matrices [B, d, d] float64 of B operators on d entries each; column j is A times unit vector j.

    `block` vectors are multiplied at once for each sample (default: 32 for all samples together); `progress`
    is called with the columns done. Costs d products. Raises InvalidInput where d > `most`, NonFiniteError
    where a product is NaN or infinite.
    """
    return _matrices(as_batched(operator, batched), block, most, progress)


def eigh(
    operator: CurvatureOperator | BatchedOperator | Tensor,
    *,
    block: int | None = None,
    most: int = MOST,
    batched: bool | None = None,
    symmetry_tolerance: float | None = None,
) -> Solution:
    """All eigenpairs of each of B symmetric operators, by LAPACK from their whole matrices.

    Returns a `Solution`: values [B, d] ascending, vectors [B, d, *sample_shape], residuals ||A v - l v|| with
    the matrix as it is; `stats.asymmetry` is exactly ||A - A^T|| / ||A||. Raises InvalidInput for d > `most`,
    and for an asymmetry above `symmetry_tolerance` (default: 1e-8, 1e-3 or 0.1 by the precision of the
    products): take `Hessian`, or `eigenvalues` for the Jacobian as it is.
    """
    began = time.perf_counter()
    op = as_batched(operator, batched)
    matrices = _matrices(op, block, most, None)
    asymmetry = asymmetries(matrices)
    if symmetry_tolerance is None:
        symmetry_tolerance = precision_defaults(op.rounding)[1]
    if float(asymmetry.max()) > symmetry_tolerance:
        raise InvalidInput(
            f"operator: expected a symmetric one; ||A - A^T|| / ||A|| of {op.name} is "
            f"{float(asymmetry.max()):.2g} (allowed: {symmetry_tolerance:.2g}). Take the symmetric part, "
            "Hessian(...), or `eigenvalues` for the Jacobian as it is"
        )
    values, vectors = torch.linalg.eigh((matrices + matrices.mT) / 2)
    residuals = torch.linalg.vector_norm(matrices @ vectors - vectors * values[:, None, :], dim=1)
    rows = vectors.mT.contiguous()
    zeros = torch.zeros(op.samples, dtype=torch.int64)
    stats = Stats(
        products=op.products,
        steps=op.calls,
        restarts=0,
        norm=values.abs().amax(1).cpu(),
        asymmetry=asymmetry,
        deflated=zeros,
        breakdowns=zeros,
        seconds=time.perf_counter() - began,
        operator_seconds=op.seconds,
    )
    shaped = rows.reshape(op.samples, op.dimension, *op.sample_shape)
    return Solution(values, shaped, residuals, Result.converged, (Result.converged,) * op.samples, stats)


def eigenvalues(
    operator: CurvatureOperator | BatchedOperator | Tensor,
    *,
    block: int | None = None,
    most: int = MOST,
    batched: bool | None = None,
) -> Tensor:
    """All eigenvalues [B, d] complex128 of each of B operators as they are, by real part ascending.

    From the whole matrices, by LAPACK. Raises InvalidInput where d > `most`.
    """
    values = torch.linalg.eigvals(_matrices(as_batched(operator, batched), block, most, None))
    first = values.imag.argsort(dim=1, stable=True)
    values = values.gather(1, first)
    return values.gather(1, values.real.argsort(dim=1, stable=True))


def asymmetries(matrices: Tensor) -> Tensor:
    """||A - A^T||_F / ||A||_F of matrices [B, d, d], [B] on the CPU; 0 for A = 0."""
    skew = torch.linalg.matrix_norm(matrices - matrices.mT)
    return (skew / torch.linalg.matrix_norm(matrices).clamp_min(torch.finfo(matrices.dtype).tiny)).cpu()


def _matrices(
    op: BatchedOperator, block: int | None, most: int, progress: Callable[[int], None] | None
) -> Tensor:
    samples, dimension = op.samples, op.dimension
    most = check_count("most", most, 1, None, "")
    if dimension > most:
        size = samples * dimension**2 * 8 / 2**30
        raise InvalidInput(
            f"operator: expected at most {most} entries a sample, got {dimension}: its matrix would take "
            f"{dimension} products and {size:.1f} GiB. Take block_lanczos for the ends of the spectrum and "
            "spectral_density for the rest, or raise `most`"
        )
    count = max(1, _VECTORS // samples) if block is None else block
    count = check_count("block", count, 1, None, "")
    out = torch.empty(samples, dimension, dimension, dtype=torch.float64, device=op.device)
    for first in range(0, dimension, count):
        columns = torch.arange(first, min(first + count, dimension), device=op.device)
        units = torch.zeros(len(columns), samples, dimension, dtype=op.dtype, device=op.device)
        units[torch.arange(len(columns), device=op.device), :, columns] = 1
        out[:, :, columns] = op.multiply(units).to(torch.float64).permute(1, 2, 0)
        if progress is not None:
            progress(int(columns[-1]) + 1)
    return out
