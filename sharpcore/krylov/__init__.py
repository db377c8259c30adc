"""Krylov solvers and stochastic estimators on curvature operators, many samples in lock-step."""

from __future__ import annotations

from sharpcore.krylov.arnoldi import arnoldi
from sharpcore.krylov.block_lanczos import block_lanczos
from sharpcore.krylov.dense import dense, eigenvalues, eigh
from sharpcore.krylov.density import Curve, Density, spectral_density
from sharpcore.krylov.diagonal import diagonal
from sharpcore.krylov.dimension import flipd, lhsd
from sharpcore.krylov.golub_kahan import SingularSolution, golub_kahan
from sharpcore.krylov.operator import BatchedOperator, as_batched
from sharpcore.krylov.probes import probes
from sharpcore.krylov.run import Progress
from sharpcore.krylov.solution import Estimate, Result, Solution, Stats
from sharpcore.krylov.trace import frobenius, trace, trace_power

__all__ = [
    "BatchedOperator",
    "Curve",
    "Density",
    "Estimate",
    "Progress",
    "Result",
    "SingularSolution",
    "Solution",
    "Stats",
    "arnoldi",
    "as_batched",
    "block_lanczos",
    "dense",
    "diagonal",
    "eigenvalues",
    "eigh",
    "flipd",
    "frobenius",
    "golub_kahan",
    "lhsd",
    "probes",
    "spectral_density",
    "trace",
    "trace_power",
]
