"""linearize and the operators against closed forms: analytic networks in all four parameterizations."""

from __future__ import annotations

import pytest
import torch
from test_analytic import PREDICTION_TYPES, SIGMAS, mixture, points, score_function

from sharpcore import Hessian, HessianDifference, ScoreJacobian, linearize
from sharpcore.testing import assert_error_at_most, relative_error

# Largest relative error measured over this file in float64: 4e-14, at sigma = 0.05.
EXACT = 1e-12


def basis(x: torch.Tensor) -> torch.Tensor:
    """The unit vectors of one sample, the same for every sample: [d, *x.shape]."""
    d = x[0].numel()
    return torch.eye(d, dtype=x.dtype).reshape(d, 1, *x.shape[1:]).expand(d, *x.shape)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_single_hessian(prediction_type):
    """Every column of H, the affine terms of the parameterization included."""
    network = mixture(prediction_type, SIGMAS, d=6)
    x = points(4, 2, 3)
    lin = linearize(score_function(network), x, backend="reference")
    assert relative_error(lin.value, network.score(x)) <= EXACT
    columns = lin.jvp(basis(x)).flatten(2)  # [d, B, d]: J e_i
    rows = lin.vjp(basis(x)).flatten(2)  # [d, B, d]: J^T e_i
    assert relative_error(columns.permute(1, 2, 0), network.hessian(x)) <= EXACT
    assert relative_error(rows.transpose(0, 1), network.hessian(x)) <= EXACT


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_relinearized_elsewhere(prediction_type):
    network = mixture(prediction_type, SIGMAS, d=6)
    x, elsewhere, tangent = points(4, 6), points(4, 6, seed=8), points(4, 6, seed=9)
    lin = linearize(score_function(network), x, backend="reference").relinearize(elsewhere)
    expected = torch.einsum("bij,bj->bi", network.hessian(elsewhere), tangent)
    assert relative_error(lin.value, network.score(elsewhere)) <= EXACT
    assert relative_error(lin.jvp(tangent[None])[0], expected) <= EXACT


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_operators(prediction_type):
    """ScoreJacobian and Hessian apply H, HessianDifference applies H_D; here to s_D."""
    network = mixture(prediction_type, [0.9, 0.5, 0.2])
    x, condition = points(3, 3), torch.tensor([1, 0, 3])
    conditional = linearize(score_function(network, condition), x, backend="reference")
    unconditional = linearize(score_function(network), x, backend="reference")
    difference = conditional.value - unconditional.value
    hessians = network.hessian(x, condition=condition), network.hessian(x)
    along = [torch.einsum("bij,bj->bi", hessian, difference) for hessian in hessians]
    assert relative_error(ScoreJacobian(conditional) @ difference, along[0]) <= EXACT
    assert relative_error(ScoreJacobian(conditional).T @ difference, along[0]) <= EXACT
    assert relative_error(Hessian(conditional) @ difference, along[0]) <= EXACT
    found = HessianDifference(conditional, unconditional) @ difference
    assert relative_error(found, along[0] - along[1]) <= EXACT


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_float32_is_as_accurate_as_forward_mode(prediction_type):
    network = mixture(prediction_type, [0.7, 0.3], d=6)
    x, tangent = points(2, 6), points(2, 6, seed=9)
    expected = torch.einsum("bij,bj->bi", network.hessian(x), tangent)
    score = score_function(network.float())
    x, tangent = x.float(), tangent.float()
    _, plain = torch.func.jvp(score, (x,), (tangent,))
    found = linearize(score, x, backend="reference").jvp(tangent[None])[0]
    # The floor is a few units of float32 rounding: on so few entries either error is luck below that.
    assert_error_at_most(relative_error(found, expected), relative_error(plain, expected), floor=5e-7)
