"""Leave-one-out sketches, of which XTrace and XDiag are means, and the error of such a mean.

Y = A Omega = Q R for k probes. Estimate i is built on the range of all columns of Y but i, with probe i for
what is beyond (Epperly, Tropp and Webber 2024). The k estimates are exchangeable but not independent: their
spread measures V - C, the variance of one less the covariance of two, while that of the mean is (V - C) / k +
C. Each estimate is unbiased given the other probes. So only what probe j changes in estimate i correlates
with what probe i changes in estimate j, and C is the mean of delta_ij delta_ji, where delta_ij is estimate i
less estimate i built without probe j as well. It is measured here from the same products; the spread alone,
the paper's error estimate, was seen to be too small by up to 1.8 times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sharpcore.krylov.estimation import student

TINY = torch.finfo(torch.float64).tiny
# A column's share in its own reconstruction from here to 1 means that no other helps.
_ALONE = 1e-6
# Shorter remainders of unit vectors are rounding.
_PARALLEL = 1e-8


def directions(triangle: Tensor, ranks: Tensor) -> Tensor:
    """Unit vectors s_i with s_i^T R e_j = 0 for all j but i, as columns [B, k, k] of R [B, k, k].

    In the range of Q, for Y = Q R, s_i is what only column i of Y reached: I - s_i s_i^T projects on what the
    others span. Zero where column i lies in the
    span of the others. Rows of R from `ranks` on are zero.
    """
    count = triangle.shape[-1]
    places = torch.arange(count, device=triangle.device)
    # Columns of an identity beside R make its rows independent and leave the pseudo-inverse of R as it is.
    beyond = (places >= ranks.to(triangle.device)[:, None]).to(triangle)
    scale = triangle.abs().amax((1, 2), keepdim=True).clamp_min(TINY)
    padded = torch.cat([triangle / scale, torch.diag_embed(beyond)], dim=2)
    q, r = torch.linalg.qr(padded.mT)
    inverse = torch.linalg.solve_triangular(r, q.mT, upper=True)[:, :, :count]
    # Row i of the pseudo-inverse is orthogonal to all columns but i only where column i stands alone; then
    # its product with the column is 1, and less elsewhere.
    alone = (inverse * triangle / scale).sum(1, keepdim=True) > 1 - _ALONE
    lengths = torch.linalg.vector_norm(inverse, dim=1, keepdim=True)
    return torch.where(alone, inverse / lengths.clamp_min(TINY), 0.0)


def directions_beyond(s: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """For every j what s_j adds to s_i, and what s_i adds to s_j.

    Unit vectors as columns [B, k, k] both, orthogonal to s_i and to s_j; zero where nothing is added, and for
    j = i.
    """
    first = s[:, :, i : i + 1]
    cosine = (first * s).sum(1, keepdim=True)
    both = torch.stack([s - first * cosine, first - s * cosine])
    lengths = torch.linalg.vector_norm(both, dim=2, keepdim=True)
    both = torch.where(lengths > _PARALLEL, both / lengths.clamp_min(TINY), 0.0)
    both[:, :, :, i] = 0
    return both[0], both[1]


def exchangeable_error(values: Tensor, covariance: Tensor, floor: Tensor) -> Tensor:
    """Standard error of the mean of k exchangeable estimates [k, ...]; at least `floor` (rounding).

    `covariance` is that of two of them, as measured; a negative one is taken for zero.
    """
    count = len(values)
    error = (values.var(0) / count + covariance.clamp_min(0)).sqrt() * student(count)
    return torch.hypot(error, floor)
