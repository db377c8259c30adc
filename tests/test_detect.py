"""The metrics by themselves: formulas, precision, what they ask for, and their registry."""

from __future__ import annotations

import pytest
import torch
from evidence_of import evidence_of

from sharpcore import InvalidInput, NonFiniteError
from sharpcore.detect import DETECTORS, Detector, compute_detectors, detectors, make_detectors
from sharpcore.detect.detector import sample_norms
from sharpcore.testing.analytic import GaussianScoreNetwork

METRICS = ("score_difference", "hessian_score_difference")


def evidence(dtype=torch.float64, scale=1.0):
    """Two samples with differences (3, 4) and (0, 2), and the Jacobian diag(2, -1)."""
    difference = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=dtype) * scale
    return evidence_of(difference, lambda vectors: vectors * torch.tensor([2.0, -1.0], dtype=dtype))


def test_values():
    found, _ = evidence()
    assert compute_detectors(make_detectors(["score_difference"], squared=True), found).tolist() == [
        [5.0, 2.0]
    ]
    squared, plain = (
        compute_detectors(make_detectors(["hessian_score_difference"], squared=squared), found)
        for squared in (True, False)
    )
    torch.testing.assert_close(squared, torch.tensor([[52.0, 4.0]], dtype=torch.float64))
    torch.testing.assert_close(plain, torch.tensor([[52.0**0.5, 2.0]], dtype=torch.float64))


def test_the_product_runs_once_and_only_when_asked_for():
    found, calls = evidence()
    compute_detectors(make_detectors(["score_difference"], squared=True), found)
    assert len(calls) == 0
    compute_detectors(make_detectors(METRICS, squared=True), found)
    compute_detectors(make_detectors(METRICS, squared=False), found)
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
    values = compute_detectors(make_detectors(METRICS, squared=True), found)
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
    found, _ = evidence_of(difference, lambda v: torch.einsum("bij,kbj->kbi", hessians, v))
    score, hessian = compute_detectors(make_detectors(METRICS, squared=True), found)
    torch.testing.assert_close(
        score.square().mean(), ((h_u - h_c) ** 2 / h_c.abs()).sum(), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(hessian.mean(), ((h_u - h_c) ** 4 / h_c.abs()).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["difference", "product"])
def test_numbers_that_are_not_finite_raise(value, where):
    bad = torch.tensor([[1.0, 2.0], [value, 0.0]])
    found, _ = evidence_of(bad if where == "difference" else torch.ones(2, 2), lambda vectors: bad[None])
    name = "score_difference" if where == "difference" else "hessian_score_difference"
    with pytest.raises(NonFiniteError, match=f"^{name}: "):
        compute_detectors(make_detectors(METRICS, squared=True), found)


def test_registry():
    assert detectors()[:2] == list(METRICS)
    for name, kind in DETECTORS.items():
        assert kind.name == name
        assert any(mark in kind.source for mark in ("arXiv", "OpenReview"))
        assert kind.__doc__
        assert kind().parts(64)
    assert [type(made) for made in make_detectors("score_difference")] == [DETECTORS["score_difference"]]
    made = make_detectors(["hessian_score_difference", "score_difference"], squared=False)
    assert [detector.name for detector in made] == ["hessian_score_difference", "score_difference"]
    assert not made[0].squared


def test_options_come_with_the_name():
    p_laplace, curvature = make_detectors(
        ["p_laplace:p=2:probes=8:radius=0.5", "curvature_difference:method=xdiag"]
    )
    assert (p_laplace.p, p_laplace.probes, p_laplace.radius) == (2.0, 8, 0.5)
    assert (curvature.method, curvature.probes) == ("xdiag", 16)
    assert make_detectors([p_laplace, "score_difference"])[0] is p_laplace
    assert make_detectors(["hessian_score_difference:squared=false"])[0].squared is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p_laplace:q=2", "metrics: p_laplace has the options p, probes, radius; got 'q=2'"),
        ("p_laplace:probes=7", "probes: expected an even number; got 7"),
        ("p_laplace:radius=0", "radius: expected a finite number greater than 0; got 0"),
        ("p_laplace:p=inf", "p: expected a finite number"),
        ("score_difference:probes=2", "metrics: score_difference has the options none"),
        ("curvature_difference:probes=1", "probes: expected an integer of at least 2; got 1"),
        ("curvature_difference:method=exact", "method: expected one of xdiag, hutchinson; got 'exact'"),
        ("condition_jacobian:probes=two", "probes: expected an integer of at least 1; got 'two'"),
        ("hessian_score_difference:squared=1", "squared: expected True or False; got 1"),
    ],
)
def test_options_that_are_none(text, message):
    with pytest.raises(InvalidInput, match=message):
        make_detectors([text])


@pytest.mark.parametrize(
    "names", [[], ["sharpness"], ["score_difference", "score_difference"], None, 3, [None], [["a"]]]
)
def test_names_that_are_no_metrics(names):
    with pytest.raises(
        InvalidInput, match=r"^metrics: expected .*score_difference, hessian_score_difference, .*; got"
    ):
        make_detectors(names)


def test_a_detector_must_compute_something():
    for method in ("compute", "map"):
        with pytest.raises(TypeError, match=r"Detector (defines no compute|has no map)"):
            getattr(Detector(), method)(evidence()[0])


class Mean(Detector):
    """A user's own detector."""

    name = "mean_difference"
    source = "here"

    def parts(self, dimension):
        return DETECTORS["score_difference"]().parts(dimension)

    def compute(self, evidence):
        return evidence.difference.double().flatten(1).mean(1)


class Point:
    """An entry point, as importlib.metadata gives them."""

    def __init__(self, name, found):
        self.name, self._found = name, found

    def load(self):
        return self._found


def test_packages_register_their_own(monkeypatch):
    points = {"mean_difference": Point("mean_difference", Mean), "broken": Point("broken", dict)}
    monkeypatch.setattr("sharpcore.detect._entry_points", lambda: points)
    assert detectors()[-2:] == ["mean_difference", "broken"]
    (made,) = make_detectors(["mean_difference"])
    assert compute_detectors([made], evidence()[0]).tolist() == [[3.5, 1.0]]
    with pytest.raises(InvalidInput, match="the entry point 'broken' is no Detector"):
        make_detectors(["broken"])
