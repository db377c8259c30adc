"""Gauss quadrature rules of random vectors for B symmetric operators: Lanczos runs in lock-step, and the
eigenvalues that all runs have found."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpcore.errors import InvalidInput
from sharpcore.krylov.estimation import Probed
from sharpcore.krylov.operator import closing_share
from sharpcore.krylov.solution import Solution

# Residuals beside ||A|| up to which a pair is deflated, or a node taken for an eigenvalue.
_CONVERGED = 1e-4
# Eigenvalues of the Gram matrix of one unit vector of each run: below the first they repeat a direction,
# above the second they add one; between, nothing is decided.
_SAME, _FURTHER = 1e-6, 1e-2
# Runs beyond the dimension of an eigenspace without which it is not told: as many directions as dimensions
# may by chance be nearly dependent.
_SPARE = 2
# Shares of a start that are rounding.
_ABSENT = 1e-14
# Nodes of a run that may belong to one eigenvalue.
_LARGEST = 4


@dataclass(frozen=True)
class Rules:
    """The rules of P probes for each of B samples, and the exact part: see `Density`. All float64."""

    nodes: Tensor  # [B, P, m]
    weights: Tensor  # [B, P, m]
    widths: Tensor  # [B, P, m]: how far from a node its weight may lie
    raw_weights: Tensor  # [B, P, m]: with what is locked
    coarse_nodes: Tensor  # [B, P, m]: of fewer steps
    coarse_weights: Tensor  # [B, P, m]
    eigenvalues: Tensor  # [B, q]
    eigenvalue_widths: Tensor  # [B, q]
    multiplicities: Tensor  # [B, q]
    free: Tensor  # [B]: the dimension that is left to the rules
    rounding: Tensor  # [B]: of eigenvalues


@dataclass(frozen=True)
class _Runs:
    """Lanczos runs of P probes of B samples: A V = V H + rest."""

    basis: Tensor  # [P, B, M, d]; V begins at row offsets[b]
    offsets: Tensor  # [B], on the CPU
    projected: Tensor  # [P, B, m, m]
    sizes: Tensor  # [P, B]: rows of H that count
    rests: Tensor  # [P, B]: norm of what the last vector's product has beyond V
    floors: Tensor  # [P, B]: rests up to here are rounding

    @property
    def closed(self) -> Tensor:
        """Runs that span an invariant subspace, [P, B]."""
        return self.rests <= self.floors


@dataclass(frozen=True)
class _Ritz:
    """Eigenpairs of the projections: `values` [P, B, m] ascending, `vectors` [P, B, m, m] as columns, the
    `weights` of the starts on them, and `residuals`."""

    values: Tensor
    vectors: Tensor
    weights: Tensor
    residuals: Tensor


@dataclass(frozen=True)
class _Known:
    """Eigenvalues that are taken exactly, [B, q] each; those of multiplicity 0 are padding."""

    values: Tensor
    widths: Tensor
    multiplicities: Tensor

    @property
    def norm(self) -> Tensor:
        """The largest magnitude, [B]; 0 where there is none."""
        largest = self.values.new_zeros(len(self.values), 1)
        return torch.cat([largest, self.values.abs()], dim=1).amax(1)


def quadrature_rules(
    target: Probed, probes: int, steps: int, deflate: Solution | None, lock: bool, symmetry_tolerance: float
) -> Rules:
    """`probes` rules of at most `steps` nodes each; see `spectral_density`."""
    known, vectors = _deflated(target, deflate)
    # What is small is done on the CPU.
    fixed = (known.multiplicities > 0).sum(1)
    free = (target.dimension - fixed).to(known.values)
    runs = _run(target, probes, max(1, min(steps, int(free.max()))), vectors, fixed)
    _check_symmetry(target, runs, symmetry_tolerance)
    ritz = _ritz(runs, runs.sizes)
    fewer = torch.where(runs.closed, runs.sizes, (3 * runs.sizes // 4).clamp_min(1))
    coarse = _ritz(runs, fewer)
    norm = torch.maximum(ritz.values.abs().amax((0, 2)), known.norm)
    rounding = target.rounding * norm
    raw = weights = ritz.weights * free[:, None]
    eigenvalues = [known]
    if lock and probes > _SPARE:
        weights, left, locked = _lock(runs, ritz, raw, free, norm, rounding)
        eigenvalues.append(locked)
        free = left

    def by_sample(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1).contiguous().to(target.device)

    # Padding must not be where a function is not defined.
    somewhere = ritz.values[0, :, :1]
    eigenvalues = [
        _Known(torch.where(each.multiplicities > 0, each.values, somewhere), each.widths, each.multiplicities)
        for each in eigenvalues
    ]

    def joined(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors, dim=1).to(target.device)

    return Rules(
        nodes=by_sample(ritz.values),
        weights=by_sample(weights),
        widths=by_sample(_widths(ritz) + rounding[:, None]),
        raw_weights=by_sample(raw),
        coarse_nodes=by_sample(coarse.values),
        coarse_weights=by_sample(coarse.weights * (target.dimension - fixed)[:, None]),
        eigenvalues=joined([each.values for each in eigenvalues]),
        eigenvalue_widths=joined([each.widths + rounding[:, None] for each in eigenvalues]),
        multiplicities=joined([each.multiplicities for each in eigenvalues]),
        free=free.to(target.device),
        rounding=rounding.to(target.device),
    )


def _deflated(target: Probed, solution: Solution | None) -> tuple[_Known, Tensor]:
    """The converged pairs of a solution, those of each sample first; vectors [B, q, d]."""
    samples, d = target.samples, target.dimension
    if solution is None:
        nothing = torch.zeros(samples, 0, dtype=torch.float64)
        return _Known(nothing, nothing, nothing), torch.zeros(
            samples, 0, d, dtype=torch.float64, device=target.device
        )
    if not isinstance(solution, Solution) or solution.vectors is None or solution.values.is_complex():
        raise InvalidInput("deflate: expected a Solution of a symmetric operator with its eigenvectors")
    values, residuals = solution.values.cpu().double(), solution.residuals.cpu().double()
    vectors = solution.vectors.to(target.device, torch.float64).flatten(2)
    if vectors.shape != (samples, values.shape[1], d):
        raise InvalidInput(
            f"deflate: expected vectors of {samples} samples of {d} entries; got "
            f"{list(solution.vectors.shape)}"
        )
    norm = torch.maximum(torch.nan_to_num(values).abs().amax(1), torch.nan_to_num(solution.stats.norm.cpu()))
    good = torch.isfinite(values) & (residuals <= _CONVERGED * norm[:, None])
    order = (~good).to(torch.uint8).sort(dim=1, stable=True).indices[:, : int(good.sum(1).max())]
    good = good.gather(1, order)
    index, mask = order.to(target.device)[..., None], good.to(target.device)[..., None]
    vectors = torch.where(mask, vectors.gather(1, index.expand(-1, -1, d)), 0.0)
    gram = (vectors @ vectors.mT).cpu()
    if bool(((gram - torch.diag_embed(good.to(gram))).abs() > 1e-6).any()):
        raise InvalidInput("deflate: expected orthonormal eigenvectors")
    known = _Known(
        torch.where(good, values.gather(1, order), 0.0),
        torch.where(good, residuals.gather(1, order), 0.0),
        good.to(values),
    )
    return known, vectors


def _run(target: Probed, probes: int, steps: int, vectors: Tensor, fixed: Tensor) -> _Runs:
    """Lanczos runs from all probes in lock-step, in the complement of `vectors` [B, q, d]."""
    samples, d = target.samples, target.dimension
    problems, rows = probes * samples, min(vectors.shape[1] + steps, d)
    basis = torch.zeros(problems, rows, d, dtype=torch.float64, device=target.device)
    basis[:, : vectors.shape[1]] = vectors.repeat(probes, 1, 1)
    offsets = fixed.repeat(probes)
    everyone, column = torch.arange(problems, device=target.device), torch.arange(steps)
    places = offsets[:, None] + column
    inside = (places < rows).to(target.device)
    places = places.clamp_max(rows - 1).to(target.device)
    start = target.probes(0, probes).reshape(1, problems, d)
    norms = torch.zeros(problems, dtype=torch.float64)
    growth = target.grow_basis(basis, offsets, start, floor=norms, limit=rows)
    alive = growth.ranks > 0
    projected = torch.zeros(problems, steps, steps, dtype=torch.float64, device=target.device)
    sizes, rests = torch.zeros(problems, dtype=torch.int64), torch.zeros_like(norms)
    for j in range(steps):
        if not bool(alive.any()):
            break
        active = torch.where(alive.to(target.device)[:, None], basis[everyone, places[:, j]], 0.0)
        image = target.multiply(active.reshape(probes, samples, d)).reshape(1, problems, d)
        norms = torch.maximum(norms, torch.linalg.vector_norm(image[0], dim=1).cpu())
        floor = closing_share(target.op.rounding) * norms
        sizes += alive
        now = torch.where(alive, offsets + sizes, -1)
        growth = target.grow_basis(basis, now, image, floor=floor, limit=rows)
        projected[:, :, j] = torch.where(inside, growth.coefficients[:, :, 0].gather(1, places), 0.0)
        rest = growth.triangle[:, 0, 0] + growth.dropped[:, 0]
        rests = torch.where(alive, rest.cpu(), rests)
        alive &= growth.ranks > 0
        if j + 1 < steps:
            projected[:, j + 1, j] = torch.where(alive.to(rest.device), rest, 0.0)

    def shaped(tensor: Tensor) -> Tensor:
        return tensor.reshape(probes, samples, *tensor.shape[1:])

    return _Runs(
        basis=shaped(basis),
        offsets=fixed,
        projected=shaped(projected.cpu()),
        sizes=shaped(sizes),
        rests=shaped(rests),
        floors=shaped(closing_share(target.op.rounding) * norms),
    )


def _check_symmetry(target: Probed, runs: _Runs, tolerance: float) -> None:
    off = torch.linalg.matrix_norm(runs.projected - runs.projected.mT).square().sum(0)
    size = torch.linalg.matrix_norm(runs.projected).square().sum(0)
    asymmetry = (off / size.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    worst = int(asymmetry.argmax())
    if float(asymmetry[worst]) > tolerance:
        raise InvalidInput(
            f"operator: expected a symmetric one; {target.op.name} is not: ||H - H^T|| / ||H|| = "
            f"{float(asymmetry[worst]):.2g} on the vectors multiplied of sample {worst} (allowed: "
            f"{tolerance:.2g}). Take the symmetric part, Hessian(...)"
        )


def _ritz(runs: _Runs, sizes: Tensor) -> _Ritz:
    """Eigenpairs of the leading `sizes` [P, B] rows and columns; the places beyond repeat the last value with
    weight 0."""
    steps = runs.projected.shape[-1]
    counts = torch.arange(steps) < sizes[..., None]
    matrices = (runs.projected + runs.projected.mT) / 2
    matrices = matrices * (counts[..., None] & counts[..., None, :])
    # Beyond all eigenvalues, so that what does not count comes last.
    beyond = 2 * torch.linalg.matrix_norm(matrices) + 1
    matrices += torch.diag_embed(torch.where(counts, 0.0, beyond[..., None]))
    values, vectors = torch.linalg.eigh(matrices)
    last = (sizes - 1).clamp_min(0)[..., None]
    end = torch.where(sizes[..., None] > 0, values.gather(-1, last), 0.0)
    values = torch.where(counts, values, end)
    weights = torch.where(counts, vectors[..., 0, :].square(), 0.0)
    tails = vectors.gather(-2, last[..., None].expand(*last.shape, steps))[..., 0, :]
    residuals = torch.where(counts, runs.rests[..., None] * tails.abs(), 0.0)
    return _Ritz(values, vectors, weights, residuals)


def _widths(ritz: _Ritz) -> Tensor:
    """Half-widths of the intervals that nodes stand for: the spread of a Ritz vector's spectrum is its
    residual, but cells between nodes are shared with the neighbours."""
    values = ritz.values
    if values.shape[-1] == 1:
        return math.sqrt(3) * ritz.residuals
    gaps = values.diff(dim=-1)
    cells = torch.cat([gaps[..., :1], (gaps[..., 1:] + gaps[..., :-1]) / 2, gaps[..., -1:]], dim=-1) / 2
    return torch.minimum(math.sqrt(3) * ritz.residuals, cells)


def _lock(
    runs: _Runs, ritz: _Ritz, weights: Tensor, free: Tensor, norm: Tensor, rounding: Tensor
) -> tuple[Tensor, Tensor, _Known]:
    """Take the eigenvalues at both ends that all runs of a sample have found out of the rules.

    A run sees one vector of an eigenspace, and more once rounding has brought others in; as many as are
    independent among all runs are its dimension, if there are runs to spare. Returns the weights
    and dimensions left, and the eigenvalues.
    """
    probes = len(weights)
    place, used = _common_ends(ritz, _CONVERGED * norm, rounding)
    values, residuals, shares = (
        each.gather(-1, place) for each in (ritz.values, ritz.residuals, weights)
    )  # [P, B, c]
    reach = 2 * residuals.amax(0) + rounding[:, None]
    member, counts = _groups(values.mean(0), used, reach)
    _, groups, size = member.shape

    def of_groups(each: Tensor, blank: float) -> Tensor:
        chosen = each.gather(-1, member.flatten(1).expand(probes, -1, -1))
        return torch.where(counts, chosen.unflatten(-1, (groups, size)), blank)

    low = of_groups(values, math.inf).amin((0, 3))
    high = of_groups(values, -math.inf).amax((0, 3))
    vectors = _ritz_vectors(runs, ritz, place.gather(-1, member.flatten(1).expand(probes, -1, -1)))
    vectors = vectors.unflatten(2, (groups, size)) * counts[..., None].to(vectors)
    vectors = vectors.permute(1, 2, 0, 3, 4).flatten(2, 3)  # [B, groups, P * size, d]
    angles = torch.linalg.eigvalsh(vectors @ vectors.mT).cpu()
    multiplicity = (angles > _FURTHER).sum(-1)
    clear = ((angles <= _SAME) | (angles > _FURTHER)).all(-1)
    taken = counts[..., 0] & clear & (multiplicity <= probes - _SPARE)
    multiplicity = torch.where(taken, multiplicity, 0)
    # What lies within an eigenvalue's interval is of it, in runs as well that hold it as several nodes.
    nodes, reach = ritz.values[..., None], of_groups(reach.expand_as(values), 0.0).amax((0, 3))
    inside = (nodes >= (low - reach)[:, None]) & (nodes <= (high + reach)[:, None])
    locked = (inside & taken[:, None]).any(-1)
    rest = torch.where(locked, 0.0, weights)
    left, sums = free - multiplicity.sum(1), rest.sum(-1)
    # Multiplicities that do not add up were misjudged.
    sound = (left >= 0) & ((left == 0) | (sums > 1e-8 * free).all(0))
    scale = left / sums.clamp_min(torch.finfo(torch.float64).tiny)
    rest = torch.where(sound[:, None], rest * scale[..., None] * (left > 0)[:, None], weights)
    # Where several eigenvalues pass for one, the runs see different means of them.
    shares = of_groups(shares, 0.0).clamp_min(torch.finfo(torch.float64).tiny) * counts
    means = (shares * of_groups(values, 0.0)).sum((0, 3)) / shares.sum((0, 3)).clamp_min(1e-300)
    widths = of_groups(residuals, math.inf).amin((0, 3)) + (high - low)
    multiplicity = torch.where(sound[:, None], multiplicity, 0).to(values)
    widths = torch.where(multiplicity > 0, widths, 0.0)
    return rest, torch.where(sound, left, free), _Known(means, widths, multiplicity)


def _groups(centers: Tensor, used: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbours among `centers` [B, c] that one of their distances [B, c] reaches over, as one group.

    Returns the places of the members of each group, [B, groups, size], and which count. Groups of more than
    _LARGEST members, which are spectra and not eigenvalues, are left out.
    """
    samples, count = centers.shape
    slots = torch.arange(count)
    apart = torch.ones_like(used)
    apart[:, 1:] = (
        (centers.diff(dim=1).abs() > torch.maximum(distance[:, 1:], distance[:, :-1]))
        | ~used[:, 1:]
        | ~used[:, :-1]
    )
    group = apart.long().cumsum(1) - 1
    first = torch.where(apart, slots, 0).cummax(1).values
    rank = slots - first
    size = max(1, min(int(rank.max()) + 1, _LARGEST)) if count else 1
    member = torch.zeros(samples, count, size, dtype=torch.int64)
    counts = torch.zeros(samples, count, size, dtype=torch.bool)
    fits = used & (rank < size)
    b, j = fits.nonzero(as_tuple=True)
    member[b, group[b, j], rank[b, j]] = j
    counts[b, group[b, j], rank[b, j]] = True
    too_large = torch.zeros(samples, count, dtype=torch.bool)
    b, j = (used & (rank >= size)).nonzero(as_tuple=True)
    too_large[b, group[b, j]] = True
    return member, counts & ~too_large[..., None]


