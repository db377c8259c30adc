"""The recorded spectra of the shipped model: in float64, from the prompt alone, and by Krylov methods."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sharpcore import curvature_at, spectrum
from sharpcore.krylov import dense

SPECTRA = np.load(Path(__file__).parent / "data" / "tiny-sd-eps" / "spectra.npz")


@pytest.mark.parametrize("key", ["non88_step49"])
def test_recorded_spectrum_at_a_recorded_state(fresh_pipe, key):
    """All 1024 eigenvalues of the trained network's Hessian in float64, as plain autograd gave them."""
    fresh_pipe.unet.double()
    x = torch.from_numpy(SPECTRA[f"{key}_x"])
    c = curvature_at(fresh_pipe, str(SPECTRA[f"{key}_prompt"]), x=x, timestep=int(SPECTRA[f"{key}_t"]))
    (jacobian,) = dense(c.jacobian)
    values = torch.linalg.eigvalsh((jacobian + jacobian.mT) / 2)
    expected = torch.from_numpy(SPECTRA[f"{key}_eig"])
    frobenius = float(SPECTRA[f"{key}_fro"])
    # Measured 3e-9 of the largest: the float32 text embeddings were made on another machine.
    assert float((values - expected).abs().max()) < 1e-6 * float(expected.abs().max())
    assert float(jacobian.trace()) == pytest.approx(float(SPECTRA[f"{key}_trace"]), rel=1e-6)
    assert float(jacobian.norm()) == pytest.approx(frobenius, rel=1e-6)
    skew = float((jacobian - jacobian.mT).norm()) / frobenius
    assert skew == pytest.approx(float(SPECTRA[f"{key}_asym"]), abs=1e-6)


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
