"""The recorded spectra of the shipped model: in float64, from the prompt alone, and by Krylov methods."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sharpcore import curvature_at, spectrum
from sharpcore.krylov import Result, block_lanczos, dense

SPECTRA = np.load(Path(__file__).parent / "data" / "tiny-sd-eps" / "spectra.npz")


@pytest.fixture(scope="module", params=["non88_step49", "mem10_step25"])
def recorded(request, tiny_pipe):
    """A recorded state, and the whole Jacobian of the trained network there in float64."""
    key, pipe = request.param, copy.deepcopy(tiny_pipe)
    pipe.unet.double()
    x = torch.from_numpy(SPECTRA[f"{key}_x"])
    c = curvature_at(pipe, str(SPECTRA[f"{key}_prompt"]), x=x, timestep=int(SPECTRA[f"{key}_t"]))
    return key, dense(c.jacobian)[0]


def test_recorded_spectrum_at_a_recorded_state(recorded):
    """All 1024 eigenvalues of the trained network's Hessian in float64, as plain autograd gave them."""
    key, jacobian = recorded
    values = torch.linalg.eigvalsh((jacobian + jacobian.mT) / 2)
    expected = torch.from_numpy(SPECTRA[f"{key}_eig"])
    frobenius = float(SPECTRA[f"{key}_fro"])
    # Measured 5e-9 of the largest: the float32 text embeddings were made on another machine.
    assert float((values - expected).abs().max()) < 1e-6 * float(expected.abs().max())
    assert float(jacobian.trace()) == pytest.approx(float(SPECTRA[f"{key}_trace"]), rel=1e-6)
    assert float(jacobian.norm()) == pytest.approx(frobenius, rel=1e-6)
    skew = float((jacobian - jacobian.mT).norm()) / frobenius
    assert skew == pytest.approx(float(SPECTRA[f"{key}_asym"]), abs=1e-6)


def scipy_pairs(operator: Any, tolerance: float, start: np.ndarray) -> Any:
    from scipy.sparse.linalg import eigsh

    return eigsh(operator, 20, which="BE", v0=start, tol=tolerance)


def primme_pairs(operator: Any, tolerance: float, start: np.ndarray) -> Any:
    primme = pytest.importorskip("primme")
    options = {"tol": tolerance, "v0": start[:, None], "method": "PRIMME_DEFAULT_MIN_MATVECS"}
    ends = [primme.eigsh(operator, 10, which=which, **options) for which in ("SA", "LA")]
    return np.concatenate([end[0] for end in ends]), np.concatenate([end[1] for end in ends], axis=1)


@pytest.mark.parametrize("solve", [scipy_pairs, primme_pairs])
def test_products_beside_other_solvers(recorded, solve: Callable[..., Any]):
    """Ten pairs at both ends with residuals of 1e-6 ||A||, in float32 products with the network's Hessian."""
    from scipy.sparse.linalg import LinearOperator

    jacobian = recorded[1]
    hessian = ((jacobian + jacobian.mT) / 2).float()
    exact, norm = hessian.double(), float(torch.linalg.matrix_norm(hessian, 2))
    solution = block_lanczos(hessian, 10, tolerance=1e-6)
    assert solution.result is Result.converged
    values, vectors = solution.values[0], solution.vectors[0]
    # Measured 2.4e-7, 1.5e-7 of it rounding of the products.
    assert float((vectors @ exact - values[:, None] * vectors).norm(dim=1).max()) <= 1e-6 * norm
    start, fewest = np.random.default_rng(0).standard_normal(1024), float("inf")
    for tolerance in (1e-3, 3e-4, 1e-4, 1e-5, 1e-6, 1e-7):
        count = 0

        def multiply(columns: np.ndarray) -> np.ndarray:
            nonlocal count
            # With float32 vectors the other solvers stop short of these residuals.
            block = torch.from_numpy(columns.reshape(1024, -1)).float()
            count += block.shape[1]
            return (hessian @ block).double().numpy().reshape(columns.shape)

        operator = LinearOperator((1024, 1024), matvec=multiply, matmat=multiply, dtype=np.float64)
        found, theirs = (torch.from_numpy(part) for part in solve(operator, tolerance, start))
        if float((exact @ theirs - theirs * found).norm(dim=0).max()) <= 1e-6 * norm:
            fewest = min(fewest, count)
    assert fewest < 1024
    # Measured 207 and 207; eigsh 199 and 220, PRIMME 629 and 531.
    assert solution.stats.products <= 1.2 * fewest


def test_recorded_spectrum_through_the_pipeline(tiny_pipe):
    """float32, from the prompt alone."""
    key = "non7_step25"
    (row,) = spectrum(tiny_pipe, [str(SPECTRA[f"{key}_prompt"])], steps=(25,), eigenvalues=True)
    expected = SPECTRA[f"{key}_eig"]
    # Measured 1.1e-6.
    assert np.abs(np.array(row["eigenvalues"]) - expected).max() < 1e-4
    assert row["smallest"] == pytest.approx(expected[:10], abs=1e-4)
    assert row["largest"] == pytest.approx(expected[::-1][:10], abs=1e-4)
    assert (row["nonnegative"], row["nonnegative_fraction"]) == (2, 2 / 1024)
    assert row["nonnegative_mass"] == pytest.approx(expected[expected >= 0].sum(), abs=1e-4)
    assert row["trace"] == pytest.approx(float(SPECTRA[f"{key}_trace"]), rel=1e-5)
    assert row["frobenius"] == pytest.approx(float(SPECTRA[f"{key}_fro"]), rel=1e-5)
    assert row["asymmetry"] == pytest.approx(float(SPECTRA[f"{key}_asym"]), abs=1e-5)
    assert row["score_norm"] == pytest.approx(np.linalg.norm(SPECTRA[f"{key}_score"]), rel=1e-4)


def test_ends_and_counts_by_krylov_methods(tiny_pipe):
    """Ten pairs at each end, and the numbers of non-negative eigenvalues within two standard errors."""
    prompt = str(SPECTRA["non88_step25_prompt"])
    for row in spectrum(tiny_pipe, [prompt], steps=(49,), method="lanczos"):
        expected = SPECTRA[f"non88_step{row['step']}_eig"]
        scale = np.abs(expected).max()
        assert row["result"] == "converged"
        assert max(row["largest_residuals"] + row["smallest_residuals"]) <= 1.01e-5 * scale
        # Measured 1.5e-6 of the largest: float32, from the prompt alone.
        assert row["smallest"] == pytest.approx(expected[:10], abs=1e-5 * scale)
        assert row["largest"] == pytest.approx(expected[::-1][:10], abs=1e-5 * scale)
        count = (expected >= 0).sum()
        assert abs(row["nonnegative"] - count) <= 2 * row["nonnegative_se"]
        assert row["nonnegative_se"] < 1
        # Measured 1306, 512 of them for the density.
        assert row["products"] < 1500
