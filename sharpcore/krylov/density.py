"""Spectral density of B symmetric operators by stochastic Lanczos quadrature: curves, counts, tr f(A)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sharpcore.errors import InvalidInput, NonFiniteError
from sharpcore.krylov.estimation import Operator, Probed, mean_and_error
from sharpcore.krylov.operator import precision_defaults
from sharpcore.krylov.quadrature import Rules, quadrature_rules
from sharpcore.krylov.run import check_count
from sharpcore.krylov.solution import Estimate, Solution

Function = Callable[[Tensor], Tensor]

_GRID = 256


class Curve(NamedTuple):
    """A density on a grid: see `Density.curve`."""

    grid: Tensor  # [G] or [B, G]
    density: Tensor  # [B, G]
    standard_error: Tensor  # [B, G]


def spectral_density(
    operator: Operator,
    *,
    probes: int = 8,
    steps: int = 64,
    kind: str = "sphere",
    deflate: Solution | None = None,
    lock: bool = True,
    seed: int = 0,
    sample_ids: Sequence[int] | Tensor | None = None,
    block: int | None = None,
    symmetry_tolerance: float | None = None,
    batched: bool | None = None,
) -> Density:
    """The spectrum of each of B symmetric operators on d entries, as quadrature rules of random vectors.

    Stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017): the eigenvalues of the tridiagonal matrix of a
    Lanczos run from a probe z, with the squares of the first components of its eigenvectors, are the Gauss
    rule of z^T f(A) z, and probes average to tr f(A). All runs of all samples go in lock-step with full
    re-orthogonalization; a run whose invariant subspace is found ends there (its rule is exact).

    Eigenvalues at the ends that have converged in every run are known, not estimated: with `lock` they are
    taken out of the rules and counted as often as the runs' eigenvectors are independent (implicit deflation,
    Bhattacharjee, Jayaram, Musco, Musco and Ray 2024), which removes their part of the variance without a
    product.

    Args:
        operator: as in `trace`; symmetric (`Hessian`, `HessianDifference`).
        probes: Lanczos runs for each sample; steps: of each run, d at most.
        kind: "sphere", "normal" or "rademacher".
        deflate: pairs of `block_lanczos` of the same operator. Those with residuals of at most 1e-4 ||A|| are
            taken out of the probes and counted exactly.
        lock: whether ends found by every run are taken exactly.
        seed, sample_ids: of the probes; a sample's rules do not depend on its batch.
        block: runs multiplied at once for each sample (default: all); memory is block x steps x d numbers.
        symmetry_tolerance: largest ||H - H^T|| / ||H|| of the projected operator (default: 1e-8, 1e-3 or 0.1
            by the precision of the products). One step projects on one vector, and shows none.
        batched: see `as_batched`.

    Returns:
        A `Density`; probes x steps products for each sample.

    Raises:
        InvalidInput: arguments do not fit; an operator that is not symmetric.
        NonFiniteError: a product is not finite.
    """
    probes = check_count("probes", probes, 2 if kind == "rademacher" else 1, None, "")
    steps = check_count("steps", steps, 1, None, "")
    target = Probed(
        operator,
        kind=kind,
        seed=seed,
        sample_ids=sample_ids,
        shift=None,
        block=probes if block is None else block,
        batched=batched,
    )
    if symmetry_tolerance is None:
        symmetry_tolerance = precision_defaults(target.op.rounding)[1]
    rules = quadrature_rules(target, probes, steps, deflate, lock, symmetry_tolerance)
    return Density(
        rules=rules, dimension=target.dimension, kind=kind, products=target.products, rounding=target.rounding
    )


@dataclass(frozen=True, repr=False)
class Density:
    """Spectra of B operators on d entries, as an exact part and quadrature rules of P random vectors.

    `eigenvalues` [B, q] are known, `multiplicities` [B, q] times each (0: padding). For the others there are
    `nodes` [B, P, m] and `weights` [B, P, m], which sum to d less the multiplicities in every rule. All are
    float64.

    Estimates are numbers of eigenvalues or sums over them, not fractions. Their standard errors hold the
    variance between random vectors and an estimate of the quadrature's own error. For normal and sphere
    probes the first is known, 2 d / (d + 2) (tr F^2 - (tr F)^2 / d) / P with F = f(A), and measured by the
    same rules; for rademacher probes it is the spread of the rules' values, widened as Student's distribution
    asks.
    """

    rules: Rules = field(repr=False)
    dimension: int
    kind: str
    products: int
    rounding: float

    @property
    def nodes(self) -> Tensor:
        """Nodes of the rules, [B, P, m], ascending."""
        return self.rules.nodes

    @property
    def weights(self) -> Tensor:
        """Weights of the rules, [B, P, m]."""
        return self.rules.weights

    @property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues that are known, [B, q]."""
        return self.rules.eigenvalues

    @property
    def multiplicities(self) -> Tensor:
        """How often each known eigenvalue is counted, [B, q]."""
        return self.rules.multiplicities

    @property
    def probes(self) -> int:
        """Random vectors of each sample."""
        return self.nodes.shape[1]

    @classmethod
    def of(cls, eigenvalues: Tensor) -> Density:
        """Of operators all of whose eigenvalues [B, d] are known: the same numbers, without an error.

        Raises InvalidInput where they are not [B, d] finite real numbers.
        """
        if (
            not isinstance(eigenvalues, Tensor)
            or eigenvalues.dim() != 2
            or eigenvalues.numel() == 0
            or eigenvalues.is_complex()
            or not bool(torch.isfinite(eigenvalues).all())
        ):
            raise InvalidInput(f"eigenvalues: expected [B, d] finite real numbers; got {eigenvalues!r}")
        values = eigenvalues.to(torch.float64)
        # A rule without weight: nothing is left to it.
        nodes, nothing = values[:, None, :1], torch.zeros_like(values[:, None, :1])
        rules = Rules(
            nodes=nodes,
            weights=nothing,
            widths=nothing,
            raw_weights=nothing,
            coarse_nodes=nodes,
            coarse_weights=nothing,
            eigenvalues=values,
            eigenvalue_widths=torch.zeros_like(values),
            multiplicities=torch.ones_like(values),
            free=nothing[:, 0, 0],
            rounding=nothing[:, 0, 0],
        )
        return cls(rules, values.shape[1], "sphere", 0, 0.0)

    def __repr__(self) -> str:
        samples, probes, steps = self.nodes.shape
        exact = self.multiplicities.sum(1)
        return (
            f"Density({samples} x {self.dimension} eigenvalues, {probes} rules of {steps} nodes, "
            f"{int(exact.min())} to {int(exact.max())} eigenvalues exact, {self.products} products)"
        )

    def range(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest eigenvalue seen, [B] each: inside the spectrum, and near its ends."""
        rules = self.rules
        known = rules.multiplicities > 0
        used = rules.weights > 0
        low = [torch.where(used, rules.nodes, math.inf).flatten(1)]
        low.append(torch.where(known, rules.eigenvalues, math.inf))
        high = [torch.where(used, rules.nodes, -math.inf).flatten(1)]
        high.append(torch.where(known, rules.eigenvalues, -math.inf))
        return torch.cat(low, 1).amin(1), torch.cat(high, 1).amax(1)

    def apply(self, f: Function) -> Estimate:
        """tr f(A), [B]: the sum of f over the eigenvalues.

        `f` is elementwise on float64 tensors of any shape. Smooth functions need few steps; the error of the
        quadrature is taken from the difference to rules of three quarters of the steps. Raises InvalidInput
        where f changes the shape, NonFiniteError where it is not finite at a node.
        """
        if not callable(f):
            raise InvalidInput(f"f: expected a function of a tensor; got {type(f).__name__}")
        rules = self.rules
        nodes, known = self._values(f, rules.nodes), self._values(f, rules.eigenvalues)
        quadrature = self._quadrature_error(nodes, self._values(f, rules.coarse_nodes))
        return self._estimate(nodes, known, torch.hypot(quadrature, self._floor(f)))

    def count_above(self, x: float | Tensor) -> Estimate:
        """The number of eigenvalues >= x, [B]; `x` is a number or [B]. `count_above(0)`: non-negative ones.

        A node stands for eigenvalues near it, as far as the next node at most and as its residual says. Where
        x lies among them their number is a ramp, and its uncertainty is in the standard error, as is
        that of eigenvalues within rounding of x.
        """
        return self._count(x, above=True)

    def count_below(self, x: float | Tensor) -> Estimate:
        """The number of eigenvalues < x, [B]: d - count_above(x)."""
        return self._count(x, above=False)

    def mass_above(self, x: float | Tensor = 0.0) -> Estimate:
        """The sum of l - x over the eigenvalues l > x, [B]: for x = 0 the sum of the positive ones.

        `x` is a number or [B].
        """
        edge = self._per_sample("x", x, finite=True)
        return self.apply(lambda values: (values - _beside(edge, values)).clamp_min(0))

    def log_det(self, shift: float | Tensor | None = None) -> Estimate:
        """log |det A|, or log det(shift I - A) where a shift is given, a number or [B]; [B].

        `log_det(0.0)` is log det(-A), the one of a negative definite Hessian. Where the spectrum lies on both
        sides of zero log |l| has its pole among the eigenvalues: the estimate is uncertain, and its standard
        error says so.

        Raises InvalidInput where A is singular to rounding, or shift I - A not positive definite.
        """
        low, high = self.range()
        allowed = self.rounding * torch.maximum(low.abs(), high.abs())
        if shift is None:
            sizes = torch.cat(
                [
                    torch.where(self.weights > 0, self.nodes.abs(), math.inf).flatten(1),
                    torch.where(self.multiplicities > 0, self.eigenvalues.abs(), math.inf),
                ],
                dim=1,
            )
            singular = sizes.amin(1) <= allowed
            if bool(singular.any()):
                sample = int(singular.nonzero()[0])
                raise InvalidInput(
                    f"log_det: expected a regular operator; that of sample {sample} is singular"
                )
            return self.apply(lambda values: values.abs().log())
        above = self._per_sample("shift", shift, finite=True)
        indefinite = high >= above - allowed
        if bool(indefinite.any()):
            sample = int(indefinite.nonzero()[0])
            raise InvalidInput(
                f"shift: expected a number above all eigenvalues; {float(above[sample]):g} is not above "
                f"{float(high[sample]):.6g} of sample {sample}"
            )
        return self.apply(lambda values: (_beside(above, values) - values).log())

    def effective_dimension(self, scale: float | Tensor) -> Estimate:
        """Sum of |l| / (|l| + scale), [B]: how many eigenvalues are large beside `scale` (MacKay 1992).

        `scale` > 0 is a number or [B].
        """
        size = self._per_sample("scale", scale, positive=True)
        return self.apply(lambda values: values.abs() / (values.abs() + _beside(size, values)))

    def smooth_count(self, threshold: float | Tensor, order: float = 4.0) -> Estimate:
        """Sum of 1 / (1 + (|l| / threshold)^order), [B]: how many eigenvalues are near zero (Hill's filter).

        `threshold` > 0, a number or [B], is where the filter is 1/2; `order` > 0 its steepness. With
        threshold c / sigma^2 this is the local Hessian spectral dimension (arXiv 2605.01221): `lhsd`.
        """
        order = _number("order", order, positive=True)
        limit = self._per_sample("threshold", threshold, positive=True)
        return self.apply(lambda values: 1 / (1 + (values.abs() / _beside(limit, values)) ** order))

    def curve(self, grid: Tensor | None = None, width: float | Tensor | None = None) -> Curve:
        """The density of eigenvalues, smoothed by a normal kernel of standard deviation `width`.

        `grid` is [G], or [B, G] for one of each sample; `width` a number or [B]. Returns (grid as given,
        density [B, G], standard_error [B, G]); a density integrates to 1 over the real line. Default grid:
        256 points over all samples' spectra and 4 widths beyond; default width: what m nodes resolve, the
        longest spectrum / m. Where nodes are farther apart than the width the density is smoothed as far as
        that, and the standard error says what a narrower one may hide.
        """
        low, high = self.range()
        ends = float(low.min()), float(high.max())
        if width is None:
            width = float((high - low).max()) / self.nodes.shape[2]
            width = max(width, 1e-3 * max(map(abs, ends)), 1e-3 if ends == (0.0, 0.0) else 0.0)
        widths = self._per_sample("width", width, positive=True)
        if grid is None:
            beyond = 4 * float(widths.max())
            grid = torch.linspace(ends[0] - beyond, ends[1] + beyond, _GRID, dtype=torch.float64)
        samples = len(self.nodes)
        if (
            not isinstance(grid, Tensor)
            or grid.dim() not in (1, 2)
            or (grid.dim() == 2 and len(grid) != samples)
            or not bool(torch.isfinite(grid).all())
        ):
            raise InvalidInput(f"grid: expected a finite tensor [G] or [{samples}, G]")
        grid = grid.to(self.nodes.device, torch.float64)
        values = grid.new_zeros(samples, grid.shape[-1])
        errors = values.clone()
        for g, point in enumerate(grid.expand_as(values).unbind(1)):
            estimate = self._at(point, widths)
            values[:, g], errors[:, g] = estimate.value, estimate.standard_error
        return Curve(grid, values / self.dimension, errors / self.dimension)

    def _at(self, point: Tensor, width: Tensor) -> Estimate:
        """The sum of normal kernels of these widths [B] around the eigenvalues, at points [B]."""
        rules = self.rules

        def kernel(values: Tensor, further: Tensor | float = 0.0) -> Tensor:
            spread = (_beside(width, values).square() + further).sqrt()
            return _normal((values - _beside(point, values)) / spread) / spread

        # Narrower kernels than the nodes' cells would show the nodes, not the eigenvalues.
        wide = kernel(rules.nodes, rules.widths.square() / 3)
        fine, known = kernel(rules.nodes), kernel(rules.eigenvalues)
        resolution = (rules.weights * (wide - fine)).sum(-1).mean(1).abs()
        quadrature = self._quadrature_error(fine, kernel(rules.coarse_nodes))
        return self._estimate(wide, known, torch.maximum(resolution, quadrature) + self._floor(kernel))

    def _quadrature_error(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """The mean difference between the rules and those of fewer steps."""
        rules = self.rules
        return ((rules.raw_weights * fine).sum(-1) - (rules.coarse_weights * coarse).sum(-1)).mean(1).abs()

    def _count(self, x: float | Tensor, above: bool) -> Estimate:
        rules, x = self.rules, self._per_sample("x", x)
        nodes, known = (
            _ramp(values - _beside(x, values), widths)
            for values, widths in ((rules.nodes, rules.widths), (rules.eigenvalues, rules.eigenvalue_widths))
        )
        weights, distance = rules.weights, rules.nodes - x[:, None, None]
        # Within a spectrum the rules of different probes fall differently, so that what a cell leaves open
        # averages out; at its ends they fall alike, and sharp and smooth counts differ by as much.
        sharp = (weights * (distance >= 0)).sum(-1).mean(1)
        open_to_chance = (weights * (nodes * (1 - nodes)).sqrt()).sum(-1).mean(1) / math.sqrt(self.probes)
        shift = ((weights * nodes).sum(-1).mean(1) - sharp).abs()
        within = (
            (weights * (distance.abs() <= rules.rounding[:, None, None]) * nodes * (1 - nodes))
            .sum(-1)
            .mean(1)
        )
        exact = (rules.multiplicities * (known * (1 - known)).sqrt()).sum(-1)
        error = torch.maximum(open_to_chance, shift) + 2 * within + exact
        if not above:
            nodes, known = 1 - nodes, 1 - known
        return self._estimate(nodes, known, error)

    def _values(self, f: Function, points: Tensor) -> Tensor:
        values = f(points)
        if not isinstance(values, Tensor) or values.shape != points.shape:
            shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise InvalidInput(f"f: expected values of shape {list(points.shape)}; got {shape}")
        if not bool(torch.isfinite(values).all()):
            bad = points[~torch.isfinite(values)][0]
            raise NonFiniteError(f"f: not finite at the node {float(bad):.6g}")
        return values.to(torch.float64)

    def _floor(self, f: Function) -> Tensor:
        """What the rounding of eigenvalues and sums, and the widths of known eigenvalues, may change."""
        rules = self.rules

        def change(points: Tensor, widths: Tensor) -> Tensor:
            return torch.nan_to_num((f(points + widths) - f(points - widths)).abs() / 2, 0.0, 0.0, 0.0)

        rounding = rules.rounding[:, None, None].expand_as(rules.nodes)
        chance = change(rules.nodes, rounding) + self.rounding * f(rules.nodes).abs()
        known = change(rules.eigenvalues, rules.eigenvalue_widths)
        sums = self.rounding * (rules.multiplicities * f(rules.eigenvalues).abs()).sum(-1)
        widths = torch.linalg.vector_norm(rules.multiplicities * known, dim=-1)
        return (rules.weights * chance).sum(-1).mean(1) + sums + widths

    def _estimate(self, nodes: Tensor, known: Tensor, error: Tensor) -> Estimate:
        """The estimate of a sum over eigenvalues from its values at nodes and known eigenvalues."""
        rules = self.rules
        sums = (rules.weights * nodes).sum(-1)
        exact = (rules.multiplicities * known).sum(-1)
        if self.kind == "rademacher":
            mean, spread = mean_and_error(sums.mT, torch.zeros_like(exact))
        else:
            mean, free = sums.mean(1), rules.free
            centre = (mean / free.clamp_min(1))[:, None, None]
            variance = (rules.weights * (nodes - centre).square()).sum(-1).mean(1)
            spread = (2 * variance * free / (free + 2) / self.probes).sqrt()
        return Estimate(exact + mean, torch.hypot(spread, error), self.probes, self.products)

    def _per_sample(
        self, name: str, value: float | Tensor, *, positive: bool = False, finite: bool = False
    ) -> Tensor:
        samples = len(self.nodes)
        try:
            numbers = torch.as_tensor(value, dtype=torch.float64, device=self.nodes.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidInput(f"{name}: expected a number or [B] numbers; got {value!r}") from error
        if numbers.shape not in ((), (samples,)) or bool(numbers.isnan().any()):
            raise InvalidInput(f"{name}: expected a number or {samples} of them; got {value!r}")
        if (positive or finite) and not bool(numbers.isfinite().all()):
            raise InvalidInput(f"{name}: expected finite numbers; got {value!r}")
        if positive and not bool((numbers > 0).all()):
            raise InvalidInput(f"{name}: expected positive numbers; got {value!r}")
        return numbers.expand(samples)


def _beside(numbers: Tensor, values: Tensor) -> Tensor:
    """[B] numbers in a shape that goes with values [B, ...]."""
    return numbers.reshape(-1, *[1] * (values.dim() - 1))


def _ramp(distance: Tensor, widths: Tensor) -> Tensor:
    """The share above zero of masses spread evenly over distance -+ width."""
    share = 0.5 + distance / (2 * widths.clamp_min(torch.finfo(torch.float64).tiny))
    return torch.where(widths > 0, share.clamp(0, 1), (distance >= 0).to(distance))


def _normal(values: Tensor) -> Tensor:
    return (-0.5 * values.square()).exp() / math.sqrt(2 * math.pi)


def _number(name: str, value: float, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidInput(f"{name}: expected a finite number; got {value!r}")
    if positive and value <= 0:
        raise InvalidInput(f"{name}: expected a positive number; got {value!r}")
    return float(value)
