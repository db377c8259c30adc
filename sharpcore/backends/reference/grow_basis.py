"""Growth of orthonormal bases by blocks of vectors, many bases in lock-step, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sharpcore.errors import InvalidInput

# A remainder this small beside its vector is the rounding of the orthogonalization itself.
ROUNDING = 64 * torch.finfo(torch.float64).eps
# After a pass that leaves less of a vector than this, what is left may still lean on the basis (Daniel,
# Gragg, Kaufman and Stewart 1976); such a vector is orthogonalized again, at most MOST_PASSES times more.
KEPT = 0.5
MOST_PASSES = 3


class Growth(NamedTuple):
    """How K vectors w_j are made of a basis of n rows and r new ones: see `grow_basis`."""

    coefficients: Tensor  # [B, M, K] float64; rows from n on are zero
    triangle: Tensor  # [B, K, K] float64; rows from r on are zero
    ranks: Tensor  # [B] int64, the r new rows of each basis
    dropped: Tensor  # [B, K] float64, norms of the remainders that gave no row


def grow_basis(basis: Tensor, sizes: Tensor, block: Tensor, *, floor: Tensor, limit: int) -> Growth:
    """Orthogonalize K vectors against each of B bases and append what is new in them, in place.

    With n = sizes[i], V = basis[i, :n] and the r new rows Q = basis[i, n:n+r]: w_j = V^T coefficients[i, :n,
    j] + Q^T triangle[i, :r, j], but for a remainder of norm dropped[i, j] where w_j gave no row. Two passes
    of block Gram-Schmidt, then one column after another against the new ones, and again where cancellation
    asks for it.

    Args:
        basis: [B, M, d] float64, row-contiguous; the first sizes[i] rows of each are orthonormal. Written.
        sizes: [B] int64 on the CPU. A negative size freezes the problem: its results are zero.
        block: [K, B, d], float32 or float64.
        floor: [B] float64 on the CPU. A remainder of at most this norm, or of 64 float64 roundings of its
            w_j, gives no row (deflation).
        limit: the most rows of a basis, at most min(M, d); a vector that finds it full is dropped.

    Returns:
        A `Growth`; tensors on basis' device, `ranks` on the CPU.

    Raises:
        InvalidInput: shapes, dtypes or the limit do not fit.
    """
    check_growth(basis, sizes, block, floor, limit)
    samples, rows, _ = basis.shape
    count = block.shape[0]
    coefficients = basis.new_zeros(samples, rows, count)
    triangle = basis.new_zeros(samples, count, count)
    dropped = basis.new_zeros(samples, count)
    ranks = torch.zeros(samples, dtype=torch.int64)
    for i, n in enumerate(sizes.tolist()):
        if n < 0:
            continue
        vectors = block[:, i].to(torch.float64).clone()
        tolerance = ROUNDING * torch.linalg.vector_norm(vectors, dim=1)
        v, rank = basis[i], 0
        for _ in range(2):
            before = torch.linalg.vector_norm(vectors, dim=1)
            along = v[:n] @ vectors.mT
            vectors -= along.mT @ v[:n]
            coefficients[i, :n] += along
        for j, w in enumerate(vectors):
            # A column that the second pass shortened, or that the new rows shorten, goes through whole passes
            # again.
            norm = torch.linalg.vector_norm(w)
            again = bool(norm < KEPT * before[j])
            for _ in range(2):
                along = v[n : n + rank] @ w
                w -= along @ v[n : n + rank]
                triangle[i, :rank, j] += along
            for _ in range(MOST_PASSES):
                left = torch.linalg.vector_norm(w)
                if left <= max(floor[i], tolerance[j]) or not (again or left < KEPT * norm):
                    break
                again, norm = False, left
                along = v[: n + rank] @ w
                w -= along @ v[: n + rank]
                coefficients[i, :n, j] += along[:n]
                triangle[i, :rank, j] += along[n:]
            left = torch.linalg.vector_norm(w)
            if left <= max(floor[i], tolerance[j]) or n + rank >= limit:
                dropped[i, j] = left
                continue
            v[n + rank] = w / left
            triangle[i, rank, j] = left
            rank += 1
        ranks[i] = rank
    return Growth(coefficients, triangle, ranks, dropped)


def check_growth(
    basis: Tensor,
    sizes: Tensor,
    block: Tensor,
    floor: Tensor,
    limit: int,
    devices: Sequence[str] = ("cpu",),
) -> None:
    """Raise InvalidInput where the arguments of `grow_basis` do not fit together.

    `devices` are the kinds of device that may hold `sizes` and `floor`; only on the CPU are sizes looked at.
    """
    if basis.dim() != 3 or basis.dtype != torch.float64 or not basis.is_contiguous():
        raise InvalidInput(
            f"basis: expected contiguous float64 [B, M, d], got {basis.dtype} {list(basis.shape)}"
            f"{'' if basis.is_contiguous() else ', not contiguous'}"
        )
    samples, rows, dimension = basis.shape
    if block.dim() != 3 or block.shape[1:] != (samples, dimension):
        raise InvalidInput(f"block: expected [K, {samples}, {dimension}], got {list(block.shape)}")
    if block.dtype not in (torch.float32, torch.float64):
        raise InvalidInput(f"block: expected float32 or float64, got {block.dtype}")
    for name, tensor, dtype in (("sizes", sizes, torch.int64), ("floor", floor, torch.float64)):
        if tensor.shape != (samples,) or tensor.dtype != dtype or tensor.device.type not in devices:
            raise InvalidInput(
                f"{name}: expected {str(dtype).removeprefix('torch.')} [{samples}] on "
                f"{' or '.join(devices)}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
    if not 0 <= limit <= min(rows, dimension):
        raise InvalidInput(f"limit: expected 0 to min(M, d) = {min(rows, dimension)}, got {limit}")
    if samples and sizes.is_cpu and int(sizes.max()) > limit:
        raise InvalidInput(f"sizes: expected at most limit = {limit}, got {int(sizes.max())}")
