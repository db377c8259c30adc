"""The rivals of block_lanczos: scipy, PRIMME, three packages, and the paper's procedure.

Each takes a symmetric operator and gives `count` pairs of each end in a common form. They are called as their
documentation shows it; what differs between them is written where it is done.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Array = np.ndarray
Multiply = Callable[[Array], Array]

# Relative to ||A|| (lobpcg, PRIMME, matfree, hessian-eigenthings) or to the eigenvalue (ARPACK); from loose.
TOLERANCES = tuple(float(f"{10**-exponent:.1g}") for exponent in np.arange(3, 7.1, 0.5))
DEPTHS = tuple(range(80, 401, 20))


@dataclass(frozen=True)
class Pairs:
    """Eigenvalues [k], ascending in their real part, and eigenvectors [d, k]."""

    values: Array
    vectors: Array

    @classmethod
    def of(cls, *ends: tuple[Any, Any]) -> Pairs:
        """Of one result (values [k], vectors [d, k]) an end."""
        values = np.concatenate([np.asarray(values) for values, _ in ends])
        vectors = np.concatenate([np.asarray(vectors) for _, vectors in ends], axis=1)
        order = np.argsort(values.real)
        return cls(values[order], vectors[:, order])


class Operator:
    """A symmetric matrix on columns [d, K] in float64 that counts the vectors it is multiplied with.

    Products of float32 are given to the solvers as float64: with float32 vectors they stop short of 1e-6.
    """

    def __init__(self, multiply: Multiply, dimension: int) -> None:
        self._multiply, self.dimension = multiply, dimension
        self.products = 0

    @classmethod
    def of_scipy(cls, operator: Any) -> Operator:
        """Of a scipy LinearOperator, in its own dtype inside."""
        return cls(lambda columns: operator.matmat(columns.astype(operator.dtype)), operator.shape[0])

    @classmethod
    def of_tensors(cls, products: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Operator:
        """Of products [K, *shape] -> [K, *shape] in float32."""
        dimension = int(np.prod(shape))

        def multiply(columns: Array) -> Array:
            rows = torch.from_numpy(np.ascontiguousarray(columns.T, dtype=np.float32))
            return products(rows.reshape(-1, *shape)).detach().reshape(-1, dimension).numpy().T

        return cls(multiply, dimension)

    def __call__(self, columns: Array) -> Array:
        """[d] or [d, K], as it came."""
        block = np.asarray(columns).reshape(self.dimension, -1)
        self.products += block.shape[1]
        return self._multiply(block).astype(np.float64).reshape(np.shape(columns))

    def to_scipy(self) -> Any:
        """For scipy and PRIMME."""
        from scipy.sparse.linalg import LinearOperator

        shape = (self.dimension, self.dimension)
        return LinearOperator(shape=shape, matvec=self, matmat=self, dtype=np.float64)

    def start(self, columns: int = 1) -> Array:
        """Random start vectors."""
        return np.random.default_rng(0).standard_normal((self.dimension, columns))

    def residuals(self, pairs: Pairs) -> Array:
        """||A v - l v|| of unit vectors; real and imaginary parts are multiplied for themselves."""
        vectors = pairs.vectors / np.linalg.norm(pairs.vectors, axis=0)
        product = self(np.ascontiguousarray(vectors.real))
        if np.iscomplexobj(vectors):
            product = product + 1j * self(np.ascontiguousarray(vectors.imag))
        return np.linalg.norm(product - vectors * pairs.values, axis=0)


Solve = Callable[[Operator, int, float, float], Pairs]  # operator, pairs an end, tolerance, ||A||


def eigsh(operator: Operator, count: int, tolerance: float, norm: float, ncv: int | None = None) -> Pairs:
    """ARPACK, both ends in one call."""
    from scipy.sparse.linalg import eigsh as solve

    start = operator.start()[:, 0]
    return Pairs.of(solve(operator.to_scipy(), 2 * count, which="BE", v0=start, tol=tolerance, ncv=ncv))


def eigsh_ends(operator: Operator, count: int, tolerance: float, norm: float) -> Pairs:
    """ARPACK, a call an end."""
    from scipy.sparse.linalg import eigsh as solve

    start, matrix = operator.start()[:, 0], operator.to_scipy()
    return Pairs.of(*(solve(matrix, count, which=which, v0=start, tol=tolerance) for which in ("SA", "LA")))


def lobpcg(operator: Operator, count: int, tolerance: float, norm: float) -> Pairs:
    """scipy's lobpcg without a preconditioner, a call an end; its tolerance is absolute."""
    from scipy.sparse.linalg import lobpcg as solve

    start, matrix = operator.start(count), operator.to_scipy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where it gives up; the residual is looked at anyway
        ends = [
            solve(matrix, start.copy(), largest=largest, tol=tolerance * norm, maxiter=200)
            for largest in (False, True)
        ]
    return Pairs.of(*ends)


def primme(operator: Operator, count: int, tolerance: float, norm: float, block: int = 1) -> Pairs:
    """PRIMME's method of fewest products, a call an end: it has no way to ask for both."""
    import primme

    start, matrix = operator.start(), operator.to_scipy()
    options: dict[str, Any] = {"method": "PRIMME_DEFAULT_MIN_MATVECS", "maxBlockSize": block}
    return Pairs.of(
        *(primme.eigsh(matrix, count, which=w, tol=tolerance, v0=start, **options) for w in ("SA", "LA"))
    )


