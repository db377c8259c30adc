"""Curvature operators of a linearized score: its Jacobian, the Hessian of log p, a difference of Hessians."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sharpcore.backends import get_backend
from sharpcore.errors import InvalidInput, MissingDependency
from sharpcore.linearization import Linearization
from sharpcore.lowering import rounding_of

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


@dataclass(frozen=True)
class Asymmetry:
    """An estimate of ||J - J^T||_F / ||J||_F from random probes, with the standard error of the estimate."""

    value: float
    standard_error: float
    probes: int


class CurvatureOperator:
    """A square linear operator on tensors of x's shape, given by products with K vectors at once.

    Subclasses define `_multiply` and `_multiply_transposed` on tensors [K, *x.shape]. For a batch of B
    samples the operator is block-diagonal over the samples: each sample is multiplied with its own curvature,
    K vectors of all samples in one pass.
    """

    _template: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n), n = number of entries of x."""
        n = self._template.numel()
        return (n, n)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of x, and of every product."""
        return self._template.dtype

    @property
    def device(self) -> torch.device:
        """The device of x."""
        return self._template.device

    @property
    def rounding(self) -> float:
        """The relative rounding of a product: that of the dtype, or of a lower precision of the products."""
        return torch.finfo(self.dtype).eps

    @property
    def T(self) -> CurvatureOperator:
        """The transposed operator."""
        return _Transposed(self)

    def _multiply(self, vectors: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} defines no product")

    def _multiply_transposed(self, vectors: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} defines no transposed product")

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """The operator times one vector or K vectors, in the shape they came in.

        One vector: x.shape or flat [n]. K vectors: [K, *x.shape], flat rows [K, n], or flat columns [n, K];
        where [K, n] and [n, K] cannot be told apart (K = n) the vectors are rows. dtype and device are x's.
        Raises InvalidInput for others.
        """
        if not isinstance(vectors, Tensor):
            raise InvalidInput(f"vectors: expected a tensor; got {type(vectors).__name__}")
        shape, n = self._template.shape, self._template.numel()
        columns = False
        if vectors.shape == shape or vectors.shape == (n,):
            rows = vectors.reshape(1, *shape)
        elif (vectors.dim() == len(shape) + 1 and vectors.shape[1:] == shape) or (
            vectors.dim() == 2 and vectors.shape[1] == n
        ):
            rows = vectors.reshape(-1, *shape) if vectors.numel() else vectors.new_empty(0, *shape)
        elif vectors.dim() == 2 and vectors.shape[0] == n:
            columns = True
            rows = vectors.mT.reshape(-1, *shape) if vectors.numel() else vectors.new_empty(0, *shape)
        else:
            raise InvalidInput(
                f"vectors: expected shape {tuple(shape)}, (K, {', '.join(map(str, shape))}), "
                f"({n},), (K, {n}) or ({n}, K); got {tuple(vectors.shape)}"
            )
        out = self._multiply(rows)
        return out.reshape(out.shape[0], n).mT if columns else out.reshape(vectors.shape)

    def to_scipy(self) -> LinearOperator:
        """This operator for scipy.sparse.linalg (eigsh, svds): vectors [n] or columns [n, K] of x's dtype.

        float16 and bfloat16 products are given to scipy as float32. Raises MissingDependency without scipy.
        """
        try:
            import numpy as np
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise MissingDependency("to_scipy needs scipy: pip install scipy") from error
        shape, n = self._template.shape, self._template.numel()
        dtype = np.dtype(np.float64 if self.dtype is torch.float64 else np.float32)

        def product(multiply: Any) -> Any:
            def apply(columns: Any) -> Any:
                array = np.array(np.asarray(columns).reshape(n, -1).T, dtype=dtype, order="C")
                rows = torch.from_numpy(array).to(self.device, self.dtype)
                out = multiply(rows.reshape(-1, *shape)).reshape(-1, n)
                result = out.to("cpu", torch.float64 if dtype == np.float64 else torch.float32).numpy().T
                return result.reshape(np.shape(columns))

            return apply

        forward, backward = product(self._multiply), product(self._multiply_transposed)
        return LinearOperator(
            shape=(n, n), matvec=forward, rmatvec=backward, matmat=forward, rmatmat=backward, dtype=dtype
        )

    def asymmetry(self, probes: int = 8, *, seed: int = 0) -> Asymmetry:
        """How far the operator is from symmetric, ||A - A^T||_F / ||A||_F, estimated with Gaussian probes.

        `probes` is the number of random vectors (each costs a product and a transposed product), `seed`
        theirs (0 to 2^63 - 1; see `sharpcore.krylov.probes`). Raises InvalidInput for fewer than 2 probes.
        Hutchinson's estimator: E||A z||^2 = ||A||_F^2.
        """
        if isinstance(probes, bool) or not isinstance(probes, int) or probes < 2:
            raise InvalidInput(f"probes: expected an integer of at least 2; got {probes!r}")
        philox_probes = get_backend("auto", device=self.device, dtype=torch.float64).philox_probes
        number, size = torch.zeros(1, dtype=torch.int64), self._template.numel()
        difference, norm = [], []
        for i in range(probes):
            z = philox_probes("normal", seed, number, i, 1, size, dtype=torch.float64, device=self.device)
            z = z.reshape(1, *self._template.shape).to(self.dtype)
            forward = self._multiply(z).double()
            difference.append(float((forward - self._multiply_transposed(z).double()).square().sum()))
            norm.append(float(forward.square().sum()))
        d, m = torch.tensor(difference), torch.tensor(norm)
        if float(m.sum()) == 0:
            return Asymmetry(0.0, 0.0, probes)
        ratio = (d.sum() / m.sum()).sqrt()
        # Delta method for the square root of a ratio of means.
        spread = (d - ratio.square() * m).std() / probes**0.5 / m.mean()
        error = float(spread / (2 * ratio)) if float(ratio) > 0 else 0.0
        return Asymmetry(float(ratio), error, probes)


class _Transposed(CurvatureOperator):
    """The transpose of another operator."""

    def __init__(self, operator: CurvatureOperator) -> None:
        self._operator = operator
        self._template = operator._template

    @property
    def rounding(self) -> float:
        return self._operator.rounding

    @property
    def T(self) -> CurvatureOperator:
        return self._operator

    def _multiply(self, vectors: Tensor) -> Tensor:
        return self._operator._multiply_transposed(vectors)

    def _multiply_transposed(self, vectors: Tensor) -> Tensor:
        return self._operator._multiply(vectors)


class ScoreJacobian(CurvatureOperator):
    """The Jacobian J of a linearized score function as it is: that of a network is not exactly symmetric.

    `linearization` comes from `linearize(score, x)`; units are those of the score function. Raises
    InvalidInput when the value's shape is not x's.
    """

    def __init__(self, linearization: Linearization) -> None:
        if not isinstance(linearization, Linearization):
            raise InvalidInput(f"linearization: expected a Linearization; got {type(linearization).__name__}")
        if (
            linearization.value.shape != linearization.x.shape
            or linearization.value.dtype != linearization.x.dtype
        ):
            raise InvalidInput(
                "linearization: a score has the shape and dtype of x; "
                f"got value {tuple(linearization.value.shape)} {linearization.value.dtype} "
                f"for x {tuple(linearization.x.shape)} {linearization.x.dtype}"
            )
        self.linearization = linearization

    @property
    def _template(self) -> Tensor:  # type: ignore[override]
        return self.linearization.x

    @property
    def rounding(self) -> float:
        return rounding_of(self.linearization.precision, self.dtype)

    def _multiply(self, vectors: Tensor) -> Tensor:
        return self.linearization.jvp(vectors)

    def _multiply_transposed(self, vectors: Tensor) -> Tensor:
        return self.linearization.vjp(vectors)


class _Symmetric(CurvatureOperator):
    """An operator that is its own transpose."""

    @property
    def T(self) -> CurvatureOperator:
        return self

    def _multiply_transposed(self, vectors: Tensor) -> Tensor:
        return self._multiply(vectors)


class Hessian(_Symmetric):
    """The Hessian of log p_t at a point: the symmetric part (J + J^T) / 2 of the score's Jacobian.

    A product costs one jvp and one vjp. For a true gradient both are the same; `asymmetry` tells how far the
    network is from one.
    """

    def __init__(self, linearization: Linearization) -> None:
        self.jacobian = ScoreJacobian(linearization)

    @property
    def _template(self) -> Tensor:  # type: ignore[override]
        return self.jacobian._template

    @property
    def rounding(self) -> float:
        return self.jacobian.rounding

    def _multiply(self, vectors: Tensor) -> Tensor:
        return (self.jacobian._multiply(vectors) + self.jacobian._multiply_transposed(vectors)) / 2

    def asymmetry(self, probes: int = 8, *, seed: int = 0) -> Asymmetry:
        """The asymmetry of the Jacobian whose symmetric part this is; see `CurvatureOperator.asymmetry`."""
        return self.jacobian.asymmetry(probes, seed=seed)


class HessianDifference(_Symmetric):
    """H(x, prompt) - H(x, no prompt): the Hessian of log p_t(prompt | x) up to a constant, by Bayes' rule.

    `conditional` and `unconditional` are linearizations at the same x. The symmetric part is meant, as in
    `Hessian`; the metric `hessian_score_difference` multiplies with the plain Jacobians, `jacobian` here, as
    in arXiv 2412.04140. Raises InvalidInput when the two points differ.
    """

    def __init__(self, conditional: Linearization, unconditional: Linearization) -> None:
        self.conditional, self.unconditional = Hessian(conditional), Hessian(unconditional)
        first, second = conditional.x, unconditional.x
        if (first.dtype, first.device) != (second.dtype, second.device) or not torch.equal(first, second):
            raise InvalidInput(
                "conditional, unconditional: expected linearizations at the same x; their points differ"
            )

    @property
    def _template(self) -> Tensor:  # type: ignore[override]
        return self.conditional._template

    @property
    def rounding(self) -> float:
        return max(self.conditional.rounding, self.unconditional.rounding)

    @property
    def jacobian(self) -> CurvatureOperator:
        """J(x, prompt) - J(x, no prompt), not symmetrized."""
        return _Difference(self.conditional.jacobian, self.unconditional.jacobian)

    def _multiply(self, vectors: Tensor) -> Tensor:
        return self.conditional._multiply(vectors) - self.unconditional._multiply(vectors)

    def asymmetry(self, probes: int = 8, *, seed: int = 0) -> Asymmetry:
        """The asymmetry of the difference of the two Jacobians; see `CurvatureOperator.asymmetry`."""
        return self.jacobian.asymmetry(probes, seed=seed)


class _Difference(CurvatureOperator):
    """The difference of two operators on the same space."""

    def __init__(self, first: CurvatureOperator, second: CurvatureOperator) -> None:
        self.first, self.second = first, second

    @property
    def _template(self) -> Tensor:  # type: ignore[override]
        return self.first._template

    @property
    def rounding(self) -> float:
        return max(self.first.rounding, self.second.rounding)

    def _multiply(self, vectors: Tensor) -> Tensor:
        return self.first._multiply(vectors) - self.second._multiply(vectors)

    def _multiply_transposed(self, vectors: Tensor) -> Tensor:
        return self.first._multiply_transposed(vectors) - self.second._multiply_transposed(vectors)
