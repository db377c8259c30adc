"""Eigenpairs of many small symmetric matrices, and residuals of Ritz pairs, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sharpcore.errors import InvalidInput

# The largest matrices for which the cuda backend has a kernel.
MOST_EIGEN_ROWS = 128


class Eigen(NamedTuple):
    """Eigenpairs of G matrices of at most n rows."""

    values: Tensor  # [G, n] float64, ascending; infinity beyond the size of a matrix
    vectors: Tensor  # [G, n, n] float64, columns; zero beyond the size of a matrix


class RitzResiduals(NamedTuple):
    """Parts of the norms of A v - l v: their root of the sum of squares is the residual."""

    coupling: Tensor  # [B, n] float64: what more steps reduce
    noise: Tensor  # [B, n] float64: rounding and asymmetry of the products, and what was lost


def symmetric_eigen(matrices: Tensor, sizes: Tensor | None = None) -> Eigen:
    """All eigenpairs of the leading sizes[g] rows and columns of each of G matrices.

    Only their upper triangles are read. A matrix that falls apart into diagonal blocks, with nothing but
    zeros elsewhere, has the eigenvectors of the blocks, also where both have an eigenvalue. One that is not
    finite has NaN.

    Args:
        matrices: [G, n, n] float64.
        sizes: [G] int64 on the same device, 0 to n; None: n.

    Raises:
        InvalidInput: shapes or dtypes do not fit.
    """
    check_eigen(matrices, sizes)
    problems, rows, _ = matrices.shape
    values = matrices.new_full((problems, rows), float("inf"))
    vectors = torch.zeros_like(matrices, memory_format=torch.contiguous_format)
    lengths = [rows] * problems if sizes is None else sizes.tolist()
    for g, n in enumerate(lengths):
        matrix = matrices[g, :n, :n]
        if bool(torch.isfinite(matrix.triu()).all()):
            values[g, :n], vectors[g, :n, :n] = torch.linalg.eigh(matrix, UPLO="U")
        else:
            values[g, :n], vectors[g, :n, :n] = float("nan"), float("nan")
    return Eigen(values, vectors)


def ritz_residuals(
    projected: Tensor, lost: Tensor, processed: Tensor, sizes: Tensor, values: Tensor, weights: Tensor
) -> RitzResiduals:
    """How far A v is from l v for v = V^T w, by the projections alone.

    With H the rows [0, sizes) and columns [0, processed) of `projected`: the coupling is the norm of the rows
    [processed, sizes) of H w; the noise is that of the rows before, less l w, and of `lost` times w.

    Args:
        projected, lost, processed, sizes: [B, M, M], [B, M] float64, [B], [B] int64, as in
            :class:`sharpcore.backends.reference.lanczos_step.LanczosState`.
        values: [B, n] float64, the l.
        weights: [B, n, n] float64, the w as columns; n is at least the largest `processed`.

    Returns:
        `RitzResiduals`; zero from `processed` on.

    Raises:
        InvalidInput: shapes or dtypes do not fit.
    """
    check_residuals(projected, lost, processed, sizes, values, weights)
    coupling, noise = torch.zeros_like(values), torch.zeros_like(values)
    for i, (p, size) in enumerate(zip(processed.tolist(), sizes.tolist(), strict=True)):
        w = weights[i, :p, :p]
        image = projected[i, :size, :p] @ w
        coupling[i, :p] = torch.linalg.vector_norm(image[p:], dim=0)
        off = torch.linalg.vector_norm(image[:p] - w * values[i, :p], dim=0)
        noise[i, :p] = off.hypot(torch.linalg.vector_norm(w * lost[i, :p, None], dim=0))
    return RitzResiduals(coupling, noise)


def check_eigen(matrices: Tensor, sizes: Tensor | None) -> None:
    """Raise InvalidInput where the arguments of `symmetric_eigen` do not fit together."""
    if matrices.dim() != 3 or matrices.shape[1] != matrices.shape[2] or matrices.dtype != torch.float64:
        raise InvalidInput(
            f"matrices: expected float64 [G, n, n], got {matrices.dtype} {list(matrices.shape)}"
        )
    if sizes is not None:
        _check("sizes", sizes, torch.int64, (matrices.shape[0],), matrices.device)


def check_residuals(
    projected: Tensor, lost: Tensor, processed: Tensor, sizes: Tensor, values: Tensor, weights: Tensor
) -> None:
    """Raise InvalidInput where the arguments of `ritz_residuals` do not fit together."""
    if projected.dim() != 3 or values.dim() != 2:
        raise InvalidInput(
            "projected, values: expected [B, M, M] and [B, n], got "
            f"{list(projected.shape)} and {list(values.shape)}"
        )
    samples, rows, _ = projected.shape
    count = values.shape[1]
    double, device = torch.float64, projected.device
    _check("projected", projected, double, (samples, rows, rows), device)
    _check("lost", lost, double, (samples, rows), device)
    _check("processed", processed, torch.int64, (samples,), device)
    _check("sizes", sizes, torch.int64, (samples,), device)
    _check("values", values, double, (samples, count), device)
    _check("weights", weights, double, (samples, count, count), device)


def _check(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device != device:
        raise InvalidInput(
            f"{name}: expected {str(dtype).removeprefix('torch.')} {list(shape)} on {device}, got "
            f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )
