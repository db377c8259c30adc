"""A step of block Lanczos on its device, from the products to the next block, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sharpcore.backends.reference.grow_basis import grow_basis
from sharpcore.errors import InvalidInput

# What `LanczosState.faults` says of the products of a sample: NaN or infinity; entries whose squares are no
# float64 numbers.
NOT_FINITE = 1
OUT_OF_RANGE = 2
LEAST_ENTRY, MOST_ENTRY = 1e-140, 1e140


class LanczosState(NamedTuple):
    """The Krylov decompositions A_i V_i = V_i H_i + R_i of B operators, as
    :class:`sharpcore.krylov.decomposition.Decomposition` has them, all on one device."""

    basis: Tensor  # [B, M, d] float64
    projected: Tensor  # [B, M, M] float64; zero beyond the rows and columns that are there
    lost: Tensor  # [B, M] float64
    norm: Tensor  # [B] float64, estimates of ||A||
    sizes: Tensor  # [B] int64, rows of the bases
    processed: Tensor  # [B] int64, rows that have been multiplied
    multiplied: Tensor  # [B] int64
    deflated: Tensor  # [B] int64
    breakdowns: Tensor  # [B] int64
    frozen: Tensor  # [B] bool: nothing is done
    faults: Tensor  # [B] int64, 0, NOT_FINITE or OUT_OF_RANGE: nothing is done from there on


def lanczos_step(
    state: LanczosState,
    products: Tensor,
    *,
    share: float,
    tolerance: float,
    limit: int,
    out: Tensor,
) -> Tensor:
    """Take the products with the active blocks into the decompositions, in place, and give the next blocks.

    The products raise the estimate of ||A||. Their remainders beside the basis are new rows, unless of at
    most min(share, tolerance / 4) * ||A||. A sequence whose coupling to the new rows is at most share * ||A||
    has ended: the coupling counts as lost, and there are no new rows.

    Args:
        state: what is changed. A sample is left alone where it is frozen or has a fault, and where the
            products show one.
        products: [K, B, d], float32 or float64: those of the rows [processed, sizes) of each sample, and what
            zeros give where it has fewer than K.
        share: see `sharpcore.krylov.operator.closing_share`.
        tolerance: that of the eigenpairs, relative to ||A||.
        limit: the most rows of a basis, at most min(M, d).
        out: [K, B, d], float32 or float64, without gaps: the new rows of each sample, then zeros.

    Returns:
        `out`.

    Raises:
        InvalidInput: shapes, dtypes or the limit do not fit.
    """
    check_step(state, products, limit, out)
    wide = products.to(torch.float64)
    finite = torch.isfinite(wide).all(2).all(0)
    peak = wide.abs().amax((0, 2))
    out_of_range = (peak > MOST_ENTRY) | ((peak > 0) & (peak < LEAST_ENTRY))
    found = torch.where(finite, torch.where(out_of_range, OUT_OF_RANGE, 0), NOT_FINITE)
    state.faults.copy_(torch.where(state.frozen | (state.faults != 0), state.faults, found))
    going = ~state.frozen & (state.faults == 0)
    observed = torch.linalg.vector_norm(wide, dim=2).amax(0)
    state.norm.copy_(torch.where(going, torch.maximum(state.norm, observed), state.norm))
    closing = share * state.norm
    floor = closing.minimum(tolerance / 4 * state.norm)
    sizes = torch.where(going, state.sizes, -1)
    growth = grow_basis(state.basis, sizes.cpu(), products, floor=floor.cpu(), limit=limit)
    counts = state.sizes - state.processed
    ended = (torch.linalg.matrix_norm(growth.triangle) <= closing) & (counts > 0)
    out.zero_()
    for i in going.nonzero().flatten().tolist():
        first, n, rank = int(state.processed[i]), int(state.sizes[i]), int(growth.ranks[i])
        count = n - first
        state.projected[i, :, first:n] = growth.coefficients[i, :, :count]
        state.projected[i, n : n + rank, first:n] = growth.triangle[i, :rank, :count]
        state.lost[i, first:n] = growth.dropped[i, :count]
        state.multiplied[i] += count
        state.deflated[i] += max(count - rank, 0)
        state.processed[i] = n
        if ended[i]:
            # A coupling of rounding alone is no direction of the old sequence: the next one begins afresh.
            coupling = torch.linalg.vector_norm(state.projected[i, n:, :n], dim=0)
            state.lost[i, :n] = state.lost[i, :n].hypot(coupling)
            state.projected[i, n:] = 0
            state.breakdowns[i] += 1
            rank = 0
        state.sizes[i] = n + rank
        out[:rank, i] = state.basis[i, n : n + rank]
    return out


def check_step(state: LanczosState, products: Tensor, limit: int, out: Tensor) -> None:
    """Raise InvalidInput where the arguments of `lanczos_step` do not fit together."""
    basis = state.basis
    if basis.dim() != 3:
        raise InvalidInput(f"basis: expected [B, M, d], got {list(basis.shape)}")
    samples, rows, dimension = basis.shape
    shapes: dict[str, tuple[int, ...]] = {
        "basis": (samples, rows, dimension),
        "projected": (samples, rows, rows),
        "lost": (samples, rows),
    }
    for name, tensor in state._asdict().items():
        shape = shapes.get(name, (samples,))
        dtype = torch.float64 if name in shapes or name == "norm" else torch.int64
        dtype = torch.bool if name == "frozen" else dtype
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise InvalidInput(
                f"{name}: expected contiguous {str(dtype).removeprefix('torch.')} {list(shape)}, got "
                f"{tensor.dtype} {list(tensor.shape)}{'' if tensor.is_contiguous() else ', not contiguous'}"
            )
        if tensor.device != basis.device:
            raise InvalidInput(f"{name}: expected a tensor on {basis.device}, got one on {tensor.device}")
    if products.dim() != 3 or products.shape[1:] != (samples, dimension) or products.numel() == 0:
        raise InvalidInput(
            f"products: expected [K, {samples}, {dimension}], none of them 0, got {list(products.shape)}"
        )
    if out.shape != products.shape or not out.is_contiguous():
        raise InvalidInput(
            f"out: expected contiguous {list(products.shape)}, got {list(out.shape)}"
            f"{'' if out.is_contiguous() else ', not contiguous'}"
        )
    for name, tensor in (("products", products), ("out", out)):
        if tensor.dtype not in (torch.float32, torch.float64) or tensor.device != basis.device:
            raise InvalidInput(
                f"{name}: expected float32 or float64 on {basis.device}, got {tensor.dtype} on "
                f"{tensor.device}"
            )
    if not 0 <= limit <= min(rows, dimension):
        raise InvalidInput(f"limit: expected 0 to min(M, d) = {min(rows, dimension)}, got {limit}")
