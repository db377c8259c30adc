"""BatchedOperator: what Krylov solvers multiply with, B independent square operators in lock-step."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from sharpcore.errors import InvalidInput, NonFiniteError
from sharpcore.linearization import checking
from sharpcore.operators import CurvatureOperator

Multiply = Callable[[Tensor], Tensor]


def precision_defaults(rounding: float) -> tuple[float, float]:
    """The tolerance and the largest asymmetry that are usual for products of this relative rounding."""
    if rounding < 1e-12:
        return 1e-10, 1e-8
    return (1e-5, 1e-3) if rounding < 1e-4 else (2e-2, 0.1)


def closing_share(rounding: float) -> float:
    """The coupling, beside ||A||, below which a Krylov sequence has closed: what follows is rounding."""
    return min(64 * rounding, 5e-3)


class BatchedOperator:
    """B square operators A_i on d entries each, multiplied with K vectors of every sample at once.

    `multiply` and `multiply_transposed` take and return [K, B, d] in `dtype` on `device`; `sample_shape` is
    the shape that vectors of one sample are returned in. `products` counts the vectors multiplied for each
    sample, `seconds` the time that took.
    """

    def __init__(
        self,
        multiply: Multiply,
        multiply_transposed: Multiply | None = None,
        *,
        samples: int,
        dimension: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        sample_shape: tuple[int, ...] | None = None,
        rounding: float | None = None,
        name: str = "operator",
    ) -> None:
        self._multiply, self._multiply_transposed = multiply, multiply_transposed
        self.samples, self.dimension = samples, dimension
        self.dtype, self.device = dtype, torch.device(device)
        self.sample_shape = (dimension,) if sample_shape is None else tuple(sample_shape)
        self.rounding = torch.finfo(dtype).eps if rounding is None else rounding
        self.name = name
        self.products = 0
        self.calls = 0
        self.seconds = 0.0

    @property
    def has_transpose(self) -> bool:
        """Whether `multiply_transposed` can be called."""
        return self._multiply_transposed is not None

    def multiply(self, block: Tensor) -> Tensor:
        """A_i times K vectors each: [K, B, d] of any floating dtype to [K, B, d] of the operator's dtype.

        Raises NonFiniteError where the product is not finite, if `checking()`.
        """
        return self._call(self._multiply, block, "product")

    def multiply_transposed(self, block: Tensor) -> Tensor:
        """A_i^T times K vectors each; as `multiply`. Raises InvalidInput where there is none."""
        if self._multiply_transposed is None:
            raise InvalidInput(f"{self.name}: expected an operator with a transposed product; it has none")
        return self._call(self._multiply_transposed, block, "transposed product")

    def _call(self, multiply: Multiply, block: Tensor, kind: str) -> Tensor:
        start = time.perf_counter()
        with torch.no_grad():
            out = multiply(block.to(self.device, self.dtype))
        self.products += len(block)
        self.calls += 1
        if out.shape != block.shape or not out.is_floating_point():
            raise InvalidInput(
                f"{self.name}: expected a floating-point {kind} of shape {list(block.shape)}; got "
                f"{out.dtype} {list(out.shape)}"
            )
        if out.dtype not in (torch.float32, torch.float64):
            out = out.float()
        # One pass: a sum is finite but where an entry is not, or where finite entries overflow it.
        if checking() and not bool(torch.isfinite(out.sum())) and not bool(torch.isfinite(out).all()):
            bad = (~torch.isfinite(out)).nonzero()[0].tolist()
            raise NonFiniteError(
                f"{self.name}: NaN or infinity in its {kind} number {self.products - len(block) + bad[0]} of "
                f"sample {bad[1]}"
            )
        # Taken here, as only the check waits for a device that works on its own.
        self.seconds += time.perf_counter() - start
        return out


def as_batched(
    operator: CurvatureOperator | BatchedOperator | Tensor, batched: bool | None = None
) -> BatchedOperator:
    """`operator` as B independent problems.

    A CurvatureOperator is block-diagonal over the first dimension of its x, [B, ...]: B problems of x[0]'s
    entries; with batched=False, or where x has one dimension, it is one problem. A tensor [d, d] is one
    problem, [B, d, d] are B. Raises InvalidInput for anything else, and for matrices that are not finite.
    """
    if isinstance(operator, BatchedOperator):
        operator = BatchedOperator(
            operator._multiply,
            operator._multiply_transposed,
            samples=operator.samples,
            dimension=operator.dimension,
            dtype=operator.dtype,
            device=operator.device,
            sample_shape=operator.sample_shape,
            rounding=operator.rounding,
            name=operator.name,
        )
        if operator.samples < 1 or operator.dimension < 1:
            raise InvalidInput(
                f"operator: expected at least one sample of at least one entry; got {operator.samples} of "
                f"{operator.dimension}"
            )
        return operator
    if isinstance(operator, CurvatureOperator):
        return _from_curvature(operator, batched)
    if isinstance(operator, Tensor):
        return _from_matrices(operator)
    raise InvalidInput(
        "operator: expected a curvature operator, a matrix [d, d] or [B, d, d], or a BatchedOperator; "
        f"got {type(operator).__name__}"
    )


def _from_curvature(operator: CurvatureOperator, batched: bool | None) -> BatchedOperator:
    x = operator._template
    if batched and x.dim() < 2:
        raise InvalidInput(f"batched: expected x of shape [B, ...]; got {list(x.shape)}")
    several = x.dim() > 1 if batched is None else batched
    shape = x.shape[1:] if several else x.shape
    samples, dimension = (x.shape[0] if several else 1), shape.numel()
    if samples < 1 or dimension < 1:
        raise InvalidInput(f"operator: expected an x with entries; got shape {list(x.shape)}")

    def product(multiply: Multiply) -> Multiply:
        return lambda block: multiply(block.reshape(-1, *x.shape)).reshape(-1, samples, dimension)

    return BatchedOperator(
        product(operator._multiply),
        product(operator._multiply_transposed),
        samples=samples,
        dimension=dimension,
        dtype=operator.dtype,
        device=operator.device,
        sample_shape=tuple(shape),
        rounding=operator.rounding,
        name=type(operator).__name__.removeprefix("_"),
    )


def _from_matrices(matrices: Tensor) -> BatchedOperator:
    if matrices.dim() not in (2, 3) or matrices.shape[-1] != matrices.shape[-2] or matrices.numel() == 0:
        raise InvalidInput(
            f"operator: expected square matrices [d, d] or [B, d, d]; got {list(matrices.shape)}"
        )
    if matrices.dtype not in (torch.float32, torch.float64):
        raise InvalidInput(f"operator: expected a float32 or float64 matrix; got {matrices.dtype}")
    if not bool(torch.isfinite(matrices).all()):
        raise NonFiniteError("operator: the matrix has NaN or infinity")
    matrices = matrices.detach().reshape(-1, *matrices.shape[-2:])
    samples, dimension, _ = matrices.shape
    return BatchedOperator(
        lambda block: (block.transpose(0, 1) @ matrices.mT).transpose(0, 1),
        lambda block: (block.transpose(0, 1) @ matrices).transpose(0, 1),
        samples=samples,
        dimension=dimension,
        dtype=matrices.dtype,
        device=matrices.device,
        name="matrix",
    )
