"""Krylov solvers and stochastic estimators on curvature operators, many samples in lock-step."""

from __future__ import annotations

from sharpcore.krylov.block_lanczos import Progress, block_lanczos
from sharpcore.krylov.operator import BatchedOperator, as_batched
from sharpcore.krylov.probes import probes
from sharpcore.krylov.solution import Estimate, Result, Solution, Stats

__all__ = [
    "BatchedOperator",
    "Estimate",
    "Progress",
    "Result",
    "Solution",
    "Stats",
    "as_batched",
    "block_lanczos",
    "probes",
]