def _common_ends(ritz: _Ritz, tolerance: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor]:
    """Places [P, B, c] in every run of the pairs that all runs of a sample agree on, from either end inwards
    to the first one that they do not, and which of the c belong to the sample, [B, c]."""
    steps = ritz.values.shape[-1]
    # Copies of eigenvalues that rounding brings in come late, and would be in the way of those behind.
    present = ritz.weights > _ABSENT
    order = (~present).to(torch.uint8).sort(dim=-1, stable=True).indices
    sizes = present.sum(-1, keepdim=True)
    upwards = torch.arange(steps).expand_as(ritz.values)
    downwards = sizes - 1 - upwards

    def agreed(slot: Tensor) -> Tensor:
        counts = (slot >= 0) & (slot < sizes)
        place = order.gather(-1, slot.clamp_min(0))
        values, residuals = ritz.values.gather(-1, place), ritz.residuals.gather(-1, place)
        converged = counts & (residuals <= tolerance[:, None])
        together = values.amax(0) - values.amin(0) <= 2 * residuals.amax(0) + rounding[:, None]
        return (converged.all(0) & together).long().cumprod(-1).sum(-1)

    low = agreed(upwards)
    high = torch.minimum(agreed(downwards), (sizes[..., 0].amin(0) - low).clamp_min(0))
    slots = torch.arange(int((low + high).max()))
    slot = torch.where(slots < low[:, None], slots, sizes - 1 - (slots - low[:, None]))
    return order.gather(-1, slot.clamp(0, steps - 1)), slots < (low + high)[:, None]


def _ritz_vectors(runs: _Runs, ritz: _Ritz, place: Tensor) -> Tensor:
    """The Ritz vectors at these places [P, B, c], [P, B, c, d]."""
    probes, samples, count = place.shape
    rows, steps = runs.basis.shape[2], ritz.values.shape[-1]
    columns = ritz.vectors.gather(-1, place[..., None, :].expand(-1, -1, steps, -1)).mT
    # A run's vectors begin at the sample's offset in the basis.
    at = (runs.offsets[:, None] + torch.arange(steps)).clamp_max(rows - 1)
    at = at[:, None].expand(probes, samples, count, steps)
    counts = torch.arange(steps) < runs.sizes[..., None, None]
    spread = torch.zeros(probes, samples, count, rows, dtype=torch.float64)
    spread.scatter_add_(-1, at, torch.where(counts, columns, 0.0))
    return spread.to(runs.basis.device) @ runs.basis
