"""Krylov solvers and stochastic estimators on curvature operators, many samples in lock-step."""

from __future__ import annotations

from sharpcore.krylov.block_lanczos import Progress, block_lanczos
from sharpcore.krylov.density import Curve, Density, spectral_density
from sharpcore.krylov.diagonal import diagonal
from sharpcore.krylov.dimension import flipd, lhsd
from sharpcore.krylov.operator import BatchedOperator, as_batched
from sharpcore.krylov.probes import probes
from sharpcore.krylov.solution import Estimate, Result, Solution, Stats
from sharpcore.krylov.trace import frobenius, trace, trace_power

__all__ = [
    "BatchedOperator",
    "Curve",
    "Density",
    "Estimate",
    "Progress",
    "Result",
    "Solution",
    "Stats",
    "as_batched",
    "block_lanczos",
    "diagonal",
    "flipd",
    "frobenius",
    "lhsd",
    "probes",
    "spectral_density",
    "trace",
    "trace_power",
]