def arnoldi_procedure(
    operator: Operator, count: int, tolerance: float, norm: float, every: int = 10, most: int = 500
) -> Pairs:
    """Arnoldi with one vector, as arXiv 2412.04140 finds eigenvalues, until its pairs have converged.

    The Ritz pairs are looked at every few steps. Gram-Schmidt goes twice over a float64 basis, which costs
    little beside the products: one pass, modified Gram-Schmidt, gave zeros among the eigenvalues here.
    """
    basis = np.zeros((most + 1, operator.dimension))
    hessenberg = np.zeros((most + 1, most))
    basis[0] = operator.start()[:, 0]
    basis[0] /= np.linalg.norm(basis[0])
    for step in range(most):
        size, w = step + 1, operator(basis[step])
        for _ in range(2):
            along = basis[:size] @ w
            w -= along @ basis[:size]
            hessenberg[:size, step] += along
        hessenberg[size, step] = np.linalg.norm(w)
        basis[size] = w / hessenberg[size, step]
        if size < 2 * count or size % every:
            continue
        values, vectors = np.linalg.eig(hessenberg[:size, :size])
        order = np.argsort(values.real)
        ends = np.concatenate([order[:count], order[-count:]])
        if (hessenberg[size, step] * np.abs(vectors[-1, ends])).max() <= tolerance * norm:
            return Pairs(values[ends], basis[:size].T @ vectors[:, ends])
    raise RuntimeError(f"not converged after {most} steps")


def loosest(
    solve: Solve,
    operator: Operator,
    count: int,
    norm: float,
    reached: Callable[[Pairs], bool],
    tolerances: Sequence[float] = TOLERANCES,
) -> float:
    """The loosest tolerance whose pairs satisfy `reached`: no solver does more than was asked for."""
    low, high = 0, len(tolerances)
    while low < high:
        middle = (low + high - 1) // 2
        if reached(solve(operator, count, tolerances[middle], norm)):
            high = middle
        else:
            low = middle + 1
    if low == len(tolerances):
        raise RuntimeError("the residuals asked for are not reached with any tolerance")
    return tolerances[low]


# -- packages, on a dense symmetric matrix [d, d] in float64 -------------------------------------------------


def matfree_lanczos(matrix: Array, depth: int) -> Callable[[int], Pairs]:
    """matfree (JAX): Lanczos of a fixed depth with full re-orthogonalization, compiled in the first call."""
    import jax

    jax.config.update("jax_enable_x64", True)
    from matfree import decomp, eig

    partial = eig.eigh_partial(decomp.tridiag_sym(depth))
    a, start = jax.numpy.asarray(matrix), jax.numpy.asarray(Operator(lambda v: v, len(matrix)).start()[:, 0])
    decompose = jax.jit(lambda a, start: partial(lambda v: a @ v, start))

    def run(count: int) -> Pairs:
        values, vectors = (np.asarray(part) for part in decompose(a, start))
        ends = np.r_[:count, depth - count : depth]
        return Pairs(values[ends], vectors[ends].T)

    return run


def eigenthings_lanczos(matrix: Array, depth: int) -> Callable[[int], Pairs]:
    """hessian-eigenthings: Lanczos of a fixed depth, re-orthogonalized, a call an end: it has no "both"."""
    from hessian_eigenthings import LambdaOperator, lanczos

    a = torch.from_numpy(matrix)
    operator = LambdaOperator(lambda v: a @ v, len(a), dtype=a.dtype)

    def run(count: int) -> Pairs:
        options: dict[str, Any] = {"k": count, "max_iter": depth, "reorthogonalize": True, "seed": 0}
        ends = [lanczos(operator, which=which, **options) for which in ("SA", "LA")]
        return Pairs.of(*((end.eigenvalues.numpy(), end.eigenvectors.numpy().T) for end in ends))

    return run


class Quadratic(nn.Module):
    """x^T A x / 2 of its parameter x, whose Hessian is A, for packages that differentiate a loss."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix
        self.x = nn.Parameter(torch.zeros(len(matrix), dtype=matrix.dtype))

    def forward(self, _: Tensor) -> Tensor:
        """The "data" is a placeholder."""
        return self.x @ (self.matrix @ self.x) / 2


class _Output(nn.Module):
    """A "loss" that is the model's output."""

    reduction = "sum"

    def forward(self, output: Tensor, _: Tensor) -> Tensor:
        return output


def curvlinops_operator(matrix: Array) -> Operator:
    """curvlinops' HessianLinearOperator of `Quadratic`, for scipy: the package has no eigensolver."""
    import curvlinops

    model, placeholder = Quadratic(torch.from_numpy(matrix)), torch.zeros(1, 1)
    hessian = curvlinops.HessianLinearOperator(
        model,
        _Output(),
        [model.x],
        [(placeholder, placeholder)],
        check_deterministic=False,
        num_data=1,
    )
    return Operator.of_scipy(hessian.to_scipy())
