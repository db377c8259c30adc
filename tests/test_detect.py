"""The metrics by themselves: formulas, precision, what they ask for, and their registry."""

from __future__ import annotations

import pytest
import torch

from sharpcore import InvalidInput, NonFiniteError
from sharpcore.detect import METRICS, Evidence, Metric, compute_metrics, make_metrics
from sharpcore.detect.evidence import sample_norms
from sharpcore.testing.analytic import GaussianScoreNetwork


def evidence(dtype=torch.float64, scale=1.0):
    """Two samples with differences (3, 4) and (0, 2), and the Jacobian diag(2, -1)."""
    difference = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=dtype) * scale
    calls = []

    def product(vectors):
        calls.append(vectors)
        return vectors * torch.tensor([2.0, -1.0], dtype=dtype)

    return Evidence(difference, product), calls


def test_values():
    found, _ = evidence()
    assert compute_metrics(make_metrics(["score_difference"], squared=True), found).tolist() == [[5.0, 2.0]]
    squared, plain = (
        compute_metrics(make_metrics(["hessian_score_difference"], squared=squared), found)
        for squared in (True, False)
    )
    torch.testing.assert_close(squared, torch.tensor([[52.0, 4.0]], dtype=torch.float64))
    torch.testing.assert_close(plain, torch.tensor([[52.0**0.5, 2.0]], dtype=torch.float64))


def test_the_product_runs_once_and_only_when_asked_for():
    found, calls = evidence()
    compute_metrics(make_metrics(["score_difference"], squared=True), found)
    assert len(calls) == 0
    compute_metrics(make_metrics(list(METRICS), squared=True), found)
    compute_metrics(make_metrics(list(METRICS), squared=False), found)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_norms_are_summed_in_float64(dtype):
    """Squares that overflow the dtype, and many small ones that a sum in it would lose."""
    assert sample_norms(torch.full((2, 3, 10), 3e4, dtype=dtype)).tolist() == pytest.approx(
        [3e4 * 30**0.5] * 2, rel=2e-3
    )
    many = torch.full((1, 2**17), 2.0**-7, dtype=dtype)
    assert sample_norms(many).tolist() == [2.0**-7 * 2**8.5]
    found, _ = evidence(dtype, scale=2**10)
    values = compute_metrics(make_metrics(list(METRICS), squared=True), found)
    assert values.dtype is torch.float64
    # Exact but for the square of a square root.
    assert values[1].tolist() == pytest.approx([52.0 * 2**20, 4.0 * 2**20], rel=1e-14)


def test_commuting_gaussians():
    """Equal means, diagonal covariances: E||s_D||^2 and E||H_D s_D||^2 have a closed form."""
    conditional = torch.tensor([0.3, 0.5, 2.0], dtype=torch.float64)
    unconditional = torch.tensor([1.0, 1.0, 1.5], dtype=torch.float64)
    alpha, sigma = 0.8, 0.6
    h_c, h_u = (-1 / (alpha**2 * c + sigma**2) for c in (conditional, unconditional))
    networks = [
        GaussianScoreNetwork(torch.zeros(3, dtype=torch.float64), torch.diag(c), alpha=alpha, sigma=sigma)
        for c in (conditional, unconditional)
    ]
    # Points at which the first two moments of the conditional Gaussian hold exactly.
    x = torch.diag((3 / -h_c).sqrt())
    difference = networks[0].score(x) - networks[1].score(x)
    hessians = networks[0].hessian(x) - networks[1].hessian(x)
    found = Evidence(difference, lambda v: torch.einsum("bij,bj->bi", hessians, v))
    score, hessian = compute_metrics(make_metrics(list(METRICS), squared=True), found)
    torch.testing.assert_close(
        score.square().mean(), ((h_u - h_c) ** 2 / h_c.abs()).sum(), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(hessian.mean(), ((h_u - h_c) ** 4 / h_c.abs()).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["difference", "product"])
def test_numbers_that_are_not_finite_raise(value, where):
    bad = torch.tensor([[1.0, 2.0], [value, 0.0]])
    found = Evidence(bad if where == "difference" else torch.ones(2, 2), lambda vectors: bad)
    name = "score_difference" if where == "difference" else "hessian_score_difference"
    with pytest.raises(NonFiniteError, match=f"^{name}: "):
        compute_metrics(make_metrics(list(METRICS), squared=True), found)


def test_registry():
    assert list(METRICS) == ["score_difference", "hessian_score_difference"]
    for name, metric in METRICS.items():
        assert metric.name == name
        assert "arXiv" in metric.source
        assert metric.__doc__
    assert [type(metric) for metric in make_metrics("score_difference", squared=True)] == [
        METRICS["score_difference"]
    ]
    made = make_metrics(["hessian_score_difference", "score_difference"], squared=False)
    assert [metric.name for metric in made] == ["hessian_score_difference", "score_difference"]
    assert not made[0].squared


@pytest.mark.parametrize(
    "names", [[], ["sharpness"], ["score_difference", "score_difference"], None, 3, [None], [["a"]]]
)
def test_names_that_are_no_metrics(names):
    with pytest.raises(
        InvalidInput, match=r"^metrics: expected .*score_difference, hessian_score_difference; got"
    ):
        make_metrics(names, squared=True)


def test_a_metric_must_compute_something():
    with pytest.raises(TypeError, match="Metric defines no compute"):
        Metric().compute(evidence()[0])
