"""The recorded spectra of the shipped model, whole, in float64: accuracy rather than time.

    pytest benchmarks/bench_spectra.py -s

Each state's Hessian is made by 1024 products in float64, at the recorded latent, and its eigenvalues are
compared with those that plain autograd gave; an error is the largest difference over the largest eigenvalue.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scoring_pipelines import tiny

from sharpcore import curvature_at
from sharpcore.krylov import dense

LARGEST = "largest of all"
RECORDED = Path(__file__).parents[1] / "tests" / "data" / "tiny-sd-eps" / "spectra.npz"


@pytest.mark.spectra
def test_spectra(table: Any, benchmark: Any) -> None:
    recorded = np.load(RECORDED)
    pipe = copy.copy(tiny())
    pipe.unet.double()

    def error(key: str) -> float:
        x, timestep = torch.from_numpy(recorded[f"{key}_x"]), int(recorded[f"{key}_t"])
        curvature = curvature_at(pipe, str(recorded[f"{key}_prompt"]), x=x, timestep=timestep)
        (jacobian,) = dense(curvature.jacobian)
        values = torch.linalg.eigvalsh((jacobian + jacobian.mT) / 2)
        expected = torch.from_numpy(recorded[f"{key}_eig"])
        return float((values - expected).abs().max() / expected.abs().max())

    keys = sorted(name.removesuffix("_eig") for name in recorded if name.endswith("_eig"))

    def run() -> None:
        for key in keys:
            row = table.add_row(key)
            row.error = error(key)
        errors = [row.error for row in table.rows]
        table.add_row(LARGEST).error = max(errors)

    benchmark.pedantic(run, rounds=1)
